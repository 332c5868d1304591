"""Pruners of both languages on the same weights and gradients: equal bits of weights and state after every step."""

import subprocess

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.pruning import (
    ACDC,
    SET,
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
from rarefy.pruning.importance import Random, Taylor

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

STEPS = 13
LINEAR = LinearSchedule(0, 9, 2)
RUNS = {
    "one_shot": {},
    "linear": {"schedule": LINEAR},
    "polynomial": {"scope": "local", "schedule": PolynomialSchedule(0, 9, 2)},
    "cosine": {"scope": "erk", "schedule": CosineSchedule(0, 9, initial=0.1)},
    "exponential": {"schedule": ExponentialSchedule(0, 9), "layers": {"a": 0.4}},
    "cyclic": {"schedule": CyclicSchedule(0, 10, 2)},
    "acdc": {"schedule": ACDC(1, 9, 2, 2)},
    "iterative": {"schedule": Iterative(3, 4, "weights", 1)},
    "custom": {"schedule": CustomSchedule(lambda step: step / 20, [1, 4, 9])},
    "blocks": {"sparsity": 0.5, "schedule": LINEAR, "pattern": "2x2"},
    "nm": {"sparsity": 0.5, "schedule": LINEAR, "pattern": "2:4"},
    "movement": {"schedule": LINEAR, "criterion": "movement"},
    "taylor": {"schedule": LINEAR, "pattern": "row", "criterion": Taylor()},
    "random": {"schedule": LINEAR, "criterion": Random(5)},
    "set": {"regrowth": SET(0, 12, 2, seed=3)},
    "rigl": {"schedule": LINEAR, "regrowth": RigL(0, 12, 2)},
    "soft": {"sparsity": 0.5, "pattern": "2:4", "regrowth": StraightThrough(9, 2, 0.01)},
    "scores": {"schedule": LINEAR, "criterion": "scores"},
}


class Two(nn.Module):
    def __init__(self, data):
        super().__init__()
        self.a, self.b = nn.Linear(12, 10, bias=False), nn.Conv2d(8, 6, 3, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(data["a.weight"])
            self.b.weight.copy_(data["b.weight"])


@pytest.fixture(scope="module")
def program(request):
    program = request.config.rootpath / "build" / "dev" / "tests" / "cpp" / "rarefy_pruning_parity"
    if not program.exists():
        pytest.skip("rarefy_pruning_parity is not built (-DRAREFY_BUILD_TESTS=ON)")
    return program


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    shapes = {"a.weight": (10, 12), "b.weight": (6, 8, 3, 3)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"score.{name}": torch.randn(shape) for name, shape in shapes.items()}
    for step in range(1, STEPS + 1):
        tensors |= {f"{name}.grad.{step}": torch.randn(shape) for name, shape in shapes.items()}
    return tensors


@pytest.mark.parametrize("name", RUNS)
def test_equal_at_every_step(program, data, tmp_path, name):
    save_file(data, tmp_path / "data.safetensors")
    subprocess.run(
        [program, name, tmp_path / "data.safetensors", tmp_path / "out.safetensors"], check=True, capture_output=True
    )
    expected = load_file(tmp_path / "out.safetensors")

    model = Two(data)
    options = {"sparsity": 0.7} | RUNS[name]
    if options.get("criterion") == "movement":
        options["criterion"] = rf.pruning.Movement()
    if options.get("criterion") == "scores":
        options["criterion"] = {n: data[f"score.{n}"] for n in ("a.weight", "b.weight")}
    pruner = Pruner(model, **options)
    compared, pruned = 0, 0
    for step in range(1, STEPS + 1):
        for n, weight in model.named_parameters():
            weight.grad = data[f"{n}.grad.{step}"].clone()
        if pruner.needs_accumulate:
            pruner.accumulate()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(weight.grad, alpha=-0.1)
        pruner.step()
        state = {f"{step}.{key}": value for key, value in model.state_dict().items()}
        assert state.keys() == {key for key in expected if key.startswith(f"{step}.")}
        for key, value in state.items():
            assert torch.equal(value, expected[key]), key
            compared += value.numel()
        pruned = pruner.report().pruned
    assert compared > STEPS * 2 * 120
    assert pruned > 0.35 * (120 + 432)
