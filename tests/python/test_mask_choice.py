"""choose_masks: every pattern, scope, shape and type against plain loops."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import FLOAT_TYPES, layouts
from test_mask import pack, unpack

import rarefy as rf
from rarefy._core.pruning import misfit
from rarefy.pruning import NM, Block, Column, Filter, Head, Row, Unstructured, choose_masks, erk_sparsities

UNITS = [Block(4, 1), Block(3, 5), Row(), Column(), Filter(), Head(2)]


def units_of(pattern, shape) -> list[np.ndarray]:
    """Flat indices of each unit, in the order of units."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    rows, matrix = shape[0], index.reshape(shape[0], -1)
    if isinstance(pattern, (Row, Filter)):
        return [index[i].reshape(-1) for i in range(rows)]
    if isinstance(pattern, Column):
        return [index[:, j].reshape(-1) for j in range(shape[1])]
    if isinstance(pattern, Head):
        return [index[i : i + pattern.size].reshape(-1) for i in range(0, rows, pattern.size)]
    return [
        matrix[i : i + pattern.rows, j : j + pattern.columns].reshape(-1)
        for i in range(0, rows, pattern.rows)
        for j in range(0, matrix.shape[1], pattern.columns)
    ]


def unit_reference(pattern, shapes, scores, kept, sparsity) -> list[np.ndarray]:
    """Whole units of the lowest mean, as many as come nearest to the number of elements."""
    units = []
    for t, shape in enumerate(shapes):
        for flat in units_of(pattern, shape):
            alive = [int(i) for i in flat if kept[t][i]]
            total = 0.0
            for i in alive:
                total += float(scores[t][i])
            units.append((total / len(alive) if alive else None, t, alive, len(flat)))
    total = sum(len(k) for k in kept)
    dead = sum(int((~k).sum()) for k in kept)
    already = sum(1 for u in units if not u[2])
    order = sorted((u for u in units if u[2]), key=lambda u: u[0])
    if len({u[3] for u in units}) == 1 and all(len(u[2]) in (0, u[3]) for u in units):
        count = max(0, round(sparsity * len(units)) - already)
    else:
        sums = np.concatenate([[0], np.cumsum([len(u[2]) for u in order])])
        distance = np.abs(sums - (sparsity * total - dead))
        near = np.flatnonzero(distance == distance.min())
        count = int(near[0] if len(near) == 1 or (already + near[0]) % 2 == 0 else near[1])
    out = [k.copy() for k in kept]
    for _, t, alive, _ in order[:count]:
        out[t][alive] = False
    return out


def element_reference(scores, kept, sparsity):
    flat, alive = np.concatenate(scores), np.concatenate(kept)
    order = np.lexsort((np.arange(flat.size), flat, alive))
    out = np.ones(flat.size, dtype=bool)
    out[order[: max(round(sparsity * flat.size), int((~alive).sum()))]] = False
    return np.split(out, np.cumsum([s.size for s in scores])[:-1])


def nm_reference(pattern, shapes, scores, kept, sparsity):
    candidates, prunable, total = [], 0, 0
    for t, shape in enumerate(shapes):
        index = np.moveaxis(np.arange(int(np.prod(shape))).reshape(shape), 1, -1).reshape(-1, shape[1])
        total += index.size
        for line in index:
            for begin in range(0, len(line), pattern.m):
                group = line[begin : begin + pattern.m]
                prunable += max(0, len(group) - pattern.n)
                order = sorted(group, key=lambda i: (kept[t][i], scores[t][i], i))
                candidates += [(t, i) for i in order[: max(0, len(group) - pattern.n)] if kept[t][i]]
    out = [k.copy() for k in kept]
    full = 1 - pattern.n / pattern.m
    if sparsity < full - 1e-9:
        exact = prunable * pattern.m == total * (pattern.m - pattern.n)
        count = round(sparsity * total) if exact else round(sparsity / full * prunable)
        more = max(0, count - sum(int((~k).sum()) for k in kept))
        candidates = sorted(candidates, key=lambda c: (scores[c[0]][c[1]], c))[:more]
    for t, i in candidates:
        out[t][i] = False
    return out


def reference(pattern, shapes, scores, kept, sparsity, scope):
    pick = {Unstructured: lambda p, s, *rest: element_reference(*rest), NM: nm_reference}.get(
        type(pattern), unit_reference
    )
    if scope == "global":
        return pick(pattern, shapes, scores, kept, sparsity)
    shares = erk_sparsities([list(s) for s in shapes], sparsity) if scope == "erk" else [sparsity] * len(shapes)
    return [
        pick(pattern, [shapes[t]], [scores[t]], [kept[t]], min(shares[t], np.nextafter(1, 0)))[0]
        for t in range(len(shapes))
    ]


def check(pattern, shapes, sparsity, scope, dtype, seed, with_scores=False, with_masks=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return (torch.randint(-9, 10, shape, generator=generator) / 4).to(dtype)  # ties, exact sums

    weights = {f"layer{t}.weight": draw(s) for t, s in enumerate(shapes)}
    scores = {name: draw(w.shape) for name, w in weights.items()} if with_scores else None
    kept = [torch.rand(w.numel(), generator=generator).numpy() > 0.3 if with_masks else np.ones(w.numel(), bool)
            for w in weights.values()]  # fmt: skip
    values = [
        (w.abs() if scores is None else scores[name]).double().reshape(-1).numpy() + 0.0 for name, w in weights.items()
    ]
    before = copy.deepcopy(weights)
    got = choose_masks(
        weights,
        sparsity,
        scope=scope,
        pattern=pattern,
        scores=scores,
        masks=dict(zip(weights, map(pack, kept), strict=True)) if with_masks else None,
    )
    assert list(got) == list(weights)
    for name, expected in zip(weights, reference(pattern, shapes, values, kept, sparsity, scope), strict=True):
        np.testing.assert_array_equal(unpack(got[name], weights[name].numel()), expected, err_msg=f"{pattern} {name}")
        assert torch.equal(weights[name], before[name])
    return got


SHAPES = {
    "linear": [(6, 8), (10, 13), (4, 5)],
    "conv": [(6, 8, 3, 3), (4, 5, 1, 1), (8, 13, 2, 2)],
    "odd": [(2, 7, 3), (14, 5, 2)],
}


CASES = [
    (pattern, kind)
    for pattern in [Unstructured(), *UNITS]
    for kind, shapes in SHAPES.items()
    if not any(misfit(pattern, shape) for shape in shapes)
]


@pytest.mark.parametrize("scope", ["local", "global", "erk"])
@pytest.mark.parametrize(("pattern", "kind"), CASES, ids=str)
def test_matches_loops(pattern, kind, scope):
    for i, dtype in enumerate(FLOAT_TYPES):
        for sparsity in (0.0, 0.13, 0.5, 0.85):
            for with_scores in (False, True):
                for with_masks in (False, True):
                    check(pattern, SHAPES[kind], sparsity, scope, dtype, i, with_scores, with_masks)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 3), NM(3, 5)], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_nm_matches_loops(pattern, kind, scope):
    full = 1 - pattern.n / pattern.m
    for i, dtype in enumerate(FLOAT_TYPES):
        for sparsity in (0.0, 0.1, full * 0.7, full):
            for with_scores in (False, True):
                for with_masks in (False, True):
                    check(pattern, SHAPES[kind], sparsity, scope, dtype, i, with_scores, with_masks)


@settings(max_examples=120, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=4),
    sparsity=st.floats(0, 1, exclude_max=True),
    pattern=st.sampled_from([Unstructured(), Block(1, 4), Block(2, 3), Row(), Column(), Filter()]),
    scope=st.sampled_from(["local", "global", "erk"]),
    dtype=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**31),
    with_scores=st.booleans(),
    with_masks=st.booleans(),
)
def test_any_shapes(shapes, sparsity, pattern, scope, dtype, seed, with_scores, with_masks):
    assume(not any(misfit(pattern, shape) for shape in shapes))
    check(pattern, shapes, sparsity, scope, dtype, seed, with_scores, with_masks)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 1, exclude_max=True),
    scope=st.sampled_from(["global", "erk"]),
)
def test_counts_are_exact(shapes, sparsity, scope):
    weights = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    total = sum(w.numel() for w in weights.values())
    masks = choose_masks(weights, sparsity, scope=scope)
    pruned = sum(w.numel() - int(unpack(masks[k], w.numel()).sum()) for k, w in weights.items())
    assert pruned == round(sparsity * total)


def test_erk_by_hand():
    """Densities in proportion to (in + out + kernel) / (in * out * kernel); the first layer would be above 1."""
    shapes = [[4, 3, 3, 3], [64, 32, 3, 3], [100, 64]]
    got = erk_sparsities(shapes, 0.9)
    total = 108 + 18432 + 6400
    kept = total - round(0.9 * total)
    epsilon = (kept - 108) / (64 + 32 + 3 + 3 + 100 + 64)
    assert epsilon * (4 + 3 + 3 + 3) / 108 > 1  # dense
    assert got[0] == 0
    assert abs((1 - got[1]) * 18432 - epsilon * 102) <= 1
    assert abs((1 - got[2]) * 6400 - epsilon * 164) <= 1
    assert sum(round(s * n) for s, n in zip(got, (108, 18432, 6400), strict=True)) == total - kept
    assert erk_sparsities(shapes, 0.0) == [0.0, 0.0, 0.0]


def test_layers_have_their_own_sparsity():
    torch.manual_seed(0)
    weights = {name: torch.randn(10, 20) for name in ("a.weight", "b.weight", "head.fc.weight", "head.out.weight")}
    masks = choose_masks(weights, 0.5, layers={"head.out": 0.0, "head.*": 0.9})
    pruned = {name: 200 - int(unpack(mask, 200).sum()) for name, mask in masks.items()}
    assert pruned["head.out.weight"] == 0  # the first pattern that fits
    assert pruned["head.fc.weight"] == 180
    assert pruned["a.weight"] + pruned["b.weight"] == 200
    alone = choose_masks({k: weights[k] for k in ("a.weight", "b.weight")}, 0.5)
    assert torch.equal(alone["a.weight"], masks["a.weight"])


def test_masks_grow_towards_nm():
    """Each step keeps what the one before it pruned, and the last one is exactly 2:4."""
    torch.manual_seed(1)
    weight, mask, before = torch.randn(32, 3, 16).movedim(1, 2), None, 0
    for step in range(1, 11):
        sparsity = 0.5 * step / 10
        masks = choose_masks({"w": weight}, sparsity, pattern="2:4", masks=mask)
        kept = rf.pruning.unpack_mask(masks["w"], weight.shape)
        assert weight.numel() - int(kept.sum()) == round(sparsity * weight.numel()) > before
        if mask:
            assert not (kept & ~rf.pruning.unpack_mask(mask["w"], weight.shape)).any()
        assert (kept.movedim(1, -1).reshape(-1, 4).sum(1) >= 2).all()
        mask, before = masks, weight.numel() - int(kept.sum())
        weight = weight + 0.1 * torch.randn_like(weight)  # training goes on
    assert (kept.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_regrow():
    weight = torch.arange(1.0, 9.0)
    mask = {"w": pack(np.array([True] * 4 + [False] * 4))}
    held = choose_masks({"w": weight}, 0.5, masks=mask)["w"]
    free = choose_masks({"w": weight}, 0.5, masks=mask, regrow=True)["w"]
    assert unpack(held, 8).tolist() == [True] * 4 + [False] * 4
    assert unpack(free, 8).tolist() == [False] * 4 + [True] * 4
    for pattern in ("row", "1x2", "1:2"):
        matrix = weight.view(4, 2)
        again = choose_masks({"w": matrix}, 0.5, pattern=pattern, masks=mask, regrow=True)["w"]
        assert torch.equal(again, choose_masks({"w": matrix}, 0.5, pattern=pattern)["w"])


def test_results_do_not_depend_on_threads_or_strides():
    torch.manual_seed(2)
    x = torch.randn(64, 48, 3, 3)
    for pattern in ("unstructured", "2:4", "4x1", "7x11", "row", "column", "filter", "head:8"):
        sparsity = 0.4
        expected = choose_masks({"x": x}, sparsity, pattern=pattern)["x"]
        for name, view in layouts(x).items():
            assert torch.equal(choose_masks({"x": view}, sparsity, pattern=pattern)["x"], expected), (pattern, name)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(choose_masks({"x": x}, sparsity, pattern=pattern)["x"], expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 3), *UNITS, Head(64)], ids=str)
def test_values(pattern):
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern
    assert eval(repr(pattern)) == pattern
    assert rf.pruning.parse_pattern(pattern.name) == pattern
    assert rf.pruning.parse_pattern(pattern) == pattern
    assert len({pattern, pickle.loads(pickle.dumps(pattern))}) == 1
    assert pattern != NM(5, 7)


@pytest.mark.parametrize(
    "text", ["", "2:", ":4", "2:4:8", "2 : 4", "x", "4x", "rows", "head", "head:", "head:x", "2.5:4"]
)
def test_unknown_patterns(text):
    with pytest.raises(ValueError, match=r"\[parse_pattern\] pattern must be 'unstructured', 'n:m'"):
        rf.pruning.parse_pattern(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(4, 4), r"\[NM\] must have 1 <= n < m, got n 4 and m 4"),
        (lambda: NM(0, 4), r"\[NM\] must have 1 <= n < m, got n 0 and m 4"),
        (lambda: rf.pruning.parse_pattern("5:4"), r"\[NM\] must have 1 <= n < m, got n 5 and m 4"),
        (lambda: Block(0, 3), r"\[Block\] rows and columns must be at least 1, got 0 and 3"),
        (lambda: Head(0), r"\[Head\] size must be at least 1, got 0"),
    ],
)
def test_pattern_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"\[MaskChoice\] sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.1}, r"\[MaskChoice\] sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"scope": "layer"}, r"scope must be 'local', 'global' or 'erk', got 'layer'"),
        ({"layers": {"b": 1.5}}, r"the sparsity of layers 'b' must be in \[0, 1\), got 1.5"),
        ({"layers": {"c": 0.5}}, r"\[choose_masks\] layers: 'c' matches no weight"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity must be at most 1 - n / m = 0.5 for 2:4, got 0.6"),
        ({"pattern": "2:4", "scope": "erk"}, r"scope 'erk' has other sparsities than 1 - n / m, got it for 2:4"),
        (
            {"pattern": "2:7"},
            r"'a.weight' cannot have the pattern: NM\(n=2, m=7\) needs 7 or more input features or channels "
            r"\(dimension 1\), got shape \[4, 6\]",
        ),
        (
            {"pattern": "5x1"},
            r"Block\(rows=5, columns=1\) needs a matrix that is not smaller than the block, got shape",
        ),
        ({"pattern": "1x7"}, r"needs a matrix that is not smaller than the block, got shape \[4, 6\]"),
        ({"pattern": "filter"}, r"Filter\(\) needs the 3 or more dimensions of a convolution, got shape \[4, 6\]"),
        ({"pattern": "head:3"}, r"Head\(size=3\) needs a number of rows that 3 divides, got shape \[4, 6\]"),
        (
            {"scores": {"a.weight": torch.ones(6, 4)}},
            r"the score of 'a.weight' must have its shape \[4, 6\], got \[6, 4\]",
        ),
        ({"scores": {"c": torch.ones(6, 4)}}, r"\[choose_masks\] scores must be of the weights, got 'c'"),
        (
            {"masks": {"a.weight": torch.zeros(16, dtype=torch.uint8)}},
            r"the mask of 'a.weight' must hold 8 bytes \(uint8\) for shape \[4, 6\], got 16",
        ),
    ],
)
def test_errors(arguments, message):
    weights = {"a.weight": torch.ones(4, 6), "b.weight": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=message):
        choose_masks(weights, arguments.pop("sparsity", 0.5), **arguments)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2", "row", "column"])
def test_nan(pattern):
    weights = {"a.weight": torch.ones(4, 8), "b.weight": torch.ones(4, 8)}
    scores = copy.deepcopy(weights)
    scores["b.weight"][1, 3] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"\[choose_masks\] weights must not be NaN, got 1 NaN in 'b.weight', the first at flat index 11",
    ):
        choose_masks(scores, 0.5, pattern=pattern)
    with pytest.raises(
        ValueError,
        match=r"\[choose_masks\] scores must not be NaN, got 1 NaN in 'b.weight', the first at flat index 11",
    ):
        choose_masks(weights, 0.5, pattern=pattern, scores=scores)
    scores["b.weight"][1, 3] = float("inf")
    scores["b.weight"][1, 2] = -float("inf")
    if pattern in ("2x2", "row"):
        with pytest.raises(ValueError, match=r"infinities of both signs, got them in 'b.weight'"):
            choose_masks(weights, 0.5, pattern=pattern, scores=scores)
    else:
        choose_masks(weights, 0.5, pattern=pattern, scores=scores)


def test_no_weights():
    assert choose_masks({}, 0.5) == {}
