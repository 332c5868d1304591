"""Where masks are enforced around an optimizer's step, and between processes. Models and their masks: ``rarefy.masks``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import PruningState
from rarefy.masks import (
    OnViolation,
    SaveCheck,
    check_masks,
    guard,
    masked,
    masked_parameter,
    masked_parameters,
    remask,
    remove_masks,
    unguard,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        before: called before gradients are masked, instead of ``state``, and gives the same and whether this step is that of
            dense weights (soft masks), whose gradients and moments are left alone: values alone are masked after it.
        after: given the state, counts a step, changes masks without applying them, and tells whether it did.

    Raises:
        TypeError: something without ``register_step_post_hook``.
        ValueError: no optimizer; one that holds no parameter of the state (it is another model's); a parameter that trains
            and is in none of them; an optimizer that has a hook for one of these parameters already.
    """

    def __init__(
        self,
        optimizers: Any | Sequence[Any],
        state: Callable[[], PruningState],
        before: Callable[[], tuple[PruningState, bool]] | None = None,
        after: Callable[[PruningState], bool] | None = None,
    ) -> None:
        given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        self._optimizers = [_hookable(optimizer) for optimizer in given]
        self._state, self._before, self._after = state, before, after
        self._now = state()  # of this step: gathering it at each use costs more than all else on small layers
        self._check(self._now)
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
        if optimizer is self._optimizers[0] and self._before is not None:
            self._now, self._dense = self._before()
        else:
            self._now = self._state()
        if self._dense:
            return
        state = self._now
        self._watched = [*_core.pruning.values_of(state), *_core.pruning.masks_of(state)]
        if self._dirty or _fingerprint(self._watched) != self._seen:
            enforce(state, self._optimizers)
        self._dirty = False
        self._sparse = not _core.pruning.mask_gradients(state)

    def _post(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_skipped(optimizer):
            return
        changed = optimizer is self._optimizers[-1] and self._after is not None and self._after(self._now)
        self._steps += 1
        if self._dense:
            _core.pruning.apply_values(self._now)
            self._dirty = True
            return
        check = self._steps % _CHECK_EVERY == 0
        if changed:
            enforce(self._state(), self._optimizers)
        elif self._sparse or not _keeps_zeros(optimizer) or (check and _core.pruning.stray_values(self._now)):
            enforce(self._now, self._optimizers)
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


__all__ = [
    "OnViolation",
    "OptimizerHook",
    "SaveCheck",
    "check_masks",
    "enforce",
    "guard",
    "masked",
    "masked_parameter",
    "masked_parameters",
    "moments_of",
    "remask",
    "remove_masks",
    "same_on_all_ranks",
    "unguard",
]
