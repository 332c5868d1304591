"""Sparse models in compressed files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar, overload

from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import SparseFileReport
from rarefy.pruning.manifest import matched

Model = TypeVar("Model", bound=nn.Module)


def _tensors(model_or_tensors: nn.Module | Mapping[str, Tensor], function: str) -> dict[str, Tensor]:
    state = (
        model_or_tensors.state_dict(keep_vars=True)
        if isinstance(model_or_tensors, nn.Module)
        else dict(model_or_tensors)
    )
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"[{function}] what is saved must be tensors, got {type(value).__name__} at {name}")
    return {name: value.detach() for name, value in state.items()}


def save_sparse(
    model_or_tensors: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> SparseFileReport:
    """Write a model or tensors to a safetensors file, sparse tensors compressed.

    A sparse tensor is stored as its values and a packed mask, or as 2-bit places where each four neighbours keep one
    (1:4); each tensor in the form of fewest bytes, so that dense ones stay as they are. Values come back bit for bit; zeros
    are left out, and a -0 among them (``w * mask`` leaves some) comes back as +0. Where a pruner's mask ``x_mask_bits``
    stands beside ``x``, it is stored once, as the bits of x. Any reader of safetensors opens the file; ``load_sparse`` puts
    the tensors together again, and C++ reads the same files. The file is written under another name and renamed, so that a
    failure leaves the file that was there. A tensor with several names is written once.

    Args:
        model_or_tensors: a module, whose parameters and buffers are written, or tensors by name.
        path: of the file.
        metadata: text that travels with the tensors.

    Returns:
        Bytes of the file and of every tensor.

    Raises:
        ValueError: a pruned value that is not zero (call the pruner's ``step`` after the optimizer's); a tensor that
            safetensors does not know; names that clash with those of the format.
        RuntimeError: the file cannot be written.
    """
    tensors = _tensors(model_or_tensors, "save_sparse")
    return _core.pruning.write_sparse(list(tensors), list(tensors.values()), os.fspath(path), dict(metadata or {}))


def sparse_size(model_or_tensors: nn.Module | Mapping[str, Tensor]) -> SparseFileReport:
    """What ``save_sparse`` would write, without writing it. Raises as it does for what it refuses."""
    tensors = _tensors(model_or_tensors, "sparse_size")
    return _core.pruning.sparse_size(list(tensors), list(tensors.values()), {})


@overload
def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...
@overload
def load_sparse(path: str | os.PathLike[str], model: Model, strict: bool = True) -> Model: ...
def load_sparse(
    path: str | os.PathLike[str], model: Model | None = None, strict: bool = True
) -> dict[str, Tensor] | Model:
    """Read a file that ``save_sparse`` has written, in either language, or any other safetensors file.

    Args:
        path: of the file.
        model: takes the values, which are copied into its parameters and buffers. Masks and the step counter of a pruner that
            it does not have yet become buffers of it, so that a pruner that is made next continues.
        strict: names must be those of the model.

    Returns:
        The model; without one, dense tensors on the CPU by name, one tensor under each of its names.

    Raises:
        ValueError: a file that breaks a rule of the format (it is named), or does not fit the model; the model is then
            as it was.
        RuntimeError: the file cannot be read.
    """
    file = os.fspath(path)
    tensors, metadata = _core.pruning.read_sparse(file)
    aliases = {name: tensors[of] for name, of in metadata.items() if of in tensors and name not in tensors}
    if model is None:
        return tensors | aliases
    own = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules())
    fresh: list[tuple[nn.Module, str, Tensor]] = []
    for name in list(tensors):
        path_of_module, _, buffer = name.rpartition(".")
        if name in own or not _core.pruning.is_pruning_state(name):
            continue
        if name == _core.pruning.STEP_KEY or name.rpartition("_mask_")[0] in own:
            fresh.append((modules[path_of_module], buffer, tensors.pop(name)))
    values = matched(model, tensors, file, "load_sparse", strict)
    for module, buffer, value in fresh:
        device = next((p.device for p in module.parameters()), value.device)
        module.register_buffer(buffer, value.to(device))
    model.load_state_dict(values, strict=False)  # everything has been checked
    return model
