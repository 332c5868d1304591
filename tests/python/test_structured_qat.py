"""Structured pruning of models that are prepared for quantization-aware training, with frozen scales."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from structured_checks import check_attributes, check_function, check_training, prune
from structures import Structure, image, randomize, sequence
from torch import nn

import rarefy as rf
from rarefy.pruning import StructuredPruner, importance

QConfig = rf.quantization.QConfig


class SmallCnn(nn.Module):
    """A residual block with batch norms that are folded, a ReLU that is fused, and a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.depthwise(self.relu(self.conv2(x))))
        return self.fc((x + self.conv3(self.relu(y))).mean((2, 3)))


class SmallTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.norm1 = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.o = nn.Linear(12, 12)
        self.norm2 = nn.LayerNorm(12)
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, -1, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.out(x + self.down(F.gelu(self.up(self.norm2(x)))))


def prepared(kind: type[nn.Module], inputs, config: QConfig, dtype: torch.dtype, frozen: bool = True) -> nn.Module:
    """With scales that training has observed, which are then frozen."""
    model = kind().to(dtype)
    randomize(model)
    example = tuple(x.to(dtype) for x in inputs())
    model = rf.quantization.prepare_qat(model, config, example)
    model.train()
    for _ in range(3):
        model(*(x.to(dtype) for x in inputs()))
    if frozen:
        rf.quantization.set_state(model, observe=False)
    return model.eval()


CASES = {"cnn": (SmallCnn, image(), [6, 8]), "transformer": (SmallTransformer, sequence(), [4, 10, 12])}
CONFIGS = {
    "int8": QConfig.int8(execution="simulated"),
    "per tensor": QConfig.int8(
        execution="simulated", weight=rf.quantization.Scheme(bits=8, symmetric=True, narrow_range=True)
    ),
}


class Frozen(Structure):
    """``build`` does not touch the weights again, which the scales were observed for."""

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.model()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CASES)
def test_same_function(name, config):
    """With frozen scales, the grid of what is left stays the one that it was."""
    kind, inputs, units = CASES[name]
    structure = Frozen(name, lambda: prepared(kind, inputs, CONFIGS[config], torch.float64), inputs, (), ())
    for seed in range(2):
        options = {"channels": 0.4, "scope": "local", "importance": importance.Random(seed)}
        pruned = prune(structure, seed, fold_constants=False, **options)
        assert sorted(group.units for group in pruned.report.groups) == units
        assert pruned.removed > 0
        check_function(pruned)
        check_attributes(pruned.model)


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on(name):
    kind, inputs, _ = CASES[name]
    structure = Frozen(name, lambda: prepared(kind, inputs, CONFIGS["int8"], torch.float64), inputs, (), ())
    pruned = prune(structure, trained=True, channels=0.4, scope="local", fold_constants=False)
    assert pruned.removed > 0
    check_training(pruned)


@pytest.mark.parametrize("name", CASES)
def test_converted(name):
    """Pruned, trained a step further with quantizers that observe again, then the integer model."""
    kind, inputs, units = CASES[name]
    torch.manual_seed(0)
    model = prepared(kind, inputs, QConfig.int8(), torch.float32, frozen=False)
    example = tuple(x.float() for x in inputs())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    before = copy.deepcopy(model)
    report = StructuredPruner(model, example, channels=0.4, scope="local").prune(optimizers=[optimizer])
    assert sorted(group.units for group in report.groups) == units
    assert report.achieved > 0.3
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(*example).square().mean().backward()
        optimizer.step()
    model.eval()
    integer = rf.quantization.convert(model)
    expected, got = model(*example), integer(*example)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 0.02 * float(expected.abs().max())
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in before.parameters())
