"""The integer operators inside torch: opcheck, compile, export, autocast, meta."""

import itertools

import pytest
import torch
from integer_cases import Layer, conv, linear
from torch import nn

from rarefy.quantization import QConfig, prepare_qat

ops = torch.ops.rarefy
UINT8, INT8 = (0, 255), (-128, 127)


def inner_cases(layer: Layer) -> list[tuple[str, tuple[object, ...]]]:
    """The operators that a layer consists of, on its bytes."""
    kind = "linear" if layer.geometry is None else "conv"
    q_x, _, x_scale = ops.quantize_mask(layer.x, layer.x_scale, layer.x_zero_point, None, *layer.x_limits, None)
    q_w, _, w_scale = ops.quantize_mask(
        layer.weight, layer.w_scale, layer.w_zero_point, 0, *layer.w_limits, layer.multiplier
    )
    how = (layer.transposed,) if layer.geometry is None else layer.geometry
    bytes_ = (q_x, q_w, x_scale, layer.x_zero_point, w_scale)
    if layer.geometry is not None:
        q_x = q_x.to(memory_format=torch.channels_last) if q_x.dim() == 4 else q_x
    forward = getattr(ops, f"integer_{kind}_forward")
    y, _ = forward(*bytes_, layer.bias, *how, True, torch.float32)
    cases = [(f"integer_{kind}_forward", (*bytes_, layer.bias, *how, relu, dtype))
             for relu, dtype in ((True, torch.float32), (False, torch.bfloat16))]  # fmt: skip
    cases += [(f"integer_{kind}_backward", (torch.randn_like(y), *bytes_, *how, bf16, need))
              for bf16, need in itertools.product((False, True), ([True, True], [False, True], [True, False]))]  # fmt: skip
    return cases


def cases() -> list[tuple[str, tuple[object, ...]]]:
    x = torch.randn(5, 4, 3, 7)
    grid = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    per_channel = torch.rand(4) * 0.1 + 0.01, torch.zeros(4, dtype=torch.int32)
    out = [
        ("quantize_mask", (x, *grid, None, *UINT8, None)),
        ("quantize_mask", (x.to(memory_format=torch.channels_last), *per_channel, 1, *INT8, torch.randn(4))),
        ("quantize_mask", (x[:, :, ::2].double().requires_grad_(), *per_channel, -3, *INT8, None)),
        ("quantize_mask", (torch.randn(0, 3), *grid, None, *INT8, None)),
    ]
    layers = [
        linear(relu=True),
        linear((2, 3), transposed=True, bf16=True),
        conv((2, 3, 11), kernel=(3,), relu=True),
        conv((2, 3, 11), kernel=(3,), out=40),
        conv((2, 4, 9, 7), groups=2, multiplied=True),
        conv((2, 3, 5, 5), out=40, channels_last=True, multiplied=True, relu=True),
        conv((2, 3, 4, 5, 6), kernel=(2, 2, 2)),
    ]
    for layer in layers:
        name = "integer_linear" if layer.geometry is None else "integer_conv"
        out += [(name, layer.arguments), (name, layer.requiring(*layer.leaves()).arguments)]
    for layer in (linear(), layers[2], layers[3], layers[4], layers[5], layers[6]):
        out += inner_cases(layer)
    return out


CASES = cases()


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_meta_tells_shape_type_and_strides(name: str, arguments: tuple[object, ...]) -> None:
    def flat(result: object) -> list[torch.Tensor]:
        return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]

    op = getattr(ops, name)
    real = flat(op(*arguments))
    meta = flat(op(*(a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)))
    for r, m in zip(real, meta, strict=True):
        assert (m.shape, m.dtype, m.device.type) == (r.shape, r.dtype, "meta")
        if r.numel() > 1 and name != "quantize_mask":
            assert m.stride() == r.stride(), name


# --- compile ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Both kinds of convolution, a batch normalization, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 40, 3, stride=2)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(40 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.relu2(self.conv2(x)).flatten(1))


def prepared(**changes: object) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return prepare_qat(Net(), QConfig.int8(execution="integer", **changes), x), x


def step(run: object, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)  # type: ignore[operator]
    (y**2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def compare_compiled(backend: str, exact: bool, **changes: object) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, x = prepared(**changes)
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        for _ in range(2):
            tensors = step(run, model, x)
        model.eval()
        results.append([*tensors, run(x).detach()])
    for eager, traced in zip(*results, strict=True):
        if exact:
            assert torch.equal(eager, traced)
        else:
            torch.testing.assert_close(
                traced, eager, rtol=1e-3, atol=1e-3 * max(eager.float().abs().amax().item(), 1.0)
            )


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_equals_eager(gradient_dtype) -> None:
    compare_compiled("aot_eager", exact=True, gradient_dtype=gradient_dtype)


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    compare_compiled("inductor", exact=False)


@pytest.mark.parametrize("layer", [linear((4, 6), relu=True), conv(relu=True)])
def test_compile_with_sizes_that_change(layer) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer.to(x=x).run(), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 2):
        x = torch.randn(n, *layer.x.shape[1:])
        assert torch.equal(compiled(x), layer.to(x=x).run())


def test_export_of_an_evaluated_model() -> None:
    model, x = prepared()
    model(x)
    model.eval()
    exported = torch.export.export(model, (x,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"rarefy.integer_conv.default", "rarefy.integer_linear.default"} <= targets
    assert torch.equal(exported.module()(x), model(x))


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [linear(relu=True), conv(), conv((1, 4, 4, 4), 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_type_of_the_result(layer, dtype) -> None:
    exact = layer.run()
    live = layer.requiring(*layer.leaves())
    with torch.autocast("cpu", dtype=dtype):
        y = live.run()
        assert layer.to(dtype=torch.float32).run().dtype == torch.float32
        assert layer.to(x=layer.x.double()).run().dtype == torch.float32
        assert layer.requiring().run().dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    y.sum().backward()
    for leaf in live.leaves().values():
        assert leaf.grad.dtype == torch.float32


def test_autocast_of_a_compiled_layer() -> None:
    torch._dynamo.reset()
    layer = linear(relu=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer.to(x=x).run()

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(layer.x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(layer.x))
