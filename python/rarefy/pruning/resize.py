"""Attributes that say again what the shapes of a module's tensors say: they follow when slices are removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.nn import MultiheadAttention, QuantizedLayer, QuantizedMultiheadAttention

#: (tensor, dimension) to the indices that stayed; None when all did.
Kept = Callable[[Tensor, int], Sequence[int] | None]
Attributes = dict[str, Any]

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def groups_left(kept: Sequence[int] | None, size: int, groups: int, what: str) -> int:
    """How many of ``groups`` equal ranges of ``size`` indices keep some, where all of those keep equally many.

    Raises:
        ValueError: they keep different numbers.
    """
    if kept is None:
        return groups
    counts = Counter(index // (size // groups) for index in kept)
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"[Surgery] {what} must keep equally many slices in each group that is left, got {sorted(counts.items())} "
            f"as (group, slices)"
        )
    return len(counts)


def stored(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The parameter or buffer that holds a tensor of a module: itself, or what a parametrization computes it from."""
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict) and name in parametrized:
        tensors = parametrized[name]._parameters
        return tensors.get("original", tensors.get("original1"))
    for key in (name, f"{name}_orig", f"{name}_v"):  # torch.nn.utils.prune and spectral_norm, weight_norm
        tensor = module._parameters.get(key, module._buffers.get(key))
        if tensor is not None:
            return tensor
    return None


def _linear(module: nn.Linear, weight: Tensor, kept: Kept) -> Attributes:
    return {"in_features": weight.shape[1], "out_features": weight.shape[0]}


def _transposed_linear(module: nn.Module, weight: Tensor, kept: Kept) -> Attributes:
    sizes = {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {name: size for name, size in sizes.items() if name in vars(module)}


def _bilinear(module: nn.Bilinear, weight: Tensor, kept: Kept) -> Attributes:
    return dict(zip(("out_features", "in1_features", "in2_features"), weight.shape, strict=True))


def _conv(module: nn.modules.conv._ConvNd, weight: Tensor, kept: Kept) -> Attributes:
    # Dimension 0 holds the groups one after the other. A group that lost all of its slices there is gone.
    old = module.in_channels if module.transposed else module.out_channels
    groups = groups_left(kept(weight, 0), old, module.groups, type(module).__name__)
    first, second = weight.shape[0], weight.shape[1] * groups
    channels = (first, second) if module.transposed else (second, first)
    return {"in_channels": channels[0], "out_channels": channels[1], "groups": groups}


def _norm(module: nn.modules.batchnorm._NormBase, weight: Tensor, kept: Kept) -> Attributes:
    return {"num_features": weight.shape[0]}


def _shape_norm(module: nn.LayerNorm | nn.RMSNorm, weight: Tensor, kept: Kept) -> Attributes:
    return {"normalized_shape": tuple(weight.shape)}


def _group_norm(module: nn.GroupNorm, weight: Tensor, kept: Kept) -> Attributes:
    groups = groups_left(kept(weight, 0), module.num_channels, module.num_groups, "GroupNorm")
    return {"num_channels": weight.shape[0], "num_groups": groups}


def _embedding(module: nn.Embedding | nn.EmbeddingBag, weight: Tensor, kept: Kept) -> Attributes:
    attributes: Attributes = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    rows = kept(weight, 0)
    if rows is not None and module.padding_idx is not None:
        rows = list(rows)
        attributes["padding_idx"] = rows.index(module.padding_idx) if module.padding_idx in rows else None
    return attributes


def _prelu(module: nn.PReLU, weight: Tensor, kept: Kept) -> Attributes:
    return {"num_parameters": weight.shape[0]}


def _rnn(module: nn.RNNBase, weight: Tensor, kept: Kept) -> Attributes:
    hidden, inputs = weight.shape[0] // _GATES[module.mode], weight.shape[1]
    first = module._parameters["weight_hh_l0"]
    assert first is not None
    result = first.shape[1]  # what a layer returns per direction: hidden, or its projection
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        for suffix in ("", "_reverse")[:directions]:
            wide = inputs if layer == 0 else result * directions
            rows = _GATES[module.mode] * hidden
            expected = {"weight_ih": (rows, wide), "weight_hh": (rows, result)}
            if module.proj_size > 0:
                expected["weight_hr"] = (result, hidden)
            for name, shape in expected.items():
                found = tuple(getattr(module, f"{name}_l{layer}{suffix}").shape)
                if found != shape:
                    raise ValueError(
                        f"[Surgery] all layers and directions of {type(module).__name__} must keep one hidden size, but "
                        f"{name}_l{layer}{suffix} must be {list(shape)} by the first layer, got {list(found)}"
                    )
    sizes = {"input_size": inputs, "hidden_size": hidden}
    return sizes | ({"proj_size": result} if module.proj_size > 0 else {})


def _rnn_cell(module: nn.RNNCellBase, weight: Tensor, kept: Kept) -> Attributes:
    hidden = module._parameters["weight_hh"]
    assert hidden is not None
    return {"input_size": weight.shape[1], "hidden_size": hidden.shape[1]}


def _attention(module: nn.MultiheadAttention, weight: Tensor, kept: Kept) -> Attributes:
    """``weight`` is that of the output projection."""
    separate = module.in_proj_weight is None
    query = module.q_proj_weight if separate else module.in_proj_weight
    values = weight.shape[1]
    rows = query.shape[0] if separate else (query.shape[0] - values) // 2
    own = isinstance(module, MultiheadAttention)
    width = module.v_head_dim if own else module.head_dim
    heads = groups_left(kept(weight, 1), width * module.num_heads, module.num_heads, "MultiheadAttention")
    attributes: Attributes = {
        "embed_dim": query.shape[1],
        "kdim": module.k_proj_weight.shape[1] if separate else query.shape[1],
        "vdim": module.v_proj_weight.shape[1] if separate else query.shape[1],
        "num_heads": heads,
        "head_dim": rows // heads,
    }
    same = rows == values == query.shape[1] == weight.shape[0] and attributes["head_dim"] == module.head_dim
    if own or not same:
        attributes["v_head_dim"] = values // heads
        # The scores are divided as before, also where a head has lost channels.
        attributes["scale"] = module.scale if own else module.head_dim**-0.5
        attributes["__class__"] = MultiheadAttention
    return attributes


_RULES: tuple[tuple[Any, str, Callable[..., Attributes]], ...] = (
    (nn.Linear, "weight", _linear),
    (nn.Bilinear, "weight", _bilinear),
    (nn.modules.conv._ConvNd, "weight", _conv),
    (nn.modules.batchnorm._NormBase, "weight", _norm),
    ((nn.LayerNorm, nn.RMSNorm), "weight", _shape_norm),
    (nn.GroupNorm, "weight", _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), "weight", _embedding),
    (nn.PReLU, "weight", _prelu),
    (nn.RNNBase, "weight_ih_l0", _rnn),
    (nn.RNNCellBase, "weight_ih", _rnn_cell),
)


def attributes_of(module: nn.Module, kept: Kept) -> Attributes:
    """The attributes that differ from what the shapes of the module's tensors say now, with their new values.

    ``__class__`` is the type that an ``nn.MultiheadAttention`` has to become. Types that no rule knows have none.

    Raises:
        ValueError: no attributes fit the shapes, as groups or layers would have different sizes; a converted layer.
    """
    found: Attributes = {}
    if isinstance(module, QuantizedLayer):
        raise ValueError(f"[Surgery] {type(module).__name__} must not be converted yet: prune before convert")
    if isinstance(module, QuantizedMultiheadAttention) or (isinstance(module, MultiheadAttention) and module.prepared):
        raise ValueError("[Surgery] MultiheadAttention must not be prepared yet: prune before prepare and convert")
    if isinstance(module, nn.MultiheadAttention):
        weight = stored(module.out_proj)
        found = {} if weight is None else _attention(module, weight, kept)
    elif isinstance(module, nn.TransformerEncoder):
        # Nested tensors are for the path that reads the weights of torch's own attention.
        swapped = any(isinstance(child, MultiheadAttention) for child in module.modules())
        found = {"use_nested_tensor": False} if swapped and hasattr(module, "use_nested_tensor") else {}
    elif type(module).__name__ in ("Conv1D", "TransposedLinear") and isinstance(getattr(module, "nf", None), int):
        weight = stored(module)
        found = {} if weight is None else _transposed_linear(module, weight, kept)
    else:
        for types, name, rule in _RULES:
            if isinstance(module, types):
                weight = stored(module, name)
                if weight is None and isinstance(module, nn.modules.batchnorm._NormBase):
                    weight = stored(module, "running_mean")
                found = {} if weight is None else rule(module, weight, kept)
                break
    missing = object()
    return {
        name: value
        for name, value in found.items()
        if (type(module) if name == "__class__" else vars(module).get(name, missing)) != value
    }


def flatten(module: nn.Module) -> None:
    """Put the weights of a recurrent layer on a GPU into one piece of memory again, as cuDNN wants them."""
    if isinstance(module, nn.RNNBase) and any(p.is_cuda for p in module.parameters(recurse=False)):
        with torch.no_grad():
            module.flatten_parameters()
