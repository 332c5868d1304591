"""The distillation loss as a module."""

import torch
from torch import Tensor, nn

from rarefy import _core


class DistillationLoss(nn.Module):
    """Compute the loss of Hinton et al. (2015, arXiv:1503.02531): soft targets and hard labels.

        alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross_entropy(student, labels)

    The mean over the valid rows. T^2 keeps the size of the gradient independent of the temperature T. Loss and gradient
    are formed in one pass over the logits, through log-sum-exp.

    Args:
        temperature: T > 0. Higher values soften both distributions.
        alpha: the weight of the soft targets, in [0, 1]. With 1 no labels are needed.
        ignore_index: rows with this label add nothing to either term.

    Shapes:
        student_logits: [..., classes], float32, float64, bfloat16 or float16. The loss is differentiable in them, once.
        teacher_logits: the same shape and dtype; a constant.
        labels: [...], int64.

    Raises:
        ValueError, TypeError, IndexError: an argument breaks its rule; the message names the rule and the value.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        *,
        divergence: str = "kl",
        skew: float = 0.5,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = float(temperature)
        self.alpha = float(alpha)
        self.divergence = divergence
        self.skew = float(skew)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        _core.distillation.DistillationLossOptions(**self._settings()).validate()

    def _settings(self) -> dict:
        """Return the options that the operator takes, by name."""
        names = ("temperature", "alpha", "divergence", "skew", "label_smoothing", "ignore_index", "reduction")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.distillation_loss(
            student_logits, teacher_logits, labels, row_weights, **self._settings()
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}{ignored}"
