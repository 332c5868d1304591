"""The fake-quantize operators inside torch: opcheck, compile, export, autocast, meta; and beside ONNX."""

import itertools

import numpy as np
import pytest
import strategies
import torch
from strategies import new_state

ops = torch.ops.rarefy
INT8 = (-128, 127)


def grid(count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count) * 0.1 + 0.01, torch.randint(-10, 10, (count,), dtype=torch.int32)


def cases() -> list[tuple[str, tuple[object, ...]]]:
    x = torch.randn(5, 4, 3, 7)
    leaf = torch.randn(5, 4, 3, 7, requires_grad=True)
    last = x.to(memory_format=torch.channels_last)
    mask = ops.fake_quantize_mask(x, *grid(), None, *INT8)[1]
    observed = (None, 0.1, 0, 255, False)
    return [
        ("fake_quantize", (x, *grid(), None, *INT8)),
        ("fake_quantize", (leaf, *grid(4), 1, *INT8)),
        ("fake_quantize", (last, *grid(5), -4, *INT8)),
        ("fake_quantize", (x[:, :, ::2, 1:], *grid(), None, *INT8)),
        ("fake_quantize", (x[:, :1].expand(5, 4, 3, 7), *grid(4), 1, *INT8)),
        ("fake_quantize", (torch.randn(0, 3), *grid(), None, *INT8)),
        ("fake_quantize", (torch.randn(()), *grid(), None, *INT8)),
        ("fake_quantize_mask", (leaf, *grid(7), 3, *INT8)),
        ("fake_quantize_backward", (leaf, mask, x.stride())),
        ("fake_quantize_backward", (last, mask, x.stride())),
        ("fake_quantize_backward_", (x.clone(), mask)),
        ("quantize", (leaf, *grid(), None, *INT8)),
        ("quantize", (*(last.double(), *grid(4), 1, 0, 255)[:2], grid(4)[1].abs(), 1, 0, 255)),
        ("observe", (leaf, *new_state(), *observed)),
        ("observe", (last, *new_state(4), 1, None, *INT8, True)),
        ("observe_fake_quantize", (x, *new_state(), *observed)),
        ("observe_fake_quantize", (leaf, *new_state(4), 1, None, *INT8, True)),
        ("observe_fake_quantize_mask", (leaf, *new_state(), *observed)),
        ("choose_qparams", (-torch.rand(3, 2).t(), torch.rand(3, 2).t(), 0, 255, False)),
    ]


@pytest.mark.parametrize(("name", "arguments"), cases(), ids=[f"{i}-{name}" for i, (name, _) in enumerate(cases())])
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)


# --- compile and export -----------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A linear layer with per-channel weights and an observed input, as quantization-aware training has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 8)
        for name, value in zip(("min_val", "max_val", "scale", "zero_point", "skipped"), new_state(), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.min_val, self.max_val, self.scale, self.zero_point, self.skipped
        x = ops.observe_fake_quantize(x, *state, None, 0.1, 0, 255, False)
        weight = self.linear.weight
        scale, zero_point = ops.choose_qparams(weight.detach().amin(1), weight.detach().amax(1), *INT8, True)
        return torch.nn.functional.linear(x, ops.fake_quantize(weight, scale, zero_point, 0, *INT8), self.linear.bias)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_full_graph_with_backward(backend: str) -> None:
    torch.manual_seed(0)
    eager, twin = Block(), Block()
    twin.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for rows in (4, 4, 6):  # another size at the end: recompiled with a symbolic one
        x = torch.randn(rows, 16)
        results = []
        for module in (eager, compiled):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y.square().sum() * 3).backward()
            results.append((y.detach(), leaf.grad))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results, strict=True))
        for (name, a), b in zip(eager.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name
        for a, b in zip(eager.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_export_keeps_one_node_per_call() -> None:
    module = Block().eval()
    program = torch.export.export(
        module, (torch.randn(4, 16),), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}}
    )
    for decomposed in (program, program.run_decompositions()):
        code = decomposed.graph_module.code
        assert code.count("rarefy.fake_quantize.default") == 1
        assert code.count("rarefy.observe_fake_quantize.default") + code.count("rarefy::observe_fake_quantize") >= 1
        assert "aten.round" not in code
        assert "fake_quantize_mask" not in code
    x = torch.randn(9, 16)
    assert torch.equal(program.module()(x), module(x))


def test_functional_transforms_are_refused() -> None:
    # torch does not take derivatives written in C++ through torch.func; it must say so and not compute without them.
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.fake_quantize(x, *grid(), None, *INT8).sum())(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    # The operator follows its input's type; nothing is cast around it.
    linear = torch.nn.Linear(16, 8).to(device)
    state = new_state(1, device)
    x = torch.randn(4, 16, device=device)
    with torch.autocast(device.type, dtype=dtype):
        hidden = linear(x)
        y = ops.observe_fake_quantize(hidden, *state, None, None, 0, 255, False)
        z = ops.fake_quantize(x, state[2], state[3], None, 0, 255)
    assert hidden.dtype == y.dtype == dtype
    assert z.dtype == torch.float32
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(y, ops.fake_quantize(hidden, state[2], state[3], None, 0, 255))


def test_meta_device() -> None:
    x = torch.empty(5, 4, 3, 7, device="meta").to(memory_format=torch.channels_last)
    scale, zero_point = torch.empty(4, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    y, mask = ops.fake_quantize_mask(x, scale, zero_point, 1, *INT8)
    assert y.is_meta
    assert y.stride() == x.stride()
    assert mask.shape == (56,)
    assert ops.quantize(x, scale, zero_point, 1, 0, 255).dtype == torch.uint8
    skipped = torch.empty(1, dtype=torch.int64, device="meta")
    ops.observe(x, scale, scale, scale, zero_point, skipped, 1, None, *INT8, False)
    with pytest.raises(ValueError, match="scale must have 1 element"):
        ops.fake_quantize(x, scale, zero_point, None, *INT8)


def test_mixed_devices_are_an_error() -> None:
    scale, zero_point = torch.ones(1, device="meta"), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="scale must be on the input's device cpu, got meta"):
        ops.fake_quantize(torch.ones(3), scale, zero_point, None, *INT8)


def test_inference_mode() -> None:
    state = new_state()
    with torch.inference_mode():
        inner = new_state()
        for s in (state, inner):
            y = ops.observe_fake_quantize(torch.tensor([-1.0, 2.0]), *s, None, None, 0, 255, False)
            assert y.is_inference()
            assert s[1].item() == 2.0


# --- Beside ONNX ------------------------------------------------------------------------------------------------------

ONNX_CASES = list(itertools.product([(-128, 127), (0, 255), (-8, 7), (0, 15)], [None, 0, 1, -1]))


@pytest.mark.parametrize(("limits", "axis"), ONNX_CASES, ids=str)
@pytest.mark.parametrize("runtime", ["onnx.reference", "onnxruntime"])
def test_equals_onnx(runtime: str, limits: tuple[int, int], axis: int | None) -> None:
    onnx = pytest.importorskip("onnx")
    shape = (6, 33, 17)
    generator = torch.Generator().manual_seed(0)
    count = 1 if axis is None else shape[axis]
    scale = torch.rand(count, generator=generator) * 0.5 + 1e-3
    zero_point = torch.randint(limits[0], limits[1] + 1, (count,), generator=generator, dtype=torch.int32)
    x = strategies.around_bins(shape, scale, zero_point, axis, *limits, 0)

    helper, types = onnx.helper, onnx.TensorProto
    integer = {(-128, 127): types.INT8, (0, 255): types.UINT8, (-8, 7): types.INT4, (0, 15): types.UINT4}[limits]
    dims = [] if axis is None else [count]
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **attributes),
        ],
        "quantize",
        [helper.make_tensor_value_info("x", types.FLOAT, shape)],
        [helper.make_tensor_value_info("y", types.FLOAT, shape)],
        [
            helper.make_tensor("scale", types.FLOAT, dims, scale.tolist()),
            helper.make_tensor("zero_point", integer, dims, zero_point.tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    if runtime == "onnxruntime":
        ort = pytest.importorskip("onnxruntime")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    else:
        session = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    (expected,) = session.run(None, {"x": x.numpy()})
    actual = ops.fake_quantize(x, scale, zero_point, axis, *limits).numpy()
    assert np.array_equal(actual, expected)
