"""Losses for pairs of towers: images and texts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rarefy.distillation.features import FeatureAdapter


class ContrastiveKL(nn.Module):
    """Compute the divergence of the contrastive distributions, images to texts and texts to images.

    CLIP-KD: Yang et al., 2024, arXiv:2307.12732. With p the teacher's and q the student's softmax at temperature T:

        T^2 * (mean over images of KL(p(. | image) || q(. | image)) + mean over texts of KL(p(. | text) || q(. | text)))

    Args:
        temperature: T > 0, on top of the scale that the logits hold already; the paper has 1.

    Shapes:
        student_logits, teacher_logits: [images, texts], similarities times the model's scale (`logits_per_image`).
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"[ContrastiveKL] temperature must be in [1e-6, 1e6], got {temperature}")
        self.temperature = float(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits)."""
        return torch.ops.rarefy.contrastive_kl_loss(student_logits, teacher_logits, temperature=self.temperature)

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"temperature={self.temperature:g}"


class AffinityMimicking(nn.Module):
    """Compute `ContrastiveKL` of the affinities scale * cos(image_i, text_j) of both models (TinyCLIP).

    Wu et al., 2023, arXiv:2309.12314. The paper's cross-entropy is this plus the entropy of the teacher's distributions, a
    constant: the gradients are the same, and this is 0 where the models agree.

    Args:
        student_scale, teacher_scale: 1 over each model's temperature, where the call gives none.

    Shapes:
        student, teacher: (image, text) each, [batch, width]; the teacher's width may differ.
        student_scale, teacher_scale: numbers or scalar tensors, such as ``model.logit_scale.exp()``. The loss is
            differentiable in the student's.
    """

    def __init__(self, student_scale: float = 1 / 0.07, teacher_scale: float = 1 / 0.07) -> None:
        super().__init__()
        for name, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
            if not 0 < scale < math.inf:
                raise ValueError(f"[AffinityMimicking] {name} must be positive and finite, got {scale}")
        self.student_scale = float(student_scale)
        self.teacher_scale = float(teacher_scale)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        *,
        student_scale: Tensor | float | None = None,
        teacher_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 embeddings)."""
        for name, side in (("student", student), ("teacher", teacher)):
            if isinstance(side, Tensor) or len(side) != 2:
                got = "one tensor" if isinstance(side, Tensor) else f"{len(side)} tensors"
                raise ValueError(f"[AffinityMimicking] {name} must be image and text embeddings, got {got}")
        scales = []
        for called, option in ((student_scale, self.student_scale), (teacher_scale, self.teacher_scale)):
            scale = option if called is None else called
            scales.append(scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64))
        return torch.ops.rarefy.affinity_mimicking_loss(*student, *teacher, *scales)

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"student_scale={self.student_scale:g}, teacher_scale={self.teacher_scale:g}"


class EmbeddingMSE(nn.Module):
    """Compute the mean over the batch of ||s - t||_2^2 of embeddings, divided by their norms first if `normalize`.

    Feature distillation of CLIP-KD: Yang et al., 2024, arXiv:2307.12732. A mean over elements is this divided by the width.

    Args:
        student_features, teacher_features: of a learned `FeatureAdapter` (`adapter`); None: none, the widths are equal.
        normalize: divide both sides by their norms.

    Shapes:
        student, teacher: [batch, width].
    """

    def __init__(
        self, student_features: int | None = None, teacher_features: int | None = None, *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalize = bool(normalize)
        self.adapter = None
        if student_features is not None or teacher_features is not None:
            self.adapter = FeatureAdapter(student_features, teacher_features, axis=-1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 embeddings)."""
        adapted = student if self.adapter is None else self.adapter(student)
        return torch.ops.rarefy.embedding_mse_loss(adapted, teacher, normalize=self.normalize)

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"normalize={self.normalize}"
