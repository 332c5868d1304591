"""Structured pruning of what cannot be pruned: a clear error or a reason in the report, and the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from absence import named_tensors
from structured_checks import check_function, prune
from structures import STRUCTURES, conv, pool
from torch import nn

from rarefy.pruning import StructuredPruner


def plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, type(None))) or (
        isinstance(value, (tuple, list)) and all(map(plain, value))
    )


class Snapshot:
    """Everything of a model and its optimizer that pruning could touch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self.model, self.optimizer = model, optimizer
        self.tensors = dict(named_tensors(model))
        self.memory = {name: x.data_ptr() for name, x in self.tensors.items()}
        self.values = {name: x.detach().clone() for name, x in self.tensors.items()}
        self.gradients = {name: None if x.grad is None else x.grad.clone() for name, x in self.tensors.items()}
        self.flags = {name: x.requires_grad for name, x in self.tensors.items()}
        self.attributes = self.read_attributes()
        self.state = copy.deepcopy(optimizer.state_dict()) if optimizer else None

    def read_attributes(self) -> dict[str, Any]:
        attributes = {}
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                if plain(value):
                    attributes[f"{path}.{name}"] = copy.copy(value)
                elif name.endswith("_hooks"):
                    attributes[f"{path}.{name}"] = len(value)
        return attributes

    def assert_untouched(self) -> None:
        tensors = named_tensors(self.model)
        assert tensors.keys() == self.tensors.keys()
        for name, x in tensors.items():
            assert x is self.tensors[name], name
            assert x.data_ptr() == self.memory[name], name
            assert torch.equal(x.nan_to_num(99.0), self.values[name].nan_to_num(99.0)), name
            assert x.requires_grad == self.flags[name], name
            gradient = self.gradients[name]
            assert (x.grad is None) == (gradient is None), name
            assert gradient is None or torch.equal(x.grad, gradient), name
        assert self.read_attributes() == self.attributes
        if self.optimizer:
            after = self.optimizer.state_dict()
            torch.testing.assert_close(after["state"], self.state["state"], rtol=0, atol=0)
            assert after["param_groups"] == self.state["param_groups"]


def trained(model: nn.Module, inputs: Any) -> torch.optim.Optimizer:
    """An optimizer with state, and gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def fails(
    error: type[Exception], match: str, model: nn.Module | None = None, inputs: Any = None, **options: Any
) -> None:
    """Construction or prune() raises, and nothing has changed."""
    structure = STRUCTURES["residual_basic"]
    model = structure.build() if model is None else model
    inputs = structure.make_inputs() if inputs is None else inputs
    optimizer = (
        trained(model, structure.make_inputs()) if not any(p.isnan().any() for p in model.parameters()) else None
    )
    model.train()
    snapshot = Snapshot(model, optimizer)
    with pytest.raises(error, match=match):
        StructuredPruner(model, inputs, **options).prune(optimizers=[optimizer] if optimizer else [])
    snapshot.assert_untouched()


@pytest.mark.parametrize("target", ["channels", "parameters", "macs"])
@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan")])
def test_fraction_out_of_range(target, value):
    fails(ValueError, f"(?i){target}.*got", **{target: value})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_latency_out_of_range(value):
    fails(ValueError, "latency_ms", latency_ms=value)


def test_targets():
    fails(ValueError, "exactly one")
    fails(ValueError, "exactly one", channels=0.5, macs=0.5)


def test_unknown_layer():
    fails(ValueError, "conv9", channels=0.5, ignore=["conv9"])
    fails(ValueError, "conv9", channels=0.5, limits={"conv9": 0.1})
    fails(ValueError, r"stage\*", channels=0.5, ignore=["conv1", "stage*"])


def test_options_out_of_range():
    fails(ValueError, "limit", channels=0.5, limits={"conv1": 1.5})
    fails(ValueError, "round_to", channels=0.5, round_to=0)
    fails(ValueError, "min_width", channels=0.5, min_width=0)
    fails(ValueError, "steps", channels=0.5, steps=0)
    fails(ValueError, "scope", channels=0.5, scope="worldwide")
    fails(ValueError, "importance", channels=0.5, importance="l-one")


def test_nan_weight_is_named():
    model = STRUCTURES["residual_basic"].build()
    with torch.no_grad():
        model.conv1.weight[1, 2, 0, 0] = float("nan")
    fails(ValueError, r"conv1\.weight", model, channels=0.5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 4, 8, 8, dtype=torch.float64),), "RuntimeError: .*channels"),  # of another model
        ((torch.randn(2, 3, 8, 8),), "RuntimeError: .*type"),  # float32
        ((), "TypeError: .*missing"),
        ({"y": torch.randn(2, 3, 8, 8, dtype=torch.float64)}, "TypeError: .*unexpected keyword"),
        (("image",), "TypeError: .*str"),
    ],
)
def test_wrong_example_inputs(inputs, message):
    fails(ValueError, f"must run on its example inputs: {message}", inputs=inputs, channels=0.5)


def test_importance_that_raises():
    def importance(group):
        raise ZeroDivisionError("no such thing")

    fails(ZeroDivisionError, "no such thing", channels=0.5, importance=importance)


@pytest.mark.parametrize(
    "score",
    [
        lambda group: torch.zeros(group.units + 1, dtype=torch.float64),
        lambda group: torch.full((group.units,), float("nan"), dtype=torch.float64),
    ],
)
def test_importance_that_does_not_fit(score):
    fails(ValueError, "importance", channels=0.5, importance=score)


def test_optimizer_of_another_model():
    model, other = STRUCTURES["chain"].build(), STRUCTURES["chain"].build()
    inputs = STRUCTURES["chain"].make_inputs()
    optimizer = trained(other, inputs)
    snapshot, other_snapshot = Snapshot(model), Snapshot(other, optimizer)
    with pytest.raises(ValueError, match="Adam must hold parameters of the model"):
        StructuredPruner(model, inputs, channels=0.5).prune(optimizers=[optimizer])
    snapshot.assert_untouched()
    other_snapshot.assert_untouched()


def test_group_never_vanishes():
    """However much is asked for, every group keeps a unit, and the report says what was not reached."""
    pruned = prune(STRUCTURES["residual_basic"], channels=0.99, scope="local", fold_constants=False)
    assert all(kept for dims in pruned.kept.values() for kept in dims.values())
    assert pruned.report.achieved < 0.99
    check_function(pruned)
    fails(ValueError, "0.99", channels=0.99, scope="local", min_width=3, strict=True)


def test_min_width():
    pruned = prune(STRUCTURES["residual_basic"], channels=0.9, scope="local", min_width=5, fold_constants=False)
    assert {len(kept) for dims in pruned.kept.values() for kept in dims.values()} == {5}
    check_function(pruned)


def test_ignored_and_limited():
    pruned = prune(STRUCTURES["chain"], channels=0.5, scope="local", ignore=["conv1"], fold_constants=False)
    assert set(pruned.kept) == {"conv2.weight", "conv2.bias", "fc.weight"}
    check_function(pruned)
    pruned = prune(STRUCTURES["chain"], channels=0.5, scope="local", limits={"conv1": 0.25}, fold_constants=False)
    assert len(pruned.kept["conv1.weight"][0]) == 6
    check_function(pruned)


def test_everything_ignored():
    """Nothing is left to prune: said in the report, raised when strict."""
    structure = STRUCTURES["chain"]
    model, inputs = structure.build(), structure.make_inputs()
    snapshot = Snapshot(model)
    report = StructuredPruner(model, inputs, channels=0.5, ignore=[nn.Conv2d]).prune()
    assert report.achieved == 0
    assert {p.tensor for p in report.pinned} >= {"conv1.weight", "conv2.weight"}
    snapshot.assert_untouched()
    fails(ValueError, "ignore", channels=0.5, ignore=[nn.Conv2d, nn.Linear], strict=True)


def test_preview_changes_nothing():
    structure = STRUCTURES["residual_basic"]
    model, inputs = structure.build().train(), structure.make_inputs()
    optimizer = trained(model, inputs)
    snapshot = Snapshot(model, optimizer)
    pruner = StructuredPruner(model, inputs, channels=0.5, scope="local")
    preview = pruner.preview()
    snapshot.assert_untouched()
    assert model.training
    report = pruner.prune(optimizers=[optimizer])
    assert model.training
    assert [(c.tensor, c.dim, list(c.kept)) for c in preview.cuts] == [
        (c.tensor, c.dim, list(c.kept)) for c in report.cuts
    ]


class Asserting(nn.Module):
    """Its code looks at the width of one layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.conv2 = conv(8, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv1(x).relu()
        if x.shape[1] != 8:
            raise RuntimeError("eight channels, please")
        return self.fc(pool(self.conv2(x).relu()))


def test_forward_that_fails_after_surgery():
    """It is rolled back and reported; whoever asks for strictness gets an error, and the model as it was."""
    inputs = STRUCTURES["chain"].make_inputs()
    model = Asserting().double()
    report = StructuredPruner(model, inputs, channels=0.5, scope="local").prune()
    assert model.conv1.weight.shape == (8, 3, 3, 3)
    assert model.conv2.weight.shape[1] == 8
    assert any("eight channels, please" in p.reason for p in report.pinned if p.tensor == "conv1.weight")
    model(*inputs)
    fails(ValueError, "eight channels, please", Asserting().double(), channels=0.5, scope="local", strict=True)


@pytest.mark.parametrize("name", ["view_literal", "slice_literal", "split_sizes", "numpy_constant", "select_channel"])
def test_literal_size_is_reported(name):
    structure = STRUCTURES[name]
    pruned = prune(structure, channels=0.5, scope="local", fold_constants=False)
    (pin,) = structure.pins
    text = str(pruned.report)
    assert pin.tensor in text
    assert pin.word in text
    assert "structures.py:" in text  # the line that holds it
    check_function(pruned)


def test_frozen_parameters_are_pruned_and_stay_frozen():
    structure = STRUCTURES["frozen"]
    pruned = prune(structure, channels=0.5, scope="local", fold_constants=False)
    flags = {name: p.requires_grad for name, p in pruned.model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in pruned.original.named_parameters()}
    assert len(pruned.kept["conv1.weight"][0]) < 8


def test_gradients_are_cut():
    structure = STRUCTURES["chain"]
    model, inputs = structure.build(), structure.make_inputs()
    model(*inputs).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = StructuredPruner(model, inputs, channels=0.5, scope="local").prune()
    for cut in report.cuts:
        before[cut.tensor] = before[cut.tensor].index_select(cut.dim, torch.tensor(list(cut.kept)))
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]), name


class SharedWidth(nn.Module):
    """One attribute is the width of queries, whose product keeps them, and of values, which could be narrower."""

    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        k, v = (y.repeat_interleave(4, 1) for y in (k, v))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_an_attribute_of_a_pinned_operator_stays():
    """Following the values, head_dim would become 2 and break the queries, with their channels kept."""
    model = SharedWidth()
    before = Snapshot(model)
    report = StructuredPruner(model, torch.randn(2, 6, 8), channels=0.5).prune()
    before.assert_untouched()
    reasons = {pinned.tensor: pinned.reason for pinned in report.pinned if pinned.dim == 0}
    assert {"q.weight", "v.weight"} <= reasons.keys()
