"""The reference of structured pruning, against models that are pruned by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from absence import Kept, assert_same, assert_slices, named_tensors, run, run_without
from structures import STRUCTURES, Structure
from torch import nn


def cut(model: nn.Module, kept: Kept) -> nn.Module:
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    for name, dims in kept.items():
        for dim, indices in dims.items():
            tensors[name].data = tensors[name].data.index_select(dim, torch.tensor(list(indices)))
    return model


def convolutions(kept: dict[str, list[int]], chain: dict[str, str], norms: dict[str, str]) -> Kept:
    """Rows of layers, columns of the layers after them and the values of the norms between."""
    cuts: dict[str, dict[int, list[int]]] = {}
    for layer, rows in kept.items():
        cuts.setdefault(f"{layer}.weight", {})[0] = rows
        cuts.setdefault(f"{layer}.bias", {})[0] = rows
    for layer, after in chain.items():
        cuts.setdefault(f"{after}.weight", {})[1] = kept[layer]
    for layer, norm in norms.items():
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            cuts[f"{norm}.{tensor}"] = {0: kept[layer]}
    return cuts


def heads(kept: list[int], size: int) -> list[int]:
    return [head * size + i for head in kept for i in range(size)]


def gates(kept: list[int], units: int, count: int) -> list[int]:
    return [gate * units + unit for gate in range(count) for unit in kept]


STREAM = [0, 3, 5, 6, 7]
A, B = [0, 2, 3], [1, 4]
TWO = [0, 2]
CELL = [1, 2, 5]

# Structure: what stays, by hand, and what the attributes become.
BY_HAND: dict[str, tuple[Kept, dict[str, object]]] = {
    "chain": (convolutions({"conv1": [0, 4, 7], "conv2": [1, 2, 5]}, {"conv1": "conv2", "conv2": "fc"}, {}), {}),
    "residual_pre_activation": (
        convolutions(
            {"stem": STREAM, "conv1": TWO, "conv2": STREAM},
            {"stem": "conv1", "conv1": "conv2", "conv2": "fc"},
            {"stem": "bn1", "conv1": "bn2", "conv2": "bn3"},
        ),
        {},
    ),
    "concat_flattened": (
        convolutions({"a": A, "b": B}, {}, {}) | {"hidden.weight": {1: heads(A, 16) + [64 + i for i in heads(B, 4)]}},
        {},
    ),
    "layer_norm_residual": (
        convolutions({"embed": STREAM, "up": TWO, "down": STREAM}, {"embed": "up", "up": "down", "down": "out"}, {})
        | {"norm.weight": {0: STREAM}, "norm.bias": {0: STREAM}},
        {"norm.normalized_shape": (5,), "final.normalized_shape": (5,)},
    ),
    "group_norm": (
        convolutions({"conv1": [0, 3, 4, 6, 8, 11], "conv2": B}, {"conv1": "conv2", "conv2": "out"}, {})
        | {f"norm1.{t}": {0: [0, 3, 4, 6, 8, 11]} for t in ("weight", "bias")}
        | {f"norm2.{t}": {0: B} for t in ("weight", "bias")},
        {},
    ),
    "rms_norm_module": (
        convolutions({"embed": STREAM}, {"embed": "out"}, {}) | {"norm.weight": {0: STREAM}},
        {"norm.normalized_shape": (5,)},
    ),
    "grouped_conv": (
        # whole groups: channels 3..5 and 9..11 feed rows 4..7 and 12..15
        {"conv.weight": {0: heads([1, 3], 3)}, "conv.bias": {0: heads([1, 3], 3)}}
        | {"grouped.weight": {0: heads([1, 3], 4)}, "grouped.bias": {0: heads([1, 3], 4)}}
        | {"out.weight": {1: heads([1, 3], 4)}},
        {"grouped.groups": 2},
    ),
    "attention_scaled_dot_product": (
        convolutions({layer: heads(TWO, 3) for layer in "qkv"}, {"v": "o"}, {}),
        {},
    ),
    "grouped_query_flag": (
        convolutions({"q": heads([2, 3], 3), "k": [3, 4, 5], "v": [3, 4, 5]}, {"q": "o"}, {}),
        {},
    ),
    "lstm": (
        {f"lstm.{name}_l0": {0: gates(CELL, 7, 4)} for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        | {"lstm.weight_hh_l0": {0: gates(CELL, 7, 4), 1: CELL}, "out.weight": {1: CELL}},
        {"lstm.hidden_size": 3},
    ),
    "gru": (
        {f"gru.{name}_l0": {0: gates(CELL, 7, 3)} for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        | {"gru.weight_hh_l0": {0: gates(CELL, 7, 3), 1: CELL}, "out.weight": {1: CELL}},
        {"gru.hidden_size": 3},
    ),
    "embedding_tied_head": (
        convolutions({"down": STREAM}, {}, {}) | {"embed.weight": {1: STREAM}, "up.weight": {1: STREAM}},
        {},
    ),
    "weight_norm": (
        {"conv1.bias": {0: STREAM}}
        | {f"conv1.parametrizations.weight.original{i}": {0: STREAM} for i in (0, 1)}
        | {"conv2.parametrizations.weight.original1": {1: STREAM}},
        {},
    ),
    "pixel_shuffle": (
        {"conv.weight": {0: heads(B, 4)}, "conv.bias": {0: heads(B, 4)}, "out.weight": {1: B}},
        {},
    ),
}


def prune_by_hand(structure: Structure) -> tuple[nn.Module, nn.Module, Kept]:
    original = structure.build()
    kept, attributes = BY_HAND[structure.name]
    pruned = cut(original, kept)
    for path, value in attributes.items():
        module, attribute = path.rsplit(".", 1)
        setattr(pruned.get_submodule(module), attribute, value)
    return original, pruned, kept


@pytest.mark.parametrize("name", BY_HAND)
def test_pruned_by_hand(name):
    original, pruned, kept = prune_by_hand(STRUCTURES[name])
    assert_slices(original, pruned, kept)
    for seed in range(2):
        inputs = STRUCTURES[name].make_inputs(seed)
        expected = run_without(original, kept, inputs)
        assert_same(expected, run(pruned, inputs))
        with pytest.raises(AssertionError, match="differs by"):  # it is not as if nothing had been removed
            assert_same(run(original, inputs), expected)


@pytest.mark.parametrize("name", ["chain", "concat_flattened", "layer_norm_residual", "lstm"])
def test_wrong_column_is_found(name):
    """The consumer keeps a column that should be gone in the place of the last; all shapes are as they should be."""
    structure = STRUCTURES[name]
    original, _, kept = prune_by_hand(structure)
    consumer = {"chain": "conv2", "concat_flattened": "hidden", "layer_norm_residual": "up", "lstm": "out"}[name]
    columns = list(kept[f"{consumer}.weight"][1])
    columns = sorted([*columns[:-1], next(i for i in range(columns[-1]) if i not in columns)])
    wrong = {**kept, f"{consumer}.weight": {**kept[f"{consumer}.weight"], 1: columns}}
    pruned = cut(original, wrong)
    for path, value in BY_HAND[name][1].items():
        module, attribute = path.rsplit(".", 1)
        setattr(pruned.get_submodule(module), attribute, value)
    inputs = structure.make_inputs()
    assert_slices(original, pruned, wrong)  # the slices are what is reported ...
    with pytest.raises(AssertionError, match="differs by"):  # ... and are the wrong ones
        assert_same(run_without(original, wrong, inputs), run(pruned, inputs))


def test_output_channel_that_is_gone_is_found():
    original = STRUCTURES["chain"].build()
    expected = run_without(
        original, {"fc.weight": {0: [0, 1]}, "fc.bias": {0: [0, 1]}}, STRUCTURES["chain"].make_inputs()
    )
    with pytest.raises(AssertionError, match="depends on removed channels"):
        assert_same(expected, expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_nothing_removed(name):
    """Without a removed slice, the replaced operators compute what PyTorch's do."""
    structure = STRUCTURES[name]
    model, inputs = structure.build(), structure.make_inputs()
    assert_same(run(model, inputs), run_without(model, {}, inputs), 1e-12)


def test_constants():
    """A hidden unit without weights is its bias: folded by hand into the next layer, and seen by it in the reference."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3), nn.Linear(3, 2)).double()
    x = (torch.randn(4, 5, dtype=torch.float64),)
    kept, gone = [0, 2, 5], [1, 3, 4]
    cuts = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
    folded = cut(original, cuts)
    with torch.no_grad():
        constants = nn.functional.gelu(original[0].bias[gone])
        folded[2].bias += original[2].weight[:, gone] @ constants
        assert_same(run_without(original, cuts, x, folded=["2.weight"]), run(folded, x))
        masked = copy.deepcopy(original)
        masked[0].weight[gone] = 0
        assert_same(run(masked, x), run(folded, x))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(run_without(original, cuts, x), run(folded, x))


def test_constants_behind_a_norm():
    """The shift of a batch norm goes into the running mean of the next one; that of a layer norm into a bias."""
    torch.manual_seed(0)
    original = STRUCTURES["residual_bottleneck"].build()
    x = STRUCTURES["residual_bottleneck"].make_inputs()
    assert_same(run_without(original, {}, x, folded=["fc.weight"]), run(original, x), 1e-12)
    norm = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double()
    nn.init.normal_(norm[1].bias)
    x = (torch.randn(4, 5, dtype=torch.float64),)
    kept, gone = [0, 2, 5], [1, 3, 4]
    cuts = {name: {0: kept} for name in ("0.weight", "0.bias", "1.weight", "1.bias")} | {"3.weight": {1: kept}}
    folded = cut(norm, cuts)
    folded[1].normalized_shape = (3,)
    with torch.no_grad():
        folded[3].bias += norm[3].weight[:, gone] @ norm[1].bias[gone].relu()
    assert_same(run_without(norm, cuts, x, folded=["3.weight"]), run(folded, x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_nothing_removed_nothing_folded(name):
    """Without a removed slice there are no constants, whatever is said to see them."""
    structure = STRUCTURES[name]
    model, inputs = structure.build(), structure.make_inputs()
    weights = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert_same(run(model, inputs), run_without(model, {}, inputs, folded=weights), 1e-12)
