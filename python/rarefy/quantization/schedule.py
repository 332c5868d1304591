"""When quantization-aware training observes, quantizes and freezes."""

from __future__ import annotations

from torch import nn

from rarefy._core.quantization import QATScheduleOptions
from rarefy.quantization.batch_norm import folded_batch_norms
from rarefy.quantization.prepare import set_state


class QATSchedule:
    """Sets the switches of a prepared model step by step. They are host booleans: nothing is read from a device.

        schedule = QATSchedule(quantize_from=100, freeze_observers_at=1000)
        for batch in loader:
            schedule.step(model)
            ...  # forward, backward, optimizer

    Args:
        observe_from: training step, counted from 0, from which on ranges follow the data.
        quantize_from: step from which on values are rounded; floating point before it. Not before ``observe_from``.
        freeze_observers_at: step from which on scales and zero points stay as they are. After ``observe_from``.
        freeze_batch_norm_at: step from which on folded batch normalizations use their running statistics and keep them
            (``freeze_batch_norm``).

    Raises:
        ValueError: a step that is negative or out of order.
    """

    def __init__(
        self,
        observe_from: int = 0,
        quantize_from: int = 0,
        freeze_observers_at: int | None = None,
        freeze_batch_norm_at: int | None = None,
    ) -> None:
        self.options = QATScheduleOptions(observe_from, quantize_from, freeze_observers_at, freeze_batch_norm_at)
        self.steps = 0  #: training steps begun

    def step(self, model: nn.Module) -> None:
        """Call it once at the beginning of each training step: sets the model's switches for it, then counts it.

        Raises:
            ValueError: the model is not prepared, or has no folded batch normalization to freeze. No switch has changed
                then, and the step is not counted.
        """
        self._set(model, self.steps)
        self.steps += 1

    def apply(self, model: nn.Module) -> None:
        """Set the switches of the step that was counted last (of step 0 before the first), for a model that was loaded."""
        self._set(model, max(self.steps - 1, 0))

    def _set(self, model: nn.Module, step: int) -> None:
        observe, quantize, freeze = self.options.flags_at(step)
        freezes = self.options.freeze_batch_norm_at is not None
        # Whatever can fail does so before the first switch changes: this, and then the check of set_state.
        folded = folded_batch_norms("QATSchedule", model) if freezes else []
        set_state(model, observe=observe, quantize=quantize)
        for module in folded:
            module.frozen = freeze

    def state_dict(self) -> dict[str, int]:
        """The count of steps. The options are the constructor's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: not such a state.
        """
        steps = state.get("steps")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"[QATSchedule] state must have 'steps', a number of steps, got {steps!r}")
        self.steps = steps

    def __repr__(self) -> str:
        return f"QATSchedule({self.options}): {self.steps} steps begun"
