"""Sparse execution of linear layers, where a measurement says that it is faster."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import SparsifiedLayer, SparsifyOptions, SparsifyReport
from rarefy.graph.record import record
from rarefy.nn.sparse_linear import SparseLinear

BLOCKS = ((1, 1), (4, 4), (16, 1), (1, 16))


def sparsify(
    model: nn.Module,
    example_inputs: object,
    *,
    gain: float = 1.1,
    seconds: float = 0.05,
    least_sparsity: float = 0.5,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    inplace: bool = False,
) -> tuple[nn.Module, SparsifyReport]:
    """Make the linear layers sparse that run faster so, with inputs of the size of the example. For inference.

    Every ``nn.Linear`` with enough zeros is timed on this machine, dense and sparse in turn, with as many rows as the model
    gives it: on the CPU as compressed rows of single weights or of blocks (``rarefy.nn.SparseLinear``), on CUDA in 2:4 form
    by torch's semi-structured kernels where the weight has it. Where the sparse one wins it takes the place; the report
    says which, how fast, and why the others stay dense.

    Args:
        model: finished with pruning (``pruner.finalize()``): a layer with a pruner's mask stays dense.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; of the batch size
            that the model will be used with.
        gain: how many times as fast as dense a sparse layer must be.
        seconds: to measure each form of each layer for.
        least_sparsity: layers with a smaller part of zeros are not measured.
        blocks: heights and widths of the blocks that are tried; (1, 1) is single weights. One whose blocks are half empty
            is not measured.
        inplace: change the model instead of a copy.

    Returns:
        The model and the report.

    Raises:
        ValueError: an option out of range; the model is then as it was.
    """
    options = SparsifyOptions(gain, seconds, least_sparsity, [(int(height), int(width)) for height, width in blocks])
    samples = _core.pruning.linear_samples(record(model, example_inputs))
    if not inplace:
        model = copy.deepcopy(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places.setdefault(module, []).append(name)
    layers, twins = [], {}
    for linear, paths in places.items():
        own = [_join(path, "weight") for path in paths]
        rows = [count for name in own for count in samples.get(name, [])]
        reason = _why_dense(linear, [name for name in names.get(id(linear.weight), []) if name not in own])
        if not reason and inplace and paths[0] == "":
            reason = "it is the model itself, which cannot be replaced in place"
        layer = SparsifiedLayer(paths[0], rows, linear.weight.numel(), reason)
        if not reason:
            if linear.weight.is_cuda:
                layer, twin = _choose_semi_structured(linear, layer, options, gain, seconds)
            else:
                weight = _core.pruning.choose_sparse(layer, linear.weight, linear.bias, options)
                twin = None if weight is None else SparseLinear(weight, linear.in_features, linear.bias)
            if twin is not None:
                twins[linear] = twin.train(linear.training)
        layers.append(layer)
    for linear, twin in twins.items():
        model = _replace(model, places[linear], twin)
    return model, SparsifyReport(layers)


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Make the sparse layers of a model ``nn.Linear`` again, with the same weights and the same bias objects.

    Args:
        model: what ``sparsify`` returned.
        inplace: change the model instead of a copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear) or _is_semi_structured(module):
            places.setdefault(module, []).append(name)
    for sparse, paths in places.items():
        if isinstance(sparse, SparseLinear):
            model = _replace(model, paths, sparse.to_linear())
        else:
            sparse.weight = nn.Parameter(sparse.weight.detach().to_dense())
    return model


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _replace(model: nn.Module, paths: list[str], module: nn.Module) -> nn.Module:
    for path in paths:
        parent, _, name = path.rpartition(".")
        if not path:
            return module
        setattr(model.get_submodule(parent), name, module)
    return model


def _why_dense(linear: nn.Linear, other_names: list[str]) -> str:
    """Why a layer cannot be replaced; empty when it can."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not an nn.Linear"
    if other_names:
        return f"its weight is also {other_names[0]}"
    if _core.pruning.mask_key("weight") in dict(linear.named_buffers(recurse=False)):
        return "a pruner is at work on it: finalize() it first"
    if _is_semi_structured(linear):
        return "it is sparse already"
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return "it has hooks" if any(hooks) else ""


# --- 2:4 on CUDA -----------------------------------------------------------------------------------------------------


def _is_semi_structured(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None) if type(module) is nn.Linear else None
    return isinstance(weight, torch.sparse.SparseSemiStructuredTensor)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether each four neighbours of a row [out, in] hold two zeros at least."""
    if weight.dim() != 2 or weight.shape[1] % 4 != 0:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all())


def _choose_semi_structured(
    linear: nn.Linear, layer: SparsifiedLayer, options: SparsifyOptions, gain: float, seconds: float
) -> tuple[SparsifiedLayer, nn.Module | None]:
    """The layer in 2:4 form, where torch's kernels take it and are faster."""

    def stays(reason: str) -> tuple[SparsifiedLayer, None]:
        return SparsifiedLayer(layer.name, layer.samples, layer.elements, reason), None

    weight = linear.weight.detach()
    if not layer.samples:
        return stays("the example does not run it")
    if not is_two_of_four(weight):
        return stays("the kernels on CUDA are for 2:4, and its weight is not")
    try:
        sparse_weight = torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError) as error:
        return stays(f"torch's semi-structured kernels do not take it: {error}")
    inputs = [torch.randn(rows, linear.in_features, dtype=weight.dtype, device=weight.device) for rows in layer.samples]
    bias = None if linear.bias is None else linear.bias.detach()

    def run(of: Tensor) -> None:
        for x in inputs:
            F.linear(x, of, bias)
        torch.cuda.synchronize(weight.device)

    dense, sparse = _core.pruning.compare_times(lambda: run(weight), lambda: run(sparse_weight), seconds)
    if dense < gain * sparse:
        return stays(f"2:4 must be {gain} times as fast as dense, is {dense / sparse:.2f} times")
    twin = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    twin.weight = nn.Parameter(sparse_weight, requires_grad=False)
    twin.bias = linear.bias
    reason = f"2:4 is {dense / sparse:.2f} times as fast as dense"
    sparsity = 1.0 - int(weight.count_nonzero()) / weight.numel()
    return SparsifiedLayer(layer.name, layer.samples, layer.elements, reason, True, sparsity, (dense, sparse)), twin
