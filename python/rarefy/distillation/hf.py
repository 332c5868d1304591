"""Distillation inside of Hugging Face's Trainer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distillation import objective as objectives
from rarefy.distillation.inputs import named_inputs
from rarefy.distillation.modes import evaluating
from rarefy.distillation.outputs import Outputs
from rarefy.distillation.trainer_terms import Objective

try:
    import accelerate  # noqa: F401  (transformers' Trainer needs it, and imports without it)
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(f"[DistillationTrainerMixin] needs {error.name}: pip install rarefy[integrations]") from error

_TERMS_FILE = "distillation_terms.pt"


class DistillationTrainerMixin:
    """Add a teacher to a ``transformers.Trainer``: the Trainer's loss becomes one of student and teacher.

        class DistillationTrainer(DistillationTrainerMixin, transformers.Trainer): ...

        trainer = DistillationTrainer(
            model=student, args=args, train_dataset=data, teacher=teacher, loss_fn=rf.distillation.DistillationLoss(4.0, 0.5)
        )

    The student gets its inputs without the labels, so that it computes no loss of its own, and the same inputs go to the
    teacher, which runs in evaluation mode, without gradients, on the Trainer's device and under its autocast. Inputs that
    a model's forward does not name are left out. Where an encoder-decoder needs them, ``decoder_input_ids`` are made of
    the labels. Everything else is the Trainer's: evaluation, ``compute_metrics``, checkpoints, processes.

    The loss of a batch is a mean over its valid rows (labels other than -100, the first position not counting where
    ``loss_fn.shift``). With gradient accumulation each batch weighs as much as it has valid rows, so that 1 x 32, 4 x 8 and
    32 x 1 give equal gradients; batches without labels weigh the same.

    Args:
        teacher: a module that takes the student's inputs; it is moved to the Trainer's device.
        loss_fn: a `DistillationLoss`, or any callable (student_logits, teacher_logits, labels) that returns the mean over
            the valid rows.
        objective: instead of `loss_fn`, terms by name: a callable (student: Outputs, teacher: Outputs, batch), or (weight,
            callable). The outputs of layers that a term names in its attributes ``student_layers`` and ``teacher_layers``
            are in ``Outputs.features``. Parameters of terms (adapters) are trained with the student and saved in
            checkpoints, in one process; ``max_grad_norm`` measures the student's gradients alone. The mean of each weighted
            term is in the log, as ``loss/<name>``.
        student_logits, teacher_logits: functions that find the logits in what a model returned; see `to_logits`.

    Labels are ``inputs["labels"]``. Smoothing of labels is the loss's (``DistillationLoss(label_smoothing=)``).

    Raises:
        ValueError: both or none of `loss_fn` and `objective`; ``args.label_smoothing_factor`` without the same
            smoothing in `loss_fn`; ``compute_loss_func``; a loss that is no mean; terms with parameters in several processes.
        ImportError: on import of the module, without transformers and accelerate.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        loss_fn: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
        objective: Mapping[str, Any] | None = None,
        student_logits: Callable[[Any], Tensor] | None = None,
        teacher_logits: Callable[[Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if (loss_fn is None) == (objective is None):
            given = "none" if loss_fn is None else "both"
            raise ValueError(
                f"[DistillationTrainerMixin] one of loss_fn and objective must be given, got {given} of them"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "[DistillationTrainerMixin] the loss is loss_fn or objective, got a compute_loss_func as well"
            )
        chosen = Objective(loss_fn if objective is None else objective, owner="DistillationTrainerMixin")
        terms = None if objective is None else chosen.terms
        super().__init__(*args, **kwargs)
        smoothing, own = self.args.label_smoothing_factor, getattr(loss_fn, "label_smoothing", 0.0)
        if smoothing not in (0.0, own):
            raise ValueError(
                "[DistillationTrainerMixin] labels must be smoothed by the loss, DistillationLoss(label_smoothing=...), got "
                f"label_smoothing_factor={smoothing} in the arguments and {own} in the loss"
            )
        self.label_smoother = None
        self.loss_fn = loss_fn
        self.terms = terms
        self.teacher = teacher.to(self.args.device) if _is_movable(teacher) else teacher
        self._logits_of = (student_logits, teacher_logits)
        self._term_modules = {
            name: term.to(self.args.device) for name, (_, term) in (terms or {}).items() if isinstance(term, nn.Module)
        }
        self._term_sums: dict[str, Tensor] = {}
        self._term_counts = 0
        if self.args.world_size > 1 and self._term_parameters():
            raise ValueError(
                "[DistillationTrainerMixin] terms with parameters are trained in one process, got "
                f"{self.args.world_size}: make the adapters modules of the student"
            )
        if self._term_parameters():
            self.add_callback(_ZeroGradients(self._term_parameters()))
        # Not called: it tells the Trainer to count the labels of all batches of a step, and not to scale the loss itself.
        self.compute_loss_func = self._no_loss_func
        self._objective = chosen
        self._loss_shifts_labels = chosen.shift  # the Trainer counts labels by it
        self._functions = {
            name: (weight, function)
            for name, weight, function, _ in chosen.core_terms(lambda batch: batch.get("labels"))
        }

    @staticmethod
    def _no_loss_func(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("[DistillationTrainerMixin] compute_loss must not be overridden by another mixin's")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of student and teacher, scaled for gradient accumulation, and the student's outputs if asked."""
        labels = inputs.get("labels")
        batch = named_inputs(model, inputs, "labels")
        terms = self.terms or {}
        student = objectives.run(
            model,
            objectives.accepted(model, batch),
            objectives.layers_of(terms, "student"),
            self._logits_of[0],
            required=self._objective.needs_logits(),
        )
        with torch.no_grad(), self.accelerator.autocast(), evaluating(self.teacher):
            teacher = objectives.run(
                self.teacher,
                objectives.accepted(self.teacher, batch),
                objectives.layers_of(terms, "teacher"),
                self._logits_of[1],
                required=self._objective.needs_logits(),
            )
        valid = None if labels is None else self._count_valid(labels)
        if valid == 0:
            loss = student.logits.sum() * 0.0  # a mean over no rows; zero gradients, in every process
        elif self.terms is None:
            loss = self.loss_fn(student.logits, teacher.logits, labels)
        else:
            loss = self._weighted(student, teacher, inputs)
        loss = loss * self._scale(model, valid, num_items_in_batch)
        return (loss, _as_trainer_expects(student)) if return_outputs else loss

    def _weighted(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> Tensor:
        total = None
        for name, (weight, function) in self._functions.items():
            value = weight * function(student, teacher, batch)
            total = value if total is None else total + value
            if torch.is_grad_enabled():  # training
                self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach().float()
        self._term_counts += torch.is_grad_enabled()
        return total

    def _count_valid(self, labels: Tensor) -> int:
        if self._objective.shift:
            labels = labels[..., 1:]
        return int((labels != self._objective.ignore_index).sum())

    def _scale(self, model: nn.Module, valid: int | None, items: Tensor | int | None) -> Tensor | float:
        """What the mean over a batch's valid rows is multiplied by: its share in the rows of the whole step."""
        if valid is None or items is None:
            return 1.0 / getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1.0
        if isinstance(items, Tensor) and items.dim() > 0:  # DataParallel: one copy per device
            items = items.flatten()[0]
        if not self.args.average_tokens_across_devices:
            return valid / (items * max(1, self.args.n_gpu))
        replicas = self.accelerator.num_processes // max(1, getattr(self, "get_tp_size", lambda: 1)())
        return valid * replicas / items

    def _term_parameters(self) -> list[nn.Parameter]:
        return [p for module in self._term_modules.values() for p in module.parameters() if p.requires_grad]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer and add the parameters of terms to it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        added = [p for p in self._term_parameters() if id(p) not in known]
        if added:
            optimizer.add_param_group({"params": added})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of each term since the last log."""
        if "loss" in logs and self._term_counts > 0:
            for name, total in self._term_sums.items():
                logs[f"loss/{name}"] = (total / self._term_counts).item()
            self._term_sums, self._term_counts = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._term_parameters() and self.args.should_save:
            state = {name: module.state_dict() for name, module in self._term_modules.items()}
            path = Path(output_dir, _TERMS_FILE)
            temporary = path.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._term_parameters():
            state = torch.load(Path(checkpoint, _TERMS_FILE), map_location=self.args.device, weights_only=True)
            for name, module in self._term_modules.items():
                module.load_state_dict(state[name])


class _ZeroGradients(TrainerCallback):
    """Zero the gradients of terms before each step: the Trainer zeroes those of its model alone."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _is_movable(teacher: nn.Module) -> bool:
    """Whether `to` may be called: not for models that accelerate or a quantizer has placed."""
    return not getattr(teacher, "hf_device_map", None) and not getattr(teacher, "is_quantized", False)


def _as_trainer_expects(student: Outputs) -> Any:
    """Outputs whose first element, unless they are a dict, is a loss: evaluation leaves it out."""
    if isinstance(student.raw, Mapping):
        return student.raw
    return {"logits": student.logits} if isinstance(student.raw, Tensor) else (None, *student.raw)
