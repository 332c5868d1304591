"""Models with pruning masks, as everything that saves, averages or converts models sees them.

What makes masks is in ``rarefy.pruning``, whose ``check_masks``, ``remask``, ``masked`` and ``remove_masks`` these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import PruningState

OnViolation = Literal["error", "mask"]

_SUFFIX = _core.pruning.mask_key("")
_BESIDE = (_SUFFIX, "_mask_score", "_mask_latent", "_mask_rewind")  # of buffers that pruners keep beside parameters
_PLAIN = (Tensor, nn.Parameter)


# --- a model and its masks --------------------------------------------------------------------------------------------


def masked_parameter(module: nn.Module, name: str, path: str) -> Tensor:
    """The parameter of a module that has a mask.

    Args:
        module: the one that holds it.
        name: of the parameter in the module.
        path: of the parameter in the model, for messages.

    Raises:
        ValueError: it is no parameter, but computed (``torch.nn.utils.parametrize``, ``weight_norm``), or none at all; or it
            is no plain tensor (FSDP).
    """
    parameter = module._parameters.get(name)
    if parameter is None:
        if name in getattr(module, "parametrizations", {}):
            raise ValueError(
                f"[masks] '{path}' must be a parameter, but torch.nn.utils.parametrize computes it: a mask has to hold what "
                f"it is computed from ('{path.removesuffix(name)}parametrizations.{name}.original'), or finalize() the "
                f"pruner first"
            )
        if isinstance(getattr(module, name, None), Tensor):
            raise ValueError(
                f"[masks] '{path}' must be a parameter, but its module {type(module).__name__} computes it: finalize() the "
                f"pruner before the weight is replaced (by weight_norm or torch.nn.utils.prune, say)"
            )
        raise ValueError(f"[masks] '{path}' must be a parameter of {type(module).__name__}, which has a mask for it")
    if type(parameter) not in _PLAIN:
        raise ValueError(
            f"[masks] '{path}' must be a plain tensor, got {type(parameter).__name__}: weights that are sharded (FSDP, tensor "
            f"parallel) cannot have masks; train with DistributedDataParallel, or finalize() the pruner before sharding"
        )
    return parameter


def _own_masks(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names of a module's own parameters that have masks, and the masks."""
    for key, mask in module._buffers.items():
        if key.endswith(_SUFFIX) and mask is not None:
            yield key.removesuffix(_SUFFIX), mask


def _state(modules: Mapping[str, nn.Module]) -> PruningState:
    names, values, masks = [], [], []
    for prefix, module in modules.items():
        for name, mask in _own_masks(module):
            names.append(prefix + name)
            values.append(masked_parameter(module, name, prefix + name))
            masks.append(mask)
    return PruningState(names, values, masks, torch.zeros((), dtype=torch.int64))


def masked_parameters(model: nn.Module) -> PruningState:
    """The parameters of a model that have masks beside them, by the keys of the masks alone."""
    return _state({f"{path}." if path else "": module for path, module in model.named_modules()})


def has_masks(model: nn.Module) -> bool:
    """Whether a model has masks."""
    return any(True for module in model.modules() for _ in _own_masks(module))


def check_masks(model: nn.Module) -> None:
    """Raise when values of a model left their masks.

    Raises:
        ValueError: names the first such parameter, the number of its values and the first flat index.
    """
    _core.pruning.check_masks(masked_parameters(model), "check_masks")


def remask(model: nn.Module, masks_of: nn.Module | None = None) -> int:
    """Set pruned values of a model to zero again: after a merge of adapters, an average of models, loaded dense weights.

    >>> model = peft_model.merge_and_unload()
    >>> rf.pruning.remask(model)

    Args:
        model: with masks; changed in place.
        masks_of: take the masks of this model, whose parameters have the same names: of the model that trained, where
            ``model`` is its average. Masks of ``model`` itself become equal to them; it may have none.

    Returns:
        How many values were not zero.

    Raises:
        ValueError: a mask that does not fit its parameter, or one of ``masks_of`` without a parameter in ``model``; nothing
            has changed then.
    """
    if masks_of is None:
        state = masked_parameters(model)
    else:
        names, values, masks, copies = [], [], [], []
        for path, module in masks_of.named_modules():
            for name, mask in _own_masks(module):
                full = f"{path}.{name}" if path else name
                owner = _submodule(model, path, full)
                names.append(full)
                values.append(masked_parameter(owner, name, full))
                masks.append(mask.to(values[-1].device))
                own = owner._buffers.get(name + _SUFFIX)
                if own is not None:
                    copies.append((own, mask))
        state = PruningState(names, values, masks, torch.zeros((), dtype=torch.int64))
        wrong = [own.shape for own, mask in copies if own.shape != mask.shape]
        if wrong:
            raise ValueError(f"[remask] masks of both models must have the same shapes, got {list(wrong[0])} in one")
    count = sum(number for _, number, _ in _core.pruning.stray_values(state))
    if masks_of is not None:
        for own, mask in copies:
            own.copy_(mask)
    if count > 0:
        _core.pruning.apply_values(state)
    return count


def _submodule(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"[remask] '{name}' must be a parameter of the model, but it has no module '{path}'") from None


@contextmanager
def masked(model: nn.Module) -> Iterator[nn.Module]:
    """Apply the masks again when the block ends, also by an exception: around code that writes weights.

    >>> with rf.pruning.masked(model):
    ...     lora.merge_adapter()
    """
    try:
        yield model
    finally:
        remask(model)


def remove_masks(model: nn.Module) -> None:
    """Take masks, what pruners keep beside them, step counter and checks out of a model: its zeros are no longer held.

    What ``rarefy.quantization.convert`` does with its result. A pruner over the model must not be used any more; where there
    is one, its ``finalize`` is the same.
    """
    unguard(model)
    for module in model.modules():
        for key in [key for key in module._buffers if key.endswith(_BESIDE)]:
            delattr(module, key)
    model._buffers.pop(_core.pruning.STEP_KEY, None)


# --- saving -----------------------------------------------------------------------------------------------------------


class SaveCheck:
    """A hook that ``state_dict`` runs first: values that left their masks are an error, or are masked again.

    It is on the modules that hold masked parameters, so that part of a model is checked too, and knows no model, so that
    copies of a model are checked for themselves. It pickles with them.
    """

    def __init__(self, on_violation: OnViolation) -> None:
        self.on_violation = on_violation

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Check one module, whose names begin with ``prefix``."""
        state = _state({prefix: module})
        if self.on_violation == "error":
            _core.pruning.check_masks(state, "state_dict")
        elif _core.pruning.stray_values(state):
            _core.pruning.apply_values(state)


def guard(model: nn.Module, on_violation: OnViolation = "error") -> None:
    """Have ``state_dict`` check the masks of a model first; called again it changes what is done.

    Args:
        model: with masks.
        on_violation: ``"error"`` raises ValueError, ``"mask"`` sets the values to zero.

    Raises:
        ValueError: another ``on_violation``.
    """
    if on_violation not in ("error", "mask"):
        raise ValueError(f"[guard] on_violation must be 'error' or 'mask', got {on_violation!r}")
    unguard(model)
    for module in model.modules():
        if any(True for _ in _own_masks(module)):
            module.register_state_dict_pre_hook(SaveCheck(on_violation))


def unguard(model: nn.Module) -> None:
    """Take the checks away."""
    for module in model.modules():
        hooks = module._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, SaveCheck)]:
            del hooks[key]
