"""A teacher that is a moving average of its student."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy._core.distillation import Ema
from rarefy.distillation.unwrap import unwrap
from rarefy.masks import remask

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class EMATeacher(nn.Module):
    """Average a student's parameters over its training: Mean Teacher (Tarvainen & Valpola, 2017, arXiv:1703.01780).

        average <- average + (1 - d_t) (parameter - average),    d_t = min(decay, t / (t + warmup)),    t = 0, 1, 2, ...

    `update` does this after an optimizer's step. Buffers (running statistics, ranges of quantizers) are copied. Averages
    of float16 and bfloat16 parameters are kept in float32, where a weight of 0.001 is not lost, and rounded into the
    teacher. The arithmetic is that of C++'s ``rarefy::distillation::Ema``.

    The teacher is a copy of the student, always in evaluation mode and without gradients; calling it calls the copy.

    Args:
        student: the module to copy, also one in DistributedDataParallel or from torch.compile, or prepared for QAT.
        decay: the share that the average keeps in one update, in [0, 1).
        warmup: 0 or more. With 1 the average is the plain mean of all values until `decay` is reached; larger values follow
            the student longer at the start; 0 takes `decay` from the start.

    Raises:
        ValueError: an option is out of range.

    >>> teacher = EMATeacher(student, decay=0.999)
    >>> trainer = DistillationTrainer(student, teacher, optimizer, loss_fn)  # updates it after each step
    """

    def __init__(self, student: nn.Module, decay: float = 0.999, warmup: float = 1.0) -> None:
        super().__init__()
        self._ema = Ema(decay, warmup)
        self.module = _detached_copy(unwrap(student))
        self.module.requires_grad_(False)
        self._masters = {
            name: parameter.detach().float()
            for name, parameter in self.module.named_parameters()
            if parameter.dtype in _LOW_PRECISION
        }
        super().train(False)

    @property
    def averaged_module(self) -> nn.Module:
        """The copy that is averaged."""
        return self.module

    @property
    def updates(self) -> int:
        """How many updates are done."""
        return self._ema.updates

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the averages towards the student's parameters and copy its buffers; a pruner's masks hold in the average.

        Raises:
            ValueError: the student is not what it was when the teacher was made (pruned or prepared since, say); the
                message names what differs. Nothing has changed then.
        """
        inner = unwrap(student)
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        values = _matched("parameters", parameters, dict(inner.named_parameters()))
        copies = _matched("buffers", buffers, dict(inner.named_buffers()))
        averages = {name: self._masters.get(name, parameter) for name, parameter in parameters.items()}
        moving = [name for name, parameter in parameters.items() if parameter.is_floating_point()]
        self._ema.update([averages[name] for name in moving], [values[name] for name in moving])
        for name, parameter in parameters.items():
            if name in self._masters:
                parameter.copy_(self._masters[name])
            elif not parameter.is_floating_point():
                parameter.copy_(values[name])
        for name, buffer in buffers.items():
            buffer.copy_(copies[name])
        remask(self.module)  # what was pruned on the way is in the average still

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the averaged model returns."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "EMATeacher":
        super()._apply(fn, recurse)
        for name, parameter in self.module.named_parameters():
            if name in self._masters:
                self._masters[name] = self._masters[name].to(parameter.device)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return what `state_dict` holds beside the averaged module: the updates done, float32 averages."""
        masters = {name: master.clone() for name, master in self._masters.items()}
        return {"updates": self.updates, "masters": masters}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `get_extra_state` returned."""
        masters = _matched("float32 averages", self._masters, state["masters"])
        self._ema.updates = state["updates"]
        for name, master in self._masters.items():
            master.copy_(masters[name])

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"decay={self._ema.decay:g}, warmup={self._ema.warmup:g}, updates={self.updates}"


def _detached_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy that has no gradients, which would be copied with the parameters."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        return copy.deepcopy(module)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _matched(kind: str, averages: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if averages.keys() != values.keys():
        names = sorted(averages.keys() ^ values.keys())
        shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"[EMATeacher] the student must have the teacher's {kind}, got a difference in {shown}")
    for name, average in averages.items():
        if average.shape != values[name].shape:
            raise ValueError(
                f"[EMATeacher] the student must keep the shapes of its {kind}, got {list(values[name].shape)} for "
                f"{list(average.shape)} in {name!r}"
            )
    return values
