"""Masks that change and come back: SET, RigL, AC/DC, cycles, soft masks, rewinding, criteria of gradients, adopted masks."""

import copy
import math

import pytest
import torch
from pruning_runs import ELEMENTS, NAMES, backward, kept, make, pruned_counts, same, sgd, tensors, train, weights, zeros
from torch import nn

import rarefy as rf
from rarefy.pruning import (
    ACDC,
    SET,
    ConstantSchedule,
    CyclicSchedule,
    FixedSchedule,
    Iterative,
    LinearSchedule,
    MagnitudePruner,
    Pruner,
    RigL,
    StraightThrough,
    pack_mask,
)
from rarefy.pruning.importance import Fisher, Magnitude, Random, Taylor

Movement = rf.pruning.Movement


def masks_of(model):
    return {name: kept(model, name) for name in NAMES}


def lowest(score, alive, count):
    """The `count` lowest of the alive elements, of equal ones the earlier, as a mask."""
    flat = torch.where(alive, score.double(), torch.inf).flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[torch.argsort(flat, stable=True)[:count]] = True
    return chosen.view(score.shape)


# --- RigL and SET ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local", "erk"])
def test_rigl_follows_the_paper(scope):
    """An independent loop over dense tensors: drop the smallest, grow the largest gradients, as many as before."""
    model = make()
    regrowth = RigL(begin=1, end=12, every=2, fraction=0.4)
    pruner = MagnitudePruner(model, 0.6, scope, ConstantSchedule(1), regrowth=regrowth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, exchanged = {}, 0
    for step in range(1, 15):
        backward(model, step)
        gradients = {name: w.grad.abs().clone() for name, w in weights(model).items()}
        before = {name: kept(model, name) for name in NAMES}
        optimizer.step()
        values = {name: w.detach().clone() for name, w in weights(model).items()}
        pruner.step()
        if step == 1:
            expected = masks_of(model)
            continue
        if step in (3, 5, 7, 9, 11):
            fraction = 0.4 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 11))
            for name, mask in expected.items():
                count = round(fraction * int(mask.sum()))
                left = mask & ~lowest(values[name].abs(), mask, count)
                candidates = int((~left).sum())  # of equal gradients, which dead units have, the later ones grow
                grown = ~left & ~lowest(gradients[name], ~left, candidates - count)
                expected[name] = left | grown
                exchanged += int((grown & ~mask).sum())
        for name, mask in expected.items():
            assert torch.equal(kept(model, name), mask), (step, name)
            new = mask & ~before[name]
            assert not weights(model)[name][new].any()  # what grows starts at 0
            assert torch.equal(weights(model)[name][mask & before[name]], values[name][mask & before[name]])
            assert not weights(model)[name][~mask].any()
    assert exchanged > 50


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("regrowth", [RigL(0, 20, 3, 0.5), SET(0, 20, 3, 0.5)])
def test_what_grows_has_no_history(regrowth, attached):
    """With the optimizer attached or given, moments of what grows are zero."""
    model = make()
    pruner = MagnitudePruner(model, 0.7, schedule=ConstantSchedule(1), regrowth=regrowth)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if attached:
        pruner.attach(optimizer)
    grown = 0
    for step in range(1, 18):
        before = masks_of(model)
        backward(model, step)
        optimizer.step()
        if not attached:
            pruner.step(optimizer)
        for name, weight in weights(model).items():
            now = kept(model, name)
            assert not weight.grad[~now].any()
            state = optimizer.state[weight]
            for moment in (weight, state["exp_avg"], state["exp_avg_sq"]):
                assert not moment[~now].any()
                assert not moment[now & ~before[name]].any()
            grown += int((now & ~before[name]).sum())
    assert grown > 50
    assert pruner.steps == 17
    assert zeros(model) >= sum(pruned_counts(model)) == round(0.7 * ELEMENTS)


@pytest.mark.parametrize("make_regrowth", [SET, RigL])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "row", "column"])
def test_sparsity_stays_to_the_element(make_regrowth, pattern):
    model = make()
    pruner = Pruner(model, 0.5, "local", ConstantSchedule(1), pattern, regrowth=make_regrowth(0, 40, 2, 0.5))
    optimizer = sgd(model)
    train(model, optimizer, pruner, [1])
    counts, before, changes = pruned_counts(model), masks_of(model), 0
    for step in range(2, 30):
        train(model, optimizer, pruner, [step])
        assert pruned_counts(model) == counts
        assert all(row.has_pattern for row in pruner.report().tensors)
        changes += sum(int((before[name] != now).sum()) for name, now in masks_of(model).items())
        before = masks_of(model)
    assert changes > 0


def test_set_depends_on_its_seed_alone():
    def run(seed):
        model = make()
        pruner = MagnitudePruner(model, 0.6, schedule=ConstantSchedule(1), regrowth=SET(0, 20, 2, 0.3, seed=seed))
        torch.manual_seed(torch.seed())  # the global generator is not used
        train(model, sgd(model), pruner, range(10))
        return masks_of(model)

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert any(not torch.equal(first[name], other[name]) for name in NAMES)


def test_set_grows_evenly():
    """Every pruned element is drawn about equally often."""
    model = nn.Linear(20, 20, bias=False)
    pruner = MagnitudePruner(model, 0.5, schedule=ConstantSchedule(1), regrowth=SET(1, 10**6, 1, 0.5, "constant"))
    pruner.step()
    drawn = torch.zeros(20, 20)
    for _ in range(400):
        before = rf.pruning.unpack_mask(model.weight_mask_bits, (20, 20))
        with torch.no_grad():
            model.weight.copy_(torch.where(before, torch.rand(20, 20) + 0.5, 0.0))
        pruner.step()
        drawn += rf.pruning.unpack_mask(model.weight_mask_bits, (20, 20)) & ~before
    # 400 steps: 100 kept are dropped, 300 are candidates, 100 of them drawn; a third of 200 pruned come back per step.
    expected = 400 * 0.5 / 3
    assert (drawn - expected).abs().max() < 6 * math.sqrt(expected)


def test_gradual_with_regrowth():
    """The schedule's sparsity at each step, with an exchange in between."""
    model = make()
    schedule = LinearSchedule(0, 12, 3)
    pruner = MagnitudePruner(model, 0.8, schedule=schedule, regrowth=RigL(0, 20, 2, 0.3))
    optimizer = sgd(model)
    came_back, expected = 0, 0.0
    for step in range(1, 16):
        before = masks_of(model)
        train(model, optimizer, pruner, [step])
        expected = schedule.sparsity_at(step, 0.8) if schedule.updates_at(step) else expected
        assert sum(pruned_counts(model)) == round(expected * ELEMENTS)
        came_back += sum(int((now & ~before[name]).sum()) for name, now in masks_of(model).items())
    assert came_back > 0


def test_regrowth_errors_change_nothing():
    model = make()
    pruner = MagnitudePruner(model, 0.5, schedule=ConstantSchedule(1), regrowth=RigL(1, 9, 1))
    pruner.step()
    state = tensors(model)
    with pytest.raises(ValueError, match=r"RigL needs the gradient of 'conv.weight' at this step, got none"):
        pruner.step()
    assert same(tensors(model), state)
    backward(model, 0)
    state = tensors(model)
    model.head[2].weight.grad[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"RigL needs finite gradients, got others for 'head.2.weight'"):
        pruner.step()
    assert same(tensors(model), state)
    with pytest.raises(ValueError, match=r"SET and RigL must have a pattern whose sparsity can rise, got 2:4"):
        Pruner(make(), pattern="2:4", regrowth=SET(0, 5))


# --- AC/DC and cycles ------------------------------------------------------------------------------------------------


def test_acdc_chooses_from_dense_weights():
    model = make()
    schedule = ACDC(begin=3, end=15, sparse=4, dense=2)
    pruner = MagnitudePruner(model, 0.7, schedule=schedule)
    optimizer = sgd(model)
    seen = []
    for step in range(1, 20):
        before = masks_of(model)
        backward(model, step)
        optimizer.step()
        values = torch.cat([w.detach().abs().flatten() for w in weights(model).values()])
        pruner.step()
        masks = torch.cat([kept(model, name).flatten() for name in NAMES])
        if schedule.updates_at(step) and schedule.sparsity_at(step, 0.7) > 0:
            order = torch.argsort(values, stable=True)[: round(0.7 * ELEMENTS)]
            assert not masks[order].any()
            seen.append(masks)
        elif schedule.updates_at(step):
            assert masks.all()
            for name, weight in weights(model).items():
                assert not weight[~before[name]].any()  # back, from zero
        assert int((~masks).sum()) == (round(0.7 * ELEMENTS) if schedule.sparsity_at(step, 0.7) > 0 else 0)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[2])


def test_cycles_begin_dense():
    model = make()
    pruner = MagnitudePruner(model, 0.8, schedule=CyclicSchedule(0, 12, 3))
    optimizer = sgd(model)
    counts = []
    for step in range(1, 15):
        train(model, optimizer, pruner, [step])
        counts.append(sum(pruned_counts(model)))
    target = round(0.8 * ELEMENTS)
    assert [counts[i] for i in (0, 4, 8)] == [0, 0, 0]
    assert [counts[i] for i in (3, 7, 11, 12, 13)] == [target] * 5
    assert all(
        a <= b for first in (0, 4, 8) for a, b in zip(counts[first:], counts[first + 1 : first + 4], strict=False)
    )


# --- soft masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(("pattern", "decay"), [("unstructured", 0.0), ("2:4", 0.0), ("2:4", 0.01)])
def test_soft_masks_are_straight_through(pattern, decay, attached):
    """Beside a model whose dense parameters are trained through w * mask by autograd, with an identity gradient."""
    model, reference = make(), make()
    schedule = LinearSchedule(0, 8, 4)
    pruner = Pruner(model, 0.5, schedule=schedule, pattern=pattern, regrowth=StraightThrough(12, 3, decay))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if attached:
        pruner.attach(optimizer)
    twin = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(reference).items()}
    came_back = 0
    for step in range(1, 16):
        backward(model, step)
        if not attached and pruner.needs_accumulate:
            pruner.accumulate()
        optimizer.step()
        if not attached:
            pruner.step()

        dense = {name: w.detach().clone() for name, w in weights(reference).items()}
        with torch.no_grad():
            for name, weight in weights(reference).items():
                weight.mul_(masks[name])
        backward(reference, step)  # the gradient of w * mask
        with torch.no_grad():
            for name, weight in weights(reference).items():
                if step <= 12:
                    weight.copy_(dense[name])
                    weight.grad.add_(torch.where(masks[name], 0.0, dense[name]), alpha=decay)
                else:
                    weight.grad *= masks[name]
        if step == 13 and attached:
            for name, weight in weights(reference).items():  # from here on, moments of what is pruned are zero
                twin.state[weight]["momentum_buffer"] *= masks[name]
        twin.step()
        if step <= 12 and (step in (4, 8) or step % 3 == 0 or step == 12):
            now = rf.pruning.choose_masks(
                {name: w.detach() for name, w in weights(reference).items()},
                schedule.sparsity_at(step, 0.5),
                pattern=pattern,
            )
            now = {name: rf.pruning.unpack_mask(mask, masks[name].shape) for name, mask in now.items()}
            came_back += sum(int((now[name] & ~masks[name]).sum()) for name in NAMES)
            masks = now
        for name, weight in weights(model).items():
            assert torch.equal(kept(model, name), masks[name]), step
            twin_weight = weights(reference)[name].detach()
            assert torch.equal(weight, torch.where(masks[name], twin_weight, 0.0)), step
            latent = model.get_buffer(name + "_mask_latent")
            if step < 12:
                assert torch.equal(latent, torch.where(masks[name], 0.0, twin_weight)), step
            else:
                assert not latent.any()
        assert torch.equal(model.head[0].bias, reference.head[0].bias)
    assert came_back > 0
    if pattern == "2:4":
        assert all(row.has_pattern for row in pruner.report().tensors)
        assert pruned_counts(model) == [144, 48, 24]


def test_soft_masks_need_accumulate():
    model = make()
    pruner = MagnitudePruner(model, 0.5, regrowth=StraightThrough(3))
    with pytest.raises(RuntimeError, match=r"needs accumulate\(\) between the backward pass and .* for soft masks"):
        pruner.step()
    with pytest.raises(ValueError, match=r"needs gradients of the pruned parameters, got none"):
        pruner.accumulate()
    backward(model, 0)
    pruner.accumulate()
    with pytest.raises(RuntimeError, match=r"accumulate\] must be called once per step"):
        pruner.accumulate()
    pruner.step()
    assert pruner.needs_accumulate
    train(model, sgd(model), pruner, [1, 2])
    assert not pruner.needs_accumulate
    pruner.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": LinearSchedule(0, 9), "regrowth": StraightThrough(8)},
            r"StraightThrough must not end before the schedule's last update at 9, got end 8",
        ),
        (
            {"schedule": Iterative(2, 3, "weights"), "regrowth": StraightThrough(8)},
            r"StraightThrough must not be combined with the rewinding of weights",
        ),
        ({"schedule": FixedSchedule(), "regrowth": StraightThrough(8)}, r"must not be combined with FixedSchedule"),
        ({"criterion": rf.pruning.importance.Activation()}, r"Activation needs statistics"),
        ({"layers": {"conv": 1.0}}, r"must be in \[0, 1\), got 1"),
        ({"layers": {"fc": 0.5}}, r"every name in layers must be that of a parameter that is pruned .*, got 'fc'"),
        ({"pattern": "3x"}, r"pattern"),
        ({"pattern": "2:4", "sparsity": 0.7}, r"at most 1 - n / m = 0.5 for 2:4, got 0.7"),
        ({"pattern": "head:5"}, r"'conv.weight' cannot have the pattern: .*a number of rows that 5 divides"),
        (
            {"criterion": {"conv.weight": torch.ones(8, 4, 3, 3)}},
            r"scores must be given for all .*, got none for 'head.0.weight'",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        Pruner(model, **({"sparsity": 0.5} | options))
    assert list(model.state_dict()) == keys


def test_sparsity_of_a_pattern():
    pruner = Pruner(make(), pattern="1:4")
    pruner.step()
    assert pruner.sparsity == 0.75
    with pytest.raises(ValueError, match=r"\[Pruner\] sparsity must be given for the pattern 'row', got None"):
        Pruner(make(), pattern="row")


# --- rewinding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("rewind_to", [0, 2])
def test_weights_are_rewound(rewind_to, attached):
    model = make()
    pruner = MagnitudePruner(model, 0.875, schedule=Iterative(3, 5, "weights", rewind_to))
    optimizer = sgd(model)
    if attached:
        pruner.attach(optimizer)
    at = copy.deepcopy(model.state_dict())
    masks = masks_of(model)
    position, rounds = 0, 0
    for step in range(1, 25):
        backward(model, step)
        optimizer.step()
        if not attached:
            pruner.step()
        position += 1
        if step == rewind_to:
            at = copy.deepcopy(model.state_dict())
        if position == 5 and rounds < 3:
            position, rounds = rewind_to, rounds + 1
            assert pruner.rewound
            now = masks_of(model)
            assert sum(pruned_counts(model)) == round((1 - 0.5**rounds) * ELEMENTS)
            for name in NAMES:
                assert not (now[name] & ~masks[name]).any()
            masks = now
            for key, value in at.items():
                if not rf._core.pruning.is_pruning_key(key.rpartition(".")[2]):
                    mask = masks.get(key, torch.ones_like(value, dtype=torch.bool))
                    assert torch.equal(model.state_dict()[key], torch.where(mask, value, torch.zeros_like(value))), key
            assert not (attached and optimizer.state)
        else:
            assert not pruner.rewound
        assert pruner.training_step == position
    assert rounds == 3
    pruner.finalize()
    assert set(model.state_dict()) == set(make().state_dict())


def test_learning_rate_is_rewound():
    model = make()
    pruner = MagnitudePruner(model, 0.75, schedule=Iterative(2, 6, "learning_rate", 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5**pruner.training_step)
    assert not any("rewind" in key for key in model.state_dict())
    rates = []
    for step in range(12):
        train(model, optimizer, pruner, [step])
        scheduler.step()
        rates.append(-math.log2(scheduler.get_last_lr()[0]) - 3)
    assert rates == [1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4]


# --- criteria --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "term"),
    [
        (Movement(), lambda w, g: -w * g),
        (Taylor(), lambda w, g: (w * g).abs()),
        (Fisher(), lambda w, g: 0.5 * (w * g) ** 2),
    ],
)
def test_criteria_of_gradients(criterion, term):
    model = make().double()
    schedule = LinearSchedule(2, 8, 3)
    pruner = Pruner(model, 0.6, schedule=schedule, criterion=criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scores = {name: torch.zeros_like(w) for name, w in weights(model).items()}
    alive = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights(model).items()}
    for step in range(1, 11):
        x, y = torch.randn(8, 4, 6, 6, dtype=torch.double), torch.randint(0, 4, (8,))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        assert pruner.needs_accumulate == (step <= 8)
        if step <= 8:
            pruner.accumulate()
            for name, w in weights(model).items():
                scores[name] += term(w.detach(), w.grad)
        optimizer.step()
        pruner.step()
        if schedule.updates_at(step):
            flat = torch.cat([torch.where(alive[n], scores[n], -torch.inf).flatten() for n in NAMES])
            order = torch.argsort(flat, stable=True)[: round(schedule.sparsity_at(step, 0.6) * ELEMENTS)]
            mask = torch.ones(ELEMENTS, dtype=torch.bool)
            mask[order] = False
            sizes = [w.numel() for w in weights(model).values()]
            for (name, w), part in zip(weights(model).items(), mask.split(sizes), strict=True):
                alive[name] = part.view(w.shape)
        for name in NAMES:
            assert torch.equal(kept(model, name), alive[name]), (step, name)


def test_given_scores():
    model = make()
    scores = {name: torch.randn(w.shape) for name, w in weights(model).items()}
    pruner = Pruner(model, 0.5, schedule=LinearSchedule(0, 3), criterion=scores)
    for _ in range(3):
        pruner.step()
    flat = torch.cat([scores[name].flatten() for name in NAMES])
    masks = torch.cat([kept(model, name).flatten() for name in NAMES])
    assert flat[~masks].max() < flat[masks].min()
    assert int((~masks).sum()) == round(0.5 * ELEMENTS)
    scores["conv.weight"].zero_()  # a copy is kept, and saved
    assert model.get_buffer("conv.weight_mask_score").any()
    assert "given scores" in repr(pruner)
    with pytest.raises(ValueError, match=r"scores must be those of parameters that are pruned, got 'x'"):
        Pruner(make(), 0.5, criterion=scores | {"x": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"the scores of 'conv.weight' must be floating point of shape \[8, 4, 3, 3\]"):
        Pruner(make(), 0.5, criterion=scores | {"conv.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("criterion", [Magnitude(2.0), Random(5), rf.pruning.importance.Lamp()])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row"])
def test_criteria_without_gradients(criterion, pattern):
    model = make()
    pruner = Pruner(model, 0.5, pattern=pattern, criterion=criterion)
    assert not pruner.needs_accumulate
    pruner.step()
    assert abs(pruner.sparsity - 0.5) < 0.05
    assert all(row.has_pattern for row in pruner.report().tensors)


# --- adopted masks ---------------------------------------------------------------------------------------------------


def test_from_masks():
    model = make()
    given = {"conv.weight": torch.rand(8, 4, 3, 3) < 0.5, "head.2.weight": pack_mask(torch.rand(4, 12) < 0.3)}
    pruner = Pruner.from_masks(model, given)
    assert torch.equal(model.conv.weight == 0, ~given["conv.weight"])
    train(model, sgd(model), pruner, range(5))
    assert torch.equal(model.conv.weight == 0, ~given["conv.weight"])
    assert torch.equal(model.get_buffer("head.2.weight_mask_bits"), given["head.2.weight"])
    assert model.head[0].weight.all()
    assert pruner.report().target == pruner.sparsity == pruner.report().pruned / 336
    fresh = make(1)
    again = Pruner(fresh, pruner.sparsity, schedule=FixedSchedule(), include=list(given))
    fresh.load_state_dict(model.state_dict())
    train(fresh, sgd(fresh), again, [5])
    assert torch.equal(fresh.conv.weight == 0, ~given["conv.weight"])


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({}, ValueError, r"\[Pruner.from_masks\] needs at least one mask, got none"),
        (
            {"fc.weight": torch.ones(2, 2, dtype=torch.bool)},
            ValueError,
            r"must be that of a parameter, got 'fc.weight'",
        ),
        (
            {"conv.weight": torch.ones(2, 2, dtype=torch.bool)},
            ValueError,
            r"must be bool of shape \[8, 4, 3, 3\] or 40 bytes",
        ),
        ({"conv.weight": torch.ones(8, 4, 3, 3)}, TypeError, r"must be bool, or uint8 where it is packed, got Float"),
        ({"conv.weight": torch.zeros(8, 4, 3, 3, dtype=torch.bool)}, ValueError, r"must keep something, got none kept"),
    ],
)
def test_from_masks_errors(masks, error, message):
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        Pruner.from_masks(model, masks)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_from_masks_beside_others():
    model = make()
    MagnitudePruner(model, 0.5)
    with pytest.raises(ValueError, match=r"the model must have no masks yet, got 'pruning_step'"):
        Pruner.from_masks(model, {"conv.weight": torch.ones(8, 4, 3, 3, dtype=torch.bool)})


# --- attached --------------------------------------------------------------------------------------------------------


def test_attached_equals_called():
    """For an optimizer without moments, hooks and calls give the same bits."""
    results = []
    for attached in (False, True):
        model = make()
        pruner = Pruner(model, 0.8, schedule=LinearSchedule(0, 9, 2), criterion=Movement())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if attached:
            pruner.attach(optimizer)
            for step in range(12):
                backward(model, step)
                optimizer.step()
        else:
            train(model, optimizer, pruner, range(12))
        results.append(model.state_dict())
    assert all(torch.equal(results[1][key], value) for key, value in results[0].items())


def test_attach_and_detach():
    model = make()
    pruner = MagnitudePruner(model, 0.5)
    optimizer = sgd(model)
    pruner.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"step\] must not be called while an optimizer is attached"):
        pruner.step()
    with pytest.raises(RuntimeError, match=r"attach\] must not be called again before detach"):
        pruner.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    assert pruner.steps == 1
    pruner.detach()
    pruner.detach()
    backward(model, 1)
    optimizer.step()
    assert pruner.steps == 1
    pruner.step()
    pruner.attach(optimizer)
    pruner.finalize()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match=r"attach\] must not be called after finalize"):
        pruner.attach(optimizer)


def test_deepcopy_of_model_and_pruner():
    model = make()
    pruner = MagnitudePruner(model, 0.8, schedule=LinearSchedule(0, 9))
    optimizer = sgd(model)
    pruner.attach(optimizer)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    twin, twin_pruner = copy.deepcopy((model, pruner))
    assert twin_pruner._model is twin
    assert twin_pruner.steps == 4
    before = zeros(model)
    for step in range(4, 9):
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), twin_pruner, [step])
    assert zeros(twin) == round(0.8 * ELEMENTS)
    assert zeros(model) == before
    assert pruner.steps == 4


def test_repr():
    pruner = Pruner(make(), 0.5, "local", LinearSchedule(0, 9), "2:4", Movement(), regrowth=StraightThrough(12))
    assert repr(pruner) == (
        "Pruner(3 tensors, Movement(), 2:4, local, sparsity 0.0000 of 0.5, step 0, LinearSchedule(begin=0, end=9, every=1, "
        "initial=0), StraightThrough(end=12, every=1, decay=0))"
    )
