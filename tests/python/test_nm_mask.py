"""rarefy::nm_mask, score_mask, pack_mask and unpack_mask against plain loops and NumPy's stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOAT_TYPES, layouts
from test_mask import isa, pack, unpack

ops = torch.ops.rarefy
__all__ = ["isa"]  # the fixture


def nm_reference(x: torch.Tensor, n: int, m: int, dim: int, kept: np.ndarray | None = None, magnitude=True):
    """Group by group: what the mask prunes first, then the smallest, of equal ones the earlier."""
    values = x.detach().double().movedim(dim, -1)
    values = values.abs() if magnitude else values
    flat = values.reshape(-1, values.shape[-1]).numpy()
    alive = np.ones(x.shape, dtype=bool) if kept is None else kept.reshape(x.shape)
    alive = np.moveaxis(alive, dim, -1).reshape(flat.shape)
    out = alive.copy()
    for line in range(flat.shape[0]):
        for begin in range(0, flat.shape[1], m):
            group = range(begin, min(begin + m, flat.shape[1]))
            order = sorted(group, key=lambda i: (alive[line, i], flat[line, i], i))
            for i in order[: max(0, len(group) - n)]:
                out[line, i] = False
    return np.moveaxis(out.reshape(values.shape), -1, dim).reshape(-1)


def check(x, n, m, dim=1, kept=None, magnitude=True):
    mask = ops.nm_mask(x, n, m, dim, None if kept is None else pack(kept), magnitude)
    got = unpack(mask, x.numel())
    np.testing.assert_array_equal(got, nm_reference(x, n, m, dim, kept, magnitude))
    return mask


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 5), (3, 40), (16, 32)])
@pytest.mark.parametrize("magnitude", [True, False])
def test_matches_loops(isa, dtype, n, m, magnitude):
    generator = torch.Generator().manual_seed(n * 100 + m)
    for shape in [(5, 40), (7, 41), (3, 52), (1, 400), (2, 44, 3, 3)]:
        x = (torch.randint(-6, 7, shape, generator=generator) / 4).to(dtype)  # many ties
        check(x, n, m, magnitude=magnitude)
        kept = torch.rand(shape, generator=generator).numpy().reshape(-1) > 0.4
        check(x, n, m, kept=kept, magnitude=magnitude)
    check(torch.randn(33, 64, generator=generator).to(dtype), n, m, magnitude=magnitude)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_dimensions(dim):
    check(torch.randn(8, 12, 9), 2, 4, dim)


def test_layouts_mean_the_same():
    x = torch.randn(6, 8, 3, 5)
    for name, view in layouts(x).items():
        assert torch.equal(ops.nm_mask(view, 2, 4), ops.nm_mask(x, 2, 4)), name
        assert torch.equal(ops.nm_mask(view, 2, 4, 3), ops.nm_mask(x, 2, 4, 3)), name


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_special_values(isa, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    row = [float("inf"), -0.0, 0.0, -tiny, float("-inf"), float("inf"), 1.0, float("-inf"), 0.0, -0.0, 0.0, -0.0]
    x = torch.tensor([row * 6], dtype=dtype)
    for n in (1, 2, 3):
        check(x, n, 4)
        check(x, n, 4, magnitude=False)
    expected = [False, False, True, True] * 3
    assert unpack(ops.nm_mask(torch.zeros(1, 12, dtype=dtype), 2, 4), 12).tolist() == expected


def test_empty_and_threads():
    assert ops.nm_mask(torch.empty(0, 8), 2, 4).numel() == 0
    x = torch.randn(300, 1024)
    threads = torch.get_num_threads()
    many = ops.nm_mask(x, 2, 4)
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.nm_mask(x, 2, 4), many)
    finally:
        torch.set_num_threads(threads)


def score_reference(scores, sparsity, kept=None):
    flat = np.concatenate([s.detach().double().contiguous().flatten().numpy() for s in scores]) + 0.0
    alive = np.ones(flat.size, dtype=bool) if kept is None else np.concatenate(kept)
    order = np.lexsort((np.arange(flat.size), flat, alive))
    out = np.ones(flat.size, dtype=bool)
    out[order[: max(round(sparsity * flat.size), int((~alive).sum()))]] = False
    return np.split(out, np.cumsum([s.numel() for s in scores])[:-1])


def check_scores(scores, sparsity, kept=None):
    masks = ops.score_mask(scores, sparsity, None if kept is None else [pack(k) for k in kept])
    for mask, score, expected in zip(masks, scores, score_reference(scores, sparsity, kept), strict=True):
        np.testing.assert_array_equal(unpack(mask, score.numel()), expected)
    return masks


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from(FLOAT_TYPES),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_scores_match_stable_sort(sizes, sparsity, dtype, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [(torch.randint(-levels, levels + 1, (n,), generator=generator) / 8).to(dtype) for n in sizes]
    scores = [torch.where(torch.rand(s.shape, generator=generator) > 0.5, s, -s) for s in scores]  # -0 too
    masks = check_scores(scores, sparsity)
    assert sum(s.numel() - int(unpack(m, s.numel()).sum()) for s, m in zip(scores, masks, strict=True)) == round(
        sparsity * sum(sizes)
    )
    kept = [torch.rand(s.shape, generator=generator).numpy() > 0.5 for s in scores]
    check_scores(scores, sparsity, kept)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.003, 0.5, 0.77, 0.9999])
def test_many_scores(isa, dtype, sparsity):
    generator = torch.Generator().manual_seed(5)
    scores = [torch.randn(n, generator=generator).to(dtype) for n in (150_001, 3, 70_000, 64)]
    check_scores(scores, sparsity)
    check_scores([torch.full((100_001,), -1.5, dtype=dtype), torch.full((40_000,), -1.5, dtype=dtype)], sparsity)
    scores[0][7] = float("-inf")
    scores[2][9] = float("inf")
    check_scores(scores, sparsity)


def test_scores_of_mixed_types():
    check_scores([torch.randn(1000).to(dtype) for dtype in FLOAT_TYPES], 0.4)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 63, 64, 65, 1000, 50_001])
def test_pack_and_unpack(n):
    kept = torch.rand(n) > 0.5
    mask = ops.pack_mask(kept)
    assert torch.equal(mask, pack(kept.numpy()))
    assert torch.equal(ops.unpack_mask(mask, [n]), kept)


def test_pack_takes_any_strides():
    kept = torch.rand(5, 6, 7, 3) > 0.5
    for view in layouts(kept).values():
        assert torch.equal(ops.pack_mask(view), pack(kept.numpy().reshape(-1)))
    assert torch.equal(ops.unpack_mask(ops.pack_mask(kept), kept.shape), kept)
    assert ops.unpack_mask(ops.pack_mask(torch.tensor(True)), []).item() is True


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_kernels_of_other_devices_agree(dtype):
    """What a GPU runs is made of torch's operators, and so runs here too."""
    elsewhere = torch._C.DispatchKey.CompositeExplicitAutograd
    generator = torch.Generator().manual_seed(3)
    x = (torch.randint(-9, 10, (6, 11, 3), generator=generator) / 4).to(dtype)
    kept = torch.rand(x.shape, generator=generator) > 0.4
    packed = ops.pack_mask(kept)
    assert torch.equal(ops.pack_mask.default._op_dk(elsewhere, kept), packed)
    assert torch.equal(ops.unpack_mask.default._op_dk(elsewhere, packed, list(kept.shape)), kept)
    for mask in (None, packed):
        for magnitude in (True, False):
            for n, m, dim in ((2, 4, 1), (1, 3, 0), (1, 2, -1), (3, 4, 1)):
                arguments = (x, n, m, dim, mask, magnitude)
                assert torch.equal(ops.nm_mask.default._op_dk(elsewhere, *arguments), ops.nm_mask(*arguments))
        scores = [x, x.flip(0)]
        masks = None if mask is None else [mask, mask]
        for sparsity in (0.0, 0.3, 0.8):
            theirs = ops.score_mask.default._op_dk(elsewhere, scores, sparsity, masks)
            for a, b in zip(theirs, ops.score_mask(scores, sparsity, masks), strict=True):
                assert torch.equal(a, b)


def test_opcheck():
    x = torch.randn(5, 12)
    mask = ops.nm_mask(x, 2, 4)
    scores = [torch.randn(70), torch.randn(5, 9, requires_grad=True)]
    torch.library.opcheck(ops.nm_mask, (x, 2, 4))
    torch.library.opcheck(ops.nm_mask, (x.clone().requires_grad_(), 1, 3, 0, mask, False))
    torch.library.opcheck(ops.score_mask, (scores, 0.3))
    torch.library.opcheck(ops.score_mask, (scores, 0.3, [ops.pack_mask(s > 0) for s in scores]))
    torch.library.opcheck(ops.pack_mask, (x > 0,))
    torch.library.opcheck(ops.unpack_mask, (mask, [5, 12]))


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def kept(x):
        return x * ops.unpack_mask(ops.nm_mask(x, 2, 4), x.shape)

    x = torch.randn(6, 16)
    assert int((kept(x) == 0).sum()) == 48


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.nm_mask(torch.ones(2, 8), 4, 4), ValueError, r"\[nm_mask\] must have 1 <= n < m, got n 4 and m 4"),
        (lambda: ops.nm_mask(torch.ones(2, 8), 0, 4), ValueError, r"must have 1 <= n < m, got n 0 and m 4"),
        (
            lambda: ops.nm_mask(torch.ones(2, 3), 2, 4),
            ValueError,
            r"dimension 1 must have at least m = 4 elements, got 3",
        ),
        (lambda: ops.nm_mask(torch.ones(8), 2, 4), IndexError, r"dim must be in \[-1, 1\) for an input of 1 dim"),
        (
            lambda: ops.nm_mask(torch.ones(2, 8).int(), 2, 4),
            TypeError,
            r"x must be float32, float64, bfloat16 or float16",
        ),
        (
            lambda: ops.nm_mask(torch.ones(9, 8), 2, 4, 1, torch.zeros(8, dtype=torch.uint8)),
            ValueError,
            r"\[nm_mask\] mask must hold 16 bytes for 72 elements, got 8",
        ),
        (
            lambda: ops.score_mask([torch.ones(3)], 1.0),
            ValueError,
            r"\[score_mask\] sparsity must be in \[0, 1\), got 1",
        ),
        (lambda: ops.score_mask([torch.ones(3)], 0.5, []), ValueError, "one mask per score, got 0 masks for 1 scores"),
        (lambda: ops.pack_mask(torch.ones(3)), TypeError, r"\[pack_mask\] kept must be bool, got Float"),
        (
            lambda: ops.unpack_mask(torch.zeros(8, dtype=torch.uint8), [65]),
            ValueError,
            r"\[unpack_mask\] mask must hold 16 bytes for 65 elements, got 8",
        ),
        (lambda: ops.unpack_mask(torch.zeros(8), [5]), TypeError, r"\[unpack_mask\] mask must be uint8, got Float"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("columns", [8, 9])
def test_nan(isa, dtype, columns):
    x = torch.randn(40, columns).to(dtype)
    x.view(-1)[77] = -float("nan")
    for magnitude in (True, False):
        with pytest.raises(ValueError, match=r"\[nm_mask\] x must not be NaN, got NaN in tensor 0 at flat index 77"):
            ops.nm_mask(x, 2, 4, 1, None, magnitude)
    for sparsity in (0.0, 0.5):
        with pytest.raises(
            ValueError, match=r"\[score_mask\] scores must not be NaN, got NaN in tensor 1 at flat index 77"
        ):
            ops.score_mask([x.abs().nan_to_num(), x], sparsity)
