"""Knowledge distillation: the loss of Hinton et al. as one fused operator, and a trainer around it."""

from rarefy._core.distillation import EpochMetrics, Evaluation, StepResult
from rarefy.distillation.loss import DistillationLoss
from rarefy.distillation.trainer import Callbacks, DistillationTrainer

__all__ = ["Callbacks", "DistillationLoss", "DistillationTrainer", "EpochMetrics", "Evaluation", "StepResult"]
