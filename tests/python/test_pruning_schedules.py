"""Schedules of pruning: formulas, updates, the exact end, values, errors, plots, and what a pruner makes of them."""

import copy
import itertools
import math
import pickle
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_runs import ELEMENTS, make, pruned_counts, sgd, train, zeros

from rarefy.pruning import (
    ACDC,
    SET,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    FixedSchedule,
    Iterative,
    LinearSchedule,
    PolynomialSchedule,
    Pruner,
    RigL,
    StraightThrough,
    plot_schedule,
)


def halves(step):
    return [0.1, 0.3, 0.2][step % 3]


RISING = [
    (LinearSchedule, {}, lambda x, a, b: a + (b - a) * x),
    (PolynomialSchedule, {"power": 3.0}, lambda x, a, b: b + (a - b) * (1 - x) ** 3),
    (PolynomialSchedule, {"power": 0.5}, lambda x, a, b: b + (a - b) * (1 - x) ** 0.5),
    (CosineSchedule, {}, lambda x, a, b: b + (a - b) * (1 + math.cos(math.pi * x)) / 2),
    (ExponentialSchedule, {}, lambda x, a, b: 1 - (1 - a) ** (1 - x) * (1 - b) ** x),
]


@pytest.mark.parametrize(("kind", "options", "formula"), RISING)
@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_rising_is_the_formula(kind, options, formula, initial):
    schedule = kind(begin=10, end=210, every=7, initial=initial, **options)
    for t in range(250):
        expected = formula((t - 10) / 200, initial, 0.9) if 10 <= t <= 210 else 0.9 * (t > 210)
        assert schedule.sparsity_at(t, 0.9) == pytest.approx(expected, abs=1e-14)
        assert schedule.updates_at(t) == (t == 210 or (10 <= t < 210 and (t - 10) % 7 == 0))
        assert not schedule.releases_at(t)
    assert schedule.sparsity_at(210, 0.9) == 0.9
    assert schedule.last_update() == 210


def test_single():
    constant, fixed = ConstantSchedule(3), FixedSchedule()
    assert [constant.sparsity_at(t, 0.5) for t in (0, 2, 3, 100)] == [0.0, 0.0, 0.5, 0.5]
    assert [t for t in range(10) if constant.updates_at(t)] == [3]
    assert not any(fixed.updates_at(t) for t in range(10))
    assert (constant.last_update(), fixed.last_update()) == (3, -1)


def test_cyclic_is_its_cycles():
    """Written out: 17 steps in 3 cycles, cut at whole steps, each dense first and at the target last."""
    schedule = CyclicSchedule(begin=2, end=19, cycles=3, every=2, power=3.0)
    cuts = [2 + c * 17 // 3 for c in range(4)]
    assert cuts == [2, 7, 13, 19]
    expected = dict.fromkeys(range(3), 0.0)
    updates, releases = set(), set()
    for first, last in itertools.pairwise(cuts):
        for offset, t in enumerate(range(first + 1, last + 1)):
            expected[t] = 0.8 - 0.8 * (1 - offset / (last - first - 1)) ** 3
            if offset % 2 == 0 or t == last:
                updates.add(t)
        releases.add(first + 1)
    for t in range(25):
        assert schedule.sparsity_at(t, 0.8) == pytest.approx(expected.get(t, 0.8), abs=1e-14), t
        assert schedule.updates_at(t) == (t in updates)
        assert schedule.releases_at(t) == (t in releases)
    assert [schedule.sparsity_at(t, 0.8) for t in cuts[1:]] == [0.8] * 3
    assert schedule.last_update() == 19


@pytest.mark.parametrize("end", [20, 21, 22, 23, 24, 25, 26, 3])
def test_acdc_takes_turns(end):
    schedule = ACDC(begin=2, end=end, sparse=3, dense=2)
    is_sparse, left = [False, False], 3
    phase = True
    for t in range(2, 40):
        is_sparse.append(phase or t >= end)
        left -= 1
        if left == 0:
            phase = not phase
            left = 3 if phase else 2
    updates = [t for t in range(40) if is_sparse[t] != (t > 0 and is_sparse[t - 1])]
    assert [t for t in range(40) if schedule.updates_at(t)] == updates
    assert [t for t in range(40) if schedule.releases_at(t)] == updates
    assert schedule.last_update() == updates[-1]
    for t in range(40):
        assert schedule.sparsity_at(t, 0.7) == (0.7 if is_sparse[t] else 0.0)


@pytest.mark.parametrize(("rewind", "rewind_to"), [(None, 0), ("weights", 0), ("weights", 3), ("learning_rate", 4)])
def test_iterative_goes_back(rewind, rewind_to):
    """Simulated: training advances one step at a time, and where it arrives at its end, it prunes and goes back."""
    schedule = Iterative(rounds=3, steps_per_round=10, rewind=rewind, rewind_to=rewind_to)
    position, done = 0, 0
    for t in range(1, 60):
        position += 1
        at_end = position == 10 if rewind else position % 10 == 0
        updates = at_end and done < 3
        if updates:
            done += 1
            position = rewind_to if rewind else position
        assert schedule.updates_at(t) == updates, t
        assert schedule.training_step(t) == position, t
        assert schedule.sparsity_at(t, 0.875) == pytest.approx(1 - 0.5**done, abs=1e-14)
    assert schedule.sparsity_at(60, 0.9) == 0.9
    assert schedule.updates_at(schedule.last_update())


def test_custom():
    schedule = CustomSchedule(halves, [2, 4, 9])
    assert [t for t in range(12) if schedule.updates_at(t)] == [2, 4, 9]
    assert [schedule.sparsity_at(t, 0.7) for t in (2, 4, 9, 10)] == [0.2, 0.3, 0.7, 0.7]
    assert not schedule.releases_at(4)
    assert CustomSchedule(halves, [2, 4], regrow=True).releases_at(4)
    assert not CustomSchedule(halves, [2, 4], regrow=True).releases_at(3)
    assert schedule.function is halves
    with pytest.raises(
        ValueError, match=r"\[CustomSchedule\] the function must give a sparsity in \[0, 1\), got 1.5 at step 1"
    ):
        CustomSchedule(lambda _: 1.5, [1, 2]).sparsity_at(1, 0.5)


# --- the end, whatever the frequency -----------------------------------------------------------------------------------

SPANS = st.tuples(st.integers(0, 20), st.integers(1, 60), st.integers(1, 80))
TARGETS = st.floats(0.0, 0.99)


@st.composite
def schedules(draw):
    begin, length, every = draw(SPANS)
    end = begin + length
    kind = draw(st.sampled_from(["linear", "polynomial", "cosine", "exponential", "cyclic", "acdc", "iterative"]))
    if kind == "cyclic":
        cycles = draw(st.integers(1, 5))
        return CyclicSchedule(begin, begin + max(length, 2 * cycles), cycles, every, draw(st.floats(0.1, 5)))
    if kind == "acdc":
        return ACDC(begin, end, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    if kind == "iterative":
        rewind = draw(st.sampled_from([None, "weights", "learning_rate"]))
        to = draw(st.integers(0, length - 1)) if rewind else 0
        return Iterative(draw(st.integers(1, 5)), length, rewind, to)
    rising = {"linear": LinearSchedule, "cosine": CosineSchedule, "exponential": ExponentialSchedule}
    if kind == "polynomial":
        return PolynomialSchedule(begin, end, every, 0.0, draw(st.floats(0.1, 5)))
    return rising[kind](begin, end, every)


@given(schedules(), TARGETS)
def test_the_last_update_is_exact_and_only_releases_fall(schedule, final):
    last = schedule.last_update()
    assert schedule.updates_at(last)
    assert schedule.sparsity_at(last, final) == final
    assert schedule.sparsity_at(last + 1, final) == final
    assert not any(schedule.updates_at(t) for t in range(last + 1, last + 100))
    before = 0.0
    for t in range(last + 1):
        if schedule.updates_at(t):
            sparsity = schedule.sparsity_at(t, final)
            assert 0.0 <= sparsity <= final or sparsity == pytest.approx(final, abs=1e-12)
            assert schedule.releases_at(t) or sparsity >= before - 1e-12
            before = sparsity


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(2),
        LinearSchedule(0, 11, 3),
        PolynomialSchedule(2, 11, 4, 0.3),
        CosineSchedule(1, 11, 100),
        ExponentialSchedule(0, 11, 2, 0.1),
        CyclicSchedule(0, 11, 2, 2),
        ACDC(1, 11, 3, 2),
        Iterative(3, 5, "learning_rate", 2),
        CustomSchedule(lambda step: step / 20, [1, 4, 9, 11]),
        CustomSchedule(halves, [1, 2, 3, 5, 8, 11], regrow=True),
    ],
    ids=lambda schedule: repr(schedule).split("(")[0],
)
def test_a_pruner_has_the_scheduled_number_of_zeros(schedule):
    model = make()
    pruner = Pruner(model, 0.7, schedule=schedule)
    optimizer = sgd(model)
    expected = 0.0
    for step in range(1, 15):
        train(model, optimizer, pruner, [step])
        due = step if schedule.updates_at(step) else 0 if step == 1 and schedule.updates_at(0) else None
        if due is not None:
            expected = schedule.sparsity_at(due, 0.7)
        assert sum(pruned_counts(model)) == round(expected * ELEMENTS), step
        assert zeros(model) >= round(expected * ELEMENTS)
    assert zeros(model) == sum(pruned_counts(model)) == round(0.7 * ELEMENTS)


def test_own_sparsities_follow_the_schedule():
    model = make()
    schedule = LinearSchedule(0, 4)
    pruner = Pruner(model, 0.5, scope="local", schedule=schedule, layers={"conv": 0.8, "head.2": 0.0})
    for step in range(1, 6):
        pruner.step()
        assert pruned_counts(model) == [
            round(schedule.sparsity_at(step, 0.8) * 288),
            round(schedule.sparsity_at(step, 0.5) * 96),
            0,
        ]


def test_a_function_that_raises_changes_nothing():
    def broken(step):
        raise KeyError(f"no sparsity at {step}")

    model = make()
    pruner = Pruner(model, 0.5, schedule=CustomSchedule(broken, [1, 2]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError, match="no sparsity at 1"):
        pruner.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# --- values --------------------------------------------------------------------------------------------------------------

VALUES = [
    ConstantSchedule(3),
    FixedSchedule(),
    LinearSchedule(1, 17, 4, 0.1),
    PolynomialSchedule(2, 17, 4),
    CosineSchedule(2, 17, 4),
    ExponentialSchedule(2, 17, 4),
    CyclicSchedule(1, 20, 3, 2, 2.0),
    ACDC(3, 40, 5, 6),
    Iterative(4, 10, "weights", 3),
    CustomSchedule(halves, [1, 5, 9], True),
    SET(1, 50, 5, 0.2, "linear", 7),
    RigL(1, 50, 5, 0.2, "constant"),
    StraightThrough(30, 2, 1e-4),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values(value):
    for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert other == value
        assert hash(other) == hash(value)
        assert repr(other) == repr(value)
    assert sum(value == other for other in VALUES) == 1
    with pytest.raises(AttributeError):
        value.begin = 1
    names = {"CustomSchedule": None}
    if type(value).__name__ not in names:
        assert eval(repr(value), vars(sys.modules["rarefy.pruning"])) == value


def test_reprs():
    assert repr(Iterative(4, 10, "weights", 3)) == (
        "Iterative(rounds=4, steps_per_round=10, rewind='weights', rewind_to=3)"
    )
    assert repr(CustomSchedule(halves, [1, 5])) == "CustomSchedule(2 updates from 1 to 5, regrow=False)"
    assert repr(SET(0, 5, seed=3)) == "SET(begin=0, end=5, every=100, fraction=0.3, decay='cosine', seed=3)"


def test_fractions():
    for decay, formula in (
        ("constant", lambda x: 0.4),
        ("linear", lambda x: 0.4 * (1 - x)),
        ("cosine", lambda x: 0.2 * (1 + math.cos(math.pi * x))),
    ):
        for kind in (SET, RigL):
            regrowth = kind(10, 110, 20, 0.4, decay)
            assert [t for t in range(200) if regrowth.updates_at(t)] == [30, 50, 70, 90]
            for t in (30, 50, 90):
                assert regrowth.fraction_at(t) == pytest.approx(formula((t - 10) / 100), abs=1e-15)
    soft = StraightThrough(end=10, every=4)
    assert [t for t in range(20) if soft.updates_at(t)] == [4, 8, 10]


@pytest.mark.parametrize(
    ("make_value", "message"),
    [
        (lambda: LinearSchedule(-1, 5), r"\[LinearSchedule\] begin must not be negative, got -1"),
        (lambda: CosineSchedule(5, 5), r"\[CosineSchedule\] end must be larger than begin, got begin 5 and end 5"),
        (lambda: ExponentialSchedule(0, 5, 0), r"\[ExponentialSchedule\] every must be positive, got 0"),
        (lambda: LinearSchedule(0, 5, initial=1.0), r"\[LinearSchedule\] initial must be in \[0, 1\), got 1"),
        (
            lambda: CyclicSchedule(0, 5, 3),
            r"\[CyclicSchedule\] a cycle must have 2 or more steps, got 5 steps for 3 cycles",
        ),
        (lambda: CyclicSchedule(0, 5, 0), r"\[CyclicSchedule\] cycles must be positive, got 0"),
        (lambda: CyclicSchedule(0, 5, 1, power=0.0), r"\[CyclicSchedule\] power must be positive and finite, got 0"),
        (lambda: ACDC(0, 5, 0, 1), r"\[ACDC\] sparse must be positive, got 0"),
        (lambda: ACDC(0, 5, 1, -2), r"\[ACDC\] dense must be positive, got -2"),
        (lambda: Iterative(0, 5), r"\[Iterative\] rounds must be positive, got 0"),
        (lambda: Iterative(1, 5, "weights", 5), r"\[Iterative\] rewind_to must be in \[0, 5\), got 5"),
        (lambda: Iterative(1, 5, None, 2), r"\[Iterative\] rewind_to must be 0 when nothing is rewound, got 2"),
        (
            lambda: Iterative(1, 5, "bias"),
            r"\[Iterative\] rewind must be 'weights', 'learning_rate' or 'none', got 'bias'",
        ),
        (lambda: CustomSchedule(halves, []), r"\[CustomSchedule\] updates must be one or more steps"),
        (lambda: CustomSchedule(halves, [3, 3]), r"not negative and ascending, got \[3, 3\]"),
        (lambda: CustomSchedule(halves, [-1, 3]), r"not negative and ascending, got \[-1, 3\]"),
        (lambda: SET(0, 5, fraction=0.0), r"\[SET\] fraction must be in \(0, 1\], got 0"),
        (lambda: RigL(4, 4), r"\[RigL\] end must be larger than begin, got begin 4 and end 4"),
        (lambda: RigL(0, 4, decay="fast"), r"decay must be 'constant', 'linear' or 'cosine', got 'fast'"),
        (lambda: StraightThrough(0), r"\[StraightThrough\] end must be positive, got 0"),
        (lambda: StraightThrough(3, 0), r"\[StraightThrough\] every must be positive, got 0"),
        (lambda: StraightThrough(3, 1, -1.0), r"\[StraightThrough\] decay must be finite and not negative, got -1"),
    ],
)
def test_errors(make_value, message):
    with pytest.raises(ValueError, match=message):
        make_value()


# --- plots -------------------------------------------------------------------------------------------------------------


def test_plot():
    figure = plot_schedule(PolynomialSchedule(0, 100, 10), 0.9)
    line, points = figure.axes[0].lines[:2]
    assert line.get_ydata()[-1] == 0.9
    assert list(points.get_xdata()) == list(range(0, 101, 10))
    assert figure.axes[0].get_xlim()[1] >= 112
    for schedule in VALUES[:10]:
        plot_schedule(schedule, 0.8)
    with pytest.raises(ValueError, match=r"\[plot_schedule\] final must be in \[0, 1\), got 1.0"):
        plot_schedule(ConstantSchedule(), 1.0)
    with pytest.raises(ValueError, match=r"\[plot_schedule\] steps must be positive, got 0"):
        plot_schedule(ConstantSchedule(), 0.5, steps=0)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"\[plot_schedule\] needs matplotlib: pip install rarefy\[plot\]"):
        plot_schedule(ConstantSchedule(), 0.5)
