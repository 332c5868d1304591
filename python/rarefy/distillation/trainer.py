"""The distillation trainer: the C++ loop, driven with Python's models, optimizer and batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from rarefy._core import distillation as _core
from rarefy._core.distillation import EpochMetrics, Evaluation, StepResult

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Callbacks:
    """What to call inside the loop.

    Attributes:
        on_step: called with (step, loss) after each step; the place of a pruning schedule. `step` counts from 1, across
            epochs; `loss` is the one before the step.
        on_epoch_end: called with (epoch, metrics) after each epoch. The trainer's state is ready to be saved there.
    """

    on_step: Callable[[int, float], object] | None = None
    on_epoch_end: Callable[[int, EpochMetrics], object] | None = None


class DistillationTrainer:
    """Train a student on the logits of a teacher and, as the loss says, on labels.

    A step is ``loss = loss_fn(student(inputs), teacher(inputs), labels)``, ``optimizer.zero_grad()``,
    ``loss.backward()``, clipping, ``optimizer.step()``. The teacher runs in evaluation mode and without recording
    gradients. `fit` and `evaluate` put the modes of both models back as they were, also when something raises, and what
    a model, a loader or a callback raises comes out unchanged.

    Args:
        student: the module to train.
        teacher: the module to learn from, or any callable from inputs to logits.
        optimizer: over the student's parameters.
        loss_fn: a `DistillationLoss`, or any callable (student_logits, teacher_logits, labels) that returns a scalar.
        max_grad_norm: gradients are scaled down to this 2-norm before each step; None: not at all.
        callbacks: one `Callbacks` or several, called in order.
        input_key, label_key: where batches that are dicts hold the inputs and the labels.

    Batches are (inputs, labels), (inputs,), a tensor of inputs, or a dict. Labels are None where there are none.

    >>> loss_fn = rf.distillation.DistillationLoss(temperature=4.0, alpha=0.7)
    >>> trainer = rf.distillation.DistillationTrainer(student, teacher, optimizer, loss_fn)
    >>> trainer.fit(loader, epochs=3)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Callable[[Tensor], Tensor],
        optimizer: Optimizer,
        loss_fn: LossFunction,
        *,
        max_grad_norm: float | None = None,
        callbacks: Callbacks | Sequence[Callbacks] = (),
        input_key: str = "inputs",
        label_key: str = "labels",
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"[DistillationTrainer] max_grad_norm must be positive or None, got {max_grad_norm}")
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.callbacks = (callbacks,) if isinstance(callbacks, Callbacks) else tuple(callbacks)
        self._keys = (input_key, label_key)
        # None of these refers to self: a cycle through the C++ object could not be collected.
        self._trainer = _core.DistillationTrainer(
            student=_returning_tensor(student, "student"),
            student_mode=_mode_switch(student),
            teacher=_returning_tensor(teacher, "teacher"),
            teacher_mode=_mode_switch(teacher),
            zero_grad=optimizer.zero_grad,
            step=lambda: optimizer.step(),  # looked up at each call: learning-rate schedulers replace the method
            parameters=lambda: [p for group in optimizer.param_groups for p in group["params"]],
            loss=_returning_tensor(loss_fn, "loss_fn"),
            max_grad_norm=max_grad_norm or 0.0,
            ignore_index=getattr(loss_fn, "ignore_index", -100),
        )

    def train_step(self, inputs: Tensor, labels: Tensor | None = None) -> StepResult:
        """Do one step; the student's mode is the caller's.

        Raises:
            ValueError: the loss (or, with clipping, the norm of the gradient) is not finite. The message names the
                step, and the parameters are as they were before it.
        """
        return self._trainer.train_step(inputs, labels)

    def fit(
        self, loader: Iterable, epochs: int, *, progress: bool = True, evaluate: Iterable | None = None
    ) -> list[EpochMetrics]:
        """Train until `epochs` epochs are done, those of a loaded state included; return the history.

        A script that was interrupted and loads its state can thus be run again as it is; for three more epochs ask for
        ``trainer.epoch + 3``.

        Args:
            loader: the batches of one epoch; iterated once per epoch.
            epochs: how many epochs are to be done in the end.
            progress: show a bar per epoch.
            evaluate: batches to evaluate the student on after each epoch; the result is in the history.

        Raises:
            ValueError: a loss is not finite, or a loader is empty.
        """
        batches = _Batches(loader, self._keys, self._trainer.epoch, epochs, progress)
        steps = [c.on_step for c in self.callbacks if c.on_step is not None]
        ends = [c.on_epoch_end for c in self.callbacks if c.on_epoch_end is not None]

        def on_step(step: int, loss: float) -> None:
            batches.show(loss)
            for callback in steps:
                callback(step, loss)

        def on_epoch_end(epoch: int, metrics: EpochMetrics) -> None:
            for callback in ends:
                callback(epoch, metrics)

        try:
            self._trainer.fit(
                batches,
                epochs,
                on_step if steps or progress else None,
                on_epoch_end if ends else None,
                None if evaluate is None else _Batches(evaluate, self._keys),
            )
        finally:
            batches.close()
        return self.history

    def evaluate(self, loader: Iterable) -> Evaluation:
        """Return loss and accuracy of the student over the batches of `loader`. Changes nothing."""
        return self._trainer.evaluate(_Batches(loader, self._keys))

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._trainer.epoch

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._trainer.step

    @property
    def history(self) -> list[EpochMetrics]:
        """One entry per epoch."""
        return self._trainer.history

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, in plain values. Student and optimizer have their own state_dict."""
        return {"epoch": self.epoch, "step": self.step, "history": [_to_dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; ValueError when it is not consistent."""
        self._trainer.load_state(state["epoch"], state["step"], [_from_dict(entry) for entry in state["history"]])

    def __repr__(self) -> str:
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        lines = [
            f"student={_describe(self.student)}",
            f"teacher={_describe(self.teacher)}",
            f"optimizer={type(self.optimizer).__name__} over {trained:,} parameters",
            f"loss_fn={self.loss_fn!r}",
            f"epoch={self.epoch}, step={self.step}",
        ]
        if self.history:
            lines.append(f"last={self.history[-1]!r}")
        return "DistillationTrainer(\n  " + ",\n  ".join(lines) + "\n)"


class _Batches:
    """A callable that yields (inputs, labels) epoch after epoch, and None between two of them."""

    def __init__(
        self, loader: Iterable, keys: tuple[str, str], epoch: int = 0, epochs: int = 0, progress: bool = False
    ) -> None:
        self._loader = loader
        self._keys = keys
        self._epoch = epoch
        self._epochs = epochs
        self._progress = progress
        self._bar: tqdm | None = None
        self._iterator: Iterator | None = None

    def __call__(self) -> tuple[Tensor, Tensor | None] | None:
        if self._iterator is None:
            self._epoch += 1
            if self._progress:
                self._bar = tqdm(self._loader, desc=f"epoch {self._epoch}/{self._epochs}", unit="batch")
            self._iterator = iter(self._loader if self._bar is None else self._bar)
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._iterator = None
            return None
        return _split(batch, self._keys)

    def show(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _split(batch: Any, keys: tuple[str, str]) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        input_key, label_key = keys
        if input_key not in batch:
            raise KeyError(
                f"[DistillationTrainer] a batch must hold the inputs under {input_key!r} (input_key), "
                f"got the keys {sorted(map(str, batch))}"
            )
        return batch[input_key], batch.get(label_key)
    if isinstance(batch, Sequence) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) == 2 else None
    length = f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
    raise TypeError(
        "[DistillationTrainer] a batch must be a tensor, a tuple or list (inputs, labels) of tensors, or a dict, "
        f"got {type(batch).__name__}{length}"
    )


def _returning_tensor(function: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    def call(*arguments: Tensor | None) -> Tensor:
        result = function(*arguments)
        if not isinstance(result, Tensor):
            raise TypeError(f"[DistillationTrainer] {name} must return a tensor, got {type(result).__name__}")
        return result

    return call


def _mode_switch(model: object) -> Callable[[bool], Callable[[], None]] | None:
    if not isinstance(model, nn.Module):
        return None

    def enter(training: bool) -> Callable[[], None]:
        flags = [(module, module.training) for module in model.modules()]
        model.train(training)

        def restore() -> None:
            for module, flag in flags:
                module.training = flag

        return restore

    return enter


def _describe(model: object) -> str:
    if isinstance(model, nn.Module):
        return f"{type(model).__name__} ({sum(p.numel() for p in model.parameters()):,} parameters)"
    return repr(model)


def _to_dict(entry: EpochMetrics) -> dict[str, Any]:
    evaluation = entry.evaluation
    return {
        "epoch": entry.epoch,
        "step": entry.step,
        "loss": entry.loss,
        "evaluation": None if evaluation is None else {"loss": evaluation.loss, "accuracy": evaluation.accuracy},
    }


def _from_dict(entry: Mapping[str, Any]) -> EpochMetrics:
    evaluation = entry["evaluation"]
    return EpochMetrics(
        entry["epoch"], entry["step"], entry["loss"], None if evaluation is None else Evaluation(**evaluation)
    )
