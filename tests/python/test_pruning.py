"""MagnitudePruner: schedules, enforcement, state, selection, errors."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from pruning_runs import same, tensors
from torch import nn

import rarefy as rf
from rarefy.pruning import ConstantSchedule, MagnitudePruner, PolynomialSchedule


class Net(nn.Module):
    """The same network as in tests/cpp/pruning/test_pruner.cpp, so that keys can be compared."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.bn = nn.BatchNorm2d(7)
        self.head = nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


KEYS = ["conv.weight_mask_bits", "head.0.weight_mask_bits", "head.2.weight_mask_bits", "pruning_step"]
ELEMENTS = 3 * 7 * 9 + 7 * 13 + 13 * 5


def make(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(model, optimizer, pruner, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def weights(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() >= 2}


def kept(model, name):
    mask = model.get_buffer(name + "_mask_bits")
    parameter = model.get_parameter(name)
    bits = np.unpackbits(mask.numpy(), bitorder="little")[: parameter.numel()]
    return torch.from_numpy(bits.astype(bool)).view(parameter.shape)


def zeros(model):
    return sum(int((p == 0).sum()) for p in weights(model).values())


SCHEDULE = PolynomialSchedule(begin=2, end=17, every=4)  # 15 is no multiple of 4


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_polynomial_is_the_formula(power, initial):
    schedule = PolynomialSchedule(begin=100, end=1100, every=50, initial=initial, power=power)
    for t in range(0, 1300, 7):
        expected = 0.9 + (initial - 0.9) * (1 - (t - 100) / 1000) ** power if 100 <= t <= 1100 else 0.9 * (t > 1100)
        assert schedule.sparsity_at(t, 0.9) == pytest.approx(expected, abs=1e-15)
    assert schedule.sparsity_at(99, 0.9) == 0.0
    assert schedule.sparsity_at(100, 0.9) == pytest.approx(initial)
    assert schedule.sparsity_at(1100, 0.9) == 0.9


def test_polynomial_updates():
    updates = [t for t in range(30) if SCHEDULE.updates_at(t)]
    assert updates == [2, 6, 10, 14, 17]


def test_constant():
    schedule = ConstantSchedule(begin=3)
    assert [schedule.sparsity_at(t, 0.5) for t in (0, 2, 3, 100)] == [0.0, 0.0, 0.5, 0.5]
    assert [t for t in range(10) if schedule.updates_at(t)] == [3]


def test_schedules_are_values():
    for schedule in (ConstantSchedule(3), SCHEDULE):
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert copy.deepcopy(schedule) == schedule
        assert hash(copy.copy(schedule)) == hash(schedule)
        with pytest.raises(AttributeError):
            schedule.begin = 1
    assert ConstantSchedule(3) != ConstantSchedule(4)
    assert PolynomialSchedule(0, 10) != PolynomialSchedule(0, 10, 2)
    assert repr(SCHEDULE) == "PolynomialSchedule(begin=2, end=17, every=4, initial=0, power=3)"


@pytest.mark.parametrize(
    ("make_schedule", "message"),
    [
        (lambda: ConstantSchedule(-1), r"\[ConstantSchedule\] begin must not be negative, got -1"),
        (lambda: PolynomialSchedule(-1, 5), r"\[PolynomialSchedule\] begin must not be negative, got -1"),
        (lambda: PolynomialSchedule(5, 5), r"end must be larger than begin, got begin 5 and end 5"),
        (lambda: PolynomialSchedule(0, 5, 0), r"every must be positive, got 0"),
        (lambda: PolynomialSchedule(0, 5, initial=1.0), r"initial must be in \[0, 1\), got 1"),
        (lambda: PolynomialSchedule(0, 5, power=0.0), r"power must be positive and finite, got 0"),
        (lambda: PolynomialSchedule(0, 5, power=float("inf")), r"power must be positive and finite, got inf"),
    ],
)
def test_schedule_errors(make_schedule, message):
    with pytest.raises(ValueError, match=message):
        make_schedule()


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
def test_masks_at_every_step_follow_the_reference(scope):
    """An independent pruner of dense boolean masks, sorted by magnitude with what is pruned first."""
    model = make()
    pruner = MagnitudePruner(model, 0.83, scope=scope, schedule=SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in weights(model).items()}
    groups = [list(expected)] if scope == "global" else [[n] for n in expected]
    for step in range(1, 22):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step in (2, 6, 10, 14, 17):
            sparsity = 0.83 - 0.83 * (1 - (step - 2) / 15) ** 3
            for group in groups:
                magnitude = torch.cat(
                    [torch.where(expected[n], weights(model)[n].detach().abs(), -1.0).flatten() for n in group]
                )
                order = torch.argsort(magnitude, stable=True)[: round(sparsity * magnitude.numel())]
                flat = torch.cat([expected[n].flatten() for n in group])
                flat[order] = False
                for n, part in zip(group, flat.split([expected[n].numel() for n in group]), strict=True):
                    expected[n] = part.view(expected[n].shape)
        pruner.step(optimizer)
        for name, mask in expected.items():
            assert torch.equal(kept(model, name), mask), (step, name)
            assert not weights(model)[name][~mask].any()
            assert not weights(model)[name].grad[~mask].any()
            assert weights(model)[name][mask].all()
    if scope == "global":
        assert zeros(model) == round(0.83 * ELEMENTS)
    else:
        assert zeros(model) == sum(round(0.83 * p.numel()) for p in weights(model).values())


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
)
def test_momentum_cannot_bring_zeros_back(make_optimizer):
    model = make()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    pruner = MagnitudePruner(model, 0.7, schedule=ConstantSchedule(begin=5))
    train(model, optimizer, pruner, range(5))
    masks = {n: kept(model, n) for n in weights(model)}
    assert zeros(model) == round(0.7 * ELEMENTS)
    for step in range(5, 15):
        train(model, optimizer, pruner, [step])
        assert all(torch.equal(p == 0, ~masks[n]) for n, p in weights(model).items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_target_is_hit_at_the_last_step_for_any_frequency():
    for every in (1, 2, 3, 7, 100):
        model = make()
        pruner = MagnitudePruner(model, 0.9, schedule=PolynomialSchedule(0, 10, every, power=1.0))
        for _ in range(9):
            pruner.step()
        before = zeros(model)
        pruner.step()
        assert before < zeros(model) == round(0.9 * ELEMENTS)


def test_initial_sparsity_comes_with_the_first_step():
    model = make()
    pruner = MagnitudePruner(model, 0.9, schedule=PolynomialSchedule(begin=0, end=100, every=10, initial=0.4))
    pruner.step()
    assert zeros(model) == round(0.4 * ELEMENTS)


def test_one_shot():
    model = make()
    pruner = MagnitudePruner(model, 0.5)
    assert zeros(model) == 0
    assert pruner.sparsity == 0.0
    assert pruner.steps == 0
    pruner.step()
    assert zeros(model) == round(0.5 * ELEMENTS)
    assert pruner.steps == 1


def test_channels_last_gives_the_same_masks():
    models = [make(), make().to(memory_format=torch.channels_last)]
    assert not models[1].conv.weight.is_contiguous()
    for model in models:
        MagnitudePruner(model, 0.6).step()
    for name in weights(models[0]):
        assert torch.equal(kept(models[0], name), kept(models[1], name))
        assert torch.equal(weights(models[0])[name], weights(models[1])[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = make().to(dtype)
    MagnitudePruner(model, 0.6).step()
    assert zeros(model) == round(0.6 * ELEMENTS)


def test_forward_and_saved_keys_are_untouched():
    model = make()
    names = [n for n, _ in model.named_parameters()]
    keys = set(model.state_dict())
    MagnitudePruner(model, 0.5)
    assert [n for n, _ in model.named_parameters()] == names
    assert sorted(set(model.state_dict()) - keys) == KEYS
    assert not model.conv._forward_pre_hooks
    assert not model.conv._forward_hooks


# --- selection -------------------------------------------------------------------------------------------------------


def pruned_names(model, **options):
    return [t.name for t in MagnitudePruner(model, 0.5, **options).report().tensors]


def test_default_selection_and_reasons():
    report = MagnitudePruner(make(), 0.5).report()
    assert [t.name for t in report.tensors] == ["conv.weight", "head.0.weight", "head.2.weight"]
    assert {o.name: o.reason for o in report.left_alone} == {
        "conv.bias": "fewer than 2 dimensions",
        "bn.weight": "fewer than 2 dimensions",
        "bn.bias": "fewer than 2 dimensions",
        "head.0.bias": "fewer than 2 dimensions",
        "head.2.bias": "fewer than 2 dimensions",
    }


def test_include_and_exclude():
    assert pruned_names(make(), include=["head.*"]) == ["head.0.weight", "head.2.weight"]
    assert pruned_names(make(), include=["head.?"]) == ["head.0.weight", "head.2.weight"]
    assert pruned_names(make(), include=["conv"]) == ["conv.weight"]
    assert pruned_names(make(), include=["*.weight"], exclude=["*0*"]) == ["conv.weight", "head.2.weight"]
    assert pruned_names(make(), include=["bn.weight", "conv.bias"]) == ["conv.bias", "bn.weight"]
    assert pruned_names(make(), exclude=["head.2"]) == ["conv.weight", "head.0.weight"]
    report = MagnitudePruner(make(), 0.5, include=["head.*"], exclude=["head.2"]).report()
    reasons = {o.name: o.reason for o in report.left_alone}
    assert reasons["conv.weight"] == "not included"
    assert reasons["head.2.weight"] == "excluded"


def test_other_parameters_by_name():
    model = nn.MultiheadAttention(8, 2)
    assert pruned_names(model) == ["out_proj.weight"]
    assert pruned_names(nn.MultiheadAttention(8, 2), include=["in_proj_weight"]) == ["in_proj_weight"]


def test_tied_parameters_are_pruned_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "out": nn.Linear(6, 10, bias=False)})
    model["out"].weight = model["embed"].weight
    pruner = MagnitudePruner(model, 0.5)
    pruner.step()
    report = pruner.report()
    assert report.elements == 60
    assert report.zeros == 30
    assert [(o.name, o.reason) for o in report.left_alone] == [("out.weight", "the same tensor as embed.weight")]
    assert model["out"].weight is model["embed"].weight
    assert "out.weight_mask_bits" not in model.state_dict()


def test_shared_module_continues():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    MagnitudePruner(model, 0.5).step()
    again = MagnitudePruner(model, 0.5)
    assert again.steps == 1
    assert again.sparsity == 0.5


def test_frozen_parameters_are_pruned_too():
    model = make()
    model.requires_grad_(False)
    MagnitudePruner(model, 0.5).step()
    assert zeros(model) == round(0.5 * ELEMENTS)


# --- state -----------------------------------------------------------------------------------------------------------


def run(steps, model=None, optimizer=None):
    model = make() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    pruner = MagnitudePruner(model, 0.8, schedule=SCHEDULE)
    train(model, optimizer, pruner, steps)
    return model, optimizer, pruner


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("interruption", [1, 2, 7, 16, 17, 19])
def test_resume_equals_uninterrupted_run(interruption, assign):
    straight, _, _ = run(range(20))
    model, optimizer, _ = run(range(interruption))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = make(seed=1)
    pruner = MagnitudePruner(fresh, 0.8, schedule=SCHEDULE)
    fresh.load_state_dict(saved["model"], assign=assign)
    if assign:
        for parameter in fresh.parameters():
            parameter.requires_grad_()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    assert pruner.steps == interruption
    train(fresh, optimizer, pruner, range(interruption, 20))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key


def test_deepcopy_keeps_masks_and_goes_on():
    model, _, _ = run(range(8))
    clone = copy.deepcopy(model)
    assert sorted(k for k in clone.state_dict() if "mask" in k or "pruning" in k) == KEYS
    pruner = MagnitudePruner(clone, 0.8, schedule=SCHEDULE)
    assert pruner.steps == 8
    assert pruner.sparsity == zeros(model) / ELEMENTS
    before = zeros(model)
    for _ in range(12):
        pruner.step()
    assert zeros(clone) == round(0.8 * ELEMENTS)
    assert zeros(model) == before


def test_whole_model_can_be_pickled():
    model, _, _ = run(range(8))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert MagnitudePruner(loaded, 0.8, schedule=SCHEDULE).steps == 8


def test_masks_never_shrink():
    model = make()
    MagnitudePruner(model, 0.8).step()
    masks = {n: kept(model, n) for n in weights(model)}
    model.pruning_step.zero_()
    lower = MagnitudePruner(model, 0.3)
    lower.step()
    assert all(torch.equal(kept(model, n), masks[n]) for n in masks)


def test_finalize():
    model, optimizer, pruner = run(range(20))
    keys = set(make().state_dict())
    with torch.no_grad():
        model.conv.weight.add_(1.0)
    pruner.finalize()
    assert set(model.state_dict()) == keys
    assert zeros(model) == round(0.8 * ELEMENTS)
    report = pruner.report()
    assert report.finalized
    assert report.zeros == round(0.8 * ELEMENTS)
    assert pruner.steps == 20
    assert pruner.sparsity == round(0.8 * ELEMENTS) / ELEMENTS
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(
            RuntimeError, match=rf"\[MagnitudePruner.{call.__name__}\] must not be called after finalize"
        ):
            call()
    model(batch(0)[0]).sum().backward()
    optimizer.step()  # still valid
    MagnitudePruner(model, 0.9).step()  # and a new pruner may follow
    assert zeros(model) == round(0.9 * ELEMENTS)


# --- report ----------------------------------------------------------------------------------------------------------


def test_report():
    model, _, pruner = run(range(20))
    report = pruner.report()
    assert report.elements == ELEMENTS
    assert report.zeros == report.pruned == round(0.8 * ELEMENTS)
    assert report.sparsity == report.zeros / ELEMENTS
    assert report.target == 0.8
    assert report.step == 20
    for row in report.tensors:
        parameter = weights(model)[row.name]
        assert (row.shape, row.elements) == (tuple(parameter.shape), parameter.numel())
        assert row.zeros == int((parameter == 0).sum())
        assert row.sparsity == row.zeros / row.elements
    text = repr(report)
    assert "conv.weight" in text
    assert "7x3x3x3" in text
    assert "left alone:" in text
    assert f"{report.sparsity:.4f}" in text
    assert report._repr_html_().count("<tr>") == 1 + 3 + 1 + 5
    assert repr(pruner).startswith("MagnitudePruner(3 tensors, Magnitude(p=1), unstructured, global, sparsity 0.8")
    with pytest.raises(AttributeError):
        report.step = 3


def test_report_of_what_zeros_are_worth():
    model, _, pruner = run(range(20))
    model.eval()
    before = tensors(model)
    cost = pruner.report(batch(0)[0]).cost
    assert same(tensors(model), before)
    size = rf.pruning.sparse_size(model)
    assert (cost.bytes, cost.dense_bytes) == (size.bytes, size.dense_bytes)
    per_sample = 3 * 7 * 9 * 36 + 7 * 13 + 13 * 5
    assert cost.dense_macs == 8 * per_sample
    assert 0 < cost.macs < 0.5 * cost.dense_macs
    assert cost.seconds > 0
    assert cost.dense_seconds > 0
    assert "bytes in a file: " in repr(pruner.report(batch(0)[0]))
    assert "bytes in a file: " not in repr(pruner.report())
    pruner.finalize()
    assert pruner.report(batch(0)[0]).cost.macs == cost.macs
    assert pruner.report().cost.macs is None


def test_report_says_what_is_odd():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(10, 10))
    pruner = MagnitudePruner(model, 0.4, scope="local")
    pruner.step()
    notes = [t.note for t in pruner.report().tensors]
    assert notes == ["too small: 0.4 of 1 elements rounds to none", ""]
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    assert pruner.report().tensors[1].note == "40 pruned values are not zero: call step() after the optimizer's"

    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(10, 10))
    pruner = MagnitudePruner(model, 0.6, scope="local")
    pruner.step()
    assert pruner.report().tensors[0].note == "all of it is pruned"


def test_sparsity_zero():
    model = make()
    before = copy.deepcopy(model.state_dict())
    pruner = MagnitudePruner(model, 0.0, schedule=SCHEDULE)
    for _ in range(20):
        pruner.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert "the target is 0, so nothing is pruned" in repr(pruner.report())


# --- errors: the model is as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"\[Pruner\] sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.5}, ValueError, r"sparsity must be in \[0, 1\), got -0.5"),
        ({"sparsity": float("nan")}, ValueError, r"sparsity must be in \[0, 1\), got nan"),
        ({"scope": "layer"}, ValueError, r"scope must be 'local', 'global' or 'erk', got 'layer'"),
        (
            {"sparsity": 0.1, "schedule": PolynomialSchedule(0, 5, initial=0.3)},
            ValueError,
            r"sparsity must not be below the schedule's initial 0.3, got 0.1",
        ),
        ({"include": ["fc9"]}, ValueError, r"every name in include must be that of a parameter .*, got 'fc9'"),
        ({"exclude": ["head.7"]}, ValueError, r"every name in exclude must be that of a parameter .*, got 'head.7'"),
        ({"include": ["bn"]}, ValueError, r"needs at least one parameter to prune .* got none among 8 parameters"),
        ({"include": "conv"}, TypeError, r"include must be a list of names, got the string 'conv'"),
    ],
)
def test_construction_errors(options, error, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        MagnitudePruner(model, **({"sparsity": 0.5} | options))
    assert list(model.state_dict()) == keys


def test_other_masks_in_the_model():
    model = make()
    MagnitudePruner(model, 0.5, include=["head.*"])
    with pytest.raises(ValueError, match=r"must have them for the parameters chosen, got none for 'conv.weight'"):
        MagnitudePruner(model, 0.5)
    with pytest.raises(ValueError, match=r"for the parameters chosen only, got 'head.2.weight_mask_bits' too"):
        MagnitudePruner(model, 0.5, include=["head.0"])
    del model.pruning_step
    with pytest.raises(ValueError, match="must have pruning_step too, got none"):
        MagnitudePruner(model, 0.5, include=["head.*"])


@pytest.mark.parametrize("scope", ["global", "local"])
def test_nan_changes_nothing(scope):
    model, _, pruner = run(range(9))
    pruner = MagnitudePruner(model, 0.8, scope=scope, schedule=SCHEDULE)
    with torch.no_grad():
        model.conv.weight.fill_(1.0)
        model.head[2].weight.view(-1)[11] = float("nan")
    before = tensors(model)
    with pytest.raises(
        ValueError, match=r"weights must not be NaN, got 1 NaN in 'head.2.weight', the first at flat index 11"
    ):
        pruner.step()
    assert same(tensors(model), before)


def test_checkpoint_of_another_model():
    model = make()
    pruner = MagnitudePruner(model, 0.8, schedule=SCHEDULE)
    state = model.state_dict()
    state["conv.weight_mask_bits"] = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv.weight_mask_bits"):
        model.load_state_dict(state)
    model.conv.weight_mask_bits = torch.zeros(8, dtype=torch.uint8)
    before = tensors(model)
    for call in (pruner.step, pruner.report, pruner.finalize):
        with pytest.raises(ValueError, match=r"the mask of 'conv.weight' must hold 24 bytes .* got 8 of Byte"):
            call()
    assert same(tensors(model), before)
    assert rf.pruning.MagnitudePruner is MagnitudePruner
