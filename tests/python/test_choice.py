"""Choosing units: targets, scopes, rounding, limits, counts, steps, reasons, errors."""

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from written_structures import chain, chains, convolutional, shapes_of

import rarefy as rf
from rarefy import _core
from rarefy._core.pruning import (
    Baseline,
    Channels,
    ChoiceOptions,
    Cost,
    Counts,
    Group,
    GroupScore,
    Macs,
    Member,
    Parameters,
    Pinned,
    Structure,
    at_step,
    choose_widths,
    count,
)

TARGETS = [Channels, Parameters, Macs]
SCOPES = ["global", "local", "isomorphic"]
fractions = st.floats(0, 0.98)


def choose(case, target, baseline=None, **options):
    scores = [GroupScore(s) if isinstance(s, torch.Tensor) else s for s in case.scores]
    return _core.pruning.choose(case.structure, case.shapes, scores, ChoiceOptions(target, **options), baseline)


def count_by_loops(structure, shapes, removal):
    """Parameters and MACs from the definition: an index is gone when its unit is."""
    gone = [set(units) for units in removal]
    parameters = 0
    for name, shape in shapes.items():
        left = [set(range(n)) for n in shape]
        for g, group in enumerate(structure.groups):
            for member in group.members:
                if member.tensor == name:
                    left[member.dim] -= {i for i, unit in enumerate(member.unit_of_index) if unit in gone[g]}
        parameters += math.prod(len(s) for s in left)
    macs = 0.0
    for cost in structure.costs:
        macs += cost.factor * math.prod(sum(g < 0 or unit not in gone[g] for g, unit in axis) for axis in cost.axes)
    units = sum(group.units for group in structure.groups) - sum(len(s) for s in gone)
    return Counts(units, parameters, macs)


def measured(choice, target):
    before, after = (
        {Channels: c.channels, Parameters: c.parameters, Macs: c.macs}[type(target)]
        for c in (choice.before, choice.after)
    )
    return before - after, before


@given(chains(), st.data())
def test_counts_are_those_of_plain_loops(case, data):
    removal = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) for n in case.units]
    assert count(case.structure, case.shapes, removal) == count_by_loops(case.structure, case.shapes, removal)


def test_counts_of_units_that_fill_dimensions_unevenly():
    members = [Member("w", 0, "output", [0, 1, 1, -1, 0, 1]), Member("w", 1, "input", [1, 0])]
    structure = Structure([Group("w", 2, members)], [], [Cost(2.0, [[(0, 1), (0, 1), (0, 0)], [(-1, -1), (0, 0)]])])
    for removal in ([[]], [[0]], [[1]], [[0, 1]]):
        assert count(structure, {"w": (6, 2), "x": (3,)}, removal) == count_by_loops(
            structure, {"w": (6, 2), "x": (3,)}, removal
        )


@given(chains(), fractions, st.sampled_from(TARGETS), st.sampled_from(SCOPES), st.integers(1, 9), st.integers(1, 6))
def test_a_choice_is_consistent(case, fraction, target, scope, round_to, min_width):
    choice = choose(case, target(fraction), scope=scope, round_to=round_to, min_width=min_width)
    assert choice.before == count_by_loops(case.structure, case.shapes, [[] for _ in case.units])
    assert choice.after == count_by_loops(case.structure, case.shapes, choice.removal)
    removed, total = measured(choice, target(fraction))
    assert choice.achieved == pytest.approx(removed / total)
    for g, (units, outcome) in enumerate(zip(choice.removal, choice.groups, strict=True)):
        scores = case.scores[g].tolist()
        assert outcome.removed == len(units) == len(set(units))
        assert outcome.units - outcome.removed >= min(min_width, outcome.units)
        # The lowest scores go, of equal ones the lower index.
        assert units == sorted(sorted(range(len(scores)), key=lambda u: (scores[u], u))[: len(units)])
        if units:
            for member in case.structure.groups[g].members:
                slices = sum(unit not in units for unit in member.unit_of_index)
                assert slices % round_to == 0
        if not units and fraction > 0:
            assert outcome.reason
    again = choose(case, target(fraction), scope=scope, round_to=round_to, min_width=min_width)
    assert again.removal == choice.removal
    assert again.groups == choice.groups


@given(chains(), fractions, st.sampled_from(TARGETS), st.sampled_from(SCOPES))
def test_targets_are_met_within_one_unit(case, fraction, target, scope):
    choice = choose(case, target(fraction), scope=scope)
    removed, total = measured(choice, target(fraction))
    most = 0.0
    for g, units in enumerate(choice.removal):
        scores = case.scores[g].tolist()
        order = sorted(range(len(scores)), key=lambda u: (scores[u], u))
        for k in (len(units) - 1, len(units) + 1):
            if 0 <= k <= len(order) - 1:
                other = [*choice.removal[:g], sorted(order[:k]), *choice.removal[g + 1 :]]
                after = count_by_loops(case.structure, case.shapes, other)
                value = {Channels: after.channels, Parameters: after.parameters, Macs: after.macs}[target]
                most = max(most, abs(total - value - removed))
    bottom = all(outcome.removed == outcome.units - 1 for outcome in choice.groups)
    groups = len(choice.groups) if target is Channels and scope != "global" else 1  # each is rounded on its own
    if not bottom and not (target is Channels and scope != "global"):
        assert abs(removed - fraction * total) <= most + 1e-6
    if target is Channels:
        kept_back = sum(1 for outcome in choice.groups if outcome.removed == outcome.units - 1)
        assert abs(removed - fraction * total) <= 0.5 * groups + kept_back + 1e-6


@given(chains(), fractions, fractions, st.sampled_from(TARGETS), st.sampled_from(SCOPES), st.integers(1, 5))
def test_more_asked_removes_a_superset(case, a, b, target, scope, round_to):
    less, more = (choose(case, target(fraction), scope=scope, round_to=round_to).removal for fraction in sorted((a, b)))
    assert all(set(x) <= set(y) for x, y in zip(less, more, strict=True))


@given(chains(), fractions, st.sampled_from(TARGETS), st.sampled_from(SCOPES), st.floats(0, 1))
def test_limits_hold(case, fraction, target, scope, limit):
    choice = choose(case, target(fraction), scope=scope, limits=[("l0", limit), ("*", 0.9)])
    for g, outcome in enumerate(choice.groups):
        bound = min(limit, 0.9) if g == 0 else 0.9
        assert outcome.removed <= bound * outcome.units + 1e-6


@given(chains(), fractions)
def test_local_gives_every_group_its_own_fraction(case, fraction):
    choice = choose(case, Channels(fraction), scope="local")
    for outcome in choice.groups:
        assert outcome.removed == min(round(fraction * outcome.units), outcome.units - 1)


def descending(*widths, spans=None):
    scores = [torch.arange(w, 0, -1, dtype=torch.float64) * 100.0**-i for i, w in enumerate(widths)]
    return chain(list(widths), spans or [1] * len(widths), scores)


def test_scopes():
    case = descending(10, 10, 20)  # the third group has by far the lowest scores
    assert [len(u) for u in choose(case, Channels(0.45), scope="global").removal] == [0, 0, 18]
    assert [len(u) for u in choose(case, Channels(0.4), scope="local").removal] == [4, 4, 8]
    # Layers of a chain are alike, so isomorphic is global here; a group of other structure competes by itself.
    isomorphic = choose(case, Channels(0.45), scope="isomorphic").removal
    assert [len(u) for u in isomorphic] == [0, 0, 18]
    case = descending(10, 10, 20, spans=[1, 1, 2])
    isomorphic = choose(case, Channels(0.5), scope="isomorphic").removal
    assert [len(u) for u in isomorphic] == [1, 9, 10]
    assert choose(case, Channels(0.5), scope="isomorphic").removal[1] == list(range(1, 10))


@pytest.mark.parametrize("target", TARGETS)
def test_global_search_is_the_best_start_of_the_order(target):
    torch.manual_seed(1)
    case = chain([9, 14, 6], [1, 2, 1], [torch.rand(n, dtype=torch.float64) for n in (9, 14, 6)])
    order = sorted((case.scores[g][u].item(), g, u) for g, n in enumerate(case.units) for u in range(n))
    starts, removal = [], [[] for _ in case.units]
    starts.append([list(u) for u in removal])
    for _, g, u in order:
        if len(removal[g]) < case.units[g] - 1:
            removal[g].append(u)
            starts.append([sorted(units) for units in removal])
    before = count_by_loops(case.structure, case.shapes, starts[0])
    for fraction in (0.05, 0.3, 0.5, 0.77, 0.95):

        def distance(start, fraction=fraction):
            after = count_by_loops(case.structure, case.shapes, start)
            pick = {Channels: "channels", Parameters: "parameters", Macs: "macs"}[target]
            whole = getattr(before, pick)
            return abs(whole - getattr(after, pick) - fraction * whole)

        chosen = choose(case, target(fraction)).removal
        assert chosen in starts
        assert distance(chosen) <= min(map(distance, starts)) + 1e-9


def test_ties():
    case = chain([4, 4], [1, 1], [torch.ones(4), torch.ones(4)])
    assert choose(case, Channels(0.25)).removal == [[0, 1], []]
    assert choose(case, Channels(0.5)).removal == [[0, 1, 2], [0]]


def test_round_to():
    def kept(units, fraction, round_to, span=1):
        (outcome,) = choose(descending(units, spans=[span]), Channels(fraction), round_to=round_to).groups
        return outcome.units - outcome.removed, outcome.reason

    assert kept(12, 0.5, 8) == (8, "round_to 8: 5 of 12 units round to 8") or kept(12, 0.5, 8)[0] == 8
    assert kept(10, 0.3, 8)[0] == 8
    assert kept(64, 0.5, 8) == (32, "")
    assert kept(64, 0.05, 8)[0] == 64
    assert kept(64, 0.1, 8)[0] == 56
    # Units of 64 slices meet 8 at every number; of 4 slices at even ones.
    assert kept(12, 0.25, 8, span=64) == (9, "")
    assert kept(12, 0.25, 8, span=4)[0] in (8, 10)
    width, reason = kept(6, 0.5, 8)
    assert width == 6
    assert reason == "round_to 8 needs a multiple of 8 units below 6, and min_width keeps 1 of 6 units"


def test_reasons():
    case = descending(10, 8, 40)
    choice = choose(case, Channels(0.3), limits=[("l2", 0.2), ("l1.weight", 0.0)], min_width=9)
    assert [o.reason for o in choice.groups] == [
        "min_width keeps 9 of 10 units",
        "min_width keeps 8 of 8 units",
        "limit 0.2 of 'l2' allows 8 of 40 units",
    ]
    assert [o.removed for o in choice.groups] == [1, 0, 8]
    choice = choose(case, Channels(0.1))
    assert choice.groups[0].reason == "all units score above those removed from other groups"
    assert (
        choose(descending(4), Channels(0.1), scope="local").groups[0].reason == "the fraction rounds to none of 4 units"
    )
    assert all(not o.reason for o in choose(case, Channels(0)).groups)
    case.scores[1] = GroupScore(None, "no normalization with a scale")
    choice = choose(case, Channels(0.5))
    assert choice.groups[1].reason == "no normalization with a scale"
    assert choice.groups[1].removed == 0
    assert choice.achieved == pytest.approx(0.5, abs=0.01)


def test_strict_names_groups_and_reasons():
    case = descending(10, 8, 40)
    for target in TARGETS:
        choose(case, target(0.5), strict=True)
    limits = [("*", 0.1)]
    with pytest.raises(
        ValueError, match=r"as closely as whole units allow.*Channels\(fraction=0.5\) was asked, got 0.08"
    ) as error:
        choose(case, Channels(0.5), limits=limits, strict=True)
    assert "l2.weight: limit 0.1 of '*' allows 4 of 40 units" in str(error.value)
    with pytest.raises(ValueError, match="as closely as whole units allow"):
        choose(case, Macs(0.5), limits=limits, strict=True)
    with pytest.raises(ValueError, match="min_width keeps 10 of 10 units"):
        choose(case, Channels(0.5), scope="local", min_width=10, strict=True)
    with pytest.raises(ValueError, match="needs a multiple of 64"):
        choose(case, Parameters(0.5), round_to=64, strict=True)
    with pytest.raises(ValueError, match=r"got 0\.875"):  # the eighth of 8 units is withheld
        choose(descending(8), Channels(0.99), scope="local", strict=True)
    for target in TARGETS:
        options = ChoiceOptions(target(0.5), strict=True)
        with pytest.raises(ValueError, match="got 0: there are no groups"):
            _core.pruning.choose(Structure([]), {"w": (3,)}, [], options)
        with pytest.raises(ValueError, match=r"got 0\n  w\[0\], 3 slices: on purpose"):
            _core.pruning.choose(Structure([], [Pinned("w", 0, 3, "on purpose")]), {"w": (3,)}, [], options)


@given(chains(), st.floats(0, 0.9), st.sampled_from(TARGETS), st.sampled_from(SCOPES))
def test_strict_accepts_what_units_allow(case, fraction, target, scope):
    choice = choose(case, target(fraction), scope=scope)
    if all(o.removed < o.units - 1 for o in choice.groups):
        assert choose(case, target(fraction), scope=scope, strict=True).removal == choice.removal


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scope", SCOPES)
def test_steps_refer_to_the_baseline(target, scope):
    torch.manual_seed(0)
    widths = [30, 50, 20]
    scores = [torch.rand(n, dtype=torch.float64) for n in widths]
    case = chain(widths, [1, 2, 1], scores)
    baseline = Baseline(case.structure, case.shapes)
    at_once = choose(case, target(0.6), scope=scope)
    kept = [list(range(n)) for n in widths]
    for step in (1, 2, 3):
        now = chain([len(k) for k in kept], [1, 2, 1], [s[k] for s, k in zip(scores, kept, strict=True)])
        choice = choose(now, at_step(target(0.6), step, 3), baseline=baseline, scope=scope)
        assert choice.before == baseline.counts
        assert choice.achieved == pytest.approx(0.2 * step, abs=0.03)
        kept = [[u for i, u in enumerate(k) if i not in r] for k, r in zip(kept, choice.removal, strict=True)]
    removed = [[u for u in range(n) if u not in k] for n, k in zip(widths, kept, strict=True)]
    assert removed == at_once.removal
    with pytest.raises(ValueError, match=r"step must be in \[1, 3\], got 4"):
        at_step(target(0.6), 4, 3)


def test_a_baseline_finds_groups_by_name():
    """A group that was not there before counts with what it has, wherever it stands."""
    full = descending(20, 10)
    baseline = Baseline(full.structure, full.shapes)
    assert baseline.units == (("l0.weight", 20), ("l1.weight", 10))
    now = descending(8, 10)
    groups = [now.structure.groups[1], now.structure.groups[0]]
    groups[0] = Group("new", 10, groups[0].members)
    swapped = Structure(groups)
    scores = [GroupScore(now.scores[1]), GroupScore(now.scores[0])]
    options = ChoiceOptions(Channels(0.7), scope="local")
    choice = _core.pruning.choose(swapped, now.shapes, scores, options, baseline)
    assert [len(units) for units in choice.removal] == [7, 2]  # 10 - 3 and 8 - 6


def test_widths():
    case = descending(10, 8)
    scores = [GroupScore(s) for s in case.scores]
    choice = choose_widths(case.structure, case.shapes, scores, [4, 8])
    assert choice.removal == [[4, 5, 6, 7, 8, 9], []]
    assert choice.target is None
    assert choice.after == count_by_loops(case.structure, case.shapes, choice.removal)
    assert "widths asked" in repr(choice)
    for widths, message in (([0, 8], r"in \[1, 10\], got 0"), ([11, 8], "got 11"), ([4], "each of 2 groups, got 1")):
        with pytest.raises(ValueError, match=message):
            choose_widths(case.structure, case.shapes, scores, widths)
    with pytest.raises(ValueError, match="must have scores to lose units, got none: why"):
        choose_widths(case.structure, case.shapes, [GroupScore(None, "why"), scores[1]], [4, 8])


def test_a_model():
    model, structure = convolutional()
    scores = rf.pruning.importance.score(structure, model)
    choice = _core.pruning.choose(structure, shapes_of(model), scores, ChoiceOptions(Macs(0.5)))
    assert choice.before.parameters == sum(p.numel() for p in model.parameters())
    assert choice.before.macs == 3 * 9 * 16 * 8 + 9 * 4 * 8 * 12 + 48 * 5
    assert choice.achieved == pytest.approx(0.5, abs=0.06)  # one unit of the first group
    text = repr(choice)
    assert "Macs(fraction=0.5) asked" in text
    assert all(group.name in text for group in structure.groups)
    assert choice._repr_html_().count("<tr>") == 3


@pytest.mark.parametrize(("target", "fraction"), list(itertools.product(TARGETS, [1.0, 1.5, -0.1, math.nan, math.inf])))
def test_fractions_out_of_range(target, fraction):
    what = target.__name__.lower()
    with pytest.raises(
        ValueError, match=rf"\[{target.__name__}\] the fraction of {what} removed must be in \[0, 1\), got"
    ):
        target(fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to must be positive, got 0"),
        ({"min_width": 0}, "min_width must be positive, got 0"),
        ({"limits": [("l0", 1.1)]}, r"limits must be in \[0, 1\], got 1.1 for 'l0'"),
        ({"limits": [("l0", math.nan)]}, r"limits must be in \[0, 1\]"),
        ({"limits": [("conv", 0.5)]}, "must be that of a parameter or module of the model, got 'conv'"),
        ({"scope": "world"}, "global, local, isomorphic, got 'world'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        choose(descending(4, 4), Channels(0.5), **options)


def test_errors():
    case = descending(4, 4)
    structure, shapes = case.structure, case.shapes

    def attempt(scores, shapes=shapes, structure=structure):
        return _core.pruning.choose(structure, shapes, scores, ChoiceOptions(Channels(0.5)))

    one = GroupScore(torch.ones(4))
    with pytest.raises(ValueError, match="each of 2 groups, got 1"):
        attempt([one])
    with pytest.raises(ValueError, match=r"group l1\.weight must be 1-D with 4 values.*got sizes \[5\]"):
        attempt([one, GroupScore(torch.ones(5))])
    with pytest.raises(ValueError, match=r"scores must be finite, got NaN or infinity in group l1\.weight"):
        attempt([one, GroupScore(torch.tensor([1, math.nan, 1, 1]))])
    with pytest.raises(ValueError, match=r"l0\.weight must have 4 slices along dimension 0.*got sizes \[5, 7\]"):
        attempt([one, one], {**shapes, "l0.weight": (5, 7)})
    shared = Structure(
        [Group("a", 2, [Member("w", 0, "output", [0, 1])]), Group("b", 2, [Member("w", 0, "output", [0, 1])])]
    )
    two = GroupScore(torch.ones(2))
    with pytest.raises(ValueError, match="index 0 of dimension 0 of w must belong to one unit"):
        attempt([two, two], {"w": (2, 3)}, shared)
    with pytest.raises(IndexError, match=r"must be in \[0, 4\), got 4"):
        count(structure, shapes, [[4], []])
    with pytest.raises(ValueError, match="must be ascending, got 1 after 2"):
        count(structure, shapes, [[2, 1], []])
    with pytest.raises(ValueError, match="one list per group, 2, got 1"):
        count(structure, shapes, [[0]])


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_values(target):
    value = target(0.25)
    assert pickle.loads(pickle.dumps(value)) == value
    assert value != target(0.5)
    assert repr(value) == f"{target.__name__}(fraction=0.25)"
    assert len({value, target(0.25)}) == 1
