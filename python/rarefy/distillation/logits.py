"""Losses on logits beside `DistillationLoss`: the terms that learn from the teacher, without cross-entropy."""

import math

import torch
from torch import Tensor, nn


def _check(name: str, temperature: float, **weights: float) -> None:
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"[{name}] temperature must be in [1e-6, 1e6], got {temperature}")
    for key, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"[{name}] {key} must be finite and not negative, got {weight}")


class DKD(nn.Module):
    """Compute the decoupled loss of Zhao et al. (DKD, 2022, arXiv:2203.08679).

    With p and q the softmax of the teacher's and the student's logits at temperature T, y the label, and p^ and q^ the same
    over the classes other than y:

        T^2 * (alpha * KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta * KL(p^ || q^))

    T^2 is the factor of the paper's program; its cross-entropy with the labels is a term of its own. 0 where the models
    agree.

    Args:
        temperature: T > 0.
        alpha: weight of the label's class against the rest.
        beta: weight of the rest among itself.
        ignore_index: rows with this label add nothing.

    Shapes:
        student_logits, teacher_logits: [..., classes], two classes at least. labels: int64 [...]. mask: bool [...], true
        where a row counts.

    Raises:
        ValueError, TypeError, IndexError: an argument breaks its rule; the message names the rule and the value.
    """

    def __init__(
        self, temperature: float = 4.0, *, alpha: float = 1.0, beta: float = 8.0, ignore_index: int = -100
    ) -> None:
        super().__init__()
        _check("DKD", temperature, alpha=alpha, beta=beta)
        self.temperature, self.alpha, self.beta = float(temperature), float(alpha), float(beta)
        self.ignore_index = int(ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.dkd_loss(
            student_logits,
            teacher_logits,
            labels,
            mask,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}, beta={self.beta:g}"


class NKD(nn.Module):
    """Compute the normalized loss of Yang et al. (NKD, 2023, arXiv:2303.13005).

    With p and q the softmax of the teacher's and the student's logits, y the label, and p^ and q^ the softmax at temperature
    T over the classes other than y:

        -p_y log(q_y) - gamma * T^2 * sum over c of p^_c log(q^_c)

    The paper's cross-entropy with the labels is a term of its own. This is a cross-entropy too: where the models agree it is
    not 0, and its first term still pulls q_y towards 1.

    Args:
        temperature: T > 0, of the classes other than the label's.
        gamma: their weight.
        ignore_index: rows with this label add nothing.

    Shapes, raises: as `DKD`.
    """

    def __init__(self, temperature: float = 1.0, *, gamma: float = 1.5, ignore_index: int = -100) -> None:
        super().__init__()
        _check("NKD", temperature, gamma=gamma)
        self.temperature, self.gamma, self.ignore_index = float(temperature), float(gamma), int(ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.nkd_loss(
            student_logits,
            teacher_logits,
            labels,
            mask,
            temperature=self.temperature,
            gamma=self.gamma,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"temperature={self.temperature:g}, gamma={self.gamma:g}"


class DIST(nn.Module):
    """Compute how far the student's probabilities are from correlating with the teacher's.

    Huang et al., 2022, arXiv:2205.10536. With Y = softmax(logits / T) as [rows, classes] and rho Pearson's correlation:

        T^2 * (beta * mean over rows of (1 - rho of the rows) + gamma * mean over classes of (1 - rho of the columns))

    T^2 is the factor of the paper's program. A row or column whose values are all equal has no correlation: it adds 1, with
    gradient 0. 0 where the models agree, but for those.

    Args:
        temperature: T > 0.
        beta: weight of the correlation between classes (rows).
        gamma: weight of the correlation within a class (columns); needs two rows at least.
        ignore_index: rows with this label add nothing.

    Shapes, raises: as `DKD`; labels are only looked at for rows to ignore, and may be left out.
    """

    def __init__(
        self, temperature: float = 1.0, *, beta: float = 1.0, gamma: float = 1.0, ignore_index: int = -100
    ) -> None:
        super().__init__()
        _check("DIST", temperature, beta=beta, gamma=gamma)
        self.temperature, self.beta, self.gamma = float(temperature), float(beta), float(gamma)
        self.ignore_index = int(ignore_index)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.dist_loss(
            student_logits,
            teacher_logits,
            labels,
            mask,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"temperature={self.temperature:g}, beta={self.beta:g}, gamma={self.gamma:g}"


class LogitMSE(nn.Module):
    """Compute the mean over rows and classes of (s - t)^2.

    Ba and Caruana, 2014, arXiv:1312.6184, whose 1/2 ||s - t||^2 is this times classes / 2. Classes that are -inf on both
    sides add 0. 0 where the models agree.

    Args:
        ignore_index: rows with this label add nothing.

    Shapes, raises: as `DKD`; labels are only looked at for rows to ignore, and may be left out.
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = int(ignore_index)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.logit_mse_loss(
            student_logits, teacher_logits, labels, mask, ignore_index=self.ignore_index
        )
