"""Statistics of layer inputs: windows against torch's own convolution, means over batches, what is left out."""

import math

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy import _core
from rarefy.pruning.calibration_data import layer_input, layer_shape

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    "strided, padded, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), (3, 4, 9, 7)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "one dimension": (nn.Conv1d(3, 5, 4, stride=2, padding=1), (2, 3, 11)),
    "three dimensions": (nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 4)),
    "without batch": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=2), (2, 3, 8, 8)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 6, 6)),
    "circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6)),
    "one by one": (nn.Conv2d(5, 4, 1), (2, 5, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_weight_are_the_convolution(name):
    module, size = CONVOLUTIONS[name]
    module = module.double()
    x = torch.randn(size, dtype=torch.float64)
    for memory in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
        rows = _core.pruning.input_rows(layer_shape(module), layer_input(module, (memory,), {}))
        groups = module.groups
        weight = module.weight.detach().view(groups, module.out_channels // groups, -1)
        out = torch.einsum("gsf,gof->sgo", rows, weight).flatten(1) + module.bias.detach()
        expected = module(memory).detach()
        if x.dim() == module.weight.dim():
            expected = expected.movedim(1, -1)
        else:
            expected = expected.movedim(0, -1)
        torch.testing.assert_close(out, expected.reshape(-1, module.out_channels), rtol=1e-10, atol=1e-12)


def test_linear_inputs_of_any_leading_dimensions():
    shape = rf.pruning.LayerShape([3, 5])
    for size in ((5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)):
        x = torch.randn(size)
        rows = _core.pruning.input_rows(shape, x)
        assert torch.equal(rows, x.reshape(1, -1, 5))


def loops(rows):
    """The mean of x x^T, an element at a time."""
    groups, samples, features = rows.shape
    out = torch.zeros(groups, features, features, dtype=torch.float64)
    for g in range(groups):
        for s in range(samples):
            for i in range(features):
                for j in range(features):
                    out[g, i, j] += rows[g, s, i].item() * rows[g, s, j].item() / samples
    return out


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batches_add_up_to_the_mean(float64, groups):
    module = nn.Conv2d(2 * groups, 2 * groups, 2, groups=groups)
    batches = [torch.randn(n, 2 * groups, 3, 4) for n in (1, 4, 2)]
    own = rf.pruning.HessianAccumulator("conv", layer_shape(module), float64=float64)
    squares = rf.pruning.HessianAccumulator("conv", layer_shape(module), squares=True, float64=float64)
    for batch in batches:
        assert own.update(batch)
        assert squares.update(batch)
    expected = loops(_core.pruning.input_rows(layer_shape(module), torch.cat(batches).double()))
    tolerance = 1e-12 if float64 else 1e-5
    hessian = own.hessian()
    assert hessian.dtype == (torch.float64 if float64 else torch.float32)
    torch.testing.assert_close(hessian.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(hessian, hessian.transpose(1, 2))
    norms = expected.diagonal(0, 1, 2).sqrt()
    torch.testing.assert_close(own.norms().double(), norms, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(squares.norms().double(), norms, rtol=tolerance, atol=tolerance)
    assert own.samples == 7 * 2 * 3
    assert (own.batches, own.skipped) == (3, 0)
    assert own.bytes == hessian.nbytes
    assert squares.bytes == norms.numel() * (8 if float64 else 4)


def test_wide_layers_in_panels():
    """More features than one panel of the product has columns."""
    x = torch.randn(50, 1100, dtype=torch.float64)
    own = rf.pruning.HessianAccumulator("fc", rf.pruning.LayerShape([4, 1100]), float64=True)
    own.update(x[:20])
    own.update(x[20:])
    torch.testing.assert_close(own.hessian()[0], x.t() @ x / 50, rtol=1e-10, atol=1e-12)
    wide = rf.pruning.HessianAccumulator("fc", rf.pruning.LayerShape([4, 1100]))
    wide.update(x.float())
    torch.testing.assert_close(wide.hessian()[0].double(), x.t() @ x / 50, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_types(dtype):
    x = torch.randn(40, 6).to(dtype)
    own = rf.pruning.HessianAccumulator("fc", rf.pruning.LayerShape([2, 6]))
    own.update(x)
    assert own.hessian().dtype == torch.float32
    torch.testing.assert_close(own.hessian()[0], x.float().t() @ x.float() / 40, rtol=1e-5, atol=1e-6)


def test_batches_that_are_not_finite_are_left_out():
    own = rf.pruning.HessianAccumulator("fc", rf.pruning.LayerShape([2, 3]))
    good = torch.randn(4, 3)
    bad = good.clone()
    bad[2, 1] = math.inf
    assert not own.update(bad)
    with pytest.raises(ValueError, match="'fc' must have seen a finite batch, got 1 with NaN or infinity"):
        own.hessian()
    assert own.update(good)
    bad[2, 1] = math.nan
    assert not own.update(bad)
    assert own.update(torch.zeros(0, 3))
    assert (own.samples, own.batches, own.skipped) == (4, 1, 2)
    torch.testing.assert_close(own.hessian()[0], good.t() @ good / 4)
    assert "2 batches left out" in repr(own)


def test_errors():
    shape = rf.pruning.LayerShape([2, 3])
    own = rf.pruning.HessianAccumulator("fc", shape)
    with pytest.raises(ValueError, match=r"must have 3 features in its last dimension, got sizes \[4, 5\]"):
        own.update(torch.ones(4, 5))
    with pytest.raises(ValueError, match="the input must be floating point, got Long"):
        own.update(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="'fc' must have seen a finite batch, got none"):
        own.norms()
    squares = rf.pruning.HessianAccumulator("fc", shape, squares=True)
    squares.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match="'fc' has gathered squares alone"):
        squares.hessian()
    conv = rf.pruning.HessianAccumulator("conv", rf.pruning.LayerShape([4, 2, 3, 3], groups=2))
    with pytest.raises(ValueError, match=r"must have 4 channels, got sizes \[1, 2, 5, 5\]"):
        conv.update(torch.ones(1, 2, 5, 5))
    with pytest.raises(ValueError, match="must have 4 dimensions"):
        conv.update(torch.ones(4, 5))
    with pytest.raises(ValueError, match="the kernel must fit into the padded input, got a reach of 3"):
        conv.update(torch.ones(1, 4, 2, 2))
    with pytest.raises(ValueError, match="stride must have 2 values"):
        rf.pruning.LayerShape([4, 2, 3, 3], stride=[1])
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        rf.pruning.LayerShape([4, 2, 3], dilation=[0])
    with pytest.raises(ValueError, match="groups must divide the 4 outputs"):
        rf.pruning.LayerShape([4, 2, 3], groups=3)
    with pytest.raises(ValueError, match="weight must have 2 or more sizes"):
        rf.pruning.LayerShape([4])
