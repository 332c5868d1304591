"""Gradients of integer execution: against autograd through the formula, what is saved, what is needed."""

import itertools
import re

import pytest
import torch
from integer_cases import Layer, conv, generator, linear
from test_integer import CONV, LINEAR, unpack

ops = torch.ops.rarefy

#: Of the largest entry: float32 sums of float32 products; bfloat16 products (8 bits), rounded once to bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def gradients(layer: Layer, seed: int = 7) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The gradients of every leaf, and the upstream gradient, which is not 1."""
    live = layer.requiring(*layer.leaves())
    y = live.run()
    grad = torch.randn(y.shape, generator=generator(seed)).to(y.dtype)
    leaves = live.leaves()
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True)), grad


def check(layer: Layer, tolerance: float) -> None:
    actual, grad = gradients(layer)
    for name, expected in layer.simulated_gradients(grad).items():
        value = actual[name]
        assert value.dtype == layer.leaves()[name].dtype
        assert value.shape == expected.shape, name
        if expected.numel():
            limit = tolerance * expected.abs().amax().item()
            assert (value.double() - expected).abs().amax() <= limit, name
            if name in ("x", "weight") and layer.multiplier is None:  # what was clamped gets exactly nothing
                assert torch.equal(value == 0, expected == 0), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", [name for name in LINEAR if not name.startswith("no_rows")])
def test_linear(case, relu, bf16) -> None:
    check(linear(**{**LINEAR[case], "relu": relu}, bf16=bf16), TOLERANCE[torch.bfloat16 if bf16 else torch.float32])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("case", [name for name in CONV if "no_samples" not in name])
def test_conv(case, multiplied, bf16) -> None:
    layer = conv(**CONV[case], multiplied=multiplied, bf16=bf16)
    check(layer, TOLERANCE[torch.bfloat16 if bf16 else torch.float32])


@pytest.mark.parametrize("layer", [linear((0,)), linear((3, 0, 2)), conv((0, 3, 5, 5)), conv((0, 3, 5), kernel=(3,))])
@pytest.mark.parametrize("bf16", [False, True])
def test_no_rows_give_gradients_of_zero(layer, bf16) -> None:
    actual, _ = gradients(layer.to(bf16=bf16))
    for name, leaf in layer.leaves().items():
        assert actual[name].shape == leaf.shape
        assert not actual[name].any()


@pytest.mark.parametrize("make", [linear, conv, lambda **o: conv((1, 4, 4, 4), 40, **o)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(make, dtype) -> None:
    layer = make(relu=True)
    layer = layer.to(x=layer.x.to(dtype), weight=layer.weight.to(dtype), bias=layer.bias.to(dtype))
    rounding = {torch.float64: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    check(layer, rounding)


@pytest.mark.parametrize("case", ["matmul_2d_wide", "onednn_2d", "onednn_2d_grouped", "matmul_2d_pointwise"])
def test_weights_and_gradients_of_every_layout(case) -> None:
    layer = conv(**CONV[case], multiplied=True)
    expected, _ = gradients(layer)
    order = [1, 0, 2, 3]
    permuted = layer.weight.permute(order).contiguous().permute(order)
    last = layer.weight.to(memory_format=torch.channels_last)
    for other in (
        layer.to(weight=permuted),
        layer.to(weight=last),
        layer.to(x=layer.x.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        actual, _ = gradients(other)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * value.abs().amax().item())
    # An upstream gradient that is a view of something else, and one number everywhere.
    live = layer.requiring("x", "weight", "bias")
    y = live.run()
    for grad in (torch.ones(()).expand(y.shape), torch.stack([torch.ones_like(y)] * 2, -1)[..., 0]):
        got = torch.autograd.grad(y, list(live.leaves().values()), grad, retain_graph=True)
        dense = torch.autograd.grad(y, list(live.leaves().values()), torch.ones_like(y), retain_graph=True)
        for a, b in zip(got, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().amax().item())


def test_transposed_view_as_the_weight_of_a_linear_layer() -> None:
    layer = linear((9,), (8, 6))
    expected, _ = gradients(layer)
    view = layer.weight.t().contiguous().t()
    for options in ({"weight": view}, {"weight": view, "relu": False, "x": layer.x.t().contiguous().t()}):
        live = layer.to(**options)
        leaf = live.weight.requires_grad_()
        assert not leaf.is_contiguous()
        y = live.run()
        (gw,) = torch.autograd.grad(y, leaf, torch.randn(y.shape, generator=generator(7)))
        torch.testing.assert_close(gw, expected["weight"])


# --- What is needed and what is saved ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [linear(relu=True), conv(multiplied=True), conv((1, 4, 4, 4), 40, relu=True, multiplied=True)]
)
@pytest.mark.parametrize("bf16", [False, True])
def test_only_needed_gradients(layer, bf16) -> None:
    layer = layer.to(bf16=bf16)
    expected, grad = gradients(layer)
    names = list(layer.leaves())
    reference = layer.run()
    for needed in itertools.product([False, True], repeat=len(names)):
        wanted = [name for name, need in zip(names, needed, strict=True) if need]
        live = layer.requiring(*wanted)
        y = live.run()
        assert torch.equal(y, reference)
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(grad)
        for name, leaf in live.leaves().items():
            assert (leaf.grad is not None) == (name in wanted)
            if name in wanted:
                torch.testing.assert_close(
                    leaf.grad, expected[name], rtol=1e-5, atol=1e-6 * expected[name].abs().max().item()
                )
    with torch.no_grad():
        assert not layer.requiring(*names).run().requires_grad


def saved_by(layer: Layer, *needed: str) -> list[torch.Tensor]:
    live = layer.requiring(*needed)
    saved: list[torch.Tensor] = []
    own = {leaf.data_ptr() for leaf in live.leaves().values()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in own:  # parameters are there anyway
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        live.run()
    return saved


def mask_bytes(n: int) -> int:
    return (n + 63) // 64 * 8


@pytest.mark.parametrize(
    "make", [lambda **o: linear((40,), (300, 200), **o), lambda **o: conv((4, 16, 20, 20), 24, padding=1, **o)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_saved_bytes(make, relu) -> None:
    """One byte and one bit for each element of the input and of the weight; for a ReLU one bit of its result."""
    layer = make(relu=relu)
    x, w, y = layer.x.numel(), layer.weight.numel(), layer.run().numel()
    grids = 4 + 4 + 4 * layer.w_scale.numel()
    total = x + mask_bytes(x) + w + mask_bytes(w) + grids + (mask_bytes(y) if relu else 0)
    assert sum(t.nbytes for t in saved_by(layer, "x", "weight", "bias")) == total
    assert sum(t.nbytes for t in saved_by(layer, "weight")) == total - mask_bytes(x)
    assert sum(t.nbytes for t in saved_by(layer, "x")) == total - mask_bytes(w)


def test_the_multiplier_saves_nothing_of_the_size_of_the_weight() -> None:
    plain, multiplied = conv(), conv(multiplied=True)
    extra = [sum(t.nbytes for t in saved_by(c, *c.leaves())) for c in (plain, multiplied)]
    assert extra[0] == extra[1]


@pytest.mark.parametrize("layer", [linear(relu=True), conv(relu=True), conv((1, 4, 4, 4), 40)])
def test_state_that_moves_on_changes_no_gradient(layer) -> None:
    expected, grad = gradients(layer)
    live = layer.requiring(*layer.leaves())
    live.x_scale, live.x_zero_point, live.w_scale = (
        t.clone() for t in (layer.x_scale, layer.x_zero_point, layer.w_scale)
    )
    y = live.run()
    live.x_scale.mul_(3)
    live.x_zero_point.add_(5)
    live.w_scale.zero_()
    with torch.no_grad():
        live.weight.detach().fill_(torch.nan)  # detach: the version does not matter, the bytes are saved
    y.backward(grad)
    for name, leaf in live.leaves().items():
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("layer", [linear(relu=True), conv(relu=True), conv((1, 4, 4, 4), 40)])
def test_upstream_gradients_are_left_alone(layer) -> None:
    live = layer.requiring(*layer.leaves())
    y = live.run()
    grad = torch.randn(y.shape, generator=generator(1))
    before = grad.clone()
    y.backward(grad, retain_graph=True)
    assert torch.equal(grad, before)
    first = {name: leaf.grad.clone() for name, leaf in live.leaves().items()}
    y.backward(grad)
    for name, leaf in live.leaves().items():
        torch.testing.assert_close(leaf.grad, 2 * first[name], rtol=1e-5, atol=1e-6 * first[name].abs().max().item())


@pytest.mark.parametrize("make", [linear, conv])
def test_there_is_no_second_derivative(make) -> None:
    live = make().requiring("x", "weight")
    message = f'[integer_{make.__name__}] integer execution has no second derivative: use execution="simulated"'
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        torch.autograd.grad(live.run().sum(), live.x, create_graph=True)


def test_the_mask_says_what_was_clamped() -> None:
    """The gradient of the input is 0 exactly where quantize_mask has a 0."""
    layer = linear((64,), (32, 16))
    gx = gradients(layer)[0]["x"]
    q, mask, _ = ops.quantize_mask(layer.x, layer.x_scale, layer.x_zero_point, None, *layer.x_limits, None)
    inside = unpack(mask, q)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(gx != 0, inside)
