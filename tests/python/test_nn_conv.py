"""Convolutions of 1, 2 and 3 dimensions: padding, folding, the formula, integers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import QConfig, calibrate, prepare, prepare_qat, report, set_state

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
BN_LAYER = {1: rf.nn.ConvBn1d, 2: rf.nn.ConvBn2d, 3: rf.nn.ConvBn3d}
SIZE = {1: (11,), 2: (9, 7), 3: (6, 5, 7)}

# Arguments of the convolution beside channels; what of them depends on the dimension is a function of it.
CASES = {
    "plain": {"kernel_size": 3},
    "bias_stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2, "padding": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same_even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "grouped": {"kernel_size": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2},
    "same_reflect": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
}


def grid(x: torch.Tensor, q) -> torch.Tensor:
    """Fake quantization by the formula, in float32 numpy."""
    shape = [1] * x.dim()
    if q.axis is not None:
        shape[q.axis] = -1
    s, z = q.scale.numpy().reshape(shape), q.zero_point.numpy().reshape(shape).astype(np.float32)
    return torch.from_numpy((np.clip(np.rint(x.detach().numpy() / s) + z, q.qmin, q.qmax) - z) * s)


def float_conv(conv: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What torch's own layer makes of another input, weight and bias."""
    layer = copy.deepcopy(conv)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer(x)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dim", "channels_last"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_conv_equals_the_formula(dim, case, channels_last):
    torch.manual_seed(0)
    conv = CONV[dim](4, 8, **CASES[case])
    model = prepare_qat(nn.Sequential(conv), QConfig.int8())
    x = torch.randn(2, 4, *SIZE[dim]) + 0.3
    if channels_last:
        x = x.to(memory_format=torch.channels_last if dim == 2 else torch.channels_last_3d)
    model(x)
    layer = model.eval()[0]
    assert type(layer) is getattr(rf.nn, f"Conv{dim}d")
    expected = float_conv(conv, grid(x, layer.quant.input), grid(layer.weight, layer.quant.weight), layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "same_even", "grouped", "reflect"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_bn_folds_and_equals_the_formula(dim, case):
    torch.manual_seed(0)
    model = nn.Sequential(CONV[dim](4, 8, **CASES[case]), NORM[dim](8), nn.ReLU())
    x = torch.randn(6, 4, *SIZE[dim])
    model(x)
    prepared = prepare_qat(model, QConfig.int8(), x)
    assert type(prepared[0]) is BN_LAYER[dim]
    assert prepared[0].relu
    assert report(prepared).layers[0].note.startswith("batch norm folded, ReLU fused")
    prepared(x)
    layer, bn = prepared.eval()[0], prepared[1]
    out = prepared(x)
    factor = (bn.weight * torch.rsqrt(bn.running_var + bn.eps)).detach()
    weight = layer.weight.detach() * factor.view(-1, *[1] * (dim + 1))
    bias = bn.bias.detach() + (layer.bias.detach() - bn.running_mean) * factor
    y = float_conv(model[0], grid(x, layer.quant.input), grid(weight, layer.quant.weight), bias).relu()
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_bn_without_rounding_trains_as_in_float(dim):
    torch.manual_seed(0)
    model = nn.Sequential(CONV[dim](4, 6, 3, padding="same", bias=False), NORM[dim](6))
    x = torch.randn(5, 4, *SIZE[dim])
    prepared = prepare_qat(model, QConfig.int8(), x)
    set_state(prepared, quantize=False)
    for each in (model, prepared):
        (each(x) ** 3).mean().backward()
    for (name, p), q in zip(model.named_parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
    for name, value in model.named_buffers():
        torch.testing.assert_close(dict(prepared.named_buffers())[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv_bn_as_a_part_from_the_start(dim):
    torch.manual_seed(0)
    layer = BN_LAYER[dim](3, 4, 3, padding=1)
    reference = nn.Sequential(CONV[dim](3, 4, 3, padding=1, bias=False), NORM[dim](4))
    reference[0].weight.data.copy_(layer.weight)
    x = torch.randn(6, 3, *SIZE[dim])
    torch.testing.assert_close(layer(x), reference(x))
    prepared = calibrate(prepare(nn.Sequential(layer), QConfig.int8()), [x])
    assert (prepared.eval()(x) - reference.eval()(x)).abs().max() < 0.03


def test_a_single_sample_without_batch_dimension():
    model = prepare_qat(nn.Sequential(nn.Conv2d(2, 3, 3)), QConfig.int8())
    x = torch.randn(2, 6, 6)
    model(x)
    assert torch.equal(model.eval()(x), model(x[None])[0])


def test_gradients_pass_through_padding():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    prepared = prepare_qat(nn.Sequential(conv), QConfig.int8())
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    prepared(x).backward(torch.full((2, 3, 5, 5), 0.5))
    layer = prepared[0]
    y = x.detach().clone().requires_grad_()
    padded = F.pad(y, (1, 1, 1, 1), mode="reflect")
    F.conv2d(padded, grid(layer.weight, layer.quant.weight)).backward(torch.full((2, 3, 5, 5), 0.5))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
