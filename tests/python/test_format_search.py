"""Scales that are searched for, of every scheme that has scales of its own: against plain loops, and in fake quantizers."""

import itertools
import math

import format_reference as formats
import numpy as np
import observer_reference as plain
import pytest
import strategies
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import (
    MSE,
    MX,
    NF4,
    SQNR,
    Codebook,
    FakeQuantizer,
    HalfQuadratic,
    Histogram,
    Latest,
    MeanNoOutliers,
    Minifloat,
    MinMax,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    QConfig,
    Scheme,
)

ops = torch.ops.rarefy
MINIFLOATS = {"e4m3": Minifloat.e4m3, "e5m2": Minifloat.e5m2, "e3m2": Minifloat.e3m2, "e2m1": Minifloat.e2m1}
SHARED = {
    "tensor": PerTensor(),
    "channel 0": PerChannel(0),
    "channel 1": PerChannel(1),
    "groups of 4": PerGroup(4),
    "groups of 5 along 0": PerGroup(5, 0),
    "groups of 100": PerGroup(100),
    "blocks of 2 by 3": PerBlock(2, 3),
}


def integers(granularity: object, **options: object) -> Scheme:
    # Passing gradients make the scheme one that is not plain, whatever shares a scale.
    return Scheme(granularity=granularity, straight_through="pass", **options)


def search(x: Tensor, scheme: Scheme, importance: Tensor | None = None, steps: int = 20, bins: int = 0) -> list[Tensor]:
    return list(ops.search_scheme(x, scheme.to_json(), "mse", [2.0, steps, bins], importance))


def blocks(x: Tensor, scheme: Scheme) -> list[tuple[tuple[int, ...], Tensor]]:
    """The values of each block by the place of its scale: found by the place of every element."""
    numbers = formats.blocks_of(tuple(x.shape), scheme.block_axis, list(scheme.block))
    flat, shape = numbers.reshape(-1), scheme.scale_shape(list(x.shape))
    return [
        (place, x.reshape(-1)[torch.from_numpy(np.flatnonzero(flat == number))])
        for number, place in enumerate(itertools.product(*map(range, shape)))
    ]


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("granularity", SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize("bits", [(8, True), (4, False), (12, True)], ids=str)
def test_integers_are_searched_block_by_block(granularity: object, bits: tuple[int, bool], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scheme = integers(granularity, bits=bits[0], symmetric=bits[1])
    x = torch.distributions.Laplace(0.1, 1.0).sample((7, 10)).to(dtype)
    grid = (scheme.qmin, scheme.qmax, scheme.symmetric)
    for view in strategies.layouts(x).values():
        scale, zero_point, low, high = search(view, scheme)
        assert list(scale.shape) == scheme.scale_shape([7, 10])
        assert scale.dtype is torch.float32
        assert zero_point.dtype is torch.int32
        for place, values in blocks(view, scheme):
            ends = ops.mse_range(values, None, *grid, steps=20)
            assert (low[place].item(), high[place].item()) == (ends[0].item(), ends[1].item())
            expected = ops.choose_qparams(*ends, *grid)
            assert (scale[place].item(), zero_point[place].item()) == (expected[0].item(), expected[1].item())
            row = values.float().numpy()
            got = plain.error(row, low[place].item(), high[place].item(), grid)
            assert got <= plain.error(row, row.min(), row.max(), grid) * (1 + 1e-6) + 1e-12
        half = ops.search_scheme(view, scheme.to_json(), "half_quadratic", [0.7, 10.0, 1.01, 20])
        for place, values in blocks(view, scheme):
            expected = ops.half_quadratic_qparams(values, None, *grid)
            assert (half[0][place].item(), half[1][place].item()) == (expected[0].item(), expected[1].item())


def cast_error(values: Tensor, end: float, name: str, weights: np.ndarray | float = 1.0, power: bool = False) -> float:
    e, m, bias, specials = formats.MINIFLOATS[name]
    greatest = formats.values_of(e, m, bias, specials)[-1]
    scale = formats.scale_of_largest(np.array([np.float32(end)]), greatest)
    if power:
        scale = formats.up_to_power_of_two(scale)
    s = np.float32(scale[0])
    rounded = [
        float(np.float32(formats.to_minifloat(float(np.float32(v) / s), e, m, bias, specials)) * s)
        for v in values.float().tolist()
    ]
    return float((weights * (values.double().numpy() - np.array(rounded)) ** 2).sum())


@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(4), PerBlock(2, 3)], ids=str)
def test_minifloats_have_the_least_error_of_those_tried(name: str, granularity: object) -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((4, 6))
    scheme = Scheme(format=MINIFLOATS[name](), granularity=granularity)
    importance = torch.rand(4, 6) ** 2
    for weights in (None, importance):
        scale, zero_point, low, high = search(x, scheme, weights, steps=12)
        assert list(scale.shape) == scheme.scale_shape([4, 6])
        assert not zero_point.any()
        where = blocks(x, scheme)
        weight_of = dict(blocks(torch.ones(4, 6) if weights is None else weights, scheme))
        for place, values in where:
            w = weight_of[place].double().numpy()
            end = max(-low[place].item(), high[place].item())
            largest = values.abs().max().item()
            assert end <= largest
            tried = [cast_error(values, largest * i / 12, name, w) for i in range(1, 13)]
            got = cast_error(values, end, name, w)
            assert got <= min(tried) * (1 + 1e-4) + 1e-12
            assert scale[place].item() == pytest.approx(end / MINIFLOATS[name]().greatest, rel=1e-6)


def test_scales_that_are_powers_of_two() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.5).sample((3, 40))
    scheme = Scheme(format=Minifloat.e2m1(), granularity=PerChannel(0), power_of_two=True)
    scale, _, low, high = search(x, scheme)
    for i, row in enumerate(x):
        assert math.frexp(scale[i].item())[0] == 0.5
        largest = row.abs().max().item()
        tried = [cast_error(row, largest * 2.0**-k, "e2m1", power=True) for k in range(8)]
        end = max(-low[i].item(), high[i].item())
        assert cast_error(row, end, "e2m1", power=True) <= min(tried) * (1 + 1e-5)
    for granularity in (PerTensor(), PerChannel(0), PerGroup(8)):
        scheme = Scheme(bits=4, granularity=granularity, power_of_two=True)
        scale, zero_point, low, high = search(x, scheme)
        assert all(math.frexp(s)[0] == 0.5 for s in scale.flatten().tolist())
        assert not zero_point.any()
        for place, values in blocks(x, scheme):
            row = values.numpy()
            errors = [
                plain.error(row, -(7 * s), 7 * s, (-8, 7, True))
                for s in (scale[place].item() * 2.0**k for k in range(-3, 4))
            ]
            assert plain.error(row, low[place].item(), high[place].item(), (-8, 7, True)) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("method", [("mse", 2.0), ("mse", 3.0), ("sqnr", 3.0), ("percentile", 99.0), ("minmax", 0.0)])
def test_ranges_of_minifloats_from_histograms(name: str, method: tuple[str, float]) -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((2, 4000))
    state = [torch.zeros(2, 512, dtype=torch.int64), *(torch.full((2,), e) for e in (torch.inf, -torch.inf))]
    ops.histogram_observe(x, *state, torch.zeros(1, dtype=torch.int64), 0)
    scheme = Scheme(format=MINIFLOATS[name]())
    low, high = ops.scheme_range_from_histogram(*state, scheme.to_json(), *method)
    assert ((x.amin(1) <= low) & (low <= 0) & (high >= 0) & (high <= x.amax(1))).all()
    if method[0] == "minmax":
        assert torch.equal(low, x.amin(1))
        return
    if method[0] == "percentile":
        expected = torch.quantile(x.abs(), 0.99, dim=1)
        torch.testing.assert_close(torch.maximum(-low, high), expected, rtol=0.02, atol=0.05)
        return
    e, m, bias, specials = formats.MINIFLOATS[name]
    for i, row in enumerate(x):
        errors = []
        for ends in (torch.maximum(-low, high)[i], row.abs().max()):
            scale = ops.minifloat_scale(ends.view(1), None, [], e, m, bias, specials)
            error = (row - ops.cast_minifloat(row, scale, None, [], e, m, bias, specials)).abs()
            cost = error.pow(2.0 if method[0] == "sqnr" else method[1])
            if method[0] == "sqnr":
                cost = cost * torch.where(row.abs() > scale * MINIFLOATS[name]().greatest, method[1], 1.0)
            errors.append(cost.sum().item())
        assert errors[0] <= errors[1] * 1.01


def test_nothing_seen_gives_no_range() -> None:
    state = [torch.zeros(1, 64, dtype=torch.int64), torch.tensor([torch.inf]), torch.tensor([-torch.inf])]
    low, high = ops.scheme_range_from_histogram(*state, Scheme(format=Minifloat.e4m3()).to_json(), "mse", 2.0)
    assert low.item() == torch.inf
    assert high.item() == -torch.inf


def test_long_rows_of_minifloats_are_searched_on_their_histogram() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((2, 20_000))
    scheme = Scheme(format=Minifloat.e2m1(), granularity=PerChannel(0))
    exact, binned = search(x, scheme), search(x, scheme, bins=1024)
    error = [
        (x - ops.cast_minifloat(x, scale, 0, [], 2, 1, 1, "none")).square().sum(1) for scale in (exact[0], binned[0])
    ]
    assert (error[1] <= 1.02 * error[0]).all()


def test_extreme_values() -> None:
    for scheme in (integers(PerTensor()), Scheme(format=Minifloat.e4m3())):
        for values in ([0.0] * 5, [3.0], [1e-45, 0.0], [3e38, -3e38, 1.0]):
            scale, _, low, high = search(torch.tensor(values), scheme)
            assert scale.isfinite().all()
            assert (scale > 0).all()
            assert (low <= high).all()


@pytest.mark.parametrize("method", [("mse", [2.0, 10.0, 0.0]), ("half_quadratic", [0.7, 10.0, 1.01, 5.0])], ids=str)
def test_opcheck(method: tuple[str, list[float]]) -> None:
    scheme = integers(PerGroup(4)).to_json()
    torch.library.opcheck(ops.search_scheme.default, (torch.randn(3, 10), scheme, *method))
    state = (torch.zeros(1, 64, dtype=torch.int64), torch.tensor([torch.inf]), torch.tensor([-torch.inf]))
    minifloat = Scheme(format=Minifloat.e4m3()).to_json()
    torch.library.opcheck(ops.scheme_range_from_histogram.default, (*state, minifloat, "mse", 2.0))


def test_errors() -> None:
    x, scheme = torch.randn(4, 6), integers(PerGroup(4))
    for arguments, message in (
        ((torch.tensor([[1.0, torch.nan]]), scheme), "input must be finite"),
        ((torch.empty(0, 6), scheme), "input must not be empty"),
        ((x, scheme, torch.ones(5)), r"importance must broadcast to the input's shape \[4, 6\], got \[5\]"),
        ((x, scheme, -torch.ones(6)), "importance must be finite and not negative"),
        ((x, Scheme(format=NF4())), "does not serve nf4.*: its scales are those of the very tensor that is rounded"),
        ((x, Scheme(format=Codebook(4))), "k-means chooses its values"),
    ):
        with pytest.raises(ValueError, match=message):
            search(*arguments)
    half = ("half_quadratic", [0.7, 10.0, 1.01, 20])
    for unfit, message in (
        (Scheme(format=Minifloat.e4m3()), "half-quadratic splitting is of integers"),
        (Scheme(power_of_two=True), "finds scales that are no powers of two"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.search_scheme(x, unfit.to_json(), *half)
    with pytest.raises(ValueError, match="importance is for MSE"):
        ops.search_scheme(x, scheme.to_json(), *half, torch.ones(6))
    with pytest.raises(ValueError, match="method must be 'mse' with 3 parameters"):
        ops.search_scheme(x, scheme.to_json(), "mse", [2.0])
    with pytest.raises(TypeError, match="input must be"):
        search(torch.ones(4, 6, dtype=torch.int32), scheme)
    with pytest.raises(IndexError, match="axis"):
        search(torch.ones(4), integers(PerChannel(3)))


# --- In fake quantizers ---------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "fp8": Scheme(format=Minifloat.e4m3()),
    "fp6": Scheme(format=Minifloat.e3m2()),
    "fp4": Scheme(format=Minifloat.e2m1()),
    "power of two": Scheme(bits=8, power_of_two=True),
    "power of two, fp8": Scheme(bits=8, format=Minifloat.e5m2(), power_of_two=True),
    "pass-through": Scheme(bits=4, symmetric=False, straight_through="pass"),
    "12 bits": Scheme(bits=12, symmetric=False),
    "16 bits, stochastic": Scheme(bits=16, rounding="stochastic"),
}
OBSERVERS = [Histogram(), Histogram(search=None), Percentile(99.0), SQNR(), MeanNoOutliers(), MinMax()]


@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
@pytest.mark.parametrize("scheme", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations_of_every_format_and_observer(scheme: Scheme, observer: object) -> None:
    torch.manual_seed(0)
    data = [torch.distributions.StudentT(3.0).sample((64, 32)) for _ in range(3)]
    quantizer, widest = (FakeQuantizer(scheme, kind).eval() for kind in (observer, MinMax()))
    for each in (quantizer, widest):
        each.quantize = False
        for batch in data:
            assert torch.equal(each(batch), batch)
        each.observe, each.quantize = False, True
        assert each.calibrated
    seed = None if scheme.rounding != "stochastic" else torch.tensor([0, 0])
    x = data[0]
    y = quantizer(x)
    assert torch.equal(y, ops.simulate(x, quantizer.scale, quantizer.zero_point, scheme.to_json(), seed))
    low, high = quantizer.min_val, quantizer.max_val
    if not scheme.power_of_two:
        assert (-low <= -widest.min_val).all()
        assert (high <= widest.max_val).all()
    else:
        assert math.frexp(quantizer.scale.item())[0] == 0.5
    # The scale is that of the range.
    expected = ops.scheme_qparams(torch.stack([low, high]), scheme.to_json())
    assert torch.equal(quantizer.scale, expected[0])
    if isinstance(observer, Histogram) and observer.search == "mse" and seed is None:
        everything = torch.cat(data)
        errors = [(everything - each(everything)).square().mean().item() for each in (quantizer, widest)]
        assert errors[0] <= errors[1] * 1.01
    again = FakeQuantizer(scheme, observer)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.eval()(x), y)


def test_channels_of_activations_have_scales_of_their_own() -> None:
    x = torch.randn(16, 3, 5) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    for observer in (MinMax(), Percentile(99.0)):
        quantizer = FakeQuantizer(Scheme(format=Minifloat.e4m3(), granularity=PerChannel(1)), observer, channels=3)
        quantizer(x)
        assert (quantizer.scale[1:] > 3 * quantizer.scale[:-1]).all()
        assert ((quantizer(x) - x).abs() <= x.abs() / 8 + quantizer.scale.view(1, 3, 1)).float().mean() > 0.95


@pytest.mark.parametrize("observer", [MSE(steps=20), HalfQuadratic(iterations=5)], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=4, symmetric=False, granularity=PerGroup(16)),
        Scheme(bits=4, granularity=PerBlock(8, 8)),
        Scheme(bits=3, granularity=PerChannel(0), straight_through="pass"),
        Scheme(bits=10, granularity=PerGroup(5)),
        Scheme(bits=4, granularity=PerGroup(16), rounding="stochastic"),
        Scheme(bits=4, granularity=PerGroup(16), power_of_two=True),
        Scheme(format=Minifloat.e2m1(), granularity=PerGroup(16)),
    ],
    ids=str,
)
def test_weights_of_groups_and_blocks_are_searched(scheme: Scheme, observer: object) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.distributions.StudentT(3.0).sample((12, 40)))
    if isinstance(observer, HalfQuadratic) and (scheme.power_of_two or isinstance(scheme.format, Minifloat)):
        with pytest.raises(ValueError, match=r"\[FakeQuantizer\] HalfQuadratic\(.*\) does not serve .*half-quadratic"):
            FakeQuantizer(scheme, observer, 12, weight.shape)
        return
    quantizer, own = (FakeQuantizer(scheme, kind, 12, weight.shape) for kind in (observer, Latest()))
    y = quantizer(weight)
    y.sum().backward()
    assert weight.grad is not None
    assert quantizer.scale.shape == own.scale.shape == torch.Size(scheme.scale_shape([12, 40]))
    power = 2.0 if isinstance(observer, MSE) else 0.7
    if scheme.rounding != "stochastic":
        errors = [(weight - each(weight)).abs().pow(power).sum().item() for each in (quantizer, own)]
        assert errors[0] < errors[1] * (1 + 1e-6)
    # Once for the same values.
    before = quantizer.scale.clone()
    quantizer.scale.fill_(7.0)
    quantizer(weight)
    assert (quantizer.scale == 7.0).all()
    with torch.no_grad():
        weight.mul_(1.0)
    quantizer(weight)
    assert torch.equal(quantizer.scale, before)
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        quantizer(weight)
    quantizer.drop_statistics()
    assert quantizer.observer == Latest()


def test_importance_reaches_groups() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(2.5).sample((4, 32))
    scheme = Scheme(bits=3, granularity=PerGroup(8))
    plain_one, weighted = (FakeQuantizer(scheme, MSE(), 4, weight.shape) for _ in range(2))
    weighted.importance = torch.rand(1, 32) ** 6
    errors = [((weight - q(weight)).square() * weighted.importance).sum() for q in (plain_one, weighted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("scheme", "observer", "reason"),
    [
        (Scheme(format=NF4()), MSE(), "its scales are those of the very tensor that is rounded"),
        (Scheme(format=MX()), Histogram(), "its scales are those of the very tensor that is rounded"),
        (Scheme(dynamic=True), Percentile(), "its scales are those of the very tensor that is rounded"),
        (Scheme(format=Codebook(16)), MSE(), "k-means chooses its values"),
        (Scheme(format=Minifloat.e4m3()), Histogram(search="kl"), r"the divergence \(kl\) is of integers"),
        (Scheme(format=Minifloat.e4m3()), HalfQuadratic(), "half-quadratic splitting is of integers"),
        (Scheme(granularity=PerGroup(8)), SQNR(), "statistics over batches are of the tensor or its channels"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(scheme: Scheme, observer: object, reason: str) -> None:
    with pytest.raises(ValueError, match=r"\[FakeQuantizer\] .* does not serve .*: " + reason):
        FakeQuantizer(scheme, observer)


def test_a_configuration_refuses_what_its_quantizers_would() -> None:
    with pytest.raises(ValueError, match=r"\[QConfig\] Histogram\(.*'kl'.*\) does not serve e4m3.*: the divergence"):
        QConfig.fp8(observer=Histogram(search="kl"))
    with pytest.raises(ValueError, match=r"\[QConfig\] MSE\(.*\) does not serve .*: its scales are those of the very"):
        QConfig.nf4(weight_observer=MSE())


def test_a_model_in_fp8_is_calibrated_by_a_histogram() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    fp8 = Scheme(format=Minifloat.e4m3())
    config = QConfig(
        weight=Scheme(bits=4, granularity=PerGroup(8)),
        activation=fp8,
        observer=Histogram(),
        weight_observer=MSE(),
    )
    prepared = rf.quantization.prepare(model, config)
    rf.quantization.calibrate(prepared, x.split(64))
    assert (prepared(x) - model(x)).square().mean() < 0.02 * model(x).square().mean()
