"""Models and checkpoints of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from rarefy import _core

Model = TypeVar("Model", bound=nn.Module)


@overload
def import_torch_pruning(model_or_state: Model) -> Model: ...
@overload
def import_torch_pruning(model_or_state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
def import_torch_pruning(model_or_state: Model | Mapping[str, Tensor]) -> Model | dict[str, Tensor]:
    """Turn what ``torch.nn.utils.prune`` has pruned into an ordinary model with packed masks beside its parameters.

    Of a state dict, each pair ``x_orig`` and ``x_mask`` becomes ``x``, zero where the mask is, and ``x_mask_bits``; a
    ``pruning_step`` of 0 is added. Load it into a model with a pruner for these parameters, which then goes on.

    Of a live model, the hooks that multiplied at every forward are gone afterwards, and ``x`` is the Parameter that was called
    ``x_orig``: the same object, so that optimizers stay valid. The masks become buffers, with which a pruner over the same
    parameters continues (``include=[...]``).

    Args:
        model_or_state: a module, changed in place, or tensors by name, which are not changed.

    Returns:
        The module, or the new state.

    Raises:
        ValueError: nothing that torch has pruned; an ``x_orig`` without ``x_mask`` or without its hook; a mask of another
            shape, or with values other than 0 and 1. Nothing has changed then.
    """
    if not isinstance(model_or_state, nn.Module):
        state = dict(model_or_state)
        return _core.pruning.import_torch_pruning(list(state), list(state.values()))
    model = model_or_state
    found: list[tuple[nn.Module, str, int]] = []  # with the number of the hook
    for path, module in model.named_modules():
        hooks = {
            hook._tensor_name: key
            for key, hook in module._forward_pre_hooks.items()
            if isinstance(hook, BasePruningMethod)
        }
        for name in [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]:
            if f"{name}_mask" in module._buffers and name not in hooks:
                raise ValueError(
                    f"[import_torch_pruning] {path or 'the model'} must have torch's pruning hook for '{name}', got none"
                )
        found += [(module, name, key) for name, key in hooks.items()]
    prefix = {module: f"{path}." if path else "" for path, module in model.named_modules()}
    state = {}
    for module, name, _ in found:
        for part, tensors in (("_orig", module._parameters), ("_mask", module._buffers)):
            tensor = tensors.get(name + part)
            if tensor is None:
                raise ValueError(f"[import_torch_pruning] '{prefix[module]}{name}{part}' must be there, got none")
            state[prefix[module] + name + part] = tensor
    values = _core.pruning.import_torch_pruning(list(state), list(state.values()))  # checks all of them
    for module, name, hook in found:
        full = prefix[module] + name
        parameter = module._parameters.pop(f"{name}_orig")
        assert parameter is not None
        with torch.no_grad():
            parameter.copy_(values[full])
        module._forward_pre_hooks.pop(hook)
        module._buffers.pop(f"{name}_mask")
        module.__dict__.pop(name, None)  # what the hook computed last
        module.register_parameter(name, parameter)
        module.register_buffer(_core.pruning.mask_key(name), values[_core.pruning.mask_key(full)])
    for module in {module: None for module, _, _ in found}:
        # torch puts what it renames behind the others; a weight stands first.
        own = [name for of, name, _ in found if of is module]
        for name in own + [key for key in module._parameters if key not in own]:
            module._parameters[name] = module._parameters.pop(name)
    step_key = _core.pruning.STEP_KEY
    if step_key not in model._buffers:
        model.register_buffer(step_key, values[step_key])
    return model


def export_torch_pruning(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that ``torch.nn.utils.prune`` would have made: ``x_orig`` and ``x_mask`` for each ``x`` with a mask.

    Args:
        state: of a model with a pruner's masks. Other state of the pruner is left out.

    Raises:
        ValueError: no masks; a mask without its tensor or of another size.
    """
    state = dict(state)
    return _core.pruning.export_torch_pruning(list(state), list(state.values()))
