"""Knowledge distillation: the loss of Hinton et al. as one fused operator, and a trainer around it."""

from rarefy._core.distillation import EpochMetrics, Evaluation, StepResult
from rarefy.distillation.clip import AffinityMimicking, ContrastiveKL, EmbeddingMSE
from rarefy.distillation.contrastive import ContrastiveRepresentation
from rarefy.distillation.features import AttentionTransfer, FeatureAdapter, HiddenCosine, Hint
from rarefy.distillation.logits import DIST, DKD, NKD, LogitMSE
from rarefy.distillation.loss import DistillationLoss
from rarefy.distillation.relations import (
    AttentionMaps,
    MiniLMRelations,
    ProbabilisticKnowledgeTransfer,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from rarefy.distillation.terms import FeatureLoss, layer_map
from rarefy.distillation.trainer import Callbacks, DistillationTrainer

__all__ = [
    "DIST",
    "DKD",
    "NKD",
    "AffinityMimicking",
    "AttentionMaps",
    "AttentionTransfer",
    "Callbacks",
    "ContrastiveKL",
    "ContrastiveRepresentation",
    "DistillationLoss",
    "DistillationTrainer",
    "EmbeddingMSE",
    "EpochMetrics",
    "Evaluation",
    "FeatureAdapter",
    "FeatureLoss",
    "HiddenCosine",
    "Hint",
    "LogitMSE",
    "MiniLMRelations",
    "ProbabilisticKnowledgeTransfer",
    "RelationalAngle",
    "RelationalDistance",
    "SimilarityPreserving",
    "StepResult",
    "layer_map",
]
