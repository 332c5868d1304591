"""Binary, ternary and clustered weights, and the bound on accumulators, against plain loops and the papers' formulas."""

import itertools
import re

import format_reference as reference
import numpy as np
import pytest
import torch
from strategies import FLOAT_TYPES, layouts
from test_formats import data, same, special

ops = torch.ops.rarefy
SHARINGS = [(None, []), (0, []), (1, []), (-1, [3]), (0, [2]), (-1, [2, 3])]


def same_means(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; in float64 up to the order in which torch sums."""
    if actual.dtype is torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0, equal_nan=True)
    else:
        same(actual, expected)


def by_block(x: torch.Tensor, axis: int | None, block: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return reference.computing(x), reference.blocks_of(x.shape, axis, block)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
def test_binary(axis, block, dtype):
    x = data((6, 8), dtype)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = 0.0, -0.0, float("nan"), float("-inf")
    values, which = by_block(x, axis, block)
    expected = np.empty_like(values)
    for index in np.ndindex(6, 8):
        members = values[(which == which[index]) & np.isfinite(values)]
        mean = values.dtype.type(np.abs(members).astype(np.float64).sum() / max(len(members), 1))
        expected[index] = values[index] if np.isnan(values[index]) else (-mean if values[index] < 0 else mean)
    same_means(ops.fake_quantize_binary(x, axis, block), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
@pytest.mark.parametrize("threshold", [0.7, 0.05])
def test_ternary(axis, block, dtype, threshold):
    x = data((6, 8), dtype)
    values, which = by_block(x, axis, block)
    kind = values.dtype.type
    expected = np.zeros_like(values)
    for index in np.ndindex(6, 8):
        sizes = np.abs(values[which == which[index]])
        limit = kind(kind(sizes.astype(np.float64).sum() / len(sizes)) * kind(threshold))
        above = sizes[sizes > limit]
        mean = kind(above.astype(np.float64).sum() / max(len(above), 1))
        if abs(values[index]) > limit:
            expected[index] = np.copysign(mean, values[index])
    same_means(ops.fake_quantize_ternary(x, threshold, axis, block), torch.from_numpy(expected).to(dtype))


def test_gradients_of_binary_and_ternary():
    x = torch.tensor([[-1.5, -1.0, -0.2, 0.0], [0.3, 1.0, 1.01, 7.0]], requires_grad=True)
    grad = torch.randn(2, 4)
    ops.fake_quantize_binary(x, 0).backward(grad)
    assert torch.equal(x.grad, torch.where(x.abs() <= 1, grad, torch.zeros_like(grad)))
    for call in (lambda x: ops.fake_quantize_binary(x, 0, [], False), lambda x: ops.fake_quantize_ternary(x, 0.7, 0)):
        x.grad = None
        call(x).backward(grad)
        assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
def test_codebook_takes_the_nearest(axis, block, dtype):
    x = special(data((6, 8), dtype))
    shape = () if axis is None else reference.scale_shape(x.shape, axis, block)
    codebook = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(1))  # in any order
    values, which = by_block(x, axis, block)
    tables = codebook.numpy().reshape(-1, 5)
    expected, places = np.empty_like(values), np.zeros(values.shape, np.uint8)
    for index in np.ndindex(6, 8):
        table = tables[which[index]]
        order = np.argsort(table)
        place = order[reference.nearest([float(v) for v in table[order]], float(values[index]))]
        if np.isnan(values[index]):
            place = order[-1]
        places[index] = place
        expected[index] = values[index] if np.isnan(values[index]) else table[place]
    same(ops.fake_quantize_codebook(x, codebook, axis, block), torch.from_numpy(expected).to(dtype))
    if dtype is not torch.float64:  # middles there are not rounded to float32
        assert np.array_equal(ops.codebook_indices(x, codebook, axis, block).numpy(), places)


def test_layouts_of_weight_formats():
    x = data((2, 6, 4, 5))
    codebook = torch.linspace(-1, 1, 7)
    for call in (
        lambda x: ops.fake_quantize_binary(x, 1),
        lambda x: ops.fake_quantize_ternary(x, 0.7, -1, [3]),
        lambda x: ops.fake_quantize_codebook(x, codebook),
    ):
        for name, view in layouts(x).items():
            assert torch.equal(call(view), call(x)), name
            assert call(view).stride() == torch.empty_like(view).stride(), name
    for shape in [(0, 4), (3, 0)]:
        assert ops.fake_quantize_binary(torch.empty(shape)).shape == shape
        assert ops.fake_quantize_codebook(torch.empty(shape), codebook).shape == shape


def test_gradient_of_a_codebook_is_the_sum_over_its_members():
    x = data((6, 8)).requires_grad_()
    codebook = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    grad = torch.randn(6, 8)
    ops.fake_quantize_codebook(x, codebook, -1, [3]).backward(grad)
    assert torch.equal(x.grad, grad)
    places = ops.codebook_indices(x, codebook, -1, [3])
    expected = torch.zeros(6, 3, 4)
    for r, c in itertools.product(range(6), range(8)):
        expected[r, c // 3, int(places[r, c])] += grad[r, c]
    torch.testing.assert_close(codebook.grad, expected)


def error_of(points: np.ndarray, weights: np.ndarray, centers: np.ndarray) -> float:
    return float((weights * np.min((points[:, None] - centers[None]) ** 2, axis=1)).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_optimal(weighted):
    """Against all ways to cut a sorted line into pieces."""
    generator = np.random.default_rng(0)
    for entries in (2, 3, 4):
        points = np.sort(generator.normal(size=9)).astype(np.float32)
        weights = generator.uniform(0.1, 3, size=9).astype(np.float32) if weighted else np.ones(9, np.float32)
        best = np.inf
        for cuts in itertools.combinations(range(1, 9), entries - 1):
            pieces = np.split(np.arange(9), cuts)
            centers = np.array([np.average(points[p], weights=weights[p]) for p in pieces])
            best = min(
                best,
                sum(float((weights[p] * (points[p] - c) ** 2).sum()) for p, c in zip(pieces, centers, strict=True)),
            )
        given = torch.from_numpy(weights) if weighted else None
        found = ops.kmeans_codebook(torch.from_numpy(points), entries, None, [], given).numpy()
        assert error_of(points, weights, found) <= best * (1 + 1e-5) + 1e-9
        assert np.all(np.diff(found) >= 0)


def test_kmeans_of_many_values_beats_an_even_grid_and_stands_still():
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3))
    found = ops.kmeans_codebook(x, 16)
    assert torch.equal(found, ops.kmeans_codebook(x, 16))
    grid = torch.linspace(float(x.min()), float(x.max()), 16)
    errors = [float((ops.fake_quantize_codebook(x, c) - x).double().square().mean()) for c in (found, grid)]
    assert errors[0] < 0.01 * 1.2  # the optimum for 16 values of a normal distribution is 0.0095
    assert errors[0] < errors[1] / 2


def test_kmeans_of_few_different_values():
    codebook = ops.kmeans_codebook(torch.tensor([2.0, 2.0, -1.0]), 4)
    assert codebook.tolist() == [-1.0, 2.0, 2.0, 2.0]
    per_row = ops.kmeans_codebook(torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 3.0]]), 2, 0)
    assert per_row.tolist() == [[1.5, 5.0], [0.0, 3.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.fake_quantize_ternary(torch.ones(3), 0.0),
            ValueError,
            "[fake_quantize_ternary] threshold must be positive, got 0",
        ),
        (
            lambda: ops.fake_quantize_codebook(torch.ones(3), torch.ones(1)),
            ValueError,
            "[fake_quantize_codebook] codebook must have 2 to 256 entries on its last axis and 0 axes before it, got shape [1]",
        ),
        (
            lambda: ops.fake_quantize_codebook(torch.ones(3, 4), torch.ones(4, 2), 0),
            ValueError,
            "[fake_quantize_codebook] codebook must have shape [3, 2], got [4, 2]",
        ),
        (
            lambda: ops.fake_quantize_codebook(torch.ones(3), torch.ones(2).double()),
            TypeError,
            "[fake_quantize_codebook] codebook must be float32, got Double",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(3), 1),
            ValueError,
            "[kmeans_codebook] entries must be in 2..256, got 1",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(0), 2),
            ValueError,
            "[kmeans_codebook] input must not be empty, got shape [0]",
        ),
        (
            lambda: ops.kmeans_codebook(torch.tensor([1.0, torch.nan]), 2),
            ValueError,
            "[kmeans_codebook] input must be finite, got NaN or infinity",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(3), 2, None, [], torch.ones(2)),
            ValueError,
            "[kmeans_codebook] weights must have the input's shape [3], got [2]",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(3), 2, None, [], -torch.ones(3)),
            ValueError,
            "[kmeans_codebook] weights must be finite and not negative",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(2, 3), 2, 0, [], torch.zeros(2, 3)),
            ValueError,
            "[kmeans_codebook] the weights of every block must have a positive sum, got 0 for block 0",
        ),
        (
            lambda: ops.kmeans_codebook(torch.ones(3), 2, None, [], None, 0),
            ValueError,
            "[kmeans_codebook] iterations must be at least 1, got 0",
        ),
        (lambda: ops.a2q_limit(1, 8, False), ValueError, "[a2q_limit] accumulator_bits must be in 2..64, got 1"),
        (lambda: ops.a2q_limit(16, 17, False), ValueError, "[a2q_limit] input_bits must be in 1..16, got 17"),
        (
            lambda: ops.accumulator_range(torch.ones(3), None, 0, 1),
            TypeError,
            "[accumulator_range] weight must be of an integer type, got Float",
        ),
        (
            lambda: ops.accumulator_range(torch.ones(3, dtype=torch.int8), None, 2, 1),
            ValueError,
            "[accumulator_range] low must not be above high, got 2 and 1",
        ),
        (
            lambda: ops.check_accumulator(torch.full((2, 3), 127, dtype=torch.int8), 0, 0, 255, 16),
            ValueError,
            "[check_accumulator] sums must be within 16 bits, [-32768, 32767], got [0, 97155] for channel 0",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


# --- Accumulators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 16, 20])
def test_a2q_weights_overflow_no_accumulator(bits, signed):
    """Proven for every input by the worst case of each channel."""
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-1, 1, 12)[:, None]
    scale = weight.abs().amax(1) / 127
    y = ops.fake_quantize_a2q(weight, scale, 0, -127, 127, bits, 8, signed)
    q = torch.round(y / scale[:, None])
    assert torch.equal(q * scale[:, None], y)
    limit = (2 ** (bits - 1) - 1) * 2.0 ** (int(signed) - 8)
    assert ops.a2q_limit(bits, 8, signed) == limit
    assert float(q.abs().sum(1).max()) <= limit
    low, high = (-128, 127) if signed else (0, 255)
    ops.check_accumulator(q.to(torch.int8), 0, low, high, bits)
    # Without the bound it does overflow, and the check says so.
    if bits < 16:
        plain = torch.round(weight / scale[:, None]).to(torch.int8)
        with pytest.raises(ValueError, match=r"\[check_accumulator\] sums must be within"):
            ops.check_accumulator(plain, 0, low, high, bits)


def test_a2q_rounds_to_zero_and_leaves_small_channels_alone():
    weight = torch.tensor([[0.9, -1.9, 0.2], [3.7, 0.1, -0.4]])
    y = ops.fake_quantize_a2q(weight, torch.ones(2), 0, -128, 127, 20, 8, False)
    assert torch.equal(y, weight.trunc() + 0.0)


def test_a2q_gradient_is_that_of_the_scaled_weights():
    weight = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    scale = torch.full((3,), 0.05, dtype=torch.float64)
    grad = torch.randn(3, 20, dtype=torch.float64)
    ops.fake_quantize_a2q(weight, scale, 0, -1000, 1000, 12, 6, False).backward(grad)
    found, weight.grad = weight.grad, None
    limit = (1 - 2.0**-20) * (2**11 - 1) * 2.0**-6
    sums = (weight / scale[:, None]).abs().sum(1, keepdim=True)
    (weight * (limit / sums).clamp(max=1)).backward(grad)
    torch.testing.assert_close(found, weight.grad)


def test_range_of_an_accumulator_is_the_worst_of_all_orders():
    q = torch.tensor([[3, -2, 1]], dtype=torch.int8)
    low, high = ops.accumulator_range(q, 0, -1, 2)
    worst = [0, 0]
    for inputs in itertools.product((-1, 0, 1, 2), repeat=3):
        products = [int(a) * b for a, b in zip(q[0], inputs, strict=True)]
        for order in itertools.permutations(products):
            partial = np.cumsum(order)
            worst = [min(worst[0], partial.min()), max(worst[1], partial.max())]
    assert [int(low), int(high)] == worst
