"""A pruned model in a file: values, and what was removed, so that a model of the original class can be cut to fit."""

from __future__ import annotations

import json
import operator
import os
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import Cut
from rarefy.pruning.records import record_of
from rarefy.pruning.surgery import Surgery, named_tensors


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _state(model: nn.Module, function: str) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"[{function}] the state of a model must be tensors, got {type(value).__name__} at {name}")
    return state


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned model to a safetensors file, with a manifest in its metadata.

    The manifest has, of each tensor that lost slices, its original shape and the indices that are left, over all prunings so
    far, and the attributes that were changed (``out_channels``, those set by ``Surgery.set_attribute``). C++ reads the same
    files (``rarefy::pruning::load_pruned``). Nothing in a file runs when it is read. The file is written under another name
    and renamed, so that a failure leaves the file that was there. A tensor with several names is written once.

    Args:
        model: pruned by this package, on any device; copied or pickled since, or not; or not pruned at all.
        path: of the file, ``"pruned.safetensors"`` say.

    Raises:
        ValueError: a state that is not tensors, or that safetensors does not know; a tensor that was changed in shape by
            something else after pruning.
        RuntimeError: the file cannot be written.
    """
    state = _state(model, "save_pruned")
    records: dict[str, tuple[list[int], dict[int, list[int]]]] = {}
    attributes: dict[str, dict[str, str]] = {}
    for module_path, module in model.named_modules(remove_duplicate=False):
        record = record_of(module)
        prefix = f"{module_path}." if module_path else ""
        for name, tensor in record.tensors.items():
            kept = {dim: list(indices) for dim, indices in tensor.kept.items()}
            records[prefix + name] = list(tensor.shape), kept
        if record.attributes:
            attributes[module_path] = {name: json.dumps(value) for name, value in record.attributes.items()}
    _core.pruning.write_pruned(
        list(state), [tensor.detach() for tensor in state.values()], records, attributes, os.fspath(path)
    )


def load_pruned(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a freshly constructed model to what ``save_pruned`` has written, in either language, and load its values.

    Args:
        model: of the class that was pruned, as constructed; changed in place. Parameters stay the same objects.
        path: of the file.

    Returns:
        The model. It can be pruned and saved again.

    Raises:
        ValueError: a file without a manifest, or broken; a model whose shapes are not the original ones; tensors that are
            missing, unexpected or of another type; tensors that are one in the file and two in the model. The model is as it
            was then.
        RuntimeError: the file cannot be read.
    """
    file = os.fspath(path)
    values, records, attributes = _core.pruning.read_pruned(file)
    tensors = named_tensors(model)
    wrong = []
    for name, (shape, _) in records.items():
        if name not in tensors:
            wrong.append(f"{name} is not of the model")
        elif list(tensors[name].shape) != shape:
            wrong.append(f"{name} must be {shape}, got {list(tensors[name].shape)}")
    if wrong:
        raise ValueError(
            f"[load_pruned] {file}: the model must be of the class that was pruned, freshly constructed, but: "
            f"{'; '.join(wrong)}"
        )
    with Surgery(model) as surgery:
        surgery.apply(Cut(name, dim, kept) for name, (_, of_dims) in records.items() for dim, kept in of_dims.items())
        modules = dict(model.named_modules(remove_duplicate=False))
        for module_path, changed in attributes.items():
            if module_path not in modules:
                raise ValueError(f"[load_pruned] {file}: module '{module_path}' must be of the model")
            for name, text in changed.items():
                _set(surgery, modules[module_path], f"{module_path}.{name}".lstrip("."), name, json.loads(text), file)
        model.load_state_dict(matched(model, values, file, "load_pruned"))
        surgery.commit()
    return model


def _set(surgery: Surgery, module: nn.Module, path: str, name: str, value: Any, file: str) -> None:
    try:
        current = operator.attrgetter(name)(module)
    except AttributeError:
        raise ValueError(f"[load_pruned] {file}: the model must have {path}, which is {value!r}") from None
    if name == "__class__":
        if _full_name(type(module)) != value:
            raise ValueError(f"[load_pruned] {file}: {path} must be {value}, got {_full_name(type(module))}")
        return
    if isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    if current != value:
        surgery.set_attribute(module, name, value)


def matched(
    model: nn.Module, values: dict[str, Tensor], file: str, function: str, strict: bool = True
) -> dict[str, Tensor]:
    """The model's state from the values of a file, after every check; not strict: the part of it that both have."""
    state = _state(model, function)
    given: dict[int, str] = {}
    for name in values:
        if name in state:
            given.setdefault(id(state[name]), name)
    missing = [name for name, tensor in state.items() if name not in values and id(tensor) not in given]
    unexpected = [name for name in values if name not in state]
    if strict and (missing or unexpected):
        raise ValueError(
            f"[{function}] {file}: names must be those of the model, but missing are: {', '.join(missing) or 'none'}; "
            f"unexpected are: {', '.join(unexpected) or 'none'}"
        )
    unfit = []
    for name, value in values.items():
        if name not in state:
            continue
        target = state[name]
        types = value.dtype == target.dtype or (value.is_floating_point() and target.is_floating_point())
        if not types or value.shape != target.shape:
            unfit.append(f"{name} ({value.dtype} {list(value.shape)} into {target.dtype} {list(target.shape)})")
    if unfit:
        raise ValueError(f"[{function}] {file}: shapes and types must be those of the model, but are not: {unfit}")
    for name, value in values.items():
        first = given[id(state[name])] if name in state else name
        if not torch.equal(values[first], value):
            raise ValueError(
                f"[{function}] {file}: {first} and {name} are one tensor of the model and must be equal in the file"
            )
    return {
        name: values[name] if name in values else values[given[id(tensor)]]
        for name, tensor in state.items()
        if name in values or id(tensor) in given
    }
