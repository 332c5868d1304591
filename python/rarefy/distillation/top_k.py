"""The k largest logits of a teacher, with what is left in one number."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rarefy._core import distillation as _core


@dataclass(frozen=True, eq=False)
class TopKLogits:
    """Hold what is kept of a teacher's logits: the k largest and one number for all others.

    Together they are the logits of k + 1 outcomes, "class indices[j]" and "any other class", at one temperature T.

    Attributes:
        values: [..., k], the teacher's logits, largest first.
        indices: int64 [..., k], their classes, each one once in a row. (The losses check that on the CPU; a GPU's values are
            not read for it.)
        tail: [...], T * logsumexp of the other logits / T; -inf where there are none.
        temperature: T > 0. `tail` holds for this one only.
        classes: how many the teacher has; 0 when that is not known.
    """

    values: Tensor
    indices: Tensor
    tail: Tensor
    temperature: float
    classes: int = 0

    @property
    def k(self) -> int:
        """Return the number of logits kept in each row."""
        return self.values.shape[-1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TopKLogits":
        """Return the same on another device."""
        return replace(
            self,
            values=self.values.to(device, non_blocking=non_blocking),
            indices=self.indices.to(device, non_blocking=non_blocking),
            tail=self.tail.to(device, non_blocking=non_blocking),
        )

    def __repr__(self) -> str:
        """Return shape, k and temperature."""
        of = f" of {self.classes}" if self.classes else ""
        return (
            f"TopKLogits({list(self.values.shape[:-1])} rows, k={self.k}{of} classes, "
            f"temperature={self.temperature:g}, {str(self.values.dtype).removeprefix('torch.')}, {self.values.device})"
        )


def topk_logits(logits: Tensor, k: int, temperature: float = 4.0) -> TopKLogits:
    """Return the k largest of logits [..., classes] and the tail of the others at a temperature. Not differentiable.

    Raises:
        ValueError: k is not in [1, classes], or the temperature is not positive.
    """
    return TopKLogits(*_core.topk_logits(logits, k, temperature))


def top_k_distillation_loss(
    student_logits: Tensor,
    teacher: TopKLogits,
    labels: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    temperature: float,
    alpha: float,
    divergence: str = "kl",
    skew: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the distillation loss where of the teacher the k largest logits and the tail are known.

        alpha * T^2 * D(p, q) + (1 - alpha) * cross_entropy(student, labels)

    with p and q over k + 1 outcomes, "class indices[j]" and "any other class", and the cross-entropy over all classes. With
    k = classes it is the loss on the full logits. Differentiable once, in `student_logits`.

    Raises:
        ValueError, TypeError, IndexError: the teacher is of another temperature or other classes, or an argument breaks the
            rules of `DistillationLoss`.
    """
    if teacher.temperature != temperature:
        raise ValueError(
            f"[top_k_distillation_loss] the teacher's tail must be of the loss's temperature {temperature:g}, "
            f"got {teacher.temperature:g}"
        )
    if teacher.classes and student_logits.shape[-1] != teacher.classes:
        raise ValueError(
            f"[top_k_distillation_loss] student_logits must have the teacher's {teacher.classes} classes, "
            f"got {list(student_logits.shape)}"
        )
    return torch.ops.rarefy.top_k_distillation_loss(
        student_logits,
        teacher.values,
        teacher.indices,
        teacher.tail,
        labels,
        row_weights,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
        skew=skew,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def shifted_top_k_loss(
    student_logits: Tensor,
    teacher: TopKLogits,
    labels: Tensor | None,
    row_weights: Tensor | None,
    mask: Tensor | None,
    *,
    shift: bool,
    **settings: Any,
) -> Tensor:
    """Return `top_k_distillation_loss` with a mask, and with `shift` of position i and the label, weight and mask of i + 1."""
    rows = student_logits.shape[:-1]
    for name, given in (("row_weights", row_weights), ("mask", mask)):
        if given is not None and given.shape != rows:
            raise ValueError(
                f"[DistillationLoss] {name} must have the logits' shape without classes, {list(rows)}, "
                f"got {list(given.shape)}"
            )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"[DistillationLoss] mask must be bool, got {mask.dtype}")
        weights = torch.ones(mask.shape, device=mask.device) if row_weights is None else row_weights
        row_weights = weights.masked_fill(~mask, 0.0)
    if shift:
        if student_logits.dim() < 2:
            raise ValueError(
                "[DistillationLoss] logits must have shape [..., length, classes] for shift, "
                f"got {list(student_logits.shape)}"
            )
        student_logits = student_logits[..., :-1, :]
        teacher = replace(
            teacher,
            values=teacher.values[..., :-1, :],
            indices=teacher.indices[..., :-1, :],
            tail=teacher.tail[..., :-1],
        )
        labels = None if labels is None else labels[..., 1:]
        row_weights = None if row_weights is None else row_weights[..., 1:]
    return top_k_distillation_loss(student_logits, teacher, labels, row_weights=row_weights, **settings)
