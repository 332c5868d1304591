"""Every observer on every grid, type and layout, beside plain loops: the range that is chosen, and the values on its grid."""

import copy
import math
import re

import numpy as np
import observer_reference as plain
import pytest
import reference
import strategies
import torch
from torch import Tensor

from rarefy.quantization import (
    MSE,
    SQNR,
    FakeQuantizer,
    HalfQuadratic,
    Histogram,
    Latest,
    MeanNoOutliers,
    MinMax,
    MovingAverage,
    Percentile,
    PerChannel,
    Scheme,
)

BINS, STEPS = 64, 128
OBSERVERS = [
    MinMax(),
    MovingAverage(0.3),
    Latest(),
    Histogram(BINS, None),
    Histogram(BINS, "mse"),
    Histogram(BINS, "kl"),
    Percentile(97.0, BINS),
    SQNR(2.0, BINS),
    MeanNoOutliers(sigma=0.8),
    MSE(steps=20, bins=0),
    HalfQuadratic(),
]
SCHEMES = [
    Scheme(8, symmetric=False),
    Scheme(4, narrow_range=True),
    Scheme(4, symmetric=False, granularity=PerChannel(1)),
    Scheme(8, granularity=PerChannel(1)),
    Scheme(12, symmetric=False),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "reversed axes": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


def batches(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Of different ranges for channels and batches; one has no negative values.
    spread = torch.tensor([1.0, 0.1, 30.0, 2.0]).reshape(1, 4, 1, 1)
    data = [torch.randn(3, 4, 5, 6, generator=generator) * spread * (i + 1) for i in range(4)]
    return [torch.cat([x[:, :1].abs(), x[:, 1:]], 1).to(dtype) for x in data]


def rows_of(x: Tensor, scheme: Scheme) -> list[np.ndarray]:
    """What shares a scale, as observers see it: in float32."""
    values = x.float().numpy()
    return [values.ravel()] if scheme.axis is None else [values[:, c].ravel() for c in range(values.shape[1])]


def observed(observer: object, scheme: Scheme, data: list[Tensor]) -> FakeQuantizer:
    quantizer = FakeQuantizer(scheme, observer, channels=data[0].shape[1]).eval()
    quantizer.quantize = False
    for x in data:
        assert quantizer(x) is x
    quantizer.observe, quantizer.quantize = False, True
    quantizer.settle()
    return quantizer


def check_range(observer: object, scheme: Scheme, seen: list[np.ndarray], low: float, high: float) -> None:
    """The range of one row, of which ``seen`` has the batches."""
    grid = scheme.qmin, scheme.qmax, scheme.symmetric
    everything, last = np.concatenate(seen), seen[-1]
    lows, highs = [b.min() for b in seen], [b.max() for b in seen]
    if isinstance(observer, MinMax) or (isinstance(observer, Histogram) and observer.search is None):
        assert (low, high) == (min(lows), max(highs))
    elif isinstance(observer, Latest):
        assert (low, high) == (lows[-1], highs[-1])
    elif isinstance(observer, MovingAverage):
        for ends, got in ((lows, low), (highs, high)):
            average = float(ends[0])
            for end in ends[1:]:
                average = float(np.float32((1 - observer.constant) * average + observer.constant * float(end)))
            assert got == average
    elif isinstance(observer, MeanNoOutliers):
        for ends, got in ((lows, low), (highs, high)):
            column = np.array(ends, dtype=np.float64)
            kept = column[np.abs(column - column.mean()) <= observer.sigma * column.std()]
            assert got == pytest.approx(kept.mean() if len(kept) else column.mean(), rel=1e-6)
    elif isinstance(observer, Percentile):
        width = 2.0 ** plain.exponent_and_base(everything.min(), everything.max(), BINS)[0]
        ends = ((everything, 100 - observer.percentile, low), (everything, observer.percentile, high))
        if scheme.symmetric:
            ends = ((np.abs(everything), observer.percentile, max(-low, high)),)
        for values, percent, got in ends:
            assert np.percentile(values, percent, method="lower") - width <= got * (1 + 1e-6) + 1e-6
            assert got * (1 - 1e-6) - 1e-6 <= np.percentile(values, percent, method="higher") + width
    elif isinstance(observer, Histogram) and observer.search == "kl":
        # test_observers.py has all windows of smaller histograms; here the layouts must agree.
        assert min(lows) <= low <= 0 or low == min(lows)
        assert high <= max(highs)
    elif isinstance(observer, (Histogram, SQNR)):
        exponent, base = plain.exponent_and_base(everything.min(), everything.max(), BINS)
        edges = np.clip((base + np.arange(BINS + 1)) * 2.0**exponent, everything.min(), everything.max())
        counts = plain.histogram(everything, BINS)
        weight = observer.clip_weight if isinstance(observer, SQNR) else 1.0

        def cost(scale: float, zero_point: int) -> float:
            return plain.expected_error_exactly(counts, edges, float(scale), int(zero_point), grid, 2.0, weight)

        check_least(cost, everything, grid, STEPS, (low, high))
    else:
        assert isinstance(observer, MSE)
        values = last.astype(np.float64)

        def cost(scale: float, zero_point: int) -> float:
            return float(np.square(values - plain.quantize(values, float(scale), int(zero_point), *grid[:2])).sum())

        check_least(cost, last, grid, observer.steps, (low, high))


def check_least(cost, values, grid, steps, found) -> None:
    wanted = plain.narrowed(cost, values.min(), values.max(), grid, steps)
    got, least = (cost(*reference.choose_qparams(*map(np.float32, ends), *grid)) for ends in (found, wanted))
    assert got <= least * (1 + 2e-5) + 1e-9


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_ranges_and_values(observer: object, scheme: Scheme, dtype: torch.dtype) -> None:
    data = batches(dtype)
    quantizer = observed(observer, scheme, data)
    rows = [rows_of(x, scheme) for x in data]
    for row, (low, high) in enumerate(zip(quantizer.min_val.tolist(), quantizer.max_val.tolist(), strict=True)):
        seen = [batch[row] for batch in rows]
        scale, zero_point = quantizer.scale[row].item(), quantizer.zero_point[row].item()
        if isinstance(observer, HalfQuadratic):
            arguments = observer.norm, observer.beta, observer.kappa, observer.iterations
            wanted = plain.half_quadratic(seen[-1], (scheme.qmin, scheme.qmax, scheme.symmetric), *arguments)
            assert scale == pytest.approx(wanted[0], rel=1e-3)
            assert abs(zero_point - wanted[1]) <= 1
        else:
            check_range(observer, scheme, seen, low, high)
            expected = reference.choose_qparams(low, high, scheme.qmin, scheme.qmax, scheme.symmetric)
            assert (scale, zero_point) == (float(expected[0]), expected[1])
    for x in (data[0], data[-1] * 3):  # and beyond the range
        for name, layout in LAYOUTS.items():
            y = quantizer(layout(x))
            limits = quantizer.scale, quantizer.zero_point, scheme.axis, scheme.qmin, scheme.qmax
            assert torch.equal(y, reference.fake_quantize(x, *limits)[0]), name
            assert y.dtype == dtype


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_layouts_do_not_matter(observer: object, scheme: Scheme, dtype: torch.dtype) -> None:
    data = batches(dtype)
    first, *others = (observed(observer, scheme, [layout(x) for x in data]).state_dict() for layout in LAYOUTS.values())
    for other in others:
        for key, value in first.items():
            # Half-quadratic sums of a whole tensor follow the memory.
            same = torch.allclose if isinstance(observer, HalfQuadratic) and value.is_floating_point() else torch.equal
            assert same(value, other[key]), key


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_one_element_and_none(observer: object, scheme: Scheme, dtype: torch.dtype) -> None:
    for value in (1.5, -3.0, 0.0):
        x = torch.full((1, 1, 1, 1), value, dtype=dtype)
        quantizer = observed(observer, scheme, [x])
        assert quantizer.min_val.item() <= value <= quantizer.max_val.item() + 1e-6 or scheme.symmetric
        y = quantizer(x)
        limits = quantizer.scale, quantizer.zero_point, scheme.axis, scheme.qmin, scheme.qmax
        assert torch.equal(y, reference.fake_quantize(x, *limits)[0])
        # One value is on the grid, or next to a number of it.
        assert math.isclose(y.item(), value, rel_tol=2**-6)
    nothing = torch.empty(0, 1, 2, 2, dtype=dtype)
    before = copy.deepcopy(quantizer.state_dict())
    assert quantizer(nothing).shape == nothing.shape
    quantizer.observe, quantizer.quantize = True, False
    with pytest.raises(ValueError, match=re.escape("input must not be empty, got shape [0, 1, 2, 2]")):
        quantizer(nothing)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
