"""Losses on how the samples of a batch, or the tokens of a sequence, stand to one another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SimilarityPreserving(nn.Module):
    """Compute 1 / B^2 * ||G_t - G_s||_F^2 with G = A A^T, its rows divided by their 2-norms.

    Tung and Mori, 2019, arXiv:1907.09682. A is [B, everything else]; student and teacher may differ in that. Does not change
    when either side is multiplied by a number or rotated.

    Shapes:
        student, teacher: [B, ...], B >= 2.
        mask: bool [B, N] for features [B, N, ...]; what is masked becomes 0 on both sides.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.similarity_preserving_loss(student, teacher, mask)


class RelationalDistance(nn.Module):
    """Compute the mean over pairs of samples of huber(psi_t, psi_s), psi the distance over the mean distance (RKD-D).

    Park et al., 2019, arXiv:1904.05068 (which sums over pairs). Does not change when either side is moved, rotated or
    multiplied by a positive number. Where two samples of the student coincide, the gradient of their distance is 0.

    Shapes:
        student, teacher: [B, ...], B >= 2.
        mask: bool [B, N] for features [B, N, ...]; what is masked becomes 0 on both sides.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.relational_distance_loss(student, teacher, mask)


class RelationalAngle(nn.Module):
    """Compute the mean over triples of samples of huber(psi_t, psi_s), psi the cosine of the angle they form (RKD-A).

    Park et al., 2019, arXiv:1904.05068 (which sums over triples). Does not change when either side is moved, rotated or
    multiplied by a number. Takes memory for B^3 values and for B^2 feature vectors.

    Shapes:
        student, teacher: [B, ...], B >= 3.
        mask: bool [B, N] for features [B, N, ...]; what is masked becomes 0 on both sides.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.relational_angle_loss(student, teacher, mask)


class ProbabilisticKnowledgeTransfer(nn.Module):
    """Compute the mean over samples i of KL(p_t(. | i) || p_s(. | i)) of neighbours by cosine similarity (PKT).

    Passalis and Tefas, 2018, arXiv:1803.10837 (which sums over i): p(j | i) = K(x_i, x_j) / sum over k != i of K(x_i, x_k) with
    K(a, b) = (cos(a, b) + 1) / 2, not below 1e-7. Does not change when a sample is multiplied by a positive number or all
    are rotated.

    Shapes:
        student, teacher: [B, ...], B >= 2.
        mask: bool [B, N] for features [B, N, ...]; what is masked becomes 0 on both sides.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        return torch.ops.rarefy.probabilistic_transfer_loss(student, teacher, mask)


class MiniLMRelations(nn.Module):
    """Compute the divergence of self-attention relations among queries, keys and values (MiniLMv2).

    Wang et al., 2021, arXiv:2012.15828. Each of the three, [B, N, D], is split into `relation_heads` parts x_a of width
    d = D / relation_heads, and with R_a = softmax(x_a x_a^T / sqrt(d)):

        sum over q, k, v of weight * mean over batch, heads and tokens of KL(R_a of the teacher || R_a of the student)

    Args:
        relation_heads: a divisor of both widths; the models' own numbers of heads do not matter.
        weights: of query, key and value; a weight of 0 leaves that one out.

    Shapes:
        student, teacher: three tensors each, [B, N, width].
        mask: bool [B, N], true where a token is not padding; padding is neither attended to nor counted.
    """

    def __init__(self, relation_heads: int = 12, *, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        if relation_heads < 1:
            raise ValueError(f"[MiniLMRelations] relation_heads must be at least 1, got {relation_heads}")
        weights = tuple(float(w) for w in weights)
        if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or not any(weights):
            raise ValueError(
                "[MiniLMRelations] weights must be three finite numbers >= 0 (query, key, value), not all 0, "
                f"got {weights}"
            )
        self.relation_heads = int(relation_heads)
        self.weights = weights

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 features)."""
        for name, side in (("student", student), ("teacher", teacher)):
            if isinstance(side, Tensor) or len(side) != 3:
                got = "one tensor" if isinstance(side, Tensor) else f"{len(side)} tensors"
                raise ValueError(f"[MiniLMRelations] {name} must be query, key and value, got {got}")
        return sum(
            weight * torch.ops.rarefy.attention_relation_loss(s, t, mask, self.relation_heads)
            for weight, s, t in zip(self.weights, student, teacher, strict=True)
            if weight > 0
        )

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"relation_heads={self.relation_heads}"


class AttentionMaps(nn.Module):
    """Compute the distance of attention maps of equal shape.

        "mse"  mean over batch, heads and pairs of tokens of (s - t)^2 (TinyBERT: Jiao et al., 2020, arXiv:1909.10351,
               which takes the scores before softmax)
        "kl"   mean over batch, heads and tokens of KL(teacher's row || student's row) (MiniLM: Wang et al., 2020,
               arXiv:2002.10957)

    Args:
        loss: "mse" or "kl".
        scores: the maps are from before softmax, which "kl" then applies; else they are probabilities.

    Shapes:
        student, teacher: [B, heads, N, N].
        mask: bool [B, N], true where a token is not padding.
    """

    def __init__(self, loss: str = "mse", *, scores: bool = False) -> None:
        super().__init__()
        if loss not in ("mse", "kl"):
            raise ValueError(f"[AttentionMaps] loss must be one of 'mse', 'kl', got '{loss}'")
        self.loss = loss
        self.scores = bool(scores)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 maps)."""
        return torch.ops.rarefy.attention_map_loss(student, teacher, mask, loss=self.loss, scores=self.scores)

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"loss={self.loss}, scores={self.scores}"
