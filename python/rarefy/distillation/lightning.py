"""Distillation inside of Lightning's Trainer."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distillation.capture import LayerCapture
from rarefy.distillation.modes import evaluating
from rarefy.distillation.objective import accepted
from rarefy.distillation.outputs import to_logits

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ImportError(f"[DistillationCallback] needs {error.name}: pip install rarefy[integrations]") from error


class DistillationCallback(Callback):
    """Add a teacher's loss to what a LightningModule's training step returns.

        loss = task_weight * (the training step's) + weight * loss_fn(student logits, teacher logits, labels)

    The module itself stays as it is: no line of it knows of the teacher. During ``fit`` its ``training_step`` is wrapped;
    afterwards, by an exception too, it is its own again. The teacher runs in evaluation mode, without gradients, on the
    module's device and under the Trainer's precision; it is no part of the module, and so not in its checkpoints.
    ``task_loss`` and ``distillation_loss`` are logged. Automatic optimization only.

    Args:
        teacher: a module that takes what `inputs` returns.
        loss_fn: a `DistillationLoss`, or any callable (student_logits, teacher_logits, labels). With ``alpha=1`` it has no
            part of the labels in it, which the training step's own loss has.
        weight, task_weight: of the two losses.
        layer: the path in the LightningModule of the part that returns the student's logits (``"model"``, say; ``""`` is
            the module's own forward). Its last call in a training step counts. None: the training step returns a dict
            with the logits, under `key`.
        key: see `layer`.
        inputs: batch to the teacher's input: a tensor, a tuple of arguments, a dict of keywords. Default: a batch that is a
            tensor; the first of a tuple; a dict without "labels", of which the teacher's forward gets what it names.
        labels: batch to labels, or None. Default: the second of a tuple, a dict's "labels", else None.

    Raises:
        ValueError, TypeError: an argument breaks its rule; in ``fit``: the training step returns no loss or no logits.
        ImportError: on import of the module, without lightning.

    >>> loss_fn = rf.distillation.DistillationLoss(temperature=4.0, alpha=1.0)
    >>> callback = DistillationCallback(teacher, loss_fn, weight=0.7, task_weight=0.3, layer="model")
    >>> Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss_fn: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        *,
        weight: float = 1.0,
        task_weight: float = 1.0,
        layer: str | None = None,
        key: str = "logits",
        inputs: Callable[[Any], Any] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"[DistillationCallback] teacher must be a module, got {type(teacher).__name__}")
        if not (weight >= 0.0 and task_weight >= 0.0 and weight + task_weight > 0.0):
            raise ValueError(
                "[DistillationCallback] weights must be 0 or more, and one of them positive, got "
                f"weight={weight} and task_weight={task_weight}"
            )
        super().__init__()
        self.teacher = teacher
        self.loss_fn = loss_fn
        self.weight = weight
        self.task_weight = task_weight
        self.layer = layer
        self.key = key
        self._inputs = inputs or _inputs_of
        self._labels = labels or _labels_of
        self._capture: LayerCapture | None = None
        self._wrapped: LightningModule | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the teacher to the module's device and wrap the training step."""
        if not pl_module.automatic_optimization:
            raise ValueError("[DistillationCallback] automatic_optimization must be True, got False")
        capture = None if self.layer is None else LayerCapture(_submodule(pl_module, self.layer), "")
        self.teacher.to(pl_module.device)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(pl_module.device)
        if capture is not None:
            self._capture = capture.__enter__()
        self._wrapped = pl_module
        pl_module.training_step = self._around(pl_module, pl_module.training_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its own training step back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own training step back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own training step back."""
        self._restore()

    def _restore(self) -> None:
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None
        if self._wrapped is not None:
            del self._wrapped.training_step  # the instance's, which hid the class's
            self._wrapped = None

    def _around(self, module: LightningModule, training_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            result = training_step(batch, *args, **kwargs)
            task = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(task, Tensor):
                raise ValueError(
                    "[DistillationCallback] training_step must return a loss, or a dict with a 'loss', got "
                    f"{type(task).__name__}"
                )
            distilled = self.loss_fn(self._student_logits(result), self._teacher_logits(batch), self._labels(batch))
            loss = self.task_weight * task + self.weight * distilled
            module.log("task_loss", task.detach(), batch_size=_size(batch))
            module.log("distillation_loss", distilled.detach(), batch_size=_size(batch))
            return {**result, "loss": loss} if isinstance(result, Mapping) else loss

        return step

    def _student_logits(self, result: Any) -> Tensor:
        if self._capture is not None:
            return to_logits(self._capture.features[""])
        if not isinstance(result, Mapping) or self.key not in result:
            got = f"the keys {sorted(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
            raise ValueError(
                f"[DistillationCallback] training_step must return a dict with the logits under {self.key!r} (or name the "
                f"part that returns them by layer=), got {got}"
            )
        return to_logits(result[self.key])

    def _teacher_logits(self, batch: Any) -> Tensor:
        inputs = self._inputs(batch)
        with torch.no_grad(), evaluating(self.teacher):
            if isinstance(inputs, Mapping):
                return to_logits(self.teacher(**accepted(self.teacher, inputs)))
            return to_logits(self.teacher(*inputs) if isinstance(inputs, tuple) else self.teacher(inputs))


def _submodule(module: LightningModule, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        LayerCapture(module, path)  # names near ones
        raise


def _inputs_of(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}
    return batch[0] if isinstance(batch, tuple | list) else batch


def _labels_of(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def _size(batch: Any) -> int | None:
    """The number of samples, for means over an epoch; None: Lightning finds out."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 0), None)
