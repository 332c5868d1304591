"""What must hold for every model that was pruned, whatever it is: shared by the tests of structured pruning."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from absence import Kept, assert_same, assert_slices, named_tensors, run, run_without
from torch import nn

from rarefy.pruning import StructuredPruner, StructuredReport


class Subject(Protocol):
    """What is pruned: a structure or an architecture."""

    def build(self, seed: int = 0) -> nn.Module: ...

    def make_inputs(self, seed: int = 0) -> Any: ...

    def forward(self, model: nn.Module, inputs: Any) -> Any: ...


@dataclass
class Pruned:
    """A model before and after."""

    subject: Subject
    original: nn.Module
    model: nn.Module
    report: StructuredReport
    kept: Kept
    optimizer: torch.optim.Optimizer
    moments: dict[str, dict[str, torch.Tensor]]  # of each parameter, before

    @property
    def removed(self) -> int:
        """Slices that are gone, over all parameters and dimensions."""
        tensors = named_tensors(self.original)
        return sum(
            tensors[name].shape[dim] - len(kept) for name, dims in self.kept.items() for dim, kept in dims.items()
        )


def kept_slices(report: StructuredReport) -> Kept:
    kept: dict[str, dict[int, list[int]]] = {}
    for cut in report.cuts:
        assert cut.dim not in kept.setdefault(cut.tensor, {})
        kept[cut.tensor][cut.dim] = list(cut.kept)
    for name in [name for name in kept if ".quant." in name and name.endswith(".scale")]:
        for sibling in ("zero_point", "min_val", "max_val"):  # what else a quantizer knows about each channel
            kept[name.removesuffix("scale") + sibling] = kept[name]
    return kept


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values()}


def loss(subject: Subject, model: nn.Module, seed: int) -> torch.Tensor:
    """Of several inputs, so that hardly a unit has no gradient for all of them."""
    torch.manual_seed(seed)  # of dropout
    with torch.enable_grad():
        outputs = [subject.forward(model, subject.make_inputs(seed + i)) for i in range(3)]
        return sum(x.square().mean() for output in outputs for x in differentiable(output))


def differentiable(output: Any) -> list[torch.Tensor]:
    output = dict(output) if hasattr(output, "keys") else output
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


def step(subject: Subject, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss(subject, model, seed).backward()
    optimizer.step()


def prune(subject: Subject, seed: int = 0, trained: bool = False, **options: Any) -> Pruned:
    """Builds a model and prunes it; `trained`: after one step of an optimizer that goes on with what is left."""
    model = subject.build(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    if trained:
        step(subject, model, optimizer, 90)
        optimizer.zero_grad()
    original = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[id(p)]: {key: x.clone() for key, x in state.items()} for p, state in optimizer.state.items()}
    pruner = StructuredPruner(model, subject.make_inputs(seed), forward=subject.forward, **options)
    report = pruner.prune(optimizers=[optimizer])
    return Pruned(subject, original, model, report, kept_slices(report), optimizer, moments)


def check_function(pruned: Pruned) -> None:
    """What is left are slices of what was there, and computes what the original computes without the others.

    Constants of removed channels were added where the report says it, and nowhere else.
    """
    folds = pruned.report.folds
    assert_slices(pruned.original, pruned.model, pruned.kept, {fold.tensor for fold in folds})
    assert ties(pruned.model) == ties(pruned.original)
    forward = pruned.subject.forward
    for seed in (0, 50, 51):
        inputs = pruned.subject.make_inputs(seed)
        expected = run_without(pruned.original, pruned.kept, inputs, forward, {fold.weight for fold in folds})
        assert_same(expected, run(pruned.model, inputs, forward))


def check_training(pruned: Pruned) -> None:
    """The optimizer holds the live parameters with what it knew about them, and moves every one that has a gradient."""
    model, optimizer = pruned.model, pruned.optimizer
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in live.values()}
    assert len(held) == len(live)

    names = {id(p): name for name, p in live.items()}
    aliases = {name: group for group in ties(model) for name in group}
    for p, state in optimizer.state.items():
        name = names[id(p)]
        dims = {dim: kept for alias in aliases[name] for dim, kept in pruned.kept.get(alias, {}).items()}
        for key, value in state.items():
            expected = pruned.moments[name][key]
            if expected.dim():
                for dim, kept in dims.items():
                    expected = expected.index_select(dim, torch.tensor(kept))
                assert value.shape == p.shape
            assert torch.equal(value, expected), f"{key} of {name}"

    before = {name: p.detach().clone() for name, p in live.items()}
    model.train()
    step(pruned.subject, model, optimizer, 91)
    model.eval()
    reached = with_gradient(model)
    assert reached
    for name in reached:
        assert live[name].grad.shape == live[name].shape
        assert not torch.equal(before[name], live[name]), f"{name} has a gradient and was not changed"
    # What has a gradient has one in the original too, rounding aside.
    original = copy.deepcopy(pruned.original).train()
    loss(pruned.subject, original, 91).backward()
    assert with_gradient(model, 1e-6) <= with_gradient(original)
    # A ReLU of the few units that are left may be dead for these inputs.
    had = with_gradient(original, 1e-6)
    assert len(had & reached) >= 0.8 * len(had), sorted(had - reached)


def with_gradient(model: nn.Module, floor: float = 1e-12) -> set[str]:
    """Parameters with more than rounding: a bias in front of a batch norm that trains has a gradient of zero."""
    return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad.abs() > floor).any())}


def check_attributes(model: nn.Module) -> None:
    """What modules say about their sizes is true."""
    for path, module in model.named_modules():
        for attribute, size in sizes(module).items():
            assert getattr(module, attribute) == size, f"{path}.{attribute}"


def sizes(module: nn.Module) -> dict[str, Any]:
    match module:
        case nn.modules.conv._ConvTransposeNd():
            return {"in_channels": module.weight.shape[0], "out_channels": module.weight.shape[1] * module.groups}
        case nn.modules.conv._ConvNd():
            return {"in_channels": module.weight.shape[1] * module.groups, "out_channels": module.weight.shape[0]}
        case nn.Linear():
            return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
        case nn.Embedding():
            return {"embedding_dim": module.weight.shape[1], "num_embeddings": module.weight.shape[0]}
        case nn.LayerNorm() | nn.RMSNorm() if module.weight is not None:
            return {"normalized_shape": tuple(module.weight.shape)}
        case nn.GroupNorm() if module.weight is not None:
            return {"num_channels": module.weight.shape[0]}
        case nn.modules.batchnorm._NormBase() if module.weight is not None:
            return {"num_features": module.weight.shape[0]}
        case nn.modules.batchnorm._NormBase() if module.running_mean is not None:
            return {"num_features": module.running_mean.shape[0]}
        case nn.PReLU():
            return {"num_parameters": module.weight.shape[0]}
        case nn.LSTM() | nn.GRU() | nn.RNN():
            return {"input_size": module.weight_ih_l0.shape[1], "hidden_size": module.weight_hh_l0.shape[1]}
        case nn.LSTMCell() | nn.GRUCell():
            return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
        case nn.MultiheadAttention():
            return {"embed_dim": module.out_proj.weight.shape[0]}
    return {}


def check_expectations(pruned: Pruned, groups: tuple[int, ...], pins: tuple[Any, ...]) -> None:
    """The groups that must be found were found and shrank, what must be pinned is, and something is really gone."""
    found = Counter(group.units for group in pruned.report.groups)
    assert not Counter(groups) - found, f"expected groups of {groups} units, found {sorted(found.elements())}"
    for pin in pins:
        reasons = [p.reason for p in pruned.report.pinned if (p.tensor, p.dim) == (pin.tensor, pin.dim)]
        assert any(pin.word in reason for reason in reasons), f"{pin}: {reasons}"
        assert pin.dim not in pruned.kept.get(pin.tensor, {})
    assert pruned.removed > 0, "nothing was removed"
