"""Removing slices of a live model: what follows, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy as rf
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


def test_losses_of_before():
    """One that is older than a cut fails by itself and disturbs no later one; after a rollback it works."""
    model = make()
    x = torch.randn(4, 3, 2, 2)
    older, oldest = model(x).sum(), model(x).sum()
    surgery = Surgery(model)
    surgery.apply(net_cuts())
    surgery.rollback()
    oldest.backward()
    surgery.apply(net_cuts())
    surgery.commit()
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        older.backward()


def test_memory_order_requires_grad_and_sparse_gradients():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4)).to(
        memory_format=torch.channels_last
    )
    model[0].weight.requires_grad_(False)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    model[1](torch.tensor([1, 4])).sum().backward()
    assert model[1].weight.grad.is_sparse
    with Surgery(model) as surgery:
        surgery.apply([Cut("0.weight", 1, [0, 2]), Cut("1.weight", 1, [1, 5]), Cut("2.weight", 0, [0, 3])])
        surgery.commit()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.requires_grad
    assert model[2].weight.stride() == (1, 2)
    assert model[1].weight.grad.is_sparse
    assert model[1].weight.grad.shape == (9, 2)
    assert (model[0].in_channels, model[1].embedding_dim, model[2].out_features) == (2, 2, 2)


class Failing(Exception):
    """Injected."""


@pytest.mark.parametrize("fail_at", range(9))
def test_rollback_from_every_point(monkeypatch, fail_at):
    """Each attribute that is set, and each check at the end, may be where it fails."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    step(model, optimizer)
    before = snapshot(model, [optimizer])
    calls = 0
    original = Surgery._set

    def fails(self, *args):
        nonlocal calls
        original(self, *args)
        calls += 1
        if calls == fail_at + 1:
            raise Failing

    monkeypatch.setattr(Surgery, "_set", fails)
    surgery = Surgery(model, [optimizer])
    if fail_at < 6:
        with pytest.raises(Failing):
            surgery.apply(net_cuts())
    else:
        surgery.apply(net_cuts())
        assert calls == 6  # conv1, bn, depthwise (3), conv2
        calls = fail_at
        with pytest.raises(Failing):
            surgery.set_attribute(model.conv1, "kernel_size", [3, 3])
        surgery.rollback()
    assert snapshot(model, [optimizer]) == before
    monkeypatch.undo()
    surgery.apply(net_cuts())
    optimizer.param_groups[0]["params"] = list(model.parameters())[1:]
    with pytest.raises(ValueError, match=r"\[Surgery.commit\] Adam must hold exactly the parameters"):
        surgery.commit()
    surgery.rollback()
    assert snapshot(model, [optimizer]) == before


BAD = [
    (Cut("conv9.weight", 0, [0]), ValueError, "must be of a parameter or buffer of the model, got 'conv9.weight'"),
    (Cut("conv1.weight", 4, [0]), IndexError, r"must be in \[0, 4\), got 4"),
    (Cut("conv1.weight", 1, []), ValueError, "must keep a slice of dimension 1, got none"),
    (Cut("conv1.weight", 1, [1, 0]), ValueError, "must ascend, got 1 before 0"),
    (Cut("conv1.weight", 1, [3]), ValueError, r"must be in \[0, 3\), got 3"),
]


@pytest.mark.parametrize(("cut", "error", "message"), BAD)
def test_bad_cuts(cut, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        Surgery(model).apply([*net_cuts(), cut])
    assert snapshot(model) == before


def test_bad_optimizers():
    model, other = make(), make()
    with pytest.raises(ValueError, match="SGD must hold parameters of the model, but holds none"):
        Surgery(model, [torch.optim.SGD(other.parameters(), lr=0.1)])
    with pytest.raises(TypeError, match="an optimizer must have param_groups and state, got int"):
        Surgery(model, [3])
    lbfgs = torch.optim.LBFGS(model.parameters())
    Surgery(model, lbfgs)
    x = torch.randn(4, 3, 2, 2)

    def closure():
        lbfgs.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(ValueError, match="LBFGS must not have taken a step"):
        Surgery(model, lbfgs)
    with pytest.raises(ValueError, match=r"fc\.weight must have its shape: run a batch"):
        Surgery(nn.ModuleDict({"fc": nn.LazyLinear(3)}))
    # What an optimizer keeps about parameters that are not cut may be anything.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.fc.weight]["history"] = [torch.zeros(3)]
    optimizer.state[model.conv2.weight]["preconditioner"] = torch.zeros(7, 7)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"optimizer state 'preconditioner' of conv2\.weight must have the parameter's shape"
    ):
        Surgery(model, optimizer).apply(net_cuts())
    del optimizer.state[model.conv2.weight]["preconditioner"]
    surgery = Surgery(model, optimizer)
    with pytest.raises(
        ValueError, match=r"what optimizers keep about fc\.weight must be tensors, but state 'history' of SGD"
    ):
        surgery.apply([*net_cuts(), Cut("fc.weight", 0, [0])])
    assert snapshot(model) == before
    surgery.apply(net_cuts())
    surgery.commit()


def test_adafactor_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    optimizer = transformers.Adafactor(model.parameters(), beta1=0.9)
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[model[0].weight].items() if isinstance(v, torch.Tensor)}
    assert {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg"} <= set(state)
    with Surgery(model, optimizer) as surgery:
        surgery.apply([Cut("0.weight", 0, [1, 4]), Cut("0.bias", 0, [1, 4]), Cut("1.weight", 1, [1, 4])])
        surgery.commit()
    now = optimizer.state[model[0].weight]
    assert torch.equal(now["exp_avg_sq_row"], state["exp_avg_sq_row"][[1, 4]])
    assert torch.equal(now["exp_avg_sq_col"], state["exp_avg_sq_col"])
    assert torch.equal(now["exp_avg"], state["exp_avg"][[1, 4]])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_two_optimizers_and_a_frozen_part():
    model = make()
    model.conv2.requires_grad_(False)
    first = torch.optim.SGD(model.conv1.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam([*model.bn.parameters(), *model.depthwise.parameters()])
    step(model, first)
    second.step()
    with Surgery(model, (first, second)) as surgery:
        surgery.apply(net_cuts())
        surgery.commit()
    assert first.state[model.conv1.weight]["momentum_buffer"].shape == (5, 3, 3, 3)
    assert second.state[model.depthwise.weight]["exp_avg"].shape == (5, 1, 3, 3)
    assert model.conv2.weight.shape == (6, 5, 1, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.copy = nn.Linear(4, 7)
        self.copy.weight.data = self.table.weight.data  # another parameter over the same memory

    def forward(self, ids):
        return self.head(self.table(ids)) + self.copy(self.table(ids))


@pytest.mark.parametrize("name", ["table.weight", "head.weight", "copy.weight"])
def test_tied_tensors_are_cut_once(name):
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    with Surgery(model, optimizer) as surgery:
        surgery.apply([Cut(name, 1, [0, 3])])
        surgery.commit()
    assert model.table.weight is model.head.weight
    assert model.copy.weight.data_ptr() == model.table.weight.data_ptr()
    assert (model.table.embedding_dim, model.head.in_features, model.copy.in_features) == (2, 2, 2)
    assert optimizer.state[model.table.weight]["momentum_buffer"].shape == (7, 2)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="must be the same"):
        Surgery(model).apply([Cut("table.weight", 1, [0]), Cut("head.weight", 1, [1])])


def rnn_cuts(hidden, gates, kept, layers, projected=False):
    rows = [gate * hidden + i for gate in range(gates) for i in kept]
    cuts = []
    for layer in range(layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            cuts.append(Cut(f"{name}_l{layer}", 0, rows))
        if projected:
            cuts.append(Cut(f"weight_hr_l{layer}", 1, kept))
            continue
        cuts.append(Cut(f"weight_hh_l{layer}", 1, kept))
        if layer:
            cuts.append(Cut(f"weight_ih_l{layer}", 1, kept))
    return cuts


def attention_cuts(width, kept, prefix=""):
    """Of a packed attention: the channels of its heads that stay."""
    rows = [part * width + i for part in range(3) for i in kept]
    cuts = [Cut(f"{prefix}in_proj_weight", 0, rows), Cut(f"{prefix}in_proj_bias", 0, rows)]
    return [*cuts, Cut(f"{prefix}out_proj.weight", 1, kept)]


class Conv1D(nn.Module):
    """As transformers has it: the weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


MODULES = {
    "bilinear": (
        lambda: nn.Bilinear(4, 5, 6),
        [Cut("weight", 1, [0, 3]), Cut("weight", 2, [1]), Cut("weight", 0, [2]), Cut("bias", 0, [2])],
        {"in1_features": 2, "in2_features": 1, "out_features": 1},
        lambda: (torch.randn(3, 2), torch.randn(3, 1)),
    ),
    "groups, one gone and the others thinner": (
        lambda: nn.Conv1d(8, 8, 3, groups=4),
        [Cut("weight", 0, [0, 3, 7]), Cut("bias", 0, [0, 3, 7]), Cut("weight", 1, [1])],
        {"in_channels": 3, "out_channels": 3, "groups": 3},
        lambda: (torch.randn(1, 3, 5),),
    ),
    "depthwise with a multiplier": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        [Cut("weight", 0, [2, 3, 6, 7]), Cut("bias", 0, [2, 3, 6, 7])],
        {"in_channels": 2, "out_channels": 4, "groups": 2},
        lambda: (torch.randn(1, 2, 5, 5),),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        [Cut("weight", 0, [1, 2]), Cut("weight", 1, [0, 3, 5]), Cut("bias", 0, [0, 3, 5])],
        {"in_channels": 2, "out_channels": 3, "groups": 1},
        lambda: (torch.randn(1, 2, 5, 5),),
    ),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(4, 8, 3, groups=2),
        [Cut("weight", 0, [2, 3]), Cut("bias", 0, [4, 5, 6, 7])],
        {"in_channels": 2, "out_channels": 4, "groups": 1},
        lambda: (torch.randn(1, 2, 5),),
    ),
    "instance norm": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        [Cut("weight", 0, [0, 3]), Cut("bias", 0, [0, 3])],
        {"num_features": 2},
        lambda: (torch.randn(1, 2, 5, 5),),
    ),
    "batch norm without weights": (
        lambda: nn.BatchNorm1d(4, affine=False),
        [Cut("running_mean", 0, [0, 3]), Cut("running_var", 0, [0, 3])],
        {"num_features": 2},
        lambda: (torch.randn(3, 2),),
    ),
    "layer norm": (
        lambda: nn.LayerNorm((3, 4)),
        [Cut("weight", 1, [0, 3]), Cut("bias", 1, [0, 3])],
        {"normalized_shape": (3, 2)},
        lambda: (torch.randn(3, 3, 2),),
    ),
    "rms norm": (
        lambda: nn.RMSNorm(4),
        [Cut("weight", 0, [0, 3])],
        {"normalized_shape": (2,)},
        lambda: (torch.randn(3, 2),),
    ),
    "group norm, groups gone": (
        lambda: nn.GroupNorm(4, 8),
        [Cut("weight", 0, [2, 3, 6, 7]), Cut("bias", 0, [2, 3, 6, 7])],
        {"num_channels": 4, "num_groups": 2},
        lambda: (torch.randn(3, 4, 2),),
    ),
    "group norm, groups thinner": (
        lambda: nn.GroupNorm(4, 8),
        [Cut("weight", 0, [0, 3, 5, 6]), Cut("bias", 0, [0, 3, 5, 6])],
        {"num_channels": 4, "num_groups": 4},
        lambda: (torch.randn(3, 4, 2),),
    ),
    "embedding": (
        lambda: nn.Embedding(5, 4, padding_idx=3),
        [Cut("weight", 0, [1, 3]), Cut("weight", 1, [0, 2])],
        {"num_embeddings": 2, "embedding_dim": 2, "padding_idx": 1},
        lambda: (torch.tensor([0, 1]),),
    ),
    "embedding without its padding": (
        lambda: nn.EmbeddingBag(5, 4, padding_idx=3),
        [Cut("weight", 0, [1, 4])],
        {"num_embeddings": 2, "embedding_dim": 4, "padding_idx": None},
        lambda: (torch.zeros(2, 3, dtype=torch.long),),
    ),
    "prelu": (
        lambda: nn.PReLU(4),
        [Cut("weight", 0, [0, 3])],
        {"num_parameters": 2},
        lambda: (torch.randn(3, 2),),
    ),
    "lstm": (
        lambda: nn.LSTM(3, 4, num_layers=2),
        rnn_cuts(4, 4, [0, 3], 2),
        {"input_size": 3, "hidden_size": 2},
        lambda: (torch.randn(5, 2, 3),),
    ),
    "lstm with a projection": (
        lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2),
        rnn_cuts(4, 4, [0, 1, 3], 2, projected=True),
        {"hidden_size": 3, "proj_size": 2},
        lambda: (torch.randn(5, 2, 3),),
    ),
    "gru": (
        lambda: nn.GRU(3, 4, num_layers=2),
        [*rnn_cuts(4, 3, [0, 3], 2), Cut("weight_ih_l0", 1, [1, 2])],
        {"input_size": 2, "hidden_size": 2},
        lambda: (torch.randn(5, 2, 2),),
    ),
    "rnn cell": (
        lambda: nn.RNNCell(3, 4),
        [Cut(n, 0, [0, 3]) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")] + [Cut("weight_hh", 1, [0, 3])],
        {"input_size": 3, "hidden_size": 2},
        lambda: (torch.randn(5, 3),),
    ),
    "conv1d of transformers": (
        lambda: Conv1D(6, 4),
        [Cut("weight", 0, [0, 2]), Cut("weight", 1, [0, 1, 5]), Cut("bias", 0, [0, 1, 5])],
        {"nf": 3, "nx": 2},
        lambda: (torch.randn(5, 2),),
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=4)),
        [Cut(f"parametrizations.weight.original{i}", 0, [0, 3]) for i in (0, 1)] + [Cut("bias", 0, [0, 3])],
        {"in_channels": 2, "out_channels": 2, "groups": 2},
        lambda: (torch.randn(1, 2, 5),),
    ),
    "attention, a head gone": (
        lambda: nn.MultiheadAttention(8, 4, batch_first=True),
        attention_cuts(8, [0, 1, 4, 5, 6, 7]),
        {"embed_dim": 8, "num_heads": 3, "head_dim": 2, "v_head_dim": 2, "scale": 2**-0.5},
        lambda: [torch.randn(2, 3, 8)] * 3,
    ),
    "attention, its width": (
        lambda: nn.MultiheadAttention(8, 4),
        [
            *attention_cuts(8, [0, 1, 4, 5]),
            Cut("in_proj_weight", 1, [0, 1, 2, 7]),
            Cut("out_proj.weight", 0, [0, 1, 2, 7]),
            Cut("out_proj.bias", 0, [0, 1, 2, 7]),
        ],
        {"embed_dim": 4, "num_heads": 2, "head_dim": 2, "kdim": 4, "vdim": 4},
        lambda: [torch.randn(2, 3, 4)] * 3,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_attributes_follow(name):
    build, cuts, expected, inputs = MODULES[name]
    model = nn.ModuleDict({"layer": build()})
    before = snapshot(model)
    cuts = [Cut(f"layer.{c.tensor}", c.dim, c.kept) for c in cuts]
    with Surgery(model) as surgery:
        surgery.apply(cuts)
        assert {key: getattr(model["layer"], key) for key in expected} == expected
        surgery.rollback()
        assert snapshot(model) == before
        surgery.apply(cuts)
        surgery.commit()
    x = inputs()
    y = model["layer"](*x)
    assert torch.isfinite(y if isinstance(y, torch.Tensor) else y[0]).all()
    twin = copy.deepcopy(model)
    z = twin["layer"](*x)
    torch.testing.assert_close(z, y)


def test_heads_that_are_removed_say_nothing_before():
    """Whole heads, and channels of heads: scores are divided as before."""
    for kept in ([0, 1, 2, 3, 8, 9, 10, 11], [1, 2, 5, 6, 9, 11]):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)}).eval()
        gone = [i for i in range(12) if i not in kept]
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        reference = copy.deepcopy(model["attention"])
        with torch.no_grad():
            for part in range(3):
                rows = [part * 12 + i for i in gone]
                reference.in_proj_weight[rows] = 0
                reference.in_proj_bias[rows] = 0
        reference.train()  # not torch's other path, for the same order of additions
        expected = reference(x, x, x)[0]
        with Surgery(model) as surgery:
            surgery.apply(attention_cuts(12, kept, "attention."))
            surgery.commit()
        torch.testing.assert_close(model["attention"](x, x, x)[0], expected, rtol=1e-12, atol=1e-12)


def test_an_encoder_whose_heads_are_removed():
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    kept = [0, 1, 6, 7]
    with Surgery(model) as surgery:
        surgery.apply(c for i in range(2) for c in attention_cuts(8, kept, f"layers.{i}.self_attn."))
        assert not model.use_nested_tensor
        surgery.rollback()
        assert model.use_nested_tensor
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
        surgery.apply(c for i in range(2) for c in attention_cuts(8, kept, f"layers.{i}.self_attn."))
        surgery.commit()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y, model(x, src_key_padding_mask=padding).detach())


@pytest.mark.parametrize(
    ("build", "cuts", "message"),
    [
        (
            lambda: nn.Conv1d(4, 4, 1, groups=2),
            [Cut("layer.weight", 0, [0, 1, 2])],
            "Conv1d must keep equally many slices",
        ),
        (lambda: nn.GroupNorm(2, 4), [Cut("layer.weight", 0, [0, 1, 2])], "GroupNorm must keep equally many slices"),
        (
            lambda: nn.LSTM(3, 4, num_layers=2),
            [Cut(f"layer.{c.tensor}", c.dim, c.kept) for c in rnn_cuts(4, 4, [0, 3], 1)],
            r"must keep one hidden size, but weight_ih_l1 must be \[8, 2\]",
        ),
    ],
)
def test_shapes_that_no_attributes_describe(build, cuts, message):
    model = nn.ModuleDict({"layer": build()})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        Surgery(model).apply(cuts)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["conv", "conv_bn", "linear", "embedding", "transposed"])
def test_prepared_layers_are_cut_with_their_quantizers(kind):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    kept = [1, 2, 5]
    model, x, cuts, weight, dim = {
        "conv": (nn.Sequential(nn.Conv2d(3, 6, 3)), torch.randn(2, 3, 5, 5), [Cut("0.bias", 0, kept)], "0.weight", 0),
        "conv_bn": (
            nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
            torch.randn(2, 3, 5, 5),
            [Cut(f"1.{n}", 0, kept) for n in ("weight", "bias", "running_mean", "running_var")],
            "0.weight",
            0,
        ),
        "linear": (nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4), [Cut("0.bias", 0, kept)], "0.weight", 0),
        "embedding": (nn.Sequential(nn.Embedding(6, 4)), torch.tensor([1, 2, 0]), [], "0.weight", 0),
        "transposed": (
            nn.Sequential(transformers.Conv1D(6, 4)),
            torch.randn(2, 4),
            [Cut("0.bias", 0, kept)],
            "0.weight",
            1,
        ),
    }[kind]
    model = rf.quantization.prepare_qat(model, rf.quantization.QConfig.int8(), x)
    model(x)
    before = {n: b.clone() for n, b in model.named_buffers() if "quant.weight" in n}
    with Surgery(model) as surgery:
        surgery.apply([*cuts, Cut(weight, dim, kept)])
        surgery.commit()
    buffers = dict(model.named_buffers())
    cut = 0
    for name, value in before.items():
        expected = value[kept] if value.shape == (6,) else value
        cut += value.shape == (6,)
        assert torch.equal(buffers[name], expected), name
    assert cut == 4
    model(x)
    model.eval()
    model(x)


def test_converted_layers_are_not_cut():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(2, 4)
    model = rf.quantization.prepare_qat(model, rf.quantization.QConfig.int8(), x)
    model(x)
    model = rf.quantization.convert(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="QuantizedLinear must not be converted yet: prune before convert"):
        Surgery(model).apply([Cut("0.weight", 0, [1]), Cut("0.bias", 0, [1]), Cut("1.weight", 1, [1])])
    assert snapshot(model) == before


def test_set_attribute():
    class Config:
        def __init__(self):
            self.width = 8

    model = make()
    model.config, model.heads = Config(), 4
    with Surgery(model) as surgery:
        surgery.set_attribute(model, "heads", 2)
        surgery.set_attribute(model, "config.width", 5)
        assert (model.heads, model.config.width) == (2, 5)
    assert (model.heads, model.config.width) == (4, 8)
    with Surgery(model) as surgery, pytest.raises(AttributeError):
        surgery.set_attribute(model, "tails", 2)
    with Surgery(model) as surgery, pytest.raises(TypeError, match="not JSON serializable"):
        surgery.set_attribute(model, "heads", torch.zeros(2))


def test_masks_are_cut_along():  # more in test_pruning_structured.py
    model = make()
    pruner = rf.pruning.MagnitudePruner(model, sparsity=0.5)
    pruner.step()
    with Surgery(model) as surgery:
        surgery.apply(net_cuts())
        surgery.commit()
    pruner.step()
    pruner.finalize()
