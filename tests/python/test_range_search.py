"""Ranges searched for on tensors, half-quadratic splitting, powers of two, means of ranges: against plain loops."""

import re

import numpy as np
import observer_reference as plain
import pytest
import reference
import strategies
import torch
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import _core

ops = torch.ops.rarefy
INFINITY = float("inf")
GRIDS = {"int8": (-128, 127, True), "int4": (-7, 7, True), "uint4": (0, 15, False), "int2": (-2, 1, True)}


def rows_of(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def least_by_trying(x: np.ndarray, grid: tuple[int, int, bool], norm: float, steps: int, weight: object = 1.0) -> float:
    """The least error of the values' range narrowed to i / steps of it (both ends together)."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    reach = max(-low, high)
    errors = []
    for i in range(1, steps + 1):
        if grid[2]:
            ends = max(low, -reach * i / steps), min(high, reach * i / steps)
        else:
            ends = low * i / steps, high * i / steps
        errors.append(plain.error(x, np.float32(ends[0]), np.float32(ends[1]), grid, norm, weight))
    return min(errors)


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 4, 2), (33, 1, 9), (1, 1296), (4, 217), ()], ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_error_is_the_least_of_those_tried(
    shape: tuple[int, ...], dtype: torch.dtype, grid: tuple[int, int, bool]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    for axis in (None, *range(len(shape))):
        rows = rows_of(x, axis)[:4].float().numpy()
        results = []
        for view in strategies.layouts(x).values():
            low, high = ops.mse_range(view, axis, *grid, steps=20)
            results.append((low, high))
            for i, row in enumerate(rows):
                got = plain.error(row, low[i].item(), high[i].item(), grid)
                assert got <= least_by_trying(row, grid, 2.0, 20) * (1 + 1e-4) + 1e-12  # ends are float32
                assert got <= plain.error(row, row.min(), row.max(), grid) * (1 + 1e-6) + 1e-12
        if axis is not None:  # the order of a row's values is that of the axes
            assert all(torch.equal(a[0], results[0][0]) and torch.equal(a[1], results[0][1]) for a in results)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 3.0, 8.0])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_norms(norm: float, grid: tuple[int, int, bool]) -> None:
    x = torch.distributions.Laplace(0.1, 1.0).sample((3, 500))
    low, high = ops.mse_range(x, 0, *grid, norm=norm, steps=50)
    for i, row in enumerate(x.numpy()):
        got = plain.error(row, low[i].item(), high[i].item(), grid, norm)
        assert got <= least_by_trying(row, grid, norm, 50) * (1 + 1e-4)
    reach = torch.maximum(-low, high)
    whole = x.abs().amax(1)
    assert (reach <= whole).all()


def test_an_asymmetric_search_moves_each_end() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000), torch.tensor([12.0])])  # one far value above
    low, high = (t.item() for t in ops.mse_range(x, None, 0, 15, False))
    assert -low > 0.6 * -x.min().item()
    assert high < 0.5 * 12


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_importance_counts_errors(grid: tuple[int, int, bool]) -> None:
    torch.manual_seed(1)
    x = torch.distributions.Laplace(0.0, 1.0).sample((4, 6, 3, 3))
    per_input, per_element = torch.rand(1, 6, 1, 1) ** 4, torch.rand(4, 6, 3, 3)
    for importance in (per_input, per_element, per_input.double(), torch.ones(3), torch.tensor(2.0)):
        for view in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            low, high = ops.mse_range(view, 0, *grid, steps=40, importance=importance)
            weights = importance.float().expand_as(view).reshape(4, -1).double().numpy()
            for i, row in enumerate(view.reshape(4, -1).numpy()):
                got = plain.error(row, low[i].item(), high[i].item(), grid, weight=weights[i])
                assert got <= least_by_trying(row, grid, 2.0, 40, weights[i]) * (1 + 1e-5)
    alone = ops.mse_range(x, 0, *grid)
    assert all(map(torch.equal, alone, ops.mse_range(x, 0, *grid, importance=torch.ones(1))))


def test_long_rows_are_searched_on_their_histogram() -> None:
    """Within what the width of a bin can cost."""
    x = torch.distributions.Laplace(0.0, 1.0).sample((2, 20_000))
    for axis, grid in ((None, GRIDS["int4"]), (0, GRIDS["uint4"])):
        exact = ops.mse_range(x, axis, *grid, bins=0)
        binned = ops.mse_range(x, axis, *grid, bins=1024)
        state = [
            torch.zeros(len(exact[0]), 1024, dtype=torch.int64),
            *(torch.full_like(exact[0], e) for e in (INFINITY, -INFINITY)),
        ]
        ops.histogram_observe(x, *state, torch.zeros(1, dtype=torch.int64), axis)
        width = 2 * x.abs().max().item() / 512
        for i, row in enumerate(rows_of(x, axis).numpy()):
            a = plain.error(row, exact[0][i].item(), exact[1][i].item(), grid) / row.size
            b = plain.error(row, binned[0][i].item(), binned[1][i].item(), grid) / row.size
            assert b <= (np.sqrt(a) + width) ** 2
            assert b <= a * 1.02


@pytest.mark.parametrize("values", [[0.0] * 5, [3.0], [-2.0] * 4, [1e-45, 0.0], [3e38, -3e38, 1.0], [1e-30, -1e-30]])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_extreme_values(values: list[float], grid: tuple[int, int, bool]) -> None:
    x = torch.tensor(values)
    low, high = ops.mse_range(x, None, *grid)
    assert low.isfinite().all()
    assert (low <= high).all()
    scale, zero_point = ops.half_quadratic_qparams(x, None, *grid)
    assert scale.isfinite().all()
    assert scale.item() >= 2.0**-60
    assert grid[0] <= zero_point.item() <= grid[1]
    if values == [0.0] * 5:
        assert scale.item() == 1.0


@pytest.mark.usefixtures("restore_instruction_set")
def test_instruction_sets_give_the_same() -> None:
    x = torch.randn(3, 2311)
    found = []
    for name in available_instruction_sets():
        _core.set_instruction_set(name)
        found.append([])
        for norm in (1.0, 2.0, 2.4):
            found[-1] += ops.mse_range(x, 0, 0, 15, False, norm=norm)
        found[-1] += ops.mse_range(
            x, 0, 0, 15, False, importance=torch.rand(2311, generator=torch.Generator().manual_seed(0))
        )
        found[-1] += ops.half_quadratic_qparams(x, 0, 0, 15, False)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


# --- Half-quadratic splitting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.7, 1.0, 0.5])
@pytest.mark.parametrize("grid", [(0, 15, False), (-7, 7, True), (0, 3, False), (-128, 127, False)], ids=str)
def test_splitting_against_float64(norm: float, grid: tuple[int, int, bool]) -> None:
    torch.manual_seed(3)
    x = torch.distributions.StudentT(4.0).sample((5, 700)) * 0.1 + 0.02
    scale, zero_point = ops.half_quadratic_qparams(x, 0, *grid, norm=norm)
    for i, row in enumerate(x.numpy()):
        expected = plain.half_quadratic(row, grid, norm, 10.0, 1.01, 20)

        def error(s: float, z: int, row: np.ndarray = row) -> float:
            return float((np.abs(row - plain.quantize(row.astype(np.float64), s, z, *grid[:2])) ** norm).sum())

        got, wanted = error(scale[i].item(), zero_point[i].item()), error(*expected)
        start = error(*map(float, reference.choose_qparams(row.min(), row.max(), *grid)))
        assert got <= start * (1 + 1e-5)
        # float32 may decide a tie, and with it the number of rounds, differently.
        assert got == pytest.approx(wanted, rel=0.03)
        assert grid[0] <= zero_point[i].item() <= grid[1]


def test_splitting_gains_on_heavy_tails() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((8, 2000))
    grid = (0, 15, False)
    scale, zero_point = ops.half_quadratic_qparams(x, 0, *grid)
    plain_scale, plain_zero = ops.choose_qparams(x.amin(1), x.amax(1), *grid)
    error = [
        (x - ops.fake_quantize(x, s, z, 0, 0, 15)).abs().pow(0.7).sum(1)
        for s, z in ((scale, zero_point), (plain_scale, plain_zero))
    ]
    assert (error[0] < 0.95 * error[1]).all()


def test_no_iterations_is_the_range_of_the_values() -> None:
    x = torch.randn(3, 40)
    got = ops.half_quadratic_qparams(x, 0, 0, 15, False, iterations=0)
    assert all(map(torch.equal, got, ops.choose_qparams(x.amin(1), x.amax(1), 0, 15, False)))


# --- Powers of two ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    limits=strategies.integer_ranges(),
    symmetric=st.booleans(),
    nearest=st.booleans(),
    ends=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 2),
)
def test_power_of_two_ranges(
    limits: tuple[int, int], symmetric: bool, nearest: bool, ends: tuple[float, float]
) -> None:
    low, high = (torch.tensor([e]) for e in (min(ends), max(ends)))
    grid = (*limits, symmetric)
    wide_low, wide_high = ops.power_of_two_range(low, high, *grid, nearest)
    scale, zero_point = ops.choose_qparams(wide_low, wide_high, *grid)
    before, _ = ops.choose_qparams(low, high, *grid)
    assert torch.frexp(scale)[0].item() == 0.5
    assert limits[0] <= zero_point.item() <= limits[1]
    if before.item() == 1.0:
        return
    if max(abs(low.item()), abs(high.item())) < 1e38:
        ratio = scale.item() / before.item()
        assert (2**-0.5 * (1 - 1e-6) <= ratio <= 2**0.5 * (1 + 1e-6)) if nearest else 1 <= ratio < 2


def test_power_of_two_values() -> None:
    def scale(low: float, high: float, grid: tuple[int, int, bool], nearest: bool = False) -> float:
        ends = ops.power_of_two_range(torch.tensor([low]), torch.tensor([high]), *grid, nearest)
        return ops.choose_qparams(*ends, *grid)[0].item()

    assert scale(-1.0, 127 / 128, (-128, 127, True)) == 2**-6  # 127 steps of 1/128 are less than 1
    assert scale(-127 / 128, 0.0, (-128, 127, True)) == 2**-7
    assert scale(0.0, 255.0, (0, 255, False)) == 1.0
    assert scale(0.0, 255.5, (0, 255, False)) == 2.0
    assert scale(0.0, 300.0, (0, 255, False), nearest=True) == 1.0
    assert scale(0.0, 400.0, (0, 255, False), nearest=True) == 2.0


# --- Ranges of batches --------------------------------------------------------------------------------------------------


def new_ranges(capacity: int, channels: int = 1) -> list[torch.Tensor]:
    shape = (capacity, channels)
    return [torch.full(shape, INFINITY), torch.full(shape, -INFINITY), torch.zeros(3, dtype=torch.int64)]


def test_ranges_are_kept_evenly_spread_over_the_stream() -> None:
    for total in (1, 7, 8, 9, 16, 17, 33, 100):
        state = new_ranges(8)
        for i in range(total):
            ops.record_ranges(*state, torch.tensor([-float(i)]), torch.tensor([float(i)]))
        seen, kept, every = state[2].tolist()
        expected = list(range(0, total, every))
        assert seen == total
        assert kept == len(expected) <= 8
        assert every & (every - 1) == 0
        assert state[1][:kept, 0].tolist() == expected
        assert state[0][:kept, 0].tolist() == [-v for v in expected]
        assert state[1][kept:].tolist() == [[-INFINITY]] * (8 - kept)
    several = new_ranges(8)
    ops.record_ranges(*several, torch.arange(17.0)[:, None] - 20, torch.arange(17.0)[:, None])
    assert several[2].tolist() == [17, 5, 4]
    ops.record_ranges(*several, torch.tensor([float("nan")]), torch.tensor([1.0]))
    ops.record_ranges(*several, torch.tensor([INFINITY]), torch.tensor([-INFINITY]))
    assert several[2].tolist() == [17, 5, 4]


@pytest.mark.parametrize(
    "rule", [{"sigma": 2.0}, {"sigma": 0.5}, {"quantile": 0.1}, {"quantile": 0.0}, {"quantile": 0.49}]
)
def test_mean_of_ranges_without_outliers(rule: dict[str, float]) -> None:
    torch.manual_seed(2)
    high = torch.rand(21, 3) + 1
    high[4, 1] = 50.0
    low = -high * torch.rand(21, 3)
    state = new_ranges(64, 3)
    ops.record_ranges(*state, low, high)
    got = ops.mean_range(*state[:2], rule.get("sigma"), rule.get("quantile"))
    for ends, values in zip(got, (low, high), strict=True):
        for c in range(3):
            column = values[:, c].double().numpy()
            if "sigma" in rule:
                kept = column[np.abs(column - column.mean()) <= rule["sigma"] * column.std()]
            else:
                a, b = np.quantile(column, [rule["quantile"], 1 - rule["quantile"]])
                kept = column[(column >= a) & (column <= b)]
            assert ends[c].item() == pytest.approx(kept.mean() if len(kept) else column.mean(), rel=1e-6)
    empty = ops.mean_range(*new_ranges(4, 2)[:2], 3.0, None)
    assert empty[0].tolist() == [INFINITY] * 2
    assert empty[1].tolist() == [-INFINITY] * 2


# --- Errors and torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: ops.mse_range(x[:0], None, -8, 7, True),
            ValueError,
            "[mse_range] input must not be empty, got shape [0, 5]",
        ),
        (
            lambda x: ops.mse_range(x.int(), None, -8, 7, True),
            TypeError,
            "[mse_range] input must be float32, float64, bfloat16 or float16, got Int",
        ),
        (
            lambda x: ops.mse_range(x, 2, -8, 7, True),
            IndexError,
            "[mse_range] axis must be in [-2, 2) for an input of 2 dimensions, got 2",
        ),
        (
            lambda x: ops.mse_range(x, None, -8, 7, True, norm=0.5),
            ValueError,
            "[mse_range] norm must be in [1, 8], got 0.5",
        ),
        (
            lambda x: ops.mse_range(x, None, -8, 7, True, steps=0),
            ValueError,
            "[mse_range] steps must be in 1..10000, got 0",
        ),
        (
            lambda x: ops.mse_range(x, None, -8, 7, True, bins=3),
            ValueError,
            "[mse_range] bins must be 0 or in 16..65536, got 3",
        ),
        (
            lambda x: ops.mse_range(x, None, -8, 7, True, importance=torch.ones(4)),
            ValueError,
            "[mse_range] importance must broadcast to the input's shape [3, 5], got [4]",
        ),
        (
            lambda x: ops.mse_range(x, None, -8, 7, True, importance=-torch.ones(5)),
            ValueError,
            "[mse_range] importance must be finite and not negative",
        ),
        (
            lambda x: ops.mse_range(x / 0, 0, -8, 7, True),
            ValueError,
            "[mse_range] input must be finite, got NaN or infinite values in row 0",
        ),
        (
            lambda x: ops.mse_range(x.repeat(100, 100) / 0, None, -8, 7, True, bins=16),
            ValueError,
            "[mse_range] input must be finite",
        ),
        (
            lambda x: ops.half_quadratic_qparams(x, None, 0, 15, False, norm=1.5),
            ValueError,
            "[half_quadratic_qparams] norm must be in (0, 1], got 1.5",
        ),
        (
            lambda x: ops.half_quadratic_qparams(x, None, 0, 15, False, beta=0.0),
            ValueError,
            "[half_quadratic_qparams] beta must be finite and positive, got 0",
        ),
        (
            lambda x: ops.half_quadratic_qparams(x, None, 0, 15, False, kappa=0.5),
            ValueError,
            "[half_quadratic_qparams] kappa must be in [1, 10], got 0.5",
        ),
        (
            lambda x: ops.half_quadratic_qparams(x * float("nan"), None, 0, 15, False),
            ValueError,
            "[half_quadratic_qparams] input must be finite",
        ),
        (
            lambda x: ops.power_of_two_range(x[0, :1] / 0, x[0, :1], 0, 15, False),
            ValueError,
            "[power_of_two_range] the range must be finite with min <= max",
        ),
        (
            lambda x: ops.mean_range(x[:2], x[:2], None, None),
            ValueError,
            "[mean_range] one of sigma and quantile must be set, got none",
        ),
        (
            lambda x: ops.mean_range(x[:2], x[:2], 1.0, 0.1),
            ValueError,
            "[mean_range] one of sigma and quantile must be set, got both",
        ),
        (
            lambda x: ops.mean_range(x[:2], x[:2], 0.0, None),
            ValueError,
            "[mean_range] sigma must be finite and positive, got 0",
        ),
        (
            lambda x: ops.mean_range(x[:2], x[:2], None, 0.5),
            ValueError,
            "[mean_range] quantile must be in [0, 0.5), got 0.5",
        ),
        (
            lambda x: ops.mean_range(x, x, 3.0, None),
            ValueError,
            "[mean_range] batch_min must be contiguous of shape [n, channels] with an even n, got [3, 5]",
        ),
        (
            lambda x: ops.record_ranges(*new_ranges(4, 2), x[0], x[0]),
            ValueError,
            "[record_ranges] low and high must have shape [2] or [k, 2], got [5] and [5]",
        ),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(torch.randn(3, 5))


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype)
    torch.library.opcheck(ops.mse_range, (x, 0, -8, 7, True), {"importance": torch.rand(40).to(dtype)})
    torch.library.opcheck(ops.mse_range, (x.requires_grad_(), None, 0, 15, False))
    torch.library.opcheck(ops.half_quadratic_qparams, (x, 0, 0, 15, False))
    torch.library.opcheck(ops.power_of_two_range, (x.detach().amin(1), x.detach().amax(1), 0, 15, False))
    torch.library.opcheck(ops.record_ranges, (*new_ranges(4, 2), torch.zeros(2), torch.ones(2)))
    torch.library.opcheck(ops.mean_range, (*new_ranges(4, 2)[:2], 3.0, None))
