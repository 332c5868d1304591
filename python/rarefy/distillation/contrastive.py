"""Contrastive representation distillation."""

import math

import torch
from torch import Tensor, nn


class ContrastiveRepresentation(nn.Module):
    """Compute the contrastive loss of Tian et al. (CRD, 2020, arXiv:1910.10699) with a memory of all samples.

    Both sides are embedded linearly into `features` numbers of unit length. With z the similarity of an embedding to a
    remembered one, over the temperature, N negatives and M samples, the critic is h = e^z / (e^z + N / M), and the loss

        mean over the batch of ( -log h(positive) - sum over negatives of log(1 - h(negative)) )

    of the student's embeddings against the memory of the teacher's, plus the same the other way round (which trains the
    teacher's embedding). While training, the memories then take up the batch:
    memory = normalize(momentum * memory + (1 - momentum) * embedding).

    It is an estimate by contrast with noise: never 0, also where student and teacher agree.

    Args:
        dataset_size: M; samples have places 0 to M - 1.
        student_features, teacher_features: widths of what `forward` is given, flattened.
        features: of the common space.
        negatives: N per sample, drawn uniformly from the M - 1 others by a hash of seed, step, row and column: the same on
            every device, and a run that is resumed draws what it would have drawn.
        temperature: of the similarities.
        momentum: of the memories, in [0, 1).
        variant: "code": e^z is divided by a constant, M times its mean over the first batch, as in the authors' program; or
            "paper": it is not. Then negatives at a right angle cost log(1 + M / N) each, which for many of them outweighs
            the positive: keep N small.
        seed: of the negatives and the first memories.

    Shapes:
        student, teacher: [B, ...]; index: int64 [B], the places of distinct samples.

    State:
        student_embedding and teacher_embedding (train them with the student), buffers student_memory, teacher_memory
        [M, features], log_normalizers [2] and step. Under data parallelism each process has memories of its own.
    """

    def __init__(
        self,
        dataset_size: int,
        student_features: int,
        teacher_features: int,
        *,
        features: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        variant: str = "code",
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = "ContrastiveRepresentation"
        if not 2 <= dataset_size < 2**31:
            raise ValueError(f"[{name}] dataset_size must be in [2, 2^31), got {dataset_size}")
        sizes = {
            "student_features": student_features,
            "teacher_features": teacher_features,
            "features": features,
            "negatives": negatives,
        }
        for key, size in sizes.items():
            if size < 1:
                raise ValueError(f"[{name}] {key} must be at least 1, got {size}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"[{name}] temperature must be positive and finite, got {temperature}")
        if not 0 <= momentum < 1:
            raise ValueError(f"[{name}] momentum must be in [0, 1), got {momentum}")
        if variant not in ("paper", "code"):
            raise ValueError(f"[{name}] variant must be one of 'paper', 'code', got '{variant}'")
        self.dataset_size, self.negatives = int(dataset_size), int(negatives)
        self.temperature, self.momentum = float(temperature), float(momentum)
        self.variant, self.seed = variant, int(seed)
        self.student_embedding = nn.Linear(student_features, features)
        self.teacher_embedding = nn.Linear(teacher_features, features)
        memory = torch.ops.rarefy.initial_memory
        self.register_buffer("student_memory", memory(self.dataset_size, features, self.seed, -1))
        self.register_buffer("teacher_memory", memory(self.dataset_size, features, self.seed, -2))
        self.register_buffer("log_normalizers", torch.full((2,), 0.0 if variant == "paper" else math.inf))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """Return the loss, a scalar in float32; in training mode the memories take up the batch."""
        ops = torch.ops.rarefy
        s = ops.embed_features(student, self.student_embedding.weight, self.student_embedding.bias)
        t = ops.embed_features(teacher.detach(), self.teacher_embedding.weight, self.teacher_embedding.bias)
        negatives = ops.contrastive_negatives(index, self.step, self.negatives, self.dataset_size, self.seed)
        losses, normalizers = [], []
        for i, (anchor, memory) in enumerate(((s, self.teacher_memory), (t, self.student_memory))):
            # A copy: the memory changes below, and the backward pass needs it as it was.
            loss, normalizer = ops.contrastive_loss(
                anchor,
                memory.clone(),
                index,
                negatives,
                temperature=self.temperature,
                log_normalizer=self.log_normalizers[i],
            )
            losses.append(loss)
            normalizers.append(normalizer)
        if self.training:
            with torch.no_grad():
                ops.update_memory_(self.student_memory, index, s, self.momentum)
                ops.update_memory_(self.teacher_memory, index, t, self.momentum)
                self.log_normalizers.copy_(torch.stack(normalizers))
                self.step.add_(1)
        return losses[0] + losses[1]

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"{self.dataset_size} samples, negatives={self.negatives}, temperature={self.temperature:g}"
