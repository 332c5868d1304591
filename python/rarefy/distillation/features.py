"""Losses between one layer of the student and one of the teacher, as modules over the operators of rarefy."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy


class FeatureAdapter(LazyModuleMixin, nn.Module):
    """Map the student's features to the teacher's number of them, by a learned linear map along the features' axis.

    A linear layer on [..., features], a 1x1 convolution on [batch, features, height, width]. Parameters: `weight`
    [teacher_features, student_features] and `bias` [teacher_features], uniform in +-1 / sqrt(student_features).

    Args:
        student_features, teacher_features: the sizes. Without them the parameters get their shape at the first call or
            from a loaded state; make that call before the optimizer, as with torch's lazy modules.
        axis: where the features are; None: 1 for four dimensions, else the last.

    Raises:
        ValueError: only one size is given, a size is below 1, or the input has another number of features.
    """

    cls_to_become = None

    def __init__(
        self, student_features: int | None = None, teacher_features: int | None = None, *, axis: int | None = None
    ) -> None:
        super().__init__()
        sizes = {"student_features": student_features, "teacher_features": teacher_features}
        given = [name for name, size in sizes.items() if size is not None]
        if len(given) == 1:
            raise ValueError(
                f"[FeatureAdapter] student_features and teacher_features must be given together, got only {given[0]}"
            )
        for name in given:
            if sizes[name] < 1:
                raise ValueError(f"[FeatureAdapter] {name} must be at least 1, got {sizes[name]}")
        self.axis = axis
        self.weight = UninitializedParameter()
        self.bias = UninitializedParameter()
        if given:
            self._materialize(student_features, teacher_features)

    def forward(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Return the student's features in the teacher's number. `teacher` is looked at for its size only."""
        return torch.ops.rarefy.adapt_features(student, self.weight, self.bias, axis=self.axis)

    def initialize_parameters(self, student: Tensor, teacher: Tensor | None = None) -> None:
        """Take the sizes of the first call, and its device; float64 where the features are."""
        if not self.has_uninitialized_params():
            return
        if teacher is None:
            raise ValueError("[FeatureAdapter] teacher must be given at the first call, for its size, got none")
        if student.ndim < 2 or teacher.ndim != student.ndim:
            raise ValueError(
                "[FeatureAdapter] student and teacher must have as many dimensions, 2 or more, got shapes "
                f"{list(student.shape)} and {list(teacher.shape)}"
            )
        axis = self.axis if self.axis is not None else 1 if student.ndim == 4 else -1
        self.to(student.device)
        if student.dtype == torch.float64:
            self.to(torch.float64)
        self._materialize(student.shape[axis], teacher.shape[axis])

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        if not self.has_uninitialized_params():
            bound = 1 / math.sqrt(self.weight.shape[1])
            with torch.no_grad():
                self.weight.uniform_(-bound, bound)
                self.bias.uniform_(-bound, bound)

    def _materialize(self, student_features: int, teacher_features: int) -> None:
        self.weight.materialize((teacher_features, student_features))
        self.bias.materialize((teacher_features,))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the sizes for the module's repr."""
        if is_lazy(self.weight):
            return "sizes of the first call"
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Hint(nn.Module):
    """Compute the distance of the student's features, behind a learned adapter, from the teacher's.

    FitNets: Romero et al., 2015, arXiv:1412.6550. With s the adapted features and t the teacher's:

        "mse"        mean of (s - t)^2 over positions and features
        "smooth_l1"  mean of d^2 / 2 where |d| = |s - t| < 1, of |d| - 1/2 elsewhere
        "cosine"     mean of 1 - <s, t> / (||s|| ||t||) over positions

    Args:
        student_features, teacher_features, axis: of the `FeatureAdapter`, which is `adapter`.
        loss: "mse", "smooth_l1" or "cosine".

    Shapes:
        student, teacher: [batch, ..., features], or [batch, features, height, width], equal but for the features.
        mask: bool, the shape without features; true where a position counts. What is masked may hold anything.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names the rule and the value.
    """

    def __init__(
        self,
        student_features: int | None = None,
        teacher_features: int | None = None,
        *,
        loss: str = "mse",
        axis: int | None = None,
    ) -> None:
        super().__init__()
        if loss not in ("mse", "smooth_l1", "cosine"):
            raise ValueError(f"[Hint] loss must be one of 'mse', 'smooth_l1', 'cosine', got '{loss}'")
        self.loss = loss
        self.axis = axis
        self.adapter = FeatureAdapter(student_features, teacher_features, axis=axis)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        if mask is not None:  # what is masked must not reach the adapter: 0 times NaN would be in its gradient
            student = torch.ops.rarefy.clear_masked(student, mask, axis=self.axis)
        return torch.ops.rarefy.hint_loss(self.adapter(student, teacher), teacher, mask, loss=self.loss, axis=self.axis)

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"loss={self.loss}"


class HiddenCosine(nn.Module):
    """Compute the mean of 1 - <s, t> / (||s|| ||t||) over positions that count.

    DistilBERT: Sanh et al., 2019, arXiv:1910.01108. A zero vector has cosine 0 to everything, with gradient 0. For models
    of different widths see `Hint` with ``loss="cosine"``.

    Shapes:
        student, teacher: [batch, ..., features] of one shape.
        mask: bool [batch, ...], true where a position counts.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.hint_loss(student, teacher, mask, loss="cosine")


class AttentionTransfer(nn.Module):
    """Compute the distance of attention maps of convolutional features or tokens.

    Zagoruyko and Komodakis, 2017, arXiv:1612.03928. With Q = vec(sum over features of |x|^power) and q = Q / ||Q||_2:

        "paper"  mean over the batch of ||q_s - q_t||_2        (sum over layers and factor beta / 2 are weights of terms)
        "code"   mean over batch and positions of (q_s - q_t)^2             (as the authors' program, with power 2)

    Args:
        variant: "paper" or "code".
        power: p >= 1.
        axis: where the features are; None: 1 for four dimensions, else the last.

    Shapes:
        student, teacher: [batch, features, height, width] or [batch, positions, features]; positions must be equal.
        mask: bool, the shape without features.
    """

    def __init__(self, variant: str = "paper", *, power: float = 2.0, axis: int | None = None) -> None:
        super().__init__()
        if variant not in ("paper", "code"):
            raise ValueError(f"[AttentionTransfer] variant must be one of 'paper', 'code', got '{variant}'")
        if not 1 <= power < math.inf:
            raise ValueError(f"[AttentionTransfer] power must be at least 1, got {power}")
        self.variant = variant
        self.power = float(power)
        self.axis = axis

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.attention_transfer_loss(
            student, teacher, mask, variant=self.variant, power=self.power, axis=self.axis
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"variant={self.variant}, power={self.power:g}"
