"""Searches leave out what cannot win: candidates above the best so far, empty bins. Beside searches that try everything."""

import numpy as np
import observer_reference as plain
import pytest
import reference
import strategies
import torch
from conftest import available_instruction_sets
from torch import Tensor

from rarefy import _core
from rarefy.quantization import Minifloat, PerChannel, Scheme

ops = torch.ops.rarefy
INFINITY = float("inf")
GRIDS = {"int8": (-128, 127, True), "int4": (-7, 7, True), "uint8": (0, 255, False), "uint4": (0, 15, False)}
TOGETHER = 1 << 17  # values whose range is found before they are counted (row_histogram.cpp)


def data(kind: str, n: int) -> Tensor:
    torch.manual_seed(n)
    normal = torch.randn(n)
    far = normal.clone()
    far[n // 2], far[n - 1] = 300.0, -90.0
    return {
        "normal": normal,
        "outliers": far,
        "relu": normal.relu(),
        "positive": normal.abs() + 3,
        "negative": -normal.abs() - 0.5,
        "constant": torch.full((n,), -1.75),
        "heavy": normal / torch.rand(n).clamp_min(0.02),
        "on edges": (normal * 4).round() / 8,
    }[kind]


KINDS = ["normal", "outliers", "relu", "positive", "negative", "constant", "heavy", "on edges"]


# --- On the values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("n", [5, 1024, 3001])  # sums are looked at every 1,024 values
def test_values_have_the_range_of_a_search_that_tries_everything(
    n: int, grid: tuple[int, int, bool], kind: str
) -> None:
    x = data(kind, n)
    importance = torch.rand(n) ** 4
    for norm, weight in ((2.0, None), (1.0, None), (2.4, None), (2.0, importance)):
        steps = 24
        low, high = (t.item() for t in ops.mse_range(x, None, *grid, norm=norm, steps=steps, importance=weight))
        values, counted = x.double().numpy(), 1.0 if weight is None else weight.double().numpy()

        def cost(
            scale: float, zero_point: int, values: np.ndarray = values, counted: object = counted, norm: float = norm
        ) -> float:
            grid_values = plain.quantize(values, float(scale), int(zero_point), *grid[:2])
            return float((counted * np.abs(values - grid_values) ** norm).sum())

        wanted = plain.narrowed(cost, x.min().item(), x.max().item(), grid, steps)
        if (low, high) != wanted:  # sums in float32 decide near ties
            got, least = (cost(*reference.choose_qparams(*map(np.float32, e), *grid)) for e in ((low, high), wanted))
            assert got <= least * (1 + 2e-5) + 1e-9


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
def test_values_for_instruction_sets_and_threads(norm: float) -> None:
    x = torch.stack([data(kind, 2 * 1024 + 77) for kind in KINDS])
    found = []
    threads = torch.get_num_threads()
    try:
        for name in available_instruction_sets():
            _core.set_instruction_set(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(ops.mse_range(x, 0, *GRIDS["uint4"], norm=norm))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][i], other[i]) for other in found[1:] for i in (0, 1))
    for i, row in enumerate(x):
        low, high = ops.mse_range(row, None, *GRIDS["uint4"], norm=norm)
        assert (low[0], high[0]) == (found[0][0][i], found[0][1][i])


# --- On histograms ----------------------------------------------------------------------------------------------------


def histogram_of(x: Tensor, bins: int, axis: int | None = None) -> list[Tensor]:
    rows = 1 if axis is None else x.shape[axis]
    state = [torch.zeros(rows, bins, dtype=torch.int64), *(torch.full((rows,), e) for e in (INFINITY, -INFINITY))]
    ops.histogram_observe(x, *state, torch.zeros(1, dtype=torch.int64), axis)
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [*GRIDS.values(), (-32768, 32767, True)], ids=[*GRIDS.keys(), "int16"])
@pytest.mark.parametrize("bins", [17, 256, 2048])
def test_histograms_have_the_range_of_a_search_that_tries_everything(
    bins: int, grid: tuple[int, int, bool], kind: str
) -> None:
    state = histogram_of(data(kind, 5000), bins)
    counts, low, high = state[0][0].numpy(), state[1].item(), state[2].item()
    exponent, base = plain.exponent_and_base(low, high, bins)
    edges = np.clip((base + np.arange(bins + 1)) * 2.0**exponent, low, high)
    for method, norm, weight in (("mse", 2.0, 1.0), ("mse", 1.0, 1.0), ("sqnr", 2.0, 1.0), ("sqnr", 2.0, 5.0)):
        given = weight if method == "sqnr" else norm
        found = tuple(t.item() for t in ops.choose_range_from_histogram(*state, method, given, *grid))

        def cost(scale: float, zero_point: int, norm: float = norm, weight: float = weight) -> float:
            return plain.expected_error_exactly(counts, edges, scale, zero_point, grid, norm, weight)

        wanted = plain.narrowed(cost, low, high, grid, 128)
        if found != wanted:  # both are differences of large numbers
            got, least = (cost(*reference.choose_qparams(*map(np.float32, e), *grid)) for e in (found, wanted))
            assert got <= least + 1e-9 * counts.sum() * max(-low, high) ** norm


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 3, 30, 25),  # runs of 750
        (3, 2, 7, 73),  # of 511: too short, copied
        (3, 2, 1, 60_001),  # two runs go together
        (4, 2, 1, TOGETHER),
        (2, 2, 1, TOGETHER + 1),
        (1, 2, 1, 2 * TOGETHER + 13),
    ],
    ids=str,
)
def test_rows_in_runs_are_counted_like_rows_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape) * torch.tensor([1.0, 1e-3, 50.0])[: shape[1], None, None]
    x[-1, 0, -1, -1] = 1000.0  # bins move after most were counted
    x[-1, -1, -1, -2] = -77.0
    x[0, 0, 0, 0] = -0.0
    x = x.to(dtype)
    counts, low, high = histogram_of(x, 64, axis=1)
    for channel, row in enumerate(x.transpose(0, 1).reshape(shape[1], -1).float().numpy()):
        assert (low[channel].item(), high[channel].item()) == (row.min(), row.max())
        exponent, base = plain.exponent_and_base(row.min(), row.max(), 64)
        places = np.trunc(np.abs(row.astype(np.float64)) * 2.0**-exponent).astype(np.int64)
        expected = np.bincount(np.where(row < 0, -1 - places, places) - base, minlength=64)
        assert (counts[channel].numpy() == expected).all()
    for grid in (GRIDS["int4"], GRIDS["uint8"]):
        found = ops.mse_range(x, 1, *grid, bins=64)
        for channel in range(shape[1]):
            alone = ops.mse_range(x[:, channel].contiguous(), None, *grid, bins=64)
            assert (found[0][channel], found[1][channel]) == (alone[0][0], alone[1][0])
        chosen = ops.choose_range_from_histogram(counts, low, high, "mse", 2.0, *grid)
        by_steps = ops.mse_range(x, 1, *grid, bins=64, steps=128)
        assert all(map(torch.equal, by_steps, chosen))


@pytest.mark.usefixtures("restore_instruction_set")
def test_rows_in_runs_for_instruction_sets_and_threads() -> None:
    x = torch.stack([data(kind, 3 * 700).view(3, 700) for kind in KINDS], dim=1)
    found = []
    threads = torch.get_num_threads()
    try:
        for name in available_instruction_sets():
            _core.set_instruction_set(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append([*histogram_of(x, 128, axis=1)])
                for grid in GRIDS.values():
                    found[-1] += ops.mse_range(x, 1, *grid, bins=128)
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("bad", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("shape", [(5, 3, 30, 25), (3, 2, 1, 60_001), (1, 2, 1, 2 * TOGETHER + 13)], ids=str)
def test_one_bad_value_in_the_last_run(shape: tuple[int, ...], bad: float) -> None:
    x = torch.randn(shape)
    x[-1, -1, -1, -1] = bad
    with pytest.raises(ValueError, match=r"\[mse_range\] input must be finite, got NaN or infinite values"):
        ops.mse_range(x, 1, *GRIDS["int8"], bins=64)
    state = [torch.zeros(shape[1], 64, dtype=torch.int64), *(torch.full((shape[1],), e) for e in (INFINITY, -INFINITY))]
    skipped = torch.zeros(1, dtype=torch.int64)
    ops.histogram_observe(x, *state, skipped, 1)
    assert skipped.item() == 1
    assert not state[0].any()
    assert state[1].isposinf().all()


# --- Casts ------------------------------------------------------------------------------------------------------------

MINIFLOATS = {"e4m3": Minifloat.e4m3(), "e5m2": Minifloat.e5m2(), "e2m1": Minifloat.e2m1()}


def ends_by_trying(x: Tensor, weight: Tensor | None, name: str, steps: int, power_of_two: bool) -> float:
    """The end with the least error of one row, each candidate in its turn."""
    f = MINIFLOATS[name]
    shape = (f.exponent_bits, f.mantissa_bits, f.bias, str(f.specials).split(".")[-1])
    largest = x.abs().max().item()

    def error(factor: float) -> tuple[float, float]:
        end = torch.tensor([factor * largest])  # rounded once
        scale = ops.minifloat_scale(end.reshape(1, 1), 0, [], *shape, power_of_two)
        term = (x - ops.cast_minifloat(x.unsqueeze(0), scale, 0, [], *shape)[0]).square()
        return (term if weight is None else term * weight).double().sum().item(), end.item()

    (least, best), at = error(1.0), 0.0
    factors = [2.0**-i for i in range(1, 17)] if power_of_two else [i / steps for i in range(steps - 1, 0, -1)]
    for finer in (False, True):
        if finer:
            center = at
            factors = [center + i / (5 * steps) for i in range(-4, 5) if i != 0 and not power_of_two and center > 0]
        for factor in factors:
            if 0 < factor < 1:
                cost, end = error(factor)
                if cost < least:
                    least, best, at = cost, end, factor
    return best


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("n", [5, 40, 1024, 2500])
def test_casts_have_the_scale_of_a_search_that_tries_everything(n: int, name: str) -> None:
    x = torch.stack([data(kind, n) for kind in KINDS])
    importance = torch.rand(len(KINDS), n) ** 3
    for power_of_two in (False, True):
        scheme = Scheme(format=MINIFLOATS[name], granularity=PerChannel(0), power_of_two=power_of_two)
        for weight in (None, importance):
            found = []
            for isa in available_instruction_sets():
                _core.set_instruction_set(isa)
                found.append(ops.search_scheme(x, scheme.to_json(), "mse", [2.0, 15, 0], weight))
            assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
            reach = torch.maximum(-found[0][2], found[0][3]).flatten()
            for i, row in enumerate(x):
                wanted = ends_by_trying(row, None if weight is None else weight[i], name, 15, power_of_two)
                assert reach[i].item() == min(wanted, row.abs().max().item())
            for dtype in (torch.float64, torch.bfloat16):
                y = x.to(dtype)
                narrow = ops.search_scheme(y, scheme.to_json(), "mse", [2.0, 15, 0], weight)
                same = ops.search_scheme(y.float(), scheme.to_json(), "mse", [2.0, 15, 0], weight)
                assert all(map(torch.equal, narrow, same))


def test_casts_of_layouts_threads_and_no_steps() -> None:
    x = data("heavy", 60 * 33).view(60, 33)
    scheme = Scheme(format=MINIFLOATS["e4m3"], granularity=PerChannel(1))
    weight = torch.rand(33)
    wanted = ops.search_scheme(x, scheme.to_json(), "mse", [2.0, 30, 0], weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for view in strategies.layouts(x).values():
                assert all(
                    map(torch.equal, wanted, ops.search_scheme(view, scheme.to_json(), "mse", [2.0, 30, 0], weight))
                )
    finally:
        torch.set_num_threads(threads)
    one = ops.search_scheme(x, scheme.to_json(), "mse", [2.0, 1, 0])
    whole = ops.search_scheme(x, scheme.to_json(), "mse", [8.0, 1, 0])  # a norm without a kernel of its own
    assert all(map(torch.equal, one, whole))
    assert torch.equal(torch.maximum(-one[2], one[3]).flatten(), x.abs().amax(0))
