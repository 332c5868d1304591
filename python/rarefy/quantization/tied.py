"""Weights that several layers have in common, a language model's table and head say: one Parameter, one int8 tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy import nn as rnn

Groups = tuple[tuple[str, ...], ...]


def tied_groups(model: nn.Module) -> Groups:
    """The names of the prepared layers that quantize one Parameter, where there are several: in module order."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, rnn.WeightedLayer) and module.prepared:
            names[id(module.weight)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def share_integers(model: nn.Module, groups: Groups) -> None:
    """Let the converted layers of each group hold one tensor where their integers and scales are equal."""
    model._rarefy_tied = groups
    _share(model)
    if groups:
        model.register_load_state_dict_pre_hook(_separate)
        model.register_load_state_dict_post_hook(_share)


def _layers(model: nn.Module, group: Sequence[str]) -> list[rnn.QuantizedLayer]:
    layers = (model.get_submodule(name) for name in group)
    return [layer for layer in layers if isinstance(layer, rnn.QuantizedLayer) and not layer.integer_weight.is_meta]


def _are_equal(a: rnn.QuantizedLayer, b: rnn.QuantizedLayer) -> bool:
    x, y = a.integer_weight, b.integer_weight
    p, q = a.quant.weight, b.quant.weight
    assert p is not None
    assert q is not None
    same_form = (a.channel_axis, p.axis, x.stride(), x.device) == (b.channel_axis, q.axis, y.stride(), y.device)
    return same_form and torch.equal(p.scale, q.scale) and torch.equal(x, y)


def _share(model: nn.Module, *_: object) -> None:
    for group in model._rarefy_tied:
        kept: list[rnn.QuantizedLayer] = []
        for layer in _layers(model, group):
            equal = next((other for other in kept if _are_equal(layer, other)), None)
            if equal is None:
                kept.append(layer)
            else:
                layer.weight = equal.integer_weight


def _separate(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Before a state is loaded: where it has different integers for layers that share theirs, each gets its own."""
    for group in model._rarefy_tied:
        keys = {name: f"{prefix}{name}.weight" for name in group}
        given = [state[key] for key in keys.values() if key in state]
        if all(torch.equal(given[0], other) for other in given[1:]):
            continue
        for name in group:
            layer = model.get_submodule(name)
            if keys[name] in state and isinstance(layer, rnn.QuantizedLayer):
                layer.weight = layer.integer_weight.clone()


def tied_note(model: nn.Module, name: str, holders: dict[int, str]) -> str:
    """What a report says of the weight of a layer: whose it is, or why it is apart.

    Args:
        model: prepared or converted.
        name: of a prepared or converted layer.
        holders: the layers seen so far by the identity of their weight; the layer is added.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, (rnn.QuantizedLayer, rnn.WeightedLayer)):
        return ""
    weight = layer.integer_weight if isinstance(layer, rnn.QuantizedLayer) else layer.weight
    first = holders.setdefault(id(weight), name)
    if first != name:
        return f"weight of {first}"
    group = next((g for g in getattr(model, "_rarefy_tied", ()) if name in g[1:]), None)
    return "" if group is None else f"integers apart from those of {group[0]}: other scales or values"
