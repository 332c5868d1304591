"""The distillation loss as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy.distillation.top_k import TopKLogits, shifted_top_k_loss


class DistillationLoss(nn.Module):
    """Compute the loss of Hinton et al. (2015, arXiv:1503.02531), soft targets and hard labels, and its family.

        alpha * T^2 * D(softmax(teacher / T), softmax(student / T)) + (1 - alpha) * cross_entropy(student, labels)

    The mean over the valid rows. T^2 keeps the size of the gradient independent of the temperature T. Loss and gradient
    are formed in one pass over the logits, through log-sum-exp.

    Args:
        temperature: T > 0. Higher values soften both distributions.
        alpha: the weight of the soft targets, in [0, 1]. With 1 no labels are needed.
        divergence: D, with p the teacher's and q the student's probabilities.

            ====================  ========================================================================
            "kl"                  KL(p || q)
            "reverse_kl"          KL(q || p)
            "jensen_shannon"      skew KL(p || m) + (1 - skew) KL(q || m), m = skew p + (1 - skew) q; skew 0
                                  means KL(p || q) and 1 KL(q || p) (generalised: arXiv:2306.13649)
            "total_variation"     sum |p - q| / 2
            "skewed_kl"           KL(p || skew p + (1 - skew) q) (arXiv:2402.03898)
            "skewed_reverse_kl"   KL(q || skew q + (1 - skew) p) (the same)
            ====================  ========================================================================

        skew: in [0, 1], and below 1 for the skewed ones.
        label_smoothing: the part of a label's mass that is spread evenly over all classes.
        ignore_index: rows with this label add nothing to either term.
        reduction: "mean" is sum(weight * loss) / sum(weight) over the valid rows, "sum" is sum(weight * loss), and "none"
            is weight * loss of each row.
        vocabulary: what to do where student and teacher do not have the same classes. "error"; "truncate" both to those
            that both have, in both terms; "pad" the shorter with -inf; "map" by `label_map`.
        label_map: for "map", int64 [student classes]: the teacher's class, or -1 where it has none.
        shift: compare position i of [..., length, classes] with the label, weight and mask of position i + 1, as causal
            language models need it. Rows of reduction "none" are then [..., length - 1].
        standardize: put z-scores of the logits, over their own classes, in their place in D (Sun et al., 2024,
            arXiv:2403.01427), and not in the cross-entropy. Logits have to be finite there.
        teacher_weights: of several teachers, relative to their sum; None: all alike.

    Shapes:
        student_logits: [..., classes], float32, float64, bfloat16 or float16. The loss is differentiable in them, once.
        teacher_logits: the same rows; a constant. Cast to the student's dtype, or both to float32 where that is a 16-bit one
            and the teacher's is another. A sequence of tensors is several teachers:
            one with the probabilities sum_k w_k softmax(teacher_k / T). TopKLogits are compared as k + 1 outcomes, with
            `top_k_distillation_loss`; `vocabulary`, `standardize` and `teacher_weights` need whole logits.
        labels: [...], int64.
        row_weights: [...], floating point, finite and >= 0, without a gradient; a row of weight 0 is not valid.
        mask: [...], bool, True where a row counts.

    Raises:
        ValueError, TypeError, IndexError: an argument breaks its rule; the message names the rule and the value.
    """

    label_map: Tensor | None

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
        vocabulary: str = "error",
        label_map: Tensor | None = None,
        shift: bool = False,
        standardize: bool = False,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.temperature = float(temperature)
        self.alpha = float(alpha)
        self.divergence = divergence
        self.skew = float(skew)
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.vocabulary = vocabulary
        self.shift = bool(shift)
        self.standardize = bool(standardize)
        self.teacher_weights = [] if teacher_weights is None else [float(weight) for weight in teacher_weights]
        self.register_buffer("label_map", label_map, persistent=False)  # moves with the module; state_dict() is empty
        _core.distillation.DistillationLossOptions(**self._options(), label_map=label_map).validate()

    def _options(self) -> dict:
        """Return the options that are not tensors, by name."""
        return {name: getattr(self, name) for name in _USUAL}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKLogits | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        row_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, in float32 (float64 for float64 logits)."""
        if isinstance(teacher_logits, TopKLogits):
            options = self._options()
            for name in _WHOLE:
                if options.pop(name) != _USUAL[name]:
                    raise ValueError(
                        f"[DistillationLoss] {name} must be {_USUAL[name]!r} for top-k logits of a teacher, "
                        f"got {getattr(self, name)!r}"
                    )
            return shifted_top_k_loss(student_logits, teacher_logits, labels, row_weights, mask, **options)
        teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
        return torch.ops.rarefy.distillation_logit_loss(
            student_logits, teachers, labels, row_weights, mask, self.label_map, **self._options()
        )

    def extra_repr(self) -> str:
        """Return temperature, alpha and the options that are not the usual ones, for the module's repr."""
        shown = [f"temperature={self.temperature:g}", f"alpha={self.alpha:g}"]
        for name, usual in _USUAL.items():
            if usual is not None and getattr(self, name) != usual:
                shown.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(shown)


#: The options that are not tensors, and their usual values; None where `extra_repr` shows the value in any case.
_USUAL = {
    "temperature": None,
    "alpha": None,
    "divergence": "kl",
    "skew": 0.5,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "vocabulary": "error",
    "shift": False,
    "standardize": False,
    "teacher_weights": [],
}

#: The options that need all of a teacher's logits.
_WHOLE = ("vocabulary", "standardize", "teacher_weights")
