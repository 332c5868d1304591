"""Removing slices of a live model: what follows, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rarefy.pruning import Cut, Surgery


class Net(nn.Module):
    """A convolution, a depthwise one, a head; a buffer that nobody normalizes with; a tied table and head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 4, 5)
        self.register_buffer("offset", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x))) + self.offset
        return self.fc(self.conv2(self.depthwise(x)).flatten(1))


KEPT = [0, 2, 3, 6, 7]


def net_cuts(kept=KEPT):
    rows = ("conv1.weight", "conv1.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    cuts = [Cut(name, 0, kept) for name in (*rows, "depthwise.weight", "depthwise.bias")]
    return [*cuts, Cut("offset", 1, kept), Cut("conv2.weight", 1, kept)]


def make(seed=0, model=Net):
    torch.manual_seed(seed)
    return model()


def masked(model, kept=KEPT):
    """A copy of the model in which the channels that are removed say nothing."""
    model = copy.deepcopy(model)
    gone = [i for i in range(8) if i not in kept]
    with torch.no_grad():
        model.conv2.weight[:, gone] = 0
    return model


def step(model, optimizer, seed=7):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3, 2, 2)).square().sum()
    loss.backward()
    optimizer.step() if not isinstance(optimizer, torch.optim.LBFGS) else optimizer.step(lambda: loss)


def snapshot(model, optimizers=()):
    """Everything that a failed surgery must leave: objects, memory, bits, attributes."""

    def of(tensor):
        return (
            id(tensor),
            tensor.data_ptr(),
            tensor.stride(),
            tensor.requires_grad,
            tensor.detach().clone().view(-1).tolist() if tensor.is_contiguous() else tensor.tolist(),
            None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist()),
        )

    tensors = {name: of(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    attributes = {
        name: (type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, type(None)))})
        for name, m in model.named_modules()
    }
    state = [
        {
            (i, k): of(v) if isinstance(v, torch.Tensor) else v
            for i, s in enumerate(o.state.values())
            for k, v in s.items()
        }
        for o in optimizers
    ]
    return tensors, attributes, state


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_cut_along_with_the_parameters(name):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    parameters = dict(model.named_parameters())
    before = {
        name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for name, p in parameters.items()
    }
    shapes = {name: p.shape for name, p in parameters.items()}
    with Surgery(model, optimizer) as surgery:
        surgery.apply(net_cuts())
        surgery.commit()

    by_name = {(c.tensor, c.dim): c.kept for c in net_cuts()}
    for key, state in before.items():
        for entry, value in state.items():
            now = optimizer.state[parameters[key]][entry]
            for (tensor, dim), kept in by_name.items():
                if tensor == key and value.dim() == len(shapes[key]) and value.shape[dim] == shapes[key][dim] > 1:
                    value = value.index_select(dim, torch.tensor(kept))
            assert torch.equal(now, value), (key, entry)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}

    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, seed=8)
    # A bias that batch normalization takes out again has a gradient of nothing but rounding.
    assert all(not torch.equal(values[name], p) for name, p in model.named_parameters() if name != "conv1.bias")


def test_the_pruned_model_computes_what_the_masked_one_does():
    model = make().double().eval()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    expected = masked(model)(x)
    storages = {p.untyped_storage().data_ptr() for p in (model.conv1.weight, model.conv2.weight)}
    surgery = Surgery(model)
    surgery.apply(net_cuts())
    surgery.commit()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert (model.conv1.out_channels, model.bn.num_features, model.conv2.in_channels) == (5, 5, 5)
    assert (model.depthwise.in_channels, model.depthwise.out_channels, model.depthwise.groups) == (5, 5, 5)
    assert model.conv1.weight.untyped_storage().nbytes() == model.conv1.weight.numel() * 8
    assert model.conv1.weight.untyped_storage().data_ptr() not in storages


def test_rollback_brings_back_memory_gradients_state_and_attributes():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    before = snapshot(model, [optimizer])
    surgery = Surgery(model, [optimizer])
    surgery.apply(net_cuts())
    assert model.conv1.weight.shape == (5, 3, 3, 3)
    assert model.conv1.weight.grad.shape == (5, 3, 3, 3)
    surgery.rollback()
    assert snapshot(model, [optimizer]) == before
    with Surgery(model, [optimizer]) as surgery:
        surgery.apply(net_cuts())
    assert snapshot(model, [optimizer]) == before
    surgery = Surgery(model, [optimizer])
    surgery.apply(net_cuts())
    del surgery
    step(model, optimizer)
