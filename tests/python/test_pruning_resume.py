"""A run that is killed after any step and resumed from its checkpoint is the uninterrupted one, bit for bit."""

import copy
import io

import pytest
import torch
from pruning_runs import NAMES, backward, make, same, sgd, tensors, train

import rarefy as rf
from rarefy.pruning import (
    ACDC,
    SET,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    Iterative,
    LinearSchedule,
    PolynomialSchedule,
    Pruner,
    RigL,
    StraightThrough,
)
from rarefy.pruning.importance import Fisher, Lamp, Magnitude, Random, Taylor

STEPS = 12


def up_and_down(step):
    return [0.1, 0.5, 0.3][step % 3]


def given_scores():
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(make().get_parameter(name).shape, generator=generator) for name in NAMES}


RUNS = {
    "constant": {"schedule": ConstantSchedule(3)},
    "linear": {"schedule": LinearSchedule(1, 10, 4)},
    "polynomial, local": {"schedule": PolynomialSchedule(0, 11, 3, 0.2), "scope": "local"},
    "cosine, erk": {"schedule": CosineSchedule(0, 9, 2), "scope": "erk"},
    "exponential, layers": {"schedule": ExponentialSchedule(2, 9, 2), "layers": {"conv": 0.3}},
    "cyclic": {"schedule": CyclicSchedule(0, 12, 3, 2)},
    "AC/DC": {"schedule": ACDC(1, 10, 3, 2)},
    "iterative": {"schedule": Iterative(3, 4)},
    "rewound weights": {"schedule": Iterative(3, 4, "weights", 2)},
    "rewound to the start": {"schedule": Iterative(2, 4, "weights")},
    "rewound learning rate": {"schedule": Iterative(3, 4, "learning_rate", 1)},
    "custom": {"schedule": CustomSchedule(up_and_down, [1, 2, 5, 8])},
    "custom, regrowing": {"schedule": CustomSchedule(up_and_down, [1, 2, 5, 8], regrow=True)},
    "SET": {"schedule": ConstantSchedule(1), "regrowth": SET(0, 12, 2)},
    "RigL": {"schedule": ConstantSchedule(1), "regrowth": RigL(0, 12, 2)},
    "gradual RigL, blocks": {
        "schedule": PolynomialSchedule(0, 8, 3),
        "regrowth": RigL(0, 12, 2, 0.5),
        "pattern": "2x2",
    },
    "soft": {"schedule": LinearSchedule(0, 6, 2), "regrowth": StraightThrough(9, 2)},
    "soft 2:4": {"sparsity": 0.5, "pattern": "2:4", "regrowth": StraightThrough(9, 1, 0.01)},
    "soft movement": {"schedule": LinearSchedule(0, 6, 2), "regrowth": StraightThrough(9, 2), "criterion": "movement"},
    "movement": {"schedule": LinearSchedule(0, 9, 3), "criterion": "movement"},
    "Taylor": {"schedule": LinearSchedule(0, 9, 3), "criterion": Taylor()},
    "Fisher, rows": {"schedule": LinearSchedule(0, 9, 3), "criterion": Fisher(), "pattern": "row"},
    "random": {"schedule": LinearSchedule(0, 9, 3), "criterion": Random(3)},
    "LAMP": {"schedule": LinearSchedule(0, 9, 3), "criterion": Lamp()},
    "squares, columns": {"schedule": LinearSchedule(0, 9, 3), "criterion": Magnitude(2.0), "pattern": "column"},
    "scores": {"schedule": LinearSchedule(0, 9, 3), "criterion": "scores"},
    "2:4": {"sparsity": 0.5, "schedule": LinearSchedule(0, 9, 3), "pattern": "2:4"},
}


def make_pruner(model, name):
    options = {"sparsity": 0.8} | RUNS[name]
    if options.get("criterion") == "movement":
        options["criterion"] = rf.pruning.Movement()
    if options.get("criterion") == "scores":
        options["criterion"] = given_scores()
    return Pruner(model, **options)


def run(model, optimizer, pruner, steps, attached):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.9**pruner.training_step
        if attached:
            backward(model, step)
            optimizer.step()
        else:
            train(model, optimizer, pruner, [step])


def start(name, seed, attached):
    model = make(seed)
    pruner = make_pruner(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1) if attached else sgd(model)
    if attached:
        pruner.attach(optimizer)
    return model, optimizer, pruner


# Hooks keep moments too, which matters where something comes back.
ATTACHED = ["linear", "AC/DC", "rewound weights", "SET", "RigL", "soft", "soft 2:4", "movement"]


@pytest.mark.parametrize(("name", "attached"), [(name, False) for name in RUNS] + [(name, True) for name in ATTACHED])
def test_killed_after_any_step(name, attached):
    model, optimizer, pruner = start(name, 0, attached)
    files = []
    for step in range(STEPS):
        run(model, optimizer, pruner, [step], attached)
        files.append(io.BytesIO())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, files[-1])
    final = model.state_dict()
    assert any((final[n + "_mask_bits"] != rf._core.pruning.full_mask(final[n])).any() for n in NAMES)

    for killed, file in enumerate(files[:-1], 1):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        fresh, its_optimizer, its_pruner = start(name, 1, attached)
        fresh.load_state_dict(saved["model"])
        its_optimizer.load_state_dict(saved["optimizer"])
        assert its_pruner.steps == killed
        run(fresh, its_optimizer, its_pruner, range(killed, STEPS), attached)
        for key, value in final.items():
            assert torch.equal(fresh.state_dict()[key], value), (killed, key)
        assert repr(its_pruner.report()) == repr(pruner.report())


@pytest.mark.parametrize("name", ["RigL", "soft 2:4", "rewound weights"])
def test_copied_after_any_step(name):
    """The same by deep copies, continued by a new pruner."""
    model, optimizer, pruner = start(name, 0, False)
    copies = []
    for step in range(STEPS):
        run(model, optimizer, pruner, [step], False)
        copies.append((copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())))
    for killed, (twin, state) in enumerate(copies[:-1], 1):
        its_pruner = make_pruner(twin, name)
        its_optimizer = sgd(twin)
        its_optimizer.load_state_dict(state)
        assert its_pruner.steps == killed
        run(twin, its_optimizer, its_pruner, range(killed, STEPS), False)
        for key, value in model.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value), (killed, key)


# --- checkpoints that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("movement", "conv.weight_mask_score"),
        ("soft", "head.0.weight_mask_latent"),
        ("rewound weights", "bn.bias_mask_rewind"),
        ("RigL", "conv.weight_mask_bits"),
    ],
)
def test_wrong_buffers_are_refused(name, key):
    model, optimizer, pruner = start(name, 0, False)
    run(model, optimizer, pruner, range(2), False)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        make_pruner(make(1), name)._model.load_state_dict(state | {key: state[key].flatten()[:3]})
    path, _, buffer = key.rpartition(".")
    pruner = make_pruner(make(1), name)  # the buffers of a model that is swapped below a pruner
    pruner._model.load_state_dict(state)
    setattr(pruner._model.get_submodule(path), buffer, state[key].flatten()[:3])
    backward(pruner._model, 0)
    before = tensors(pruner._model)
    with pytest.raises(ValueError, match=r"must have shape|must hold"):
        pruner.accumulate() if pruner.needs_accumulate else pruner.step()
    assert same(tensors(pruner._model), before)


def test_buffers_of_other_options_are_refused():
    model = make()
    make_pruner(model, "movement")
    with pytest.raises(
        ValueError, match=r"the parameters chosen only, got 'conv.weight_mask_score' too; .* and options"
    ):
        make_pruner(model, "linear")
    model = make()
    make_pruner(model, "linear")
    keys = list(model.state_dict())
    for name in ("movement", "soft", "rewound weights"):
        with pytest.raises(
            ValueError, match=r"must have '.*_mask_(score|latent|rewind)' too for these options, got none"
        ):
            make_pruner(model, name)
        assert list(model.state_dict()) == keys
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*conv.weight_mask_latent"):
        make_pruner(fresh := make(), "soft")._model.load_state_dict(model.state_dict())
    assert all(not fresh.get_buffer(f"{n}_mask_latent").any() for n in NAMES)
