"""The distillation trainer: the C++ loop, driven with Python's models, optimizer and batches."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rarefy._core import distillation as _core
from rarefy._core.distillation import EpochMetrics, Evaluation, StepResult
from rarefy.distillation import checkpoint as checkpoints
from rarefy.distillation import random_state
from rarefy.distillation.batches import Batches, BatchReader
from rarefy.distillation.capture import LayerCapture
from rarefy.distillation.display import history_html, plot_history
from rarefy.distillation.ema import EMATeacher
from rarefy.distillation.objective import Term, layers_of
from rarefy.distillation.outputs import Outputs, find_logits
from rarefy.distillation.trainer_terms import Objective
from rarefy.distillation.unwrap import unwrap

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_STATE_FIELDS = ("epoch", "step", "batch", "epoch_loss", "epoch_steps", "best_epoch", "best_value", "loss_scale",
                 "good_steps", "advances", "random", "epoch_random")  # fmt: skip


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


@dataclass(frozen=True)
class Selection:
    """Which epoch is the best, and when to stop for want of a better one.

    Attributes:
        metric: "loss" or "accuracy" of the evaluation, or a name that `fit`'s `measure` gives.
        mode: "min" or "max"; None: "min" for "loss", "max" for "accuracy".
        min_delta: how much better than the best an epoch must be, 0 or more.
        patience: epochs without a better one after which training ends; None: never.
    """

    metric: str = "loss"
    mode: Literal["min", "max"] | None = None
    min_delta: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max", None) or (self.mode is None and self.metric not in ("loss", "accuracy")):
            raise ValueError(f"[Selection] mode must be 'min' or 'max' for {self.metric!r}, got {self.mode!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"[Selection] patience must be 1 or more, or None, got {self.patience}")

    @property
    def maximize(self) -> bool:
        """True where more is better."""
        return self.mode == "max" or (self.mode is None and self.metric == "accuracy")


class DistillationTrainer:
    """Train a student on the outputs of a teacher and, as the loss says, on labels.

    A step is ``optimizer.zero_grad()``; for each of `accumulate` batches the loss of student and teacher and its
    ``backward()``; clipping; ``optimizer.step()``; ``scheduler.step()``. The teacher runs in evaluation mode and without
    recording gradients, and an error names what changed should its parameters or buffers change. `fit` and `evaluate` put
    the modes of both models back as they were, also when something raises, and what a model, a loader or a callback raises
    comes out unchanged.

    Args:
        student: the module to train; also in DistributedDataParallel, from torch.compile, or prepared for QAT.
        teacher: the module to learn from, or any callable of the same inputs. An `EMATeacher` follows the student.
        optimizer: over the student's parameters, and those of terms that have any (adapters).
        loss_fn: a `DistillationLoss`, or any callable (student_logits, teacher_logits, labels) that returns a scalar; or terms
            by name, alone or as (weight, term), each a loss of logits of this package or a callable (student: Outputs,
            teacher: Outputs, batch). Layers that a term names in ``student_layers`` and ``teacher_layers`` are captured
            for it.
        scheduler: a learning-rate scheduler of torch.
        scheduler_interval: "step" or "epoch": what it counts. A ReduceLROnPlateau counts epochs, by `selection`'s metric.
        accumulate: batches whose gradients make one step, each weighed by its valid rows: 1 batch of 32, 4 of 8 and 32
            of 1 give equal gradients.
        max_grad_norm: gradients are scaled down to this 2-norm before each step; None: not at all.
        precision: "fp32"; "bf16" or "fp16" run both models under autocast, fp16 with a loss scale that adapts.
        callbacks: one `Callbacks` or several, called in order.
        selection: what the best epoch is, and how many may pass without a better one.
        stateful: further objects by name that have a ``state_dict`` (schedules, pruners): kept in checkpoints.
        input_key, label_key: where batches that are dicts hold the inputs and the labels. A dict without `input_key` is
            passed by name: ``model(**batch)``, without the labels and what the model's forward does not take.
        mask_key, weight_key: where such batches hold `mask` and `row_weights` for the `DistillationLoss`.
        student_logits, teacher_logits: functions that find the logits in what a model returned; see `to_logits`.
        prepare: what a batch becomes before a step, and before its rows are counted: `OnPolicy`, mixed images. Not called
            in evaluation.
        count: the number of valid rows of a batch, where labels do not tell: by default the labels other than
            ``loss_fn.ignore_index``, with the mask and the weights of `mask_key` and `weight_key`; the size of the first
            dimension without any of them.
        log_every: steps between two entries of `log`, with each term's share of the gradient; None: no log.
        device: where batches are moved; None: where the student is.

    Batches are (inputs, labels), (inputs,), (x1, x2, ..., labels), a tensor of inputs, or a dict. Labels are None where
    there are none. In a process group of torch.distributed, rows are counted over all processes, and the history's losses and
    evaluations are those of all; the loss of a step, in callbacks and in the log, is this process's addend of their mean.
    What `measure` gives is taken from the first process.

    Parts of a student in training mode keep their modes (a frozen batch norm in evaluation mode stays so); a student in
    evaluation mode is put in training mode as a whole.

    >>> loss_fn = rf.distillation.DistillationLoss(temperature=4.0, alpha=0.7)
    >>> trainer = rf.distillation.DistillationTrainer(student, teacher, optimizer, loss_fn)
    >>> trainer.fit(loader, epochs=3, evaluate=held_out, checkpoint="runs/first")
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Callable[..., Any],
        optimizer: Optimizer,
        loss_fn: LossFunction | Term | Mapping[str, Any],
        *,
        scheduler: Any = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        callbacks: Callbacks | Sequence[Callbacks] = (),
        selection: Selection = Selection(),
        stateful: Mapping[str, checkpoints.Stateful] | None = None,
        input_key: str = "inputs",
        label_key: str = "labels",
        mask_key: str | int | None = None,
        weight_key: str | int | None = None,
        student_logits: Callable[[Any], Tensor] | None = None,
        teacher_logits: Callable[[Any], Tensor] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        count: Callable[[Any], float] | None = None,
        log_every: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"[DistillationTrainer] max_grad_norm must be positive or None, got {max_grad_norm}")
        if scheduler_interval not in ("step", "epoch"):
            raise ValueError(
                f"[DistillationTrainer] scheduler_interval must be 'step' or 'epoch', got {scheduler_interval!r}"
            )
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.scheduler = scheduler
        self.selection = selection
        self.stateful = dict(stateful or {})
        self.callbacks = (callbacks,) if isinstance(callbacks, Callbacks) else tuple(callbacks)
        self._objective = Objective(loss_fn, mask_key, weight_key)
        self._check_parameters()
        if _processes() > 1 and not hasattr(student, "no_sync") and not hasattr(student, "set_requires_gradient_sync"):
            warnings.warn(
                f"[DistillationTrainer] one of {_processes()} processes got a student that exchanges no gradients "
                "(DistributedDataParallel, FSDP): each trains its own",
                stacklevel=2,
            )

        place = torch.device(device) if device is not None else _device_of(student)
        self._reader = BatchReader(input_key, label_key, place)
        reader = self._reader
        # None of what the C++ object holds refers to self: a cycle through it could not be collected.
        generators: list[torch.Generator] = []
        self._generators = generators
        self._trainer = _core.DistillationTrainer(
            student=_to_model(student, reader, self._objective, student_logits, "student"),
            teacher=_to_model(teacher, reader, self._objective, teacher_logits, "teacher", student),
            zero_grad=optimizer.zero_grad,
            step=lambda: optimizer.step(),  # looked up at each call: learning-rate schedulers replace the method
            parameters=lambda: [p for group in optimizer.param_groups for p in group["params"]],
            terms=self._objective.core_terms(lambda batch: reader.labels(batch)),
            scheduler=None if scheduler is None else _advance(scheduler),
            schedule_epochs=scheduler_interval == "epoch" or isinstance(scheduler, ReduceLROnPlateau),
            max_grad_norm=max_grad_norm or 0.0,
            ignore_index=self._objective.ignore_index,
            accumulate=accumulate,
            precision=precision,
            device=str((place or torch.device("cpu")).type),
            log_every=log_every or 0,
            shift=self._objective.shift,
            metric=selection.metric,
            maximize=selection.maximize,
            min_delta=selection.min_delta,
            patience=selection.patience or 0,
            row_weights=self._objective.row_weights(),
            count=count,
            prepare=None if prepare is None else lambda batch: reader.read(prepare(batch)),
            all_reduce_sum=_all_reduce_sum if _processes() > 1 else None,
            processes=_processes(),
            capture_random=lambda: random_state.capture(generators),
            restore_random=lambda states: random_state.restore(states, generators),
        )

    def train_step(self, inputs: Any, labels: Tensor | None = None) -> StepResult:
        """Do one step on one batch; the student's mode is the caller's.

        Args:
            inputs: the inputs, or a batch of any form when there are no `labels`.
            labels: the labels.

        Raises:
            ValueError: the loss (or, with clipping, the norm of the gradient) is not finite. The message names the
                step, and the parameters are as they were before it.
        """
        batch = inputs if labels is None else (inputs, labels)
        return self._trainer.train_step(lambda: self._reader.read(batch))

    def fit(
        self,
        loader: Iterable,
        epochs: int,
        *,
        progress: bool = True,
        evaluate: Iterable | None = None,
        measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = True,
    ) -> list[EpochMetrics]:
        """Train until `epochs` epochs are done, those of a loaded state included; return the history.

        A script that was interrupted can thus be run again as it is; for three more epochs ask for ``trainer.epoch + 3``.
        An epoch that was interrupted goes on behind the batches that were done, which the loader must give again: the random
        state of the epoch's start is put back for that.

        Args:
            loader: the batches of one epoch; iterated once per epoch.
            epochs: how many epochs are to be done in the end.
            progress: show a bar per epoch.
            evaluate: batches to evaluate the student on after each epoch; the result is in the history.
            measure: metrics of one's own, by name, from the student, which is in evaluation mode; after each epoch.
            checkpoint: a folder. ``last.pt`` is written there after each epoch, and ``best.pt`` after each that was the best
                so far by `selection`; with `resume` training goes on from a ``last.pt`` that is there.
            checkpoint_every: steps between two writings of ``last.pt`` within an epoch.
            resume: False: start anew, whatever is in the folder.

        Raises:
            ValueError: a loss is not finite; a loader is empty, or has fewer batches than were done; the teacher changed;
                a checkpoint is of another run.
            OSError: a checkpoint could not be written. The one before is still there.
        """
        if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
            raise ValueError(
                "[DistillationTrainer] checkpoint_every must be 1 or more, with a folder as checkpoint, got "
                f"{checkpoint_every} and {checkpoint}"
            )
        own = self.selection.metric not in ("loss", "accuracy")
        if isinstance(self.scheduler, ReduceLROnPlateau) and evaluate is None and not (own and measure is not None):
            raise ValueError(
                f"[DistillationTrainer] ReduceLROnPlateau needs an evaluation that measures {self.selection.metric!r} after "
                "each epoch, got none"
            )
        self._generators[:] = random_state.loader_generators(loader)
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is not None and resume and self.step == 0 and (folder / "last.pt").exists():
            self.load_checkpoint(folder / "last.pt")
        progress = progress and _rank() == 0
        batches = Batches(loader, self._reader, self._trainer.epoch, epochs, progress)
        steps = [c.on_step for c in self.callbacks if c.on_step is not None]
        ends = [c.on_epoch_end for c in self.callbacks if c.on_epoch_end is not None]

        def on_step(step: int, loss: float) -> None:
            if progress:
                terms = self._trainer.last.terms
                batches.show({"loss": loss} | (terms if len(terms) > 1 else {}))
            for callback in steps:
                callback(step, loss)
            if checkpoint_every is not None and step % checkpoint_every == 0:
                self.save_checkpoint(folder / "last.pt")

        def on_epoch_end(epoch: int, metrics: EpochMetrics) -> None:
            for callback in ends:
                callback(epoch, metrics)
            if folder is not None:
                if self.best_epoch == epoch:
                    self.save_checkpoint(folder / "best.pt")
                self.save_checkpoint(folder / "last.pt")

        try:
            self._trainer.fit(
                batches,
                epochs,
                on_step if steps or progress or checkpoint_every is not None else None,
                on_epoch_end if ends or folder is not None else None,
                None if measure is None else lambda: _of_first_process(dict(measure(self.student))),
                None if evaluate is None else Batches(evaluate, self._reader),
            )
        finally:
            batches.close()
        return self.history

    def stop(self) -> None:
        """End `fit` after this step; to be called from a callback. The epoch can be gone on with."""
        self._trainer.stop()

    def evaluate(self, loader: Iterable) -> Evaluation:
        """Return loss and accuracy of the student over the batches of `loader`. Changes nothing."""
        return self._trainer.evaluate(Batches(loader, self._reader))

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

    @property
    def log(self) -> list[StepResult]:
        """The first step and every `log_every`-th: terms, shares of the gradient, its norm where it is clipped."""
        return self._trainer.log

    @property
    def best_epoch(self) -> int | None:
        """The epoch that was best by `selection`; None before the first evaluation."""
        return self._trainer.best_epoch or None  # 0 in C++

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, in plain values and tensors, with the random state of now.

        Student, optimizer and scheduler have their own state_dict; `save_checkpoint` keeps them all.
        """
        state = self._trainer.state()
        return {name: getattr(state, name) for name in _STATE_FIELDS} | {
            "history": [_to_dict(entry) for entry in state.history],
            "log": [_to_dict(entry) for entry in state.log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; ValueError when it is not consistent."""
        loaded = _core.TrainerState()
        for name in _STATE_FIELDS:
            if name in state:
                setattr(loaded, name, state[name])
        loaded.history = [_to_metrics(entry) for entry in state["history"]]
        loaded.log = [StepResult(**entry) for entry in state.get("log", ())]
        self._trainer.load_state(loaded)

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write all that a run goes on from: student, optimizer, scheduler, random state, place in the epoch, terms, masks.

        The teacher is in it as a fingerprint (an `EMATeacher`, which is trained, with its state). In a process group every
        process calls this, and the first one writes. The file is written to a temporary name and renamed;
        ``torch.load(path, weights_only=True)`` reads it, and ``["student"]`` is the student's state_dict.

        Raises:
            OSError: it could not be written. What was at `path` is still there.
        """
        content = checkpoints.collect(self._parts(), self._trainer.teacher_fingerprint())
        if _rank() == 0:
            checkpoints.save(path, content)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file of `save_checkpoint`.

        Raises:
            FileNotFoundError, ValueError: there is none; it is of another teacher, or does not fit the student, optimizer,
                scheduler or terms. Everything is as it was then.
        """
        checkpoints.load(path, self._parts(), self._trainer.teacher_fingerprint())

    def plot(self) -> Any:
        """Return a matplotlib figure of the history: losses, evaluation, and the log's terms and gradient shares."""
        return plot_history(self.history, self.log)

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

    def _repr_html_(self) -> str:
        title = f"{_describe(self.student)}, from {_describe(self.teacher)}"
        return history_html(title, self.history, self.best_epoch)

    def _parts(self) -> dict[str, checkpoints.Stateful]:
        parts: dict[str, Any] = {
            "student": unwrap(self.student),
            "optimizer": self.optimizer,
            "trainer": _Position(self),
        }
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler
        if isinstance(self.teacher, EMATeacher):
            parts["ema_teacher"] = self.teacher
        parts |= {f"term {name}": module for name, module in self._objective.modules().items() if module.state_dict()}
        return parts | {f"stateful {name}": part for name, part in self.stateful.items()}

    def _check_parameters(self) -> None:
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in optimized for p in self.student.parameters()):
            raise ValueError("[DistillationTrainer] optimizer must hold parameters of the student, got none of them")
        for name, module in self._objective.modules().items():
            missing = [key for key, p in module.named_parameters() if p.requires_grad and id(p) not in optimized]
            if missing:
                raise ValueError(
                    f"[DistillationTrainer] optimizer must hold the parameters of the term {name!r}, which learns too: "
                    f"{', '.join(missing)} are missing (optimizer.add_param_group)"
                )


class _Position:
    """Where a trainer stands, as a part of a checkpoint: of every process, since each has a random state of its own."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> list[dict[str, Any]]:
        states: list[Any] = [self._trainer.state_dict()]
        if _processes() > 1:
            states *= _processes()
            dist.all_gather_object(states, states[0])
        return states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        if len(states) != _processes() and any(state["batch"] > 0 for state in states):
            raise ValueError(
                f"a run within an epoch goes on with as many processes, got {_processes()} where it had {len(states)}"
            )
        self._trainer.load_state_dict(states[_rank() % len(states)])


def _to_model(
    model: Any,
    reader: BatchReader,
    objective: Objective,
    extract: Callable[[Any], Tensor] | None,
    name: Literal["student", "teacher"],
    student: nn.Module | None = None,
) -> _core.Model:
    """The model as the loop sees it; `student` is given for a teacher."""
    layers = tuple(dict.fromkeys(layers_of(objective.terms, name)))
    required = objective.needs_logits()
    if layers and not isinstance(model, nn.Module):
        raise TypeError(f"[DistillationTrainer] layers are captured of modules, got a {type(model).__name__} as {name}")
    captures: list[LayerCapture] = []
    call = reader.caller(model)

    def forward(batch: Any) -> tuple[Outputs, Tensor | None]:
        raw = call(batch)
        outputs = raw
        if not isinstance(raw, Outputs):
            outputs = Outputs(find_logits(raw, extract, required), captures[-1].features if captures else {}, raw)
        return outputs, outputs.logits if isinstance(outputs.logits, Tensor) else None

    if not isinstance(model, nn.Module):
        return _core.Model(forward)
    capture = LayerCapture(model, layers) if layers else None

    def enter(training: bool) -> Callable[[], None]:
        modes = [(module, module.training) for module in model.modules()]
        if not (training and model.training):  # parts in evaluation mode inside of a student in training mode stay so
            model.train(training)

        def restore() -> None:
            for module, mode in modes:
                module.training = mode

        return restore

    def begin_capture() -> Callable[[], None]:
        if captures:  # evaluation inside of training
            return lambda: None
        stack = ExitStack()
        captures.append(stack.enter_context(capture))
        stack.callback(captures.pop)
        return stack.close

    def tensors() -> list[tuple[str, Tensor]]:
        inner = unwrap(model)
        return [*inner.named_parameters(), *inner.named_buffers()]

    def pause() -> Callable[[], None]:
        stack = ExitStack()
        stack.enter_context(model.no_sync())
        return stack.close

    follows = student is not None and isinstance(model, EMATeacher)
    return _core.Model(
        forward,
        enter,
        None if capture is None else begin_capture,
        tensors,
        pause if student is None and hasattr(model, "no_sync") else None,
        (lambda: model.update(student)) if follows else None,
    )


def _advance(scheduler: Any) -> Callable[[float | None], None]:
    if isinstance(scheduler, ReduceLROnPlateau):
        return scheduler.step
    return lambda metric: scheduler.step()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _all_reduce_sum(values: Tensor) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    moved = values.to(device)
    dist.all_reduce(moved)
    values.copy_(moved)


def _of_first_process(values: dict[str, float]) -> dict[str, float]:
    """The first process's values in all of them, so that all agree on the best epoch."""
    if _processes() > 1:
        shared = [values]
        dist.broadcast_object_list(shared)
        return shared[0]
    return values


def _device_of(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def _describe(model: object) -> str:
    if isinstance(model, nn.Module):
        return f"{type(unwrap(model)).__name__} ({sum(p.numel() for p in model.parameters()):,} parameters)"
    return repr(model)


def _to_dict(entry: EpochMetrics | Evaluation | StepResult) -> dict[str, Any]:
    fields = {
        EpochMetrics: ("epoch", "step", "loss", "evaluation"),
        Evaluation: ("loss", "accuracy", "metrics"),
        StepResult: ("step", "loss", "terms", "shares", "grad_norm", "skipped"),
    }[type(entry)]
    values = {name: getattr(entry, name) for name in fields}
    if values.get("evaluation") is not None:
        values["evaluation"] = _to_dict(values["evaluation"])
    return values


def _to_metrics(entry: Mapping[str, Any]) -> EpochMetrics:
    evaluation = entry["evaluation"]
    return EpochMetrics(
        entry["epoch"], entry["step"], entry["loss"], None if evaluation is None else Evaluation(**evaluation)
    )
