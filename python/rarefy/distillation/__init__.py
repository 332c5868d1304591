"""Knowledge distillation: losses of logits and features as fused operators, and a trainer around them."""

from typing import TYPE_CHECKING, Any

from rarefy._core.distillation import (
    EpochMetrics,
    Evaluation,
    StepResult,
    TeacherCache,
    TeacherCacheBound,
    TeacherCacheOptions,
    TeacherCacheWriter,
)
from rarefy.distillation.cache import CachedTeacher, cache_teacher, fingerprint
from rarefy.distillation.capture import LayerCapture
from rarefy.distillation.clip import AffinityMimicking, ContrastiveKL, EmbeddingMSE
from rarefy.distillation.contrastive import ContrastiveRepresentation
from rarefy.distillation.ema import EMATeacher
from rarefy.distillation.features import AttentionTransfer, FeatureAdapter, HiddenCosine, Hint
from rarefy.distillation.linear_loss import LinearDistillationLoss
from rarefy.distillation.logits import DIST, DKD, NKD, LogitMSE
from rarefy.distillation.loss import DistillationLoss
from rarefy.distillation.on_policy import OnPolicy
from rarefy.distillation.outputs import Outputs, to_logits
from rarefy.distillation.relations import (
    AttentionMaps,
    MiniLMRelations,
    ProbabilisticKnowledgeTransfer,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from rarefy.distillation.terms import FeatureLoss, layer_map
from rarefy.distillation.top_k import TopKLogits, top_k_distillation_loss, topk_logits
from rarefy.distillation.trainer import Callbacks, DistillationTrainer, Selection

if TYPE_CHECKING:
    from rarefy.distillation.hf import DistillationTrainerMixin
    from rarefy.distillation.lightning import DistillationCallback

__all__ = [
    "DIST",
    "DKD",
    "NKD",
    "AffinityMimicking",
    "AttentionMaps",
    "AttentionTransfer",
    "CachedTeacher",
    "Callbacks",
    "ContrastiveKL",
    "ContrastiveRepresentation",
    "DistillationCallback",
    "DistillationLoss",
    "DistillationTrainer",
    "DistillationTrainerMixin",
    "EMATeacher",
    "EmbeddingMSE",
    "EpochMetrics",
    "Evaluation",
    "FeatureAdapter",
    "FeatureLoss",
    "HiddenCosine",
    "Hint",
    "LayerCapture",
    "LinearDistillationLoss",
    "LogitMSE",
    "MiniLMRelations",
    "OnPolicy",
    "Outputs",
    "ProbabilisticKnowledgeTransfer",
    "RelationalAngle",
    "RelationalDistance",
    "Selection",
    "SimilarityPreserving",
    "StepResult",
    "TeacherCache",
    "TeacherCacheBound",
    "TeacherCacheOptions",
    "TeacherCacheWriter",
    "TopKLogits",
    "cache_teacher",
    "fingerprint",
    "layer_map",
    "to_logits",
    "top_k_distillation_loss",
    "topk_logits",
]


def __getattr__(name: str) -> Any:
    """Import what needs an optional package on first use."""
    if name == "DistillationTrainerMixin":
        from rarefy.distillation.hf import DistillationTrainerMixin

        return DistillationTrainerMixin
    if name == "DistillationCallback":
        from rarefy.distillation.lightning import DistillationCallback

        return DistillationCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
