"""The distillation loss of two linear heads, without their logits."""

import torch
from torch import Tensor, nn

from rarefy import _core


class LinearDistillationLoss(nn.Module):
    """Compute the distillation loss from the hidden states below two linear heads, in chunks of rows.

    The value is that of `DistillationLoss` on `student_hidden @ student_weight.T + student_bias` and the same of the
    teacher. Of these logits only a chunk exists at a time: its gradient is written over it and multiplied out at once, so
    that memory does not grow with rows times classes. The loss is differentiable, once, in the student's three tensors; the
    teacher is a constant. The module holds no parameters: the heads stay where they are.

    Args:
        temperature, alpha, divergence, skew, label_smoothing, ignore_index: as in `DistillationLoss`.
        reduction: "mean" or "sum".

    Raises:
        ValueError: an option is out of range.
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
        if reduction == "none":
            raise ValueError("[LinearDistillationLoss] reduction must be 'mean' or 'sum', got 'none'")
        self.temperature = float(temperature)
        self.alpha = float(alpha)
        self.divergence = divergence
        self.skew = float(skew)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        # The options that change logits have no place here: there are none.
        whole = {"vocabulary": "error", "shift": False, "standardize": False, "teacher_weights": [], "label_map": None}
        _core.distillation.DistillationLossOptions(**self._settings(), **whole).validate()

    def _settings(self) -> dict:
        names = ("temperature", "alpha", "divergence", "skew", "label_smoothing", "ignore_index", "reduction")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        row_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64).

        Args:
            student_hidden: [..., student size], float32, float64, bfloat16 or float16.
            student_weight: [classes, student size], of the same dtype.
            teacher_hidden: [..., teacher size], with a dtype of its own.
            teacher_weight: [classes, teacher size], of the teacher's dtype.
            labels: int64 [...]; not needed with alpha 1.
            student_bias, teacher_bias: [classes].
            row_weights: [...], finite and >= 0.
            mask: bool [...], True for the rows that count. The student's hidden states must be finite in the others too: they
                are factors of the weight's gradient, and 0 * NaN is NaN.

        Raises:
            ValueError, TypeError, IndexError: an argument breaks its rule; the message names the rule and the value.
        """
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"[LinearDistillationLoss] mask must be bool, got {mask.dtype}")
            rows = student_hidden.shape[:-1]
            for name, given in (("mask", mask), ("row_weights", row_weights)):
                if given is not None and given.shape != rows:
                    raise ValueError(
                        f"[LinearDistillationLoss] {name} must have the shape of student_hidden without its last "
                        f"dimension, {list(rows)}, got {list(given.shape)}"
                    )
            ones = torch.ones(mask.shape, device=mask.device) if row_weights is None else row_weights
            row_weights = ones.masked_fill(~mask, 0.0)
        return torch.ops.rarefy.linear_distillation_loss(
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            labels,
            row_weights,
            **self._settings(),
        )

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults, temperature and alpha always."""
        defaults = {"divergence": "kl", "skew": 0.5, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean"}
        others = [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([f"temperature={self.temperature:g}", f"alpha={self.alpha:g}", *others])
