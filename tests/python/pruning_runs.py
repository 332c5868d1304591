"""A small model, its batches, and training loops with a pruner, for the tests of pruners."""

import torch
from torch import nn

import rarefy as rf


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


NAMES = ["conv.weight", "head.0.weight", "head.2.weight"]
ELEMENTS = 4 * 8 * 9 + 8 * 12 + 12 * 4


def make(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 4, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def backward(model, step):
    x, y = batch(step)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, pruner, steps):
    """The loop that calls the pruner itself."""
    for step in steps:
        backward(model, step)
        if pruner.needs_accumulate:
            pruner.accumulate()
        optimizer.step()
        pruner.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def kept(model, name):
    """The mask of a parameter, True = kept."""
    return rf.pruning.unpack_mask(model.get_buffer(name + "_mask_bits"), model.get_parameter(name).shape)


def weights(model):
    return {name: model.get_parameter(name) for name in NAMES}


def pruned_counts(model):
    return [int((~kept(model, name)).sum()) for name in NAMES]


def zeros(model):
    return sum(int((w == 0).sum()) for w in weights(model).values())


def tensors(model):
    """Copies of all parameters and buffers; state_dict() would refuse values that left their masks."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same(first, second):
    """Equal in every bit; NaN equals NaN."""
    return first.keys() == second.keys() and all(
        torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in ((first[name], second[name]) for name in first)
    )
