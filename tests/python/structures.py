"""Small models of every structure that channels can be coupled by: the table that structured pruning is proven on.

tests/cpp/pruning/structures.cpp holds the same models over torch::nn under the same names, and tests/structures.txt says
for both what must be found in each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Inputs = tuple | dict


@dataclass(frozen=True)
class Pin:
    """A dimension of which slices must stay, and a word that the reason must hold."""

    tensor: str
    dim: int
    word: str


@dataclass(frozen=True)
class Structure:
    """A model, its inputs, and what must be found in it."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    groups: tuple[int, ...]  # the units of each group, ascending
    pins: tuple[Pin, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float64 and evaluation mode, with no two parameters or statistics alike."""
        torch.manual_seed(seed)
        model = self.model().double().eval()
        randomize(model)
        return model

    def make_inputs(self, seed: int = 0) -> Inputs:
        torch.manual_seed(1000 + seed)
        return self.inputs()

    def forward(self, model: nn.Module, inputs: Inputs) -> Any:
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def randomize(model: nn.Module) -> None:
    """Moves what is initialized to zeros and ones, so that a slice of one channel never passes for another's."""
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))


EXPECTATIONS = Path(__file__).parent.parent / "structures.txt"
STRUCTURES: dict[str, Structure] = {}


def read_expectations() -> dict[str, tuple[tuple[int, ...], tuple[Pin, ...]]]:
    """Lines "name: 4 8; conv.weight 0 aten::slice; ...": the units of the groups, then what is pinned."""
    table = {}
    for line in EXPECTATIONS.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, fields = line.split(":", 1)
        groups, *pins = fields.split(";")
        table[name] = (
            tuple(int(units) for units in groups.split()),
            tuple(Pin(tensor, int(dim), word) for tensor, dim, word in (pin.split() for pin in pins)),
        )
    return table


_EXPECTED = read_expectations()


def structure(inputs: Callable[[], Inputs]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Adds a class to the table, under its name in snake case."""

    def add(kind: type[nn.Module]) -> type[nn.Module]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
        groups, pins = _EXPECTED[name]
        STRUCTURES[name] = Structure(name, kind, inputs, groups, pins)
        return kind

    return add


# Inputs. Every call draws others.


def image(channels: int = 3, size: int = 8) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, size, size, dtype=torch.float64),)


def sequence(channels: int = 5, length: int = 6) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, length, channels, dtype=torch.float64),)


def signal(channels: int = 3, length: int = 12) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, length, dtype=torch.float64),)


def words(vocabulary: int = 11, length: int = 6) -> Callable[[], Inputs]:
    return lambda: (torch.randint(0, vocabulary, (2, length)),)


def pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


# Chains


@structure(image())
class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(pool(self.conv2(self.conv1(x).relu()).relu()))


@structure(image())
class ChainBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).sigmoid()
        return self.fc(pool(F.silu(self.bn2(self.conv2(x)))))


@structure(sequence())
class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        return self.layers(x)


@structure(signal())
class ChainConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 6, 3, dilation=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.conv2(self.bn(self.conv1(x)).relu()).amax(2))


@structure(lambda: (torch.randn(2, 2, 4, 5, 6, dtype=torch.float64),))
class ChainConv3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(2, 8, 3, padding=1)
        self.bn = nn.BatchNorm3d(8)
        self.conv2 = nn.Conv3d(8, 6, (1, 3, 3))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool3d(self.bn(self.conv1(x)).relu(), 2)
        return self.fc(F.adaptive_avg_pool3d(F.relu(self.conv2(F.interpolate(x, scale_factor=2.0))), 1).flatten(1))


@structure(image())
class TransposedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = conv(3, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.out = conv(6, 3, 1)

    def forward(self, x):
        return self.out(self.up(self.down(x).relu()).relu())


@structure(image(3, 6))
class FlattenLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 7)
        self.hidden = nn.Linear(7 * 9, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.hidden(F.max_pool2d(self.conv(x), 2).flatten(1)).relu())


@structure(image())
class AdaptivePooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 7)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.fc = nn.Linear(7 * 6, 3)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.conv(x)), 1))


@structure(sequence())
class MeanPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(x)
        return self.fc(x.mean(dim=1) + x.amax(1) - x.sum(1) / x.shape[1])


@structure(image())
class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.drop = nn.Dropout2d(0.5)
        self.fc = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = pool(self.drop(self.conv(x).relu()))
        return self.out(F.dropout(self.fc(x), 0.5, self.training).relu())


@structure(image())
class Prelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.act1 = nn.PReLU(8)
        self.conv2 = conv(8, 6)
        self.act2 = nn.PReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(pool(self.act2(self.conv2(self.act1(self.conv1(x))))))


@structure(image())
class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 6)
        self.fc = nn.Linear(6, 4)
        for layer in (self.conv1, self.bn):
            layer.requires_grad_(False)

    def forward(self, x):
        return self.fc(pool(self.conv2(self.bn(self.conv1(x)).relu()).relu()))


@structure(lambda: {"batch": {"image": torch.randn(2, 3, 8, 8, dtype=torch.float64)}, "scale": 0.5})
class NestedDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.left = nn.Linear(8, 6)
        self.right = nn.Linear(8, 4)
        self.head = nn.Linear(6, 2)

    def forward(self, batch, scale):
        x = pool(self.conv(batch["image"]).relu()) * scale
        return {"scores": [self.head(self.left(x).relu())], "features": (self.right(x), None, 3)}


# Residual streams


@structure(image())
class ResidualBasic(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1 = conv(8, 6, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = conv(6, 8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()
        return self.fc(pool(x))


@structure(image())
class ResidualBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 12)
        self.conv1 = conv(12, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = conv(4, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.conv3 = conv(5, 12, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return self.fc(pool((x + self.bn3(self.conv3(y))).relu()))


@structure(image())
class ResidualProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1 = conv(8, 6, stride=2)
        self.conv2 = conv(6, 10)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc(pool(torch.add(self.conv2(self.conv1(x).relu()), self.shortcut(x), alpha=0.5).relu()))


@structure(image())
class ResidualPreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = conv(8, 6)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv2 = conv(6, 8)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return self.fc(pool(self.bn3(x).relu()))


@structure(image())
class ResidualPostActivation(nn.Module):
    """The activation ends the branch, so that a channel that is gone from the branch is one that stays in the sum."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1 = conv(8, 6)
        self.conv2 = conv(6, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).sigmoid()
        x = x + self.conv2(self.conv1(x).relu()).sigmoid()
        return self.fc(pool(x - 0.5 * self.conv2(self.conv1(x))))


@structure(image())
class ResidualPadding(nn.Module):
    """The shortcut without parameters of the first residual networks: every second pixel, and zeros for new channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1 = conv(8, 6, stride=2)
        self.conv2 = conv(6, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc(pool((self.conv2(self.conv1(x).relu()) + shortcut).relu()))


@structure(image())
class FeaturePyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage1 = conv(3, 6, stride=2)
        self.stage2 = conv(6, 8, stride=2)
        self.lateral1 = conv(6, 5, 1)
        self.lateral2 = conv(8, 5, 1)
        self.out = conv(5, 2)

    def forward(self, x):
        a = self.stage1(x).relu()
        b = self.stage2(a).relu()
        q = self.lateral2(b)
        p = self.lateral1(a) + F.interpolate(q, size=a.shape[-2:], mode="nearest")
        return self.out(p), self.out(q)


# Concatenation


@structure(image())
class ConcatNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)
        self.b = conv(3, 5, 1)
        self.c = conv(9, 6)
        self.bn = nn.BatchNorm2d(19)
        self.d = conv(19, 7)
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x).relu()
        ab = torch.cat([a, b], 1)
        x = torch.cat([ab, torch.cat([self.c(ab), a], 1)], 1)
        return self.fc(pool(self.d(self.bn(x).relu())))


@structure(image())
class ConcatFlattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4, stride=2)
        self.b = conv(3, 5, stride=4)
        self.hidden = nn.Linear(4 * 16 + 5 * 4, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.a(x).relu().flatten(1), self.b(x).relu().flatten(1)], 1)
        return self.out(self.hidden(x).relu())


@structure(image())
class ConcatResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)
        self.b = conv(3, 5)
        self.c = conv(3, 9)
        self.out = conv(9, 2)

    def forward(self, x):
        return self.out((torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).relu())


@structure(image())
class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(conv(6 + 4 * i, 4, bias=False) for i in range(3))
        self.fc = nn.Linear(18, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.fc(pool(x))


@structure(image())
class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = conv(3, 4)
        self.down2 = conv(4, 6)
        self.middle = conv(6, 8)
        self.up2 = conv(8 + 6, 5)
        self.up1 = nn.ConvTranspose2d(5, 4, 2, stride=2)
        self.out = conv(4 + 4, 2, 1)

    def forward(self, x):
        a = self.down1(x).relu()
        b = self.down2(F.avg_pool2d(a, 2)).relu()
        c = self.middle(F.max_pool2d(b, 2)).relu()
        c = F.interpolate(c, scale_factor=2, mode="bilinear", align_corners=False)
        c = self.up2(torch.cat([c, b], 1)).relu()
        return self.out(torch.cat([self.up1(c), a], 1))


@structure(sequence())
class StackedHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.b = nn.Linear(5, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.stack([self.a(x), self.b(x)], 1)
        first, second = x.unbind(1)
        return self.out(x.sum(1).relu() + first * second)


# Pieces


@structure(image())
class ChunkTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.left = conv(6, 2)
        self.right = conv(6, 2)

    def forward(self, x):
        a, b = self.conv(x).relu().chunk(2, dim=1)
        return self.left(a) + self.right(b)


@structure(image())
class SplitReuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.mix = conv(4, 5)
        self.whole = conv(12, 5)
        self.out = conv(5, 2)

    def forward(self, x):
        y = self.conv(x).relu()
        a, b, c = torch.split(y, y.size(1) // 3, dim=1)
        return self.out((self.mix(a + b) * self.mix(c) + self.whole(y)).relu())


@structure(image())
class SplitSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.left = conv(4, 5)
        self.right = conv(8, 5)
        self.out = conv(5, 2)

    def forward(self, x):
        a, b = self.conv(x).relu().split([4, 8], dim=1)
        return self.out((self.left(a) + self.right(b)).relu())


@structure(image())
class SliceLiteral(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.next = conv(8, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.next(self.conv(x)[:, :8].relu()).relu())


@structure(image())
class SliceHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.conv(x)
        half = x.shape[1] // 2
        return self.out(x[:, :half] * x[:, half:].sigmoid())


@structure(image())
class SelectChannel(nn.Module):
    """Reads one channel by its number."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 7)
        self.next = conv(7, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.out((self.next(x) * x[:, 3:4]).relu()) + x.select(1, 0).unsqueeze(1)


@structure(image())
class ViewLiteral(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4)
        self.hidden = nn.Linear(64, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x), 2).view(-1, 64)
        return self.out(self.hidden(x).relu())


@structure(image())
class Preallocated(nn.Module):
    """Writes two results into slices of one tensor."""

    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)
        self.b = conv(3, 5)
        self.next = conv(9, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        both = a.new_zeros(a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:])
        both[:, : a.shape[1]] = a
        both[:, a.shape[1] :] = b
        return self.out(self.next(both.relu_()).relu())


@structure(image())
class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = conv(8, 8)
        self.out = conv(8, 2)

    def forward(self, x):
        x = self.act(self.conv1(x))
        y = self.conv2(x)
        y += x
        y.mul_(0.5)
        y[:, :, 0] = 0
        return self.out(y.sigmoid_())


@structure(image())
class RepeatTile(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 5)
        self.next = conv(10, 6)
        self.out = conv(12, 2)

    def forward(self, x):
        x = self.next(self.conv(x).repeat(1, 2, 1, 1)).relu()
        return self.out(torch.tile(x, (1, 2, 1, 1)))


@structure(image())
class FlipRollIndex(nn.Module):
    """Moves channels to other places, by flip and by an index."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 6)
        self.next = conv(6, 8)
        self.out = conv(8, 2)
        self.register_buffer("order", torch.tensor([3, 1, 4, 0, 7, 5, 2, 6]))

    def forward(self, x):
        x = self.next(self.conv(x).flip(1).relu())
        return self.out(x[:, self.order])


# Groups of convolutions


@structure(image())
class GroupedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.grouped = conv(12, 16, groups=4)
        self.out = conv(16, 2)

    def forward(self, x):
        return self.out(self.grouped(self.conv(x).relu()).relu())


@structure(image())
class GroupedResidual(nn.Module):
    """The block of ResNeXt and RegNet."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 6)
        self.reduce = conv(6, 8, 1)
        self.grouped = conv(8, 8, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.expand = conv(8, 6, 1)
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.out((x + self.expand(self.bn(self.grouped(self.reduce(x).relu())).relu())).relu())


@structure(image())
class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.depthwise = conv(8, 8, groups=8)
        self.out = conv(8, 2)

    def forward(self, x):
        return self.out(self.depthwise(self.conv(x).relu()).relu())


@structure(image())
class DepthwiseMultiplier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.depthwise = conv(8, 16, groups=8)
        self.bn = nn.BatchNorm2d(16)
        self.out = conv(16, 2)

    def forward(self, x):
        return self.out(self.bn(self.depthwise(self.conv(x).relu())).relu())


@structure(image())
class DepthwiseSeparable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = conv(8, 8, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pointwise = conv(8, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        return self.fc(pool(F.hardswish(self.bn3(self.pointwise(x)))))


@structure(image())
class InvertedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 5)
        self.expand = conv(5, 10, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.depthwise = conv(10, 10, groups=10, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.project = conv(10, 5, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        return self.fc(pool(x + self.bn3(self.project(y))))


@structure(image())
class TransposedConvGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.depthwise = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)
        self.grouped = nn.ConvTranspose2d(8, 12, 3, groups=4)
        self.out = conv(12, 2)

    def forward(self, x):
        return self.out(self.grouped(self.depthwise(self.conv(x)).relu()).relu())


@structure(image())
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.out = conv(8, 2)

    def forward(self, x):
        x = self.conv(x).relu()
        scale = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.out(x * scale)


@structure(image())
class SpatialAttention(nn.Module):
    """Statistics over the channels weight the pixels."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.attend = conv(2, 1)
        self.out = conv(8, 2)

    def forward(self, x):
        x = self.conv(x)
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.out(x * self.attend(statistics).sigmoid())


# Normalization


@structure(sequence())
class LayerNormResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.final = nn.LayerNorm(8, elementwise_affine=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(self.final(x))


@structure(image())
class LayerNormChannelsLast(nn.Module):
    """The block of ConvNeXt, with its layer scale."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise = conv(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.out(x.mean([-2, -1]))


@structure(image(3, 4))
class LayerNormImage(nn.Module):
    """Normalizes over channels and pixels together."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 6)
        self.norm = nn.LayerNorm([6, 4, 4])
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).relu())


@structure(image())
class LayerNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 6)
        self.weight = nn.Parameter(torch.ones(6))
        self.bias = nn.Parameter(torch.zeros(6))
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.conv(x)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.out(self.weight[:, None, None] * x + self.bias[:, None, None])


@structure(image())
class GroupNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 12)
        self.norm1 = nn.GroupNorm(3, 12)
        self.conv2 = conv(12, 6)
        self.norm2 = nn.GroupNorm(1, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu())


@structure(image())
class InstanceNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.norm1 = nn.InstanceNorm2d(8, affine=True)
        self.conv2 = conv(8, 6)
        self.norm2 = nn.InstanceNorm2d(6, track_running_stats=True)
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu())


@structure(sequence())
class RmsNormModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm = nn.RMSNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(self.embed(x)))


@structure(sequence())
class RmsNormFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.weight = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out(F.rms_norm(x, x.shape[-1:], self.weight, 1e-6))


@structure(sequence())
class RmsNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.weight = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.out(self.weight * x)


@structure(sequence())
class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.normalize(self.embed(x), dim=-1))


@structure(sequence())
class SoftmaxChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.mix(self.embed(x).softmax(-1)).relu())


# Gates


@structure(image())
class GluFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(F.glu(self.conv(x), dim=1))


@structure(sequence())
class GluChunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 14)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        x, gate = self.up(x).chunk(2, dim=-1)
        return self.out(x * F.gelu(gate))


@structure(sequence())
class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6, bias=False)
        self.gate = nn.Linear(6, 9, bias=False)
        self.up = nn.Linear(6, 9, bias=False)
        self.down = nn.Linear(9, 6, bias=False)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out(x + self.down(F.silu(self.gate(x)) * self.up(x)))


# Shuffles


@structure(image())
class ChannelShuffleView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 12)
        self.next = conv(12, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return self.out(self.next(x).relu())


@structure(image())
class ChannelShuffleModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 4)
        self.b = conv(3, 4)
        self.shuffle = nn.ChannelShuffle(2)
        self.depthwise = conv(8, 8, groups=8)
        self.out = conv(8, 2)

    def forward(self, x):
        return self.out(self.depthwise(self.shuffle(torch.cat([self.a(x), self.b(x)], 1))).relu())


@structure(image(3, 4))
class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 20)
        self.shuffle = nn.PixelShuffle(2)
        self.out = conv(5, 2)

    def forward(self, x):
        return self.out(self.shuffle(self.conv(x)))


@structure(image())
class PixelUnshuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 5)
        self.next = conv(20, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.next(F.pixel_unshuffle(self.conv(x), 2)).relu())


# Parameters without a layer


@structure(sequence())
class EinsumWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(0.4 * torch.randn(5, 2, 4))
        self.w2 = nn.Parameter(0.4 * torch.randn(2, 4, 7))
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        x = torch.einsum("bli,ihd->bhld", x, self.w1)
        return self.out(torch.einsum("bhld,hdo->blo", x.relu(), self.w2).tanh())


@structure(image())
class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight1 = nn.Parameter(0.3 * torch.randn(8, 3, 3, 3))
        self.bias1 = nn.Parameter(torch.randn(8))
        self.weight2 = nn.Parameter(0.3 * torch.randn(6, 8, 3, 3))
        self.out = conv(6, 2)

    def forward(self, x):
        x = F.conv2d(x, self.weight1, self.bias1, padding=1).relu()
        return self.out(F.conv2d(x, self.weight2).relu())


@structure(sequence())
class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight1 = nn.Parameter(0.3 * torch.randn(8, 5))
        self.weight2 = nn.Parameter(0.3 * torch.randn(8, 6))
        self.bias2 = nn.Parameter(torch.randn(6))
        self.weight3 = nn.Parameter(0.3 * torch.randn(6, 3))

    def forward(self, x):
        x = F.linear(x, self.weight1).relu()
        x = torch.addmm(self.bias2, x.flatten(0, 1), self.weight2).relu()
        return x @ self.weight3


@structure(image())
class RawScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.out = conv(8, 2)

    def forward(self, x):
        return self.out((self.scale * self.conv(x) + self.shift).relu())


@structure(sequence())
class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out((x + self.gamma * self.mix(x)).relu())


@structure(image())
class BufferScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.register_buffer("mean", torch.randn(8, 1, 1))
        self.register_buffer("std", torch.linspace(0.5, 1.5, 8).view(8, 1, 1), persistent=False)
        self.out = conv(8, 2)

    def forward(self, x):
        return self.out(((self.conv(x) - self.mean) / self.std).relu())


@structure(image())
class NumpyConstant(nn.Module):
    """A constant that is no part of the model: what it is combined with keeps its channels."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)
        self.next = conv(8, 6)
        self.out = conv(6, 2)
        self.table = np.linspace(0.5, 1.5, 8)

    def forward(self, x):
        x = self.conv(x) * torch.from_numpy(self.table)[:, None, None]
        return self.out(self.next(x).relu())


@structure(image())
class WeightStandardization(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.out = conv(6, 2)

    def forward(self, x):
        x = self.conv1(x).relu()
        w = self.conv2.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self.out(F.conv2d(x, w, self.conv2.bias, padding=1).relu())


@structure(image())
class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(conv(3, 8))
        self.conv2 = nn.utils.parametrizations.weight_norm(conv(8, 6))
        self.out = conv(6, 2)

    def forward(self, x):
        return self.out(self.conv2(self.conv1(x).relu()).relu())


# Embeddings and shared parameters


@structure(words())
class EmbeddingTiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(self.up(x).relu()))


@structure(sequence())
class SharedParameter(nn.Module):
    """Two layers with one weight, in two places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.a = nn.Linear(8, 6)
        self.b = nn.Linear(8, 6)
        self.b.weight = self.a.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x).relu()
        return self.out(self.a(x).relu()) + self.out(self.b(x * 2).sigmoid())


@structure(sequence())
class ModuleTwice(nn.Module):
    """Applies one square layer twice, so that its outputs are its inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.mix(self.mix(self.embed(x).relu()).relu()).relu())


@structure(words())
class PositionsAndClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 7, 8))
        self.types = nn.Embedding(2, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1) + self.positions
        x = x + self.types(torch.zeros(ids.shape[0], 1, dtype=torch.long))
        return self.head(self.norm(x)[:, 0])


# Attention: 4 heads of 3, or 2 of them for keys and values


def split_heads(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], -1, size).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Layers of an attention of `heads` heads with `groups` heads of keys and values, on a residual stream of 8."""

    heads, size = 4, 3

    def __init__(self, groups: int = 4):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.q = nn.Linear(8, self.heads * self.size)
        self.k = nn.Linear(8, groups * self.size)
        self.v = nn.Linear(8, groups * self.size)
        self.o = nn.Linear(self.heads * self.size, 8)
        self.out = nn.Linear(8, 3)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(split_heads(layer(x), self.size) for layer in (self.q, self.k, self.v))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.o(merge_heads(attended)))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@structure(sequence())
class AttentionMatmul(Attention):
    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        scores = q @ k.transpose(-2, -1) * self.size**-0.5
        return self.finish(x, scores.softmax(-1) @ v)


@structure(sequence())
class AttentionScaledDotProduct(Attention):
    def forward(self, x):
        x = self.embed(x)
        return self.finish(x, F.scaled_dot_product_attention(*self.project(x), is_causal=True))


@structure(sequence())
class AttentionHeadsAttribute(nn.Module):
    """The number of heads is an attribute that the code divides by."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.head_dim = 3
        self.embed = nn.Linear(5, 8)
        self.q = nn.Linear(8, 12)
        self.k = nn.Linear(8, 12)
        self.v = nn.Linear(8, 12)
        self.o = nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(x + self.o(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim)))


@structure(sequence())
class AttentionFused(nn.Module):
    """Query, key and value from one layer, in the layout of ViT."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.qkv = nn.Linear(8, 36)
        self.o = nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, -1, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(x + self.o(merge_heads(attend(q, k, v))))


@structure(sequence())
class AttentionFusedChunk(nn.Module):
    """Query, key and value from one layer, cut by chunk as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.qkv = nn.Linear(8, 36)
        self.o = nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (split_heads(y, 3) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(x + self.o(merge_heads(F.scaled_dot_product_attention(q, k, v))))


@structure(sequence())
class AttentionOneHead(nn.Module):
    """No heads: queries and keys share their channels, values have their own."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(5, 6)
        self.k = nn.Linear(5, 6)
        self.v = nn.Linear(5, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out((self.q(x) @ self.k(x).mT * 0.4).softmax(-1) @ self.v(x))


@structure(sequence())
class GroupedQueryExpand(Attention):
    """Keys and values are repeated by expand and reshape, as in Llama."""

    def __init__(self):
        super().__init__(groups=2)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
        return self.finish(x, attend(q, k, v))


@structure(sequence())
class GroupedQueryRepeat(Attention):
    def __init__(self):
        super().__init__(groups=2)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        return self.finish(x, attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)))


@structure(sequence())
class GroupedQueryFlag(Attention):
    def __init__(self):
        super().__init__(groups=2)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@structure(sequence())
class MultiQuery(Attention):
    """One head of keys and values, broadcast over the heads of the queries."""

    def __init__(self):
        super().__init__(groups=1)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        return self.finish(x, attend(q, k, v))


@structure(lambda: (sequence()()[0], sequence(4, 9)()[0]))
class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.context = nn.Linear(4, 10)
        self.q = nn.Linear(8, 12)
        self.k = nn.Linear(10, 12)
        self.v = nn.Linear(10, 12)
        self.o = nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x, context):
        x, context = self.embed(x), self.context(context).relu()
        q, k, v = split_heads(self.q(x), 3), split_heads(self.k(context), 3), split_heads(self.v(context), 3)
        return self.out(x + self.o(merge_heads(F.scaled_dot_product_attention(q, k, v))))


@structure(sequence())
class AttentionRelativeBias(Attention):
    """A table of biases, one per head and distance."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(11, self.heads)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.project(x)
        place = torch.arange(x.shape[1])
        bias = self.bias(place[:, None] - place[None, :] + 5).permute(2, 0, 1).unsqueeze(0)
        return self.finish(x, (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v)


@structure(sequence())
class AttentionRotary(nn.Module):
    """Heads of 4, of which pairs are turned by an angle."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.q = nn.Linear(8, 12, bias=False)
        self.k = nn.Linear(8, 12, bias=False)
        self.v = nn.Linear(8, 12, bias=False)
        self.o = nn.Linear(12, 8, bias=False)
        self.out = nn.Linear(8, 3)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)

    @staticmethod
    def half_turned(x):
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (split_heads(layer(x), 4) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        q, k = (y * angles.cos() + self.half_turned(y) * angles.sin() for y in (q, k))
        return self.out(x + self.o(merge_heads(attend(q, k, v))))


@structure(sequence())
class MultiheadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.out(x + y)


@structure(lambda: (sequence()()[0], sequence(4, 9)()[0]))
class MultiheadAttentionCross(nn.Module):
    """Keys and values of another width."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.keys = nn.Linear(4, 6)
        self.values = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x, context):
        x = self.embed(x)
        y, weights = self.attention(x, self.keys(context).relu(), self.values(context).relu())
        return self.out(x + y), weights


@structure(sequence())
class TransformerEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.encoder(self.embed(x)))


@structure(lambda: (sequence()()[0], sequence(4, 9)()[0]))
class TransformerDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.context = nn.Linear(4, 12)
        self.decoder = nn.TransformerDecoderLayer(12, 3, 10, batch_first=True, activation="gelu")
        self.out = nn.Linear(12, 3)

    def forward(self, x, context):
        return self.out(self.decoder(self.embed(x), self.context(context)))


@structure(image(3, 8))
class PatchMerging(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, stride=2)
        self.norm = nn.LayerNorm(20)
        self.reduce = nn.Linear(20, 8, bias=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.out(self.reduce(self.norm(torch.cat(parts, -1))).mean((1, 2)))


@structure(image(3, 8))
class WindowRoll(nn.Module):
    """Attention within windows that are rolled by half their size, as in Swin."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.qkv = nn.Linear(8, 24)
        self.o = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.o(merge_heads(attend(q, k, v)))
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.out((x + torch.roll(y, shifts=(1, 1), dims=(1, 2))).mean((1, 2)))


# Recurrence


@structure(sequence())
class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 7, batch_first=True)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        y, (h, _) = self.lstm(self.embed(x))
        return self.out(y[:, -1]) + self.out(h[0])


@structure(sequence())
class LstmTwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 7, num_layers=2, batch_first=True)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.lstm(self.embed(x).relu())[0])


@structure(sequence())
class LstmBidirectional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 7, batch_first=True, bidirectional=True, bias=False)
        self.out = nn.Linear(14, 3)

    def forward(self, x):
        return self.out(self.lstm(self.embed(x).relu())[0].mean(1))


@structure(sequence())
class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.gru(self.embed(x).relu())[0])


@structure(sequence())
class LstmCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.cell = nn.LSTMCell(6, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        x = self.embed(x)
        state = None
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
        return self.out(state[0])


# What nobody can know


@structure(sequence())
class UnknownSort(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.mix(self.embed(x).sort(-1).values).relu())


@structure(sequence())
class UnknownCumsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.mix(self.embed(x).cumsum(-1)).relu())


@torch.library.custom_op("rarefy_tests::smooth", mutates_args=())
def smooth(x: torch.Tensor) -> torch.Tensor:
    """Each channel plus half of its neighbour."""
    return x + 0.5 * x.roll(1, -1)


@smooth.register_fake
def _(x):
    return torch.empty_like(x)


smooth.register_autograd(lambda context, gradient: gradient + 0.5 * gradient.roll(-1, -1))


@structure(sequence())
class UnknownCustom(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.mix = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.mix(smooth(self.embed(x))).relu())
