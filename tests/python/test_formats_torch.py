"""The operators of formats within torch: opcheck, compile, export, meta, devices without kernels of their own."""

import format_reference as reference
import pytest
import torch
from test_formats import SHARINGS, data, some_scales, special

ops = torch.ops.rarefy
E4M3, E2M1 = reference.MINIFLOATS["e4m3"], reference.MINIFLOATS["e2m1"]


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """One call of each operator: its arguments by name."""
    x = data((3, 40), dtype).requires_grad_()
    plain = x.detach()
    scale = some_scales(plain, -1, [7])
    zero_point = torch.ones(scale.shape, dtype=torch.int32)
    seed = torch.tensor([1, 2])
    codebook = torch.linspace(-2, 2, 5)
    return {
        "fake_quantize_group": (x, scale, zero_point, -1, [7], -8, 7),
        "fake_quantize_group.pass": (x, scale, zero_point, -1, [7], -8, 7, False),
        "fake_quantize_group.stochastic": (x, scale, zero_point, -1, [7], -8, 7, True, seed),
        "fake_quantize_group_backward": (plain.clone().requires_grad_(), plain, scale, zero_point, -1, [7], -8, 7),
        "cast_minifloat": (x, scale, -1, [7], *E4M3),
        "cast_minifloat.channel": (x, some_scales(plain, 0, []), 0, [], *E4M3, False),
        "cast_minifloat.stochastic": (x, scale, -1, [7], *E4M3, True, False, seed),
        "cast_minifloat_backward": (plain.clone().requires_grad_(), plain, scale, -1, [7], *E4M3),
        "group_qparams": (x, -1, [7], 0, 15, False),
        "fake_quantize_dynamic": (x, -1, [7], 0, 15, False),
        "minifloat_scale": (x, -1, [2, 7], *E2M1),
        "cast_minifloat_dynamic": (x, -1, [2, 7], *E2M1, True),
        "mx_scale": (x, "e5m2", 16),
        "fake_quantize_mx": (x, "e5m2", 16),
        "nvfp4_tensor_scale": (x,),
        "nvfp4_scale": (x, torch.tensor([0.01])),
        "fake_quantize_nvfp4": (x,),
        "fake_quantize_nvfp4.given": (x, torch.tensor([0.01])),
        "nf4_scale": (x, 16, 3),
        "fake_quantize_nf4": (x, 16, 3),
        "block_range": (x, -1, [7]),
        "fake_quantize_binary": (x, 0),
        "fake_quantize_binary.pass": (x, -1, [7], False),
        "fake_quantize_ternary": (x, 0.7, -1, [7]),
        "codebook_indices": (x, codebook),
        "fake_quantize_codebook": (x, codebook.clone().requires_grad_()),
        "kmeans_codebook": (x, 4, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_opcheck(name, dtype):
    arguments = calls(dtype)[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(ops, name.split(".")[0]).default, arguments, test_utils=checks)


COMPILED = {
    "group": lambda x: ops.fake_quantize_group(
        x, torch.full((4, 3), 0.1), torch.zeros(4, 3, dtype=torch.int32), -1, [8], -8, 7
    ),
    "minifloat": lambda x: ops.cast_minifloat(x, torch.ones(1), None, [], *E4M3),
    "dynamic": lambda x: ops.fake_quantize_dynamic(x, -1, [-1], -128, 127, True),
    "mx": lambda x: ops.fake_quantize_mx(x, "e4m3", 8),
    "nvfp4": lambda x: ops.fake_quantize_nvfp4(x),
    "nf4": lambda x: ops.fake_quantize_nf4(x, 8, 4),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_with_gradients(name):
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, y = (data((4, 24), seed=1).requires_grad_() for _ in range(2))
    grad = torch.randn(4, 24)
    assert torch.equal(compiled(x), function(y))
    compiled(x).backward(grad)
    function(y).backward(grad)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("name", COMPILED)
def test_exported_as_one_node(name):
    class Model(torch.nn.Module):
        def forward(self, x):
            return COMPILED[name](x)

    x = data((4, 24))
    program = torch.export.export(Model(), (x,))
    nodes = [node for node in program.graph.nodes if "rarefy" in str(node.target)]
    assert len(nodes) == 1
    assert torch.equal(program.module()(x), COMPILED[name](x))


# --- Devices without kernels of their own ---------------------------------------------------------------------------


def elsewhere(name: str, *arguments: object):
    """The kernel that a device without one of its own gets, run on CPU tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    return getattr(ops, name).default.redispatch(keys, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
def test_composites_have_the_bits_of_the_kernels(axis, block, dtype):
    x = special(data((2, 6, 4, 5), dtype))
    scale = some_scales(x, axis, block)
    zero_point = torch.ones(scale.shape, dtype=torch.int32)
    grad = data((2, 6, 4, 5), dtype, seed=7)
    cases = {
        "fake_quantize_group": (x, scale, zero_point, axis, block, -8, 7),
        "cast_minifloat": (x, scale, axis, block, *reference.MINIFLOATS["e5m2"], False),
        "fake_quantize_group_backward": (grad, x, scale, zero_point, axis, block, -8, 7),
        "cast_minifloat_backward": (grad, x, scale, axis, block, *E2M1),
        "group_qparams": (x, axis, block, 0, 15, False),
        "fake_quantize_dynamic": (x, axis, block, -8, 7, True, True),
        "minifloat_scale": (x, axis, block, *E4M3),
        "cast_minifloat_dynamic": (x, axis, block, *E4M3),
        "block_range": (x, axis, block),
    }
    if len(block) == 1 and block != [-1]:
        cases |= {
            "mx_scale": (x, "e2m3", block[0], axis),
            "fake_quantize_mx": (x, "e2m3", block[0], axis),
            "nvfp4_tensor_scale": (x,),
            "fake_quantize_nvfp4": (x, None, block[0], axis),
            "nf4_scale": (x, block[0], 3, axis),
            "fake_quantize_nf4": (x, block[0], 3, axis),
        }
    for name, arguments in cases.items():
        found, expected = elsewhere(name, *arguments), getattr(ops, name)(*arguments)
        for a, b in zip(*(((t,) if isinstance(t, torch.Tensor) else t) for t in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
            if a.is_floating_point():
                assert torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan()), name


def test_meta_shapes():
    x = torch.empty(4, 10, 6, device="meta")
    assert ops.fake_quantize_mx(x, "e4m3").shape == x.shape
    assert ops.mx_scale(x, "e4m3", 4, 1).shape == (4, 3, 6)
    assert ops.group_qparams(x, -1, [4, 4], -8, 7, True)[1].shape == (4, 3, 2)
    assert ops.minifloat_scale(x, -1, [-1], *E4M3).shape == (4, 10, 1)
