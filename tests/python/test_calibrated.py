"""Wanda, SparseGPT and refit of one weight against plain numpy: definitions, order of errors, N:M, singular Hessians."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import available_instruction_sets
from correlated import correlated_layer

import rarefy as rf
from rarefy import _core

core = _core.pruning


def wanda(weight, norms, sparsity=None, pattern="unstructured", name="fc"):
    return core.wanda_weight(weight, norms, core.WandaOptions(sparsity, core.parse_pattern(pattern)), name)


def sparse_gpt(weight, hessian, sparsity=None, pattern="unstructured", block=128, damping=0.01, most=1.0, name="fc"):
    options = core.SparseGptOptions(sparsity, core.parse_pattern(pattern), block, damping, most)
    return core.sparse_gpt_weight(weight, hessian, options, name)


def refit(weight, mask, hessian, damping=1e-4, most=1.0, name="fc"):
    return core.refit_weight(weight, mask, hessian, core.RefitOptions(damping, most), name)


def hessian_of(x):
    return (x.double().t() @ x.double() / len(x)).to(x.dtype)


# ---- references, in float64 ------------------------------------------------------------------------------------------


def smallest(scores, count):
    """Indices of the `count` smallest; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


def groups_of(shape, m):
    """Flat indices of a row that form the groups of N:M: along the channels at each place of the kernel."""
    channels, places = shape[1], int(np.prod(shape[2:], dtype=int))
    return [
        [c * places + place for c in range(first, min(first + m, channels))]
        for place in range(places)
        for first in range(0, channels, m)
    ]


def reference_wanda(weight, norms, sparsity=None, nm=None):
    rows = weight.flatten(1).double().numpy()
    keep = np.ones(rows.shape, dtype=bool)
    for r, row in enumerate(rows):
        score = [abs(w) * norms[j].item() for j, w in enumerate(row)]
        if nm is None:
            keep[r, smallest(score, round(sparsity * len(row)))] = False
            continue
        for group in groups_of(weight.shape, nm[1]):
            for k in smallest([score[j] for j in group], max(0, len(group) - nm[0])):
                keep[r, group[k]] = False
    return keep


def reference_sparse_gpt(weight, hessian, sparsity=None, nm=None, block=128, damping=0.01):
    """Optimal brain surgery from left to right, a column at a time, with the inverse of what remains of the Hessian."""
    rows = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    count, n = rows.shape
    h += damping * np.diag(h).mean() * np.eye(n)
    rest = [np.linalg.inv(h[j:, j:]) for j in range(n)]
    keep = np.ones(rows.shape, dtype=bool)
    pruned = 0
    for begin in range(0, n, block):
        end = min(begin + block, n)
        if nm is None:
            cost = [rows[r, j] ** 2 / rest[j][0, 0] for r in range(count) for j in range(begin, end)]
            target = round(sparsity * count * end)
            for k in smallest(cost, target - pruned):
                keep[k // (end - begin), begin + k % (end - begin)] = False
            pruned = target
        for j in range(begin, end):
            if nm is not None and j % nm[1] == 0:
                group = range(j, min(j + nm[1], n))
                for r in range(count):
                    cost = [rows[r, i] ** 2 / rest[i][0, 0] for i in group]
                    for k in smallest(cost, max(0, len(group) - nm[0])):
                        keep[r, j + k] = False
            for r in range(count):
                if not keep[r, j]:
                    error = rows[r, j] / rest[j][0, 0]
                    rows[r, j:] -= error * rest[j][0]
                    rows[r, j] = 0
    return rows, keep


# ---- Wanda -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 33), (4, 6, 3, 3), (5, 3, 2), (3, 1, 5, 5)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_wanda_prunes_the_smallest_of_each_output(shape, sparsity):
    weight = torch.randn(shape)
    weight.view(-1)[3] = 0
    norms = torch.rand(weight[0].numel())
    pruned, mask, damping, note = wanda(weight, norms, sparsity)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.flatten(1).numpy(), reference_wanda(weight, norms, sparsity))
    assert torch.equal(pruned, weight * mask)
    assert (damping, note) == (0, "")


@pytest.mark.parametrize("shape", [(7, 32), (4, 8, 3, 3), (5, 10), (3, 7, 2)])
@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 5)])
def test_wanda_n_of_m(shape, nm):
    weight = torch.randn(shape)
    norms = torch.rand(weight[0].numel())
    pruned, mask, *_ = wanda(weight, norms, pattern=f"{nm[0]}:{nm[1]}")
    assert np.array_equal(mask.flatten(1).numpy(), reference_wanda(weight, norms, nm=nm))
    assert torch.equal(pruned, weight * mask)


def test_wanda_ties_and_groups():
    """Equal scores: the earlier goes. Every group has its own norms."""
    _, mask, *_ = wanda(torch.ones(2, 6), torch.ones(6), 0.5)
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 2
    weight = torch.ones(4, 3, 1, 1)
    norms = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    _, mask, *_ = wanda(weight, norms, 1 / 3)
    assert mask.flatten(1).tolist() == [[False, True, True]] * 2 + [[True, True, False]] * 2


# ---- SparseGPT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "features", "block"), [(6, 40, 16), (5, 33, 128), (9, 50, 7), (4, 20, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_sparse_gpt_is_the_column_by_column_algorithm(rows, features, block, sparsity):
    weight, x = correlated_layer(rows, features, 200, rank=16, dtype=torch.float64)
    hessian = hessian_of(x)
    pruned, mask, damping, note = sparse_gpt(weight, hessian, sparsity, block=block)
    expected, keep = reference_sparse_gpt(weight, hessian, sparsity, block=block)
    assert np.array_equal(mask.numpy(), keep)
    assert int((~mask).sum()) == round(sparsity * mask.numel())
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-8, atol=1e-10)
    assert not pruned[~mask].any()
    assert (damping, note) == (0.01, "")


@pytest.mark.parametrize(
    ("nm", "features", "block"), [((2, 4), 40, 16), ((1, 4), 32, 6), ((4, 8), 36, 128), ((2, 4), 22, 9)]
)
def test_sparse_gpt_n_of_m(nm, features, block):
    weight, x = correlated_layer(6, features, 200, rank=16, dtype=torch.float64)
    hessian = hessian_of(x)
    pruned, mask, *_ = sparse_gpt(weight, hessian, pattern=f"{nm[0]}:{nm[1]}", block=block)
    expected, keep = reference_sparse_gpt(weight, hessian, nm=nm, block=block)
    assert np.array_equal(mask.numpy(), keep)
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-8, atol=1e-10)
    for first in range(0, features, nm[1]):
        assert (mask[:, first : first + nm[1]].sum(1) == min(nm[0], features - first)).all()


def test_sparse_gpt_n_of_m_of_a_convolution_lies_along_channels():
    """The columns of one place of the kernel are those of a linear layer whose groups do not mix places."""
    weight = torch.randn(5, 8, 3, dtype=torch.float64)
    x = torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    hessian = hessian_of(x)
    pruned, mask, *_ = sparse_gpt(weight, hessian, pattern="2:4", block=4)
    assert (mask.view(5, 2, 4, 3).sum(2) == 2).all()
    order = torch.arange(24).view(8, 3).t().flatten()
    flat, keep, *_ = sparse_gpt(
        weight.flatten(1)[:, order].contiguous(), hessian[order][:, order].contiguous(), pattern="2:4", block=4
    )
    assert torch.equal(mask.flatten(1)[:, order], keep)
    torch.testing.assert_close(pruned.flatten(1)[:, order], flat)


def test_sparse_gpt_of_groups_is_that_of_each():
    weight = torch.randn(6, 4, 2, 2)
    x = torch.randn(2, 100, 16)
    hessian = torch.stack([hessian_of(x[0]), hessian_of(x[1])])
    pruned, mask, *_ = sparse_gpt(weight, hessian, 0.5)
    for g in range(2):
        part, keep, *_ = sparse_gpt(weight[3 * g : 3 * g + 3], hessian[g], 0.5)
        assert torch.equal(pruned[3 * g : 3 * g + 3], part)
        assert torch.equal(mask[3 * g : 3 * g + 3], keep)


def test_float32_is_close_to_float64():
    weight, x = correlated_layer(64, 300, 1000, rank=100, dtype=torch.float64)
    hessian = hessian_of(x)
    wide, mask, *_ = sparse_gpt(weight, hessian, 0.5)
    narrow, other, *_ = sparse_gpt(weight.float(), hessian.float(), 0.5)
    assert (mask != other).double().mean() < 2e-3
    error = core.relative_error(weight, wide, hessian)
    assert core.relative_error(weight.float(), narrow, hessian.float()) == pytest.approx(error, rel=0.01)


def test_instruction_sets_and_threads_give_equal_bits(restore_instruction_set):
    weight, x = correlated_layer(130, 200, 400, rank=64)
    hessian = hessian_of(x)
    threads = torch.get_num_threads()
    results = []
    try:
        for name, count in itertools.product(available_instruction_sets(), (1, 2)):
            _core.set_instruction_set(name)
            torch.set_num_threads(count)
            for pattern in ("unstructured", "2:4"):
                results.append((pattern, count, *sparse_gpt(weight, hessian, pattern=pattern, block=48)[:2]))
    finally:
        torch.set_num_threads(threads)
    for pattern, count, pruned, mask in results:
        first = next(r for r in results if r[:2] == (pattern, count))
        assert torch.equal(pruned, first[2])
        assert torch.equal(mask, first[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_types_and_strides(dtype):
    weight, x = correlated_layer(16, 32, 100, rank=16)
    hessian = hessian_of(x)
    weight = weight.to(dtype)
    pruned, mask, *_ = sparse_gpt(weight, hessian, 0.5)
    assert pruned.dtype == dtype
    assert int((~mask).sum()) == 256
    assert not pruned[~mask].any()
    other, keep, *_ = sparse_gpt(weight.t().contiguous().t(), hessian, 0.5)
    assert torch.equal(other, pruned)
    assert torch.equal(keep, mask)
    fitted, *_ = refit(weight, mask, hessian)
    assert fitted.dtype == dtype
    assert not fitted[~mask].any()
    four = weight.view(16, 8, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(sparse_gpt(four, hessian, 0.5)[0].flatten(1), pruned)


# ---- refit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refit_is_least_squares_per_row(dtype):
    """Against numpy.linalg.lstsq on the inputs themselves."""
    weight, x = correlated_layer(12, 30, 400, rank=16, dtype=dtype)
    mask = torch.rand(12, 30) < 0.5
    mask[3] = False
    mask[4] = True
    fitted, same, damping, note = refit(weight, mask, hessian_of(x), damping=0)
    assert torch.equal(same, mask)
    assert (damping, note) == (0, "")
    for r in range(12):
        kept = mask[r].numpy()
        expected = np.zeros(30)
        if kept.any():
            target = x.double().numpy() @ weight[r].double().numpy()
            expected[kept] = np.linalg.lstsq(x.double().numpy()[:, kept], target, rcond=None)[0]
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3
        np.testing.assert_allclose(fitted[r].numpy(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(fitted[4], weight[4])
    assert not fitted[3].any()


def test_refit_with_damping_is_drawn_to_the_dense_weights():
    weight, x = correlated_layer(6, 20, 300, rank=8, dtype=torch.float64)
    hessian = hessian_of(x)
    mask = torch.rand(6, 20) < 0.6
    fitted, *_ = refit(weight, mask, hessian, damping=0.3)
    added = 0.3 * hessian.diagonal().mean().item()
    for r in range(6):
        kept = mask[r].numpy()
        rows = np.vstack([np.linalg.cholesky(hessian.numpy()).T, np.sqrt(added) * np.eye(20)])
        expected = np.linalg.lstsq(rows[:, kept], rows @ weight[r].numpy(), rcond=None)[0]
        np.testing.assert_allclose(fitted[r].numpy()[kept], expected, rtol=1e-9, atol=1e-11)


def test_refit_of_groups():
    weight = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    hessian = torch.stack([hessian_of(x[0]), hessian_of(x[1])])
    mask = torch.rand(weight.shape) < 0.5
    fitted, *_ = refit(weight, mask, hessian)
    for g in range(2):
        rows = slice(3 * g, 3 * g + 3)
        assert torch.equal(fitted[rows], refit(weight[rows], mask[rows], hessian[g])[0])


# ---- errors, in their order ------------------------------------------------------------------------------------------


def four_errors(weight, hessian, pattern):
    def error(pruned):
        return core.relative_error(weight, pruned, hessian)

    masks = rf.pruning.choose_masks({"fc": weight}, 0.5, pattern=pattern)
    magnitude = weight * rf.pruning.unpack_mask(masks["fc"], weight.shape)
    ours, mask, *_ = sparse_gpt(weight, hessian, pattern=pattern)
    return [
        error(magnitude),
        error(wanda(weight, hessian.diagonal().sqrt(), pattern=pattern)[0]),
        error(ours),
        error(refit(weight, mask, hessian)[0]),
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("unstructured", [0.070, 0.019, 0.0107, 0.0066]), ("2:4", [0.131, 0.049, 0.0285, 0.0174])],
)
def test_errors_of_a_layer_with_correlated_inputs(pattern, expected):
    """512 x 1024 in float32, 50 %: every method in its place, and near the figures of docs/pruning.md."""
    weight, x = correlated_layer()
    errors = four_errors(weight, hessian_of(x), pattern)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(expected[0], rel=0.03)
    assert errors[1] == pytest.approx(expected[1], rel=0.03)
    assert errors[2] <= expected[2]
    assert errors[3] <= expected[3]


def test_relative_error_is_that_of_outputs():
    weight, x = correlated_layer(8, 24, 60, rank=8, dtype=torch.float64)
    other = weight + 0.1 * torch.randn_like(weight)
    expected = ((x @ (weight - other).t()).square().sum() / (x @ weight.t()).square().sum()).item()
    assert core.relative_error(weight, other, hessian_of(x)) == pytest.approx(expected)
    assert core.relative_error(weight, weight, hessian_of(x)) == 0
    assert core.relative_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0
    assert core.relative_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)) == math.inf


# ---- singular Hessians and bad input ---------------------------------------------------------------------------------


def test_dead_inputs_are_pruned_first_and_disturb_nothing():
    weight, x = correlated_layer(10, 40, 300, rank=16)
    dead = [3, 17, 18, 39]
    x[:, dead] = 0
    hessian = hessian_of(x)
    pruned, mask, damping, note = sparse_gpt(weight, hessian, 0.5, block=40)
    assert not mask[:, dead].any()
    assert (damping, note) == (0.01, "")
    assert pruned.isfinite().all()
    weight = weight.sign() * (0.5 + weight.abs())  # no weight is next to nothing by itself
    light, kept, *_ = sparse_gpt(weight, hessian, 0.02)  # 8 elements: the least of the dead
    assert int((~kept).sum()) == 8
    alive = [j for j in range(40) if j not in dead]
    assert kept[:, alive].all()
    assert torch.equal(light[:, alive], weight[:, alive])
    assert torch.equal(light[kept], weight[kept])


def test_fewer_samples_than_features():
    weight, x = correlated_layer(20, 64, 10, rank=8)
    hessian = hessian_of(x)
    pruned, mask, *_ = sparse_gpt(weight, hessian, 0.5)
    fitted, *_ = refit(weight, mask, hessian)
    magnitude = wanda(weight, torch.ones(64), 0.5)[0]
    errors = [core.relative_error(weight, w, hessian) for w in (fitted, pruned, magnitude)]
    assert errors == sorted(errors)
    assert fitted.isfinite().all()


def test_no_signal_at_all_is_magnitude():
    weight = torch.randn(6, 16)
    pruned, mask, *_ = sparse_gpt(weight, torch.zeros(16, 16), 0.5, block=16)
    order = weight.abs().flatten().sort().indices[:48]
    assert not mask.flatten()[order].any()
    torch.testing.assert_close(pruned, weight * mask)
    fitted, *_ = refit(weight, mask, torch.zeros(16, 16))
    torch.testing.assert_close(fitted, weight * mask)


def indefinite(n, size):
    """Symmetric, with a smallest eigenvalue of -size times the mean of the diagonal."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    eigenvalues = torch.ones(n, dtype=torch.float64)
    eigenvalues[0] = -size
    h = q @ torch.diag(eigenvalues / eigenvalues.mean()) @ q.t()
    return ((h + h.t()) / 2).float()


def test_damping_grows_until_the_hessian_is_positive_definite():
    weight = torch.randn(8, 30)
    _, mask, damping, note = sparse_gpt(weight, indefinite(30, 0.05), 0.5)
    assert damping == pytest.approx(0.1)
    assert note == "damping raised to 0.1"
    assert int((~mask).sum()) == 120
    _, _, damping, _ = sparse_gpt(weight, torch.eye(30), 0.5, damping=0)
    assert damping == 0
    with pytest.raises(
        ValueError, match=r"the Hessian of 'fc' must be positive definite with a damping of at most 0.1"
    ):
        sparse_gpt(weight, indefinite(30, 0.5), 0.5, most=0.1)


def test_rows_that_cannot_be_refit_keep_their_weights():
    weight, mask = torch.randn(8, 30), torch.ones(8, 30, dtype=torch.bool)
    mask[:4, ::2] = False
    mask[4:, 15] = False
    hessian = torch.eye(30)
    hessian[0, 0] = -3.0  # even columns are pruned in the first rows
    fitted, _, damping, note = refit(weight, mask, hessian, damping=0.01, most=1.0)
    assert note == "4 of 8 rows keep their weights: not positive definite at a damping of 1"
    assert torch.equal(fitted[4:], weight[4:] * mask[4:])
    torch.testing.assert_close(fitted[:4], weight[:4] * mask[:4])
    assert damping == pytest.approx(0.01)
    hessian[0, 0] = -0.05
    _, _, damping, note = refit(weight, mask, hessian, damping=0.01, most=1.0)
    assert note == "damping raised up to 0.1 in 4 of 8 rows"
    assert damping == pytest.approx(0.1)


def test_errors():
    weight, hessian = torch.randn(4, 8), torch.eye(8)
    before = weight.clone()
    bad = weight.clone()
    bad[1, 1] = math.nan
    mask = torch.ones(4, 8, dtype=torch.bool)
    calls = {
        "wanda": lambda w, h=hessian: wanda(w, h.diagonal() if h.dim() == 2 else h, 0.5),
        "sparse_gpt": lambda w, h=hessian: sparse_gpt(w, h, 0.5),
        "refit": lambda w, h=hessian: refit(w, mask, h),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"\[{name}\] weights must be finite, got NaN or infinity in 'fc'"):
            call(bad)
        with pytest.raises(ValueError, match=rf"\[{name}\] 'fc' of sizes \[4, 8\] needs .* of 8 input features"):
            call(weight, torch.eye(7))
        with pytest.raises(ValueError, match=rf"\[{name}\] what is known of the inputs of 'fc' must be finite"):
            call(weight, hessian * math.inf)
        with pytest.raises(ValueError, match=rf"\[{name}\] a weight must be of 2 or more dimensions"):
            call(torch.randn(8))
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"\[sparse_gpt\] sparsity must be in \[0, 1\)"):
            sparse_gpt(weight, hessian, sparsity)
        with pytest.raises(ValueError, match=r"\[wanda\] sparsity must be in \[0, 1\)"):
            wanda(weight, torch.ones(8), sparsity)
    with pytest.raises(ValueError, match=r"sparsity of 2:4 must be unset or 0\.5, got 0\.6"):
        sparse_gpt(weight, hessian, 0.6, "2:4")
    assert torch.equal(sparse_gpt(weight, hessian, 0.5, "2:4")[0], sparse_gpt(weight, hessian, pattern="2:4")[0])
    with pytest.raises(ValueError, match="pattern must be unstructured or n:m, got '4x1'"):
        sparse_gpt(weight, hessian, 0.5, "4x1")
    with pytest.raises(ValueError, match=r"'fc': NM\(n=2, m=16\) needs 16 or more input"):
        sparse_gpt(weight, hessian, pattern="2:16")
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        sparse_gpt(weight, hessian, block=0)
    with pytest.raises(ValueError, match="must have 0 <= damping <= max_damping, got 2 and 1"):
        sparse_gpt(weight, hessian, damping=2.0)
    with pytest.raises(ValueError, match="must have 0 <= damping <= max_damping, got -1 and 1"):
        refit(weight, mask, hessian, damping=-1.0)
    with pytest.raises(ValueError, match=r"the mask of 'fc' must be bool of sizes \[4, 8\], got Float"):
        refit(weight, mask.float(), hessian)
    with pytest.raises(ValueError, match="both weights must have the same sizes"):
        core.relative_error(weight, weight[:2], hessian)
    assert torch.equal(weight, before)
