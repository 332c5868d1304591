"""What a model computes when some of its channels are not there: the reference for structured pruning.

It knows nothing of groups, couplings or surgery. The slices that pruning took from the parameters are overwritten with NaN
in a copy of the original model, and the model runs as it is. NaN spreads through every element-wise operator and every
movement of data by itself, and so marks what depends on a channel that is not there. Only operators that sum over
channels are replaced, by ones that sum over what is there: products, statistics, softmax. An operator that nobody thought
of lets NaN through to the outputs, where it is an error.

So a model that was cut at the wrong place differs in its outputs: a column that was removed for another's channel is
skipped here together with the wrong one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Tensor = torch.Tensor
Kept = Mapping[str, Mapping[int, Iterable[int]]]  # of each tensor and dimension: the slices that stay
NAN = float("nan")
aten = torch.ops.aten


def zeroed(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), 0.0, x)


def present(x: Tensor) -> Tensor:
    return (~x.isnan()).to(x.dtype)


def product(multiply: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of which both factors are there, and NaN where there is none."""
    result = multiply(zeroed(a), zeroed(b))
    if a.isnan().any() or b.isnan().any():
        terms = multiply(present(a), present(b))
        expected = multiply(torch.ones_like(a), torch.ones_like(b))
        result = torch.where((terms < 0.5) & (expected > 0.5), NAN, result)
    return result


def biased(multiply: Callable[..., Tensor], bias: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    result = product(multiply, a, b) * alpha
    return result if beta == 0 else bias * beta + result


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    result = product(lambda a, b: aten.convolution(a, b, None, *options), x, weight)
    return result if bias is None else result + bias.reshape(-1, *[1] * (result.dim() - 2))


def count(x: Tensor, dim: Any) -> Tensor:
    return present(x).sum(dim, keepdim=True)


def total(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    result = torch.where(count(x, dim) < 0.5, NAN, zeroed(x).sum(dim, keepdim=True))
    return result if keepdim else squeezed(result, dim)


def squeezed(x: Tensor, dim: Any) -> Tensor:
    return x.squeeze(tuple(dim) if isinstance(dim, (list, tuple)) else dim)


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    result = total(x, dim, True) / count(x, dim)
    return result if keepdim else squeezed(result, dim)


def variance(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    squares = total((x - mean(x, dim, True)).square(), dim, True)
    result = squares / (count(x, dim) - (1 if correction is None else correction))
    return result if keepdim else squeezed(result, dim)


def extreme(x: Tensor, dim: Any, keepdim: bool, sign: int) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    found = sign * torch.where(x.isnan(), -torch.inf, sign * x).amax(dim, keepdim=True)
    found = torch.where(count(x, dim) < 0.5, NAN, found)
    return found if keepdim else squeezed(found, dim)


def softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    weights = torch.where(x.isnan(), -torch.inf, x).softmax(dim)
    return torch.where(x.isnan(), NAN, weights)


def vector_norm(x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dim = list(range(x.dim())) if dim is None or dim == [] else dim
    result = total(x.abs() ** ord, dim, True) ** (1 / ord)
    return result if keepdim else squeezed(result, dim)


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dim = list(range(-len(shape), 0))
    center = mean(x, dim, True)
    scale = (variance(x, dim, correction=0, keepdim=True) + eps).rsqrt()
    result = (x - center) * scale
    result = result if weight is None else result * weight
    return result if bias is None else result + bias, center, scale


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    dim = list(range(-len(shape), 0))
    scale = (mean(x.square(), dim, True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return x * scale if weight is None else x * scale * weight, scale


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, _: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    y, center, scale = layer_norm(x.reshape(n, groups, -1), [x.numel() // (n * groups)], None, None, eps)
    y, shape = y.reshape(x.shape), [c] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), center.squeeze(-1), scale.squeeze(-1)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = vector_norm(v, 2, [d for d in range(v.dim()) if d != dim % v.dim()], True)
    return v * (g / norm), norm


REPLACED: dict[Any, Callable[..., Any]] = {
    aten.mm.default: functools.partial(product, torch.mm),
    aten.bmm.default: functools.partial(product, torch.bmm),
    aten.mv.default: functools.partial(product, torch.mv),
    aten.dot.default: functools.partial(product, torch.dot),
    aten.addmm.default: lambda c, a, b, *, beta=1, alpha=1: biased(torch.mm, c, a, b, beta, alpha),
    aten.baddbmm.default: lambda c, a, b, *, beta=1, alpha=1: biased(torch.bmm, c, a, b, beta, alpha),
    aten.addmv.default: lambda c, a, b, *, beta=1, alpha=1: biased(torch.mv, c, a, b, beta, alpha),
    aten.convolution.default: convolution,
    aten.sum.default: total,
    aten.sum.dim_IntList: total,
    aten.mean.default: mean,
    aten.mean.dim: mean,
    aten.var.correction: variance,
    aten.std.correction: lambda *a, **k: variance(*a, **k).sqrt(),
    aten.var_mean.correction: lambda x, dim=None, *, correction=None, keepdim=False: (
        variance(x, dim, correction=correction, keepdim=keepdim),
        mean(x, dim, keepdim),
    ),
    aten.amax.default: lambda x, dim=(), keepdim=False: extreme(x, list(dim), keepdim, 1),
    aten.amin.default: lambda x, dim=(), keepdim=False: extreme(x, list(dim), keepdim, -1),
    aten._softmax.default: softmax,
    aten._safe_softmax.default: softmax,
    aten.linalg_vector_norm.default: vector_norm,
    aten.norm.ScalarOpt_dim: vector_norm,
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
    aten._fused_rms_norm.default: rms_norm,
    aten._weight_norm_interface.default: weight_norm,
}


class Wide(TorchDispatchMode):
    """Keeps float64 where a model computes in float32 whatever its type is, as the norms of language models do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is aten._to_copy.default and args[0].dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Absence(TorchDispatchMode):
    """Runs what is replaced on what is there, and everything else as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


# What a producer leaves in channels whose weights are zero: the position of what it adds, or nothing.
ADDED = {
    aten.mm.default: None,
    aten.bmm.default: None,
    aten.mv.default: None,
    aten.addmm.default: 0,
    aten.baddbmm.default: 0,
    aten.addmv.default: 0,
    aten.convolution.default: 2,
}
# What a normalization leaves in channels that its statistics do not count: the position of its shift, or nothing.
SHIFTS = {
    aten.native_layer_norm.default: 3,
    aten.native_group_norm.default: 2,
    aten._fused_rms_norm.default: None,
    aten._softmax.default: None,
    aten._safe_softmax.default: None,
    aten.embedding.default: None,
}


class Constants(Absence):
    """Runs every operator twice: on what is there, and on twins that hold a constant in the place of what is not.

    A removed channel without weights is the bias of its layer, and what operators on single elements make of it. The
    consumers whose weights are in ``folded`` sum over these constants as well; all others over what is there.
    """

    def __init__(self, twins: Iterable[tuple[Tensor, Tensor]], folded: Iterable[Tensor]):
        super().__init__()
        self.twins = {id(x): (x, twin) for x, twin in twins}  # with the tensor, so that its id stays its own
        self.folded = {id(x): x for x in folded}

    def twin(self, value: Any) -> Any:
        return self.twins[id(value)][1] if isinstance(value, Tensor) and id(value) in self.twins else value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        consumes = any(id(x) in self.folded for x in tensors)
        twin_args, twin_kwargs = tree_map(self.twin, (args, kwargs))
        found = REPLACED.get(func, func)(*args, **kwargs)
        if func in ADDED:
            if consumes:
                full = func(*twin_args, **twin_kwargs)
                found = torch.where(found.isnan(), NAN, full)
            twin = self.filled(func, found, twin_args, ADDED[func], kwargs.get("beta", 1))
        elif func in SHIFTS:
            several = isinstance(found, tuple)
            first = self.filled(func, found[0] if several else found, twin_args, SHIFTS[func], 1)
            twin = (first, *found[1:]) if several else first
        else:
            twin = func(*twin_args, **twin_kwargs)
            if func in REPLACED:
                twin = tree_map(lambda x, y: torch.where(x.isnan(), y, x), found, twin)
        for x, y in zip(tree_leaves(found), tree_leaves(twin), strict=True):
            if isinstance(x, Tensor) and id(x) not in self.twins:
                self.twins[id(x)] = (x, y.clone() if y is x else y)
                if consumes and func not in ADDED:
                    self.folded[id(x)] = x  # the weight, transposed
        return found

    @staticmethod
    def filled(func: Any, found: Tensor, twins: Any, position: int | None, factor: float) -> Tensor:
        added = None if position is None or position >= len(twins) else twins[position]
        if added is None:
            return zeroed(found)
        if func in (aten.convolution.default, aten.native_group_norm.default):
            added = added.reshape(-1, *[1] * (found.dim() - 2))
        return torch.where(found.isnan(), added * factor, found)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def without(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the model in which every slice that is not kept is NaN."""
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                tensor = tensors[name]
                if ".quant." in name:
                    continue  # what a quantizer knows of rows that are NaN themselves
                assert tensor.is_floating_point(), f"{name} is of {tensor.dtype} and was cut"
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[list(indices)] = False
                tensor.index_fill_(dim, gone.nonzero().flatten(), NAN)
    return model


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def run(model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any] = call) -> list[Tensor]:
    """The floating-point tensors of the model's output, in order."""
    with torch.no_grad(), Wide():
        output = forward(model, inputs)
    output = dict(output) if hasattr(output, "keys") else output
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def run_without(
    model: nn.Module,
    kept: Kept,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any] = call,
    folded: Iterable[str] = (),
) -> list[Tensor]:
    """The outputs of the model where every slice that is not kept is not there.

    Consumers whose weights are named in ``folded`` see the constants of the removed channels.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        masked, mode = without(model, kept), Absence()
        if folded := list(folded):
            tensors, originals = named_tensors(masked), named_tensors(copy.deepcopy(model))
            twins = [(x, originals[name]) for name, x in tensors.items()]
            twins += [(x, x.clone()) for x in tree_leaves(inputs) if isinstance(x, Tensor)]
            mode = Constants(twins, (tensors[name] for name in folded))
        with sdpa_kernel(SDPBackend.MATH), mode:
            return run(masked, inputs, forward)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def assert_slices(original: nn.Module, pruned: nn.Module, kept: Kept, changed: Iterable[str] = ()) -> None:
    """Every parameter and buffer of the pruned model holds the slices of the original's that were kept, bit for bit."""
    before, after = named_tensors(original), named_tensors(pruned)
    assert before.keys() == after.keys()
    changed = set(changed)
    cuts = {id(before[name]): dims for name, dims in kept.items()}  # of a tensor with two names, too
    for name, tensor in before.items():
        for dim, indices in cuts.get(id(tensor), {}).items():
            tensor = tensor.index_select(dim, torch.as_tensor(list(indices)))
        assert tensor.shape == after[name].shape, name
        assert name in changed or torch.equal(tensor, after[name]), f"{name} is not the kept slices of the original"


def assert_same(expected: list[Tensor], got: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(expected) == len(got) > 0
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        assert x.shape == y.shape, f"output {i}: {tuple(x.shape)} became {tuple(y.shape)}"
        assert not x.isnan().any(), f"output {i} depends on removed channels"
        error = float((x - y).abs().max())
        assert error <= tolerance * max(1.0, float(x.abs().max())), f"output {i} differs by {error:.2e}"
