"""Histograms of streams and the ranges chosen from them, against plain loops."""

import itertools
import re

import numpy as np
import observer_reference as plain
import pytest
import strategies
import torch
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import _core

ops = torch.ops.rarefy
INFINITY = float("inf")
GRIDS = {
    "int8": (-128, 127, True),
    "uint8": (0, 255, False),
    "uint8 symmetric": (0, 255, True),
    "int4": (-7, 7, True),
    "uint4": (0, 15, False),
    "int8 asymmetric": (-128, 127, False),
}
State = list[torch.Tensor]  # hist, hist_min, hist_max, skipped


def new_histogram(rows: int = 1, bins: int = 64) -> State:
    return [
        torch.zeros(rows, bins, dtype=torch.int64),
        torch.full((rows,), INFINITY),
        torch.full((rows,), -INFINITY),
        torch.zeros(1, dtype=torch.int64),
    ]


def observed(*batches: torch.Tensor, bins: int = 64, axis: int | None = None) -> State:
    state = new_histogram(1 if axis is None else batches[0].shape[axis], bins)
    for batch in batches:
        ops.histogram_observe(batch, *state, axis)
    return state


def edges_of(state: State, row: int = 0) -> list[float]:
    """The edges of a row's bins, cut off at the values seen."""
    bins, low, high = state[0].shape[1], state[1][row].item(), state[2][row].item()
    exponent, base = plain.exponent_and_base(low, high, bins)
    return [min(max((base + i) * 2.0**exponent, low), high) for i in range(bins + 1)]


# --- Counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [*[s for s in strategies.ODD_SHAPES if 0 not in s][1:], (2, 40, 61)], ids=str)
def test_counts_of_every_shape_axis_layout_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 5 + torch.randn(shape[-1:] or ())).to(dtype)
    for axis in (None, *range(-1, len(shape))):
        if axis is not None and not shape:
            continue
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
        if len(rows) > 50:
            continue
        expected = [plain.histogram(row.float().numpy(), 64) for row in rows]
        for view in strategies.layouts(x).values():
            hist, low, high, skipped = observed(view, axis=axis)
            assert np.array_equal(hist.numpy(), np.stack(expected))
            assert torch.equal(low, rows.float().amin(1))
            assert torch.equal(high, rows.float().amax(1))
            assert skipped.item() == 0


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-3, 3, width=32), min_size=1, max_size=60
    ),
    cuts=st.lists(st.integers(1, 59), max_size=4),
    bins=st.sampled_from([16, 17, 64, 2048]),
    order=st.randoms(use_true_random=False),
)
def test_counts_do_not_depend_on_batches_or_their_order(
    values: list[float], cuts: list[int], bins: int, order: object
) -> None:
    """The range grows, and every value is in the bin that it would be in from the start."""
    expected = plain.histogram(np.array(values, dtype=np.float32), bins)
    for _ in range(2):
        x = torch.tensor(values)
        state = new_histogram(bins=bins)
        for batch in torch.tensor_split(x, sorted(cuts)):
            if batch.numel():
                ops.histogram_observe(batch, *state, None)
        assert np.array_equal(state[0][0].numpy(), expected)
        assert state[0].sum().item() == len(values)
        assert (state[1].item(), state[2].item()) == (min(values), max(values))
        order.shuffle(values)


@pytest.mark.parametrize("bins", [16, 2048])
def test_more_than_half_of_the_bins_are_used(bins: int) -> None:
    for low, high in ((0.0, 1.0), (0.0, 1.001), (-1.0, 1.0), (-3.7, 0.0), (-0.3, 17.1), (5.0, 6.0), (-3e38, 3e38)):
        exponent, base = plain.exponent_and_base(low, high, bins)
        used = plain.place(max(high, 0.0), exponent) - base + 1
        assert bins / 2 < used <= bins
        hist, *_ = observed(torch.tensor([low, high]), bins=bins)
        assert hist[0, plain.place(high, exponent) - base] == 1


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [-0.0, 0.0],
        [5.0] * 70,
        [-5.0] * 3,
        [1e-45, -1e-45, 0.0],
        [3.4028234e38, -3.4028234e38, 1e-45, -1e-45],
        [2.0**-100, -(2.0**-100), 2.0**-101],
        [1.0, 2.0, 4.0, -1.0, -2.0, -4.0],
        [1e-38, 2e-38, 3e-39],
    ],
)
@pytest.mark.parametrize("bins", [16, 2048])
def test_edges_denormals_zeros_and_huge_values(values: list[float], bins: int) -> None:
    hist, low, high, _ = observed(torch.tensor(values * 20), bins=bins)
    assert np.array_equal(hist[0].numpy(), plain.histogram(np.array(values * 20, dtype=np.float32), bins))
    assert not torch.signbit(torch.cat([low, high])[torch.cat([low, high]) == 0]).any()


def test_values_and_their_negatives_are_mirrored() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([0.5, 0.25, 3.0, 1e-3])]).abs() + 1e-6
    x = torch.cat([x, -x])
    hist, low, high, _ = observed(x, bins=64)
    _, base = plain.exponent_and_base(low.item(), high.item(), 64)
    positive, negative = hist[0, -base:], hist[0, :-base].flip(0)
    size = min(len(positive), len(negative))
    assert torch.equal(positive[:size], negative[:size])
    assert positive[size:].sum() == negative[size:].sum() == 0


@pytest.mark.usefixtures("restore_instruction_set")
def test_instruction_sets_and_threads_give_the_same() -> None:
    x = torch.randn(3, 70_001) * torch.tensor([1.0, 30.0, 1e-3])[:, None]
    threads = torch.get_num_threads()
    found = []
    try:
        for name, count in itertools.product(available_instruction_sets(), (1, 2)):
            _core.set_instruction_set(name)
            torch.set_num_threads(count)
            states = [observed(x, bins=2048), observed(x, bins=2048, axis=0)]
            found.append([t for state in states for t in state])
            for state, method in itertools.product(states, ("mse", "sqnr")):
                found[-1] += ops.choose_range_from_histogram(*state[:3], method, 2.0, 0, 255, False)
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("position", [0, 63, 64, 8191, 8192, 16383, 16384, 40_000])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_one_bad_value_anywhere_leaves_the_batch_out(position: int, axis: int | None) -> None:
    good = torch.randn(2, 20_001)
    state = observed(good, axis=axis) if axis != 1 else observed(good[:, :3], axis=1)
    before = [t.clone() for t in state]
    x = torch.randn(2, 20_001)
    for count, value in enumerate((float("nan"), INFINITY, -INFINITY), 1):
        bad = x.clone()
        bad.view(-1)[position] = value
        if axis == 1:
            bad = bad[:, :3].clone()
            bad[position % 2, position % 3] = value
        ops.histogram_observe(bad, *state, axis)
        assert all(map(torch.equal, state[:3], before[:3]))
        assert state[3].item() == count
    ops.histogram_observe(
        torch.tensor([[1.0, 1e300, 1.0]] * 2).double() if axis == 1 else bad.double() * 1e300, *state, axis
    )
    assert state[3].item() == 4


def test_adding_histograms_is_observing_both_streams() -> None:
    a, b = torch.randn(3, 500), torch.randn(3, 400) * torch.tensor([10.0, 0.1, 1.0])[:, None] - 3
    mine, other = observed(a, bins=128, axis=0), observed(b, bins=128, axis=0)
    both = observed(a, b, bins=128, axis=0)
    ops.histogram_add(*mine[:3], *other[:3])
    assert all(map(torch.equal, mine[:3], both[:3]))
    nothing = new_histogram(3, 128)
    ops.histogram_add(*mine[:3], *nothing[:3])
    assert all(map(torch.equal, mine[:3], both[:3]))
    ops.histogram_add(*nothing[:3], *both[:3])
    assert all(map(torch.equal, nothing[:3], both[:3]))


def test_a_batch_that_is_written_is_seen_by_autograd() -> None:
    state = observed(torch.randn(9))
    x = torch.randn(3, requires_grad=True)
    y = x * state[1]
    versions = [t._version for t in state]
    ops.histogram_observe(x, *state, None)
    assert [t._version for t in state] == [v + 1 for v in versions]
    assert not any(t.requires_grad for t in state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- Choosing ---------------------------------------------------------------------------------------------------------


def data(kind: str) -> torch.Tensor:
    torch.manual_seed(7)
    normal = torch.randn(4000)
    return {
        "normal": normal,
        "outliers": torch.cat([normal, torch.tensor([40.0, -60.0])]),
        "relu": normal.relu(),
        "negative": -normal.abs() - 0.5,
        "positive": normal.abs() + 3,
        "constant": torch.full((50,), 2.5),
        "laplace": torch.distributions.Laplace(0.3, 1.0).sample((4000,)),
        "zeros": torch.zeros(30),
        "one": torch.tensor([-1.25]),
        "tiny": normal * 1e-30,
        "huge": normal * 1e37,
    }[kind]


DATA = ["normal", "outliers", "relu", "negative", "positive", "constant", "laplace", "zeros", "one", "tiny", "huge"]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_expected_error_is_never_worse_than_that_of_the_values_seen(kind: str, grid: tuple[int, int, bool]) -> None:
    x = data(kind)
    state = observed(x, bins=256)
    low, high = (t.item() for t in state[1:3])
    seen = plain.error(x.numpy(), low, high, grid)
    for method, parameter in (("mse", 2.0), ("sqnr", 1.0)):
        a, b = (t.item() for t in ops.choose_range_from_histogram(*state[:3], method, parameter, *grid))
        width = 2.0 ** plain.exponent_and_base(low, high, 256)[0]
        # A value lies within a bin of where it counts: |error| differs by that at most.
        bound = (np.sqrt(seen / x.numel()) + width) ** 2 * x.numel()
        assert plain.error(x.numpy(), a, b, grid) <= bound * (1 + 1e-6)
        assert min(low, 0) <= a <= b <= max(high, 0)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("grid", ["int8", "uint8", "int4", "uint4"])
def test_the_expected_error_is_the_integral_over_bins(norm: float, grid: str) -> None:
    """The range that is chosen has the least error by a numerical integral too, among those that are tried."""
    limits = GRIDS[grid]
    x = data("laplace")
    state = observed(x, bins=256)
    edges = edges_of(state)
    counts, low, high = state[0][0].numpy(), state[1].item(), state[2].item()
    a, b = (t.item() for t in ops.choose_range_from_histogram(*state[:3], "mse", norm, *limits))
    chosen = plain.expected_error(counts, edges, a, b, limits, norm)
    assert chosen <= plain.expected_error(counts, edges, low, high, limits, norm) * (1 + 1e-4)
    for factor in np.arange(0.1, 1.0, 0.1):
        tried = plain.expected_error(counts, edges, low * factor, high * factor, limits, norm)
        assert chosen <= tried * (1 + 5e-3)


@pytest.mark.parametrize("grid", ["int4", "uint4"])
def test_the_noise_of_clipping_counts_as_often_as_asked(grid: str) -> None:
    state = observed(data("laplace"), bins=2048)
    reach = [
        max(abs(t.item()) for t in ops.choose_range_from_histogram(*state[:3], "sqnr", weight, *GRIDS[grid]))
        for weight in (1.0, 3.0, 10.0, 1e6)
    ]
    assert reach == sorted(reach)
    assert reach[0] < reach[1]
    mse = ops.choose_range_from_histogram(*state[:3], "mse", 2.0, *GRIDS[grid])
    sqnr = ops.choose_range_from_histogram(*state[:3], "sqnr", 1.0, *GRIDS[grid])
    assert all(map(torch.equal, mse, sqnr))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("percent", [99.99, 99.0, 75.0, 100.0])
def test_percentiles_are_those_of_numpy_within_a_bin(kind: str, percent: float) -> None:
    x = data(kind)
    state = observed(x, bins=512)
    width = 2.0 ** plain.exponent_and_base(state[1].item(), state[2].item(), 512)[0]
    low, high = (t.item() for t in ops.choose_range_from_histogram(*state[:3], "percentile", percent, 0, 255, False))
    values = x.double().numpy()
    for got, p in ((low, 100 - percent), (high, percent)):
        assert np.percentile(values, p, method="lower") - width <= got * (1 + 1e-6) + 1e-45
        assert got * (1 - 1e-6) - 1e-45 <= np.percentile(values, p, method="higher") + width
    low, high = (t.item() for t in ops.choose_range_from_histogram(*state[:3], "percentile", percent, -128, 127, True))
    reach = max(-low, high)
    magnitudes = np.abs(values)
    assert np.percentile(magnitudes, percent, method="lower") - width <= reach * (1 + 1e-6) + 1e-45
    assert reach * (1 - 1e-6) - 1e-45 <= np.percentile(magnitudes, percent, method="higher") + width


def brute_force(counts: list[int], levels: int, zero: int) -> tuple[float, list[tuple[int, int]]]:
    """The least divergence of windows [0, last) or [first, size), and those that have it."""
    size = len(counts)
    windows = [(0, last) for last in range(max(levels, zero + 1), size + 1)]
    if zero > 0:
        windows = [(first, size) for first in range(0, min(size - levels, zero - 1) + 1)]
    found = {w: plain.divergence(counts, *w, levels) for w in windows}
    least = min(found.values())
    return least, [w for w, value in found.items() if value <= least + 1e-9]


@pytest.mark.parametrize("kind", ["relu", "negative", "normal", "outliers", "laplace"])
@pytest.mark.parametrize("levels", [4, 16])
def test_divergence_against_every_window(kind: str, levels: int) -> None:
    x = data(kind)
    if kind in ("normal", "outliers", "laplace"):  # symmetric: magnitudes from 0
        grid = (-levels + 1, levels - 1, True)
        state = observed(x, bins=64)
        exponent, base = plain.exponent_and_base(state[1].item(), state[2].item(), 64)
        counts = [0] * 64
        for i, count in enumerate(state[0][0].tolist()):
            counts[base + i if base + i >= 0 else -1 - (base + i)] += count
        while counts[-1] == 0:
            counts.pop()
        zero = 0
    else:
        grid = (0, levels - 1, False)
        state = observed(x, bins=64)
        exponent, base = plain.exponent_and_base(state[1].item(), state[2].item(), 64)
        used = plain.place(max(state[2].item(), 0.0), exponent) - base + 1
        counts = state[0][0, :used].tolist()
        zero = 0 if kind == "relu" else used
    low, high = (t.item() for t in ops.choose_range_from_histogram(*state[:3], "kl", 0.0, *grid))
    _, best = brute_force(counts, levels, zero)
    if zero == 0:
        reach = {min(last * 2.0**exponent, max(abs(state[1].item()), abs(state[2].item()))) for _, last in best}
        assert any(max(-low, high) == pytest.approx(r, rel=1e-6) for r in reach)
    else:
        ends = {max((base + first) * 2.0**exponent, state[1].item()) for first, _ in best}
        assert any(low == pytest.approx(e, rel=1e-6) for e in ends)


def test_divergence_keeps_a_flat_range_and_clips_a_long_tail() -> None:
    flat = observed(torch.linspace(0, 1, 100_000), bins=2048)
    assert ops.choose_range_from_histogram(*flat[:3], "kl", 0.0, 0, 255, False)[1].item() == pytest.approx(
        1.0, abs=0.01
    )
    tail = torch.cat([torch.randn(100_000).abs(), torch.tensor([1000.0])])
    clipped = observed(tail, bins=8192)
    assert ops.choose_range_from_histogram(*clipped[:3], "kl", 0.0, 0, 15, False)[1].item() < 10


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "sqnr", "kl"])
def test_rows_are_chosen_one_by_one_and_empty_ones_have_none(method: str) -> None:
    x = torch.randn(3, 3000) * torch.tensor([1.0, 5.0, 0.1])[:, None]
    parameter = {"percentile": 99.9, "mse": 2.0, "sqnr": 1.0}.get(method, 0.0)
    state = observed(x, bins=256, axis=0)
    low, high = ops.choose_range_from_histogram(*state[:3], method, parameter, -128, 127, True)
    for i, row in enumerate(x):
        one = observed(row, bins=256)
        a, b = ops.choose_range_from_histogram(*one[:3], method, parameter, -128, 127, True)
        assert (low[i], high[i]) == (a, b)
    empty = new_histogram(2, 256)
    low, high = ops.choose_range_from_histogram(*empty[:3], method, parameter, -128, 127, True)
    assert low.tolist() == [INFINITY] * 2
    assert high.tolist() == [-INFINITY] * 2


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "sqnr", "kl"])
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_scales_are_powers_of_two_where_asked(method: str, kind: str, grid: tuple[int, int, bool]) -> None:
    state = observed(data(kind), bins=256)
    parameter = {"percentile": 99.9, "mse": 2.0, "sqnr": 1.0}.get(method, 0.0)
    low, high = ops.choose_range_from_histogram(*state[:3], method, parameter, *grid, True)
    scale, _ = ops.choose_qparams(low, high, *grid)
    assert torch.frexp(scale)[0].item() == 0.5
    if method == "minmax" and kind != "zeros":
        assert scale >= ops.choose_qparams(state[1], state[2], *grid)[0]


# --- Errors and torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            TypeError,
            "[histogram_observe] input must be float32, float64, bfloat16 or float16, got Int",
        ),
        ({"x": torch.ones(0)}, ValueError, "[histogram_observe] input must not be empty, got shape [0]"),
        ({"axis": 1}, IndexError, "[histogram_observe] axis must be in [-1, 1) for an input of 1 dimensions, got 1"),
        ({"axis": 0}, ValueError, "[histogram_observe] hist must have 5 rows (one per index of axis 0), got 1"),
        (
            {"hist": torch.zeros(2, 64, dtype=torch.int64)},
            ValueError,
            "[histogram_observe] hist_min must have shape [2]",
        ),
        ({"hist": torch.zeros(1, 64)}, TypeError, "[histogram_observe] hist must be int64, got Float"),
        (
            {"hist": torch.zeros(1, 8, dtype=torch.int64)},
            ValueError,
            "[histogram_observe] hist must have shape [rows, bins] with 16 to 65536 bins, got [1, 8]",
        ),
        (
            {"hist": torch.zeros(1, 128, dtype=torch.int64)[:, ::2]},
            ValueError,
            "[histogram_observe] hist must be contiguous",
        ),
        ({"low": torch.zeros(1).double()}, TypeError, "[histogram_observe] hist_min must be float32, got Double"),
        (
            {"low": torch.ones(1), "high": torch.zeros(1)},
            ValueError,
            "[histogram_observe] the range must be finite with min <= max, or (inf, -inf) for none, got (1, 0) at index 0",
        ),
        (
            {"skipped": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            "[histogram_observe] skipped must have 1 element, got 2",
        ),
        ({"skipped": torch.zeros(1)}, TypeError, "[histogram_observe] skipped must be int64, got Float"),
    ],
)
def test_errors_of_observing_change_nothing(change: dict, error: type[Exception], message: str) -> None:
    hist, low, high, skipped = new_histogram()
    arguments = {"x": torch.randn(5), "hist": hist, "low": low, "high": high, "skipped": skipped, "axis": None} | change
    before = [v.clone() for v in arguments.values() if isinstance(v, torch.Tensor)]
    with pytest.raises(error, match=re.escape(message)):
        ops.histogram_observe(*arguments.values())
    after = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("method", "parameter", "message"),
    [
        ("percentile", 50.0, "percentile must be in (50, 100], got 50"),
        ("percentile", 100.5, "percentile must be in (50, 100], got 100.5"),
        ("mse", 0.5, "norm must be in [1, 8], got 0.5"),
        ("sqnr", 0.0, "the weight of clipping must be finite and at least 1, got 0"),
        ("entropy", 0.0, "method must be minmax, percentile, mse, sqnr or kl, got 'entropy'"),
    ],
)
def test_errors_of_choosing(method: str, parameter: float, message: str) -> None:
    state = observed(torch.randn(50))
    with pytest.raises(ValueError, match=re.escape(f"[choose_range_from_histogram] {message}")):
        ops.choose_range_from_histogram(*state[:3], method, parameter, -128, 127, True)


def test_errors_of_counts_and_of_adding() -> None:
    state = observed(torch.randn(50))
    state[0][0, 3] = -1
    with pytest.raises(ValueError, match=re.escape("counts must not be negative, got one at index 0")):
        ops.choose_range_from_histogram(*state[:3], "mse", 2.0, -128, 127, True)
    with pytest.raises(
        ValueError, match=re.escape("[histogram_add] both must have one shape, got [1, 64] and [1, 128]")
    ):
        ops.histogram_add(*observed(torch.randn(50))[:3], *observed(torch.randn(50), bins=128)[:3])


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype)
    torch.library.opcheck(ops.histogram_observe, (x, *new_histogram(3), 0))
    torch.library.opcheck(ops.histogram_observe, (x.requires_grad_(), *new_histogram(), None))
    state, other = observed(x.detach()), observed(x.detach() * 3)
    torch.library.opcheck(ops.choose_range_from_histogram, (*state[:3], "mse", 2.0, -128, 127, True))
    torch.library.opcheck(ops.histogram_add, (*state[:3], *other[:3]))
