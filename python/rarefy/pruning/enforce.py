"""Where masks are enforced: around an optimizer's step, before a model is saved, after others have written weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import PruningState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OnViolation = Literal["error", "mask"]

_SUFFIX = _core.pruning.mask_key("")
_BESIDE = (_SUFFIX, "_mask_score", "_mask_latent", "_mask_rewind")  # of buffers that pruners keep beside parameters
_PLAIN = (Tensor, nn.Parameter)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Rules that map a zero value, gradient and state to a zero value and state: nothing has to be written after their steps.
_KEEP_ZEROS = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


_CHECK_EVERY = 100  # steps


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
    """Take masks, what pruners keep beside them, step counter and checks out of a model, whose zeros are no longer held from then on.

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


# --- optimizers -------------------------------------------------------------------------------------------------------


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def moments_of(values: Sequence[Tensor], optimizer: Any) -> tuple[list[int], list[Tensor]]:
    """What an optimizer keeps about parameters in their shapes.

    Args:
        values: the parameters.
        optimizer: of any type with ``state``.

    Returns:
        Positions in ``values``, and floating-point tensors. One element is a step count, and left out.
    """
    owners, moments = [], []
    for position, value in enumerate(values):
        for tensor in _tensors(optimizer.state.get(value)):
            if (
                type(tensor) in _PLAIN
                and tensor.dtype in _FLOATS
                and tensor.layout == torch.strided
                and tensor.shape == value.shape
                and value.numel() > 1
            ):
                owners.append(position)
                moments.append(tensor)
    return owners, moments


def enforce(state: PruningState, optimizer: Any | Sequence[Any] = ()) -> None:
    """Set values, dense gradients and what optimizers keep to zero where masks prune.

    Args:
        state: parameters and masks.
        optimizer: those that hold them; or one.
    """
    optimizers = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
    values = _core.pruning.values_of(state)
    owners: list[int] = []
    moments: list[Tensor] = []
    for one in optimizers:
        found = moments_of(values, one)
        owners += found[0]
        moments += found[1]
    _core.pruning.enforce(state, owners, moments)


class OptimizerHook:
    """Enforces masks around each step of an optimizer, so that no line after ``optimizer.step()`` is needed.

    Before a step, gradients are masked. Values and moments that are zero then stay zero under the rules of SGD, Adam and
    their like, which map zeros to zeros, and nothing else is written. Everything is written (values, gradients, moments) when
    masks change, when someone else wrote values or masks since the last step (their versions tell), when the optimizer has
    loaded a state, and at each step under other rules and with sparse gradients. What neither a version nor a rule tells,
    such as a write through ``.data``, is found by reading all values, every 100 steps.

    Nothing runs for steps that ``torch.amp.GradScaler`` skips. Hooks stay when the optimizer loads a state; copies and
    pickles of an optimizer have none.

    Args:
        optimizers: one, or those that hold the parameters together: a step is counted after that of the last.
        state: the parameters and masks at the moment of a call.
        before: called before gradients are masked. True: this step is that of dense weights (soft masks), whose gradients
            and moments are left alone; values alone are masked after it.
        after: counts a step, changes masks without applying them, and tells whether it did.

    Raises:
        TypeError: something without ``register_step_post_hook``.
        ValueError: no optimizer; one that holds no parameter of the state (it is another model's); a parameter that trains
            and is in none of them; an optimizer that has a hook for one of these parameters already.
    """

    def __init__(
        self,
        optimizers: Any | Sequence[Any],
        state: Callable[[], PruningState],
        before: Callable[[], bool | None] | None = None,
        after: Callable[[], bool] | None = None,
    ) -> None:
        given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        self._optimizers = [_hookable(optimizer) for optimizer in given]
        self._state, self._before, self._after = state, before, after
        self._check(state())
        self._dirty = True  # there may be values and moments that are not zero: from before, or written by someone else
        self._sparse = self._dense = False
        self._watched: list[Tensor] = []  # values and masks, and what they were after the last step
        self._seen: list[tuple[int, int, int]] = []
        self._steps = 0
        self._handles: list[Any] = []
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._pre),
                optimizer.register_step_post_hook(self._post),
                optimizer.register_load_state_dict_post_hook(self._loaded),
            ]

    def _check(self, state: PruningState) -> None:
        if not self._optimizers:
            raise ValueError("[attach] there must be an optimizer, got none")
        names = {
            id(value): name
            for name, value in zip(_core.pruning.names_of(state), _core.pruning.values_of(state), strict=True)
        }
        missing = {id(value): names[id(value)] for value in _core.pruning.values_of(state) if value.requires_grad}
        for optimizer in self._optimizers:
            kind = type(optimizer).__name__
            held = {id(p) for group in optimizer.param_groups for p in group["params"]} & names.keys()
            if not held:
                raise ValueError(
                    f"[attach] {kind} must hold pruned parameters of the model, but holds none of them: was it made for "
                    f"another model?"
                )
            for hook in optimizer._optimizer_step_post_hooks.values():
                other = getattr(hook, "__self__", None)
                if isinstance(other, OptimizerHook) and held & {
                    id(value) for value in _core.pruning.values_of(other._state())
                }:
                    raise ValueError(f"[attach] {kind} must not be attached already: call detach() first")
            for key in held:
                missing.pop(key, None)
        if missing:
            raise ValueError(
                f"[attach] the optimizer must hold every pruned parameter that trains, but lacks {_listed(missing.values())}"
            )

    def _pre(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = next((i for i, value in enumerate(args) if i > 0 and callable(value)), None)
        closure = kwargs.get("closure") if position is None else args[position]
        if closure is None:
            if not _is_skipped(optimizer):
                self._mask_gradients(optimizer)
            return None

        def masked_closure() -> Any:  # the gradients of this step do not exist yet
            loss = closure()
            self._mask_gradients(optimizer)
            return loss

        if position is None:
            return args, {**kwargs, "closure": masked_closure}
        return (*args[:position], masked_closure, *args[position + 1 :]), kwargs

    def _mask_gradients(self, optimizer: Any) -> None:
        if optimizer is self._optimizers[0]:
            self._dense = self._before is not None and bool(self._before())
        if self._dense:
            return
        state = self._state()
        self._watched = [*_core.pruning.values_of(state), *_core.pruning.masks_of(state)]
        if self._dirty or _fingerprint(self._watched) != self._seen:
            enforce(state, self._optimizers)
        self._dirty = False
        self._sparse = not _core.pruning.mask_gradients(state)

    def _post(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_skipped(optimizer):
            return
        changed = optimizer is self._optimizers[-1] and self._after is not None and self._after()
        self._steps += 1
        if self._dense:
            _core.pruning.apply_values(self._state())
            self._dirty = True
            return
        if changed or self._sparse or not _keeps_zeros(optimizer):
            enforce(self._state(), self._optimizers)
        elif self._steps % _CHECK_EVERY == 0:
            state = self._state()
            if _core.pruning.stray_values(state):
                enforce(state, self._optimizers)
        self._seen = _fingerprint(self._watched)

    def _loaded(self, optimizer: Any) -> None:
        self._dirty = True

    def remove(self) -> None:
        """Take the hooks away. Does nothing when called again."""
        while self._handles:
            self._handles.pop().remove()


def _hookable(optimizer: Any) -> Any:
    """The optimizer whose ``step`` runs hooks: the inner one of a wrapper (accelerate, Lightning)."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not (hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "register_step_post_hook")):
        raise TypeError(
            f"[attach] an optimizer must have register_step_post_hook, as torch.optim.Optimizer has, got "
            f"{type(optimizer).__name__}; without it, call step() after optimizer.step()"
        )
    return inner


def _keeps_zeros(optimizer: Any) -> bool:
    """Whether a step maps values, gradients and moments that are zero to zeros; 0 / 0 is not."""
    return type(optimizer) in _KEEP_ZEROS and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def _fingerprint(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Differs when a tensor was replaced or written to, unless through ``.data``."""
    return [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors]


def _is_skipped(optimizer: Any) -> bool:
    """Whether this step of a fused optimizer does nothing since GradScaler found an infinity."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- processes --------------------------------------------------------------------------------------------------------


def same_on_all_ranks(masks: Sequence[Tensor], process_group: ProcessGroup | None = None) -> None:
    """Give all processes the masks of the first: one broadcast of an eighth of a byte per weight, after a change of masks.

    Weights and reduced gradients are equal on all processes under ``DistributedDataParallel``, and masks that follow from
    them too; this keeps them so where scores are not, as random ones or those of a process's own batches. Does nothing
    without ``torch.distributed``.

    Args:
        masks: written in place; equal in number and shapes on all processes.
        process_group: the processes; None: all.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or not masks:
        return
    if distributed.get_world_size(process_group) == 1:
        return
    group = distributed.group.WORLD if process_group is None else process_group
    flat = torch.cat([mask.reshape(-1) for mask in masks])
    distributed.broadcast(flat, src=distributed.get_global_rank(group, 0), group=process_group)
    for mask, part in zip(masks, flat.split([mask.numel() for mask in masks]), strict=True):
        mask.copy_(part.view_as(mask))
