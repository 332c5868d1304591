"""Pruning: weights held at zero by packed masks beside untouched parameters."""

from rarefy._core.pruning import ConstantSchedule, LeftAlone, PolynomialSchedule, PrunedTensor, PruningReport
from rarefy.pruning.magnitude import MagnitudePruner

__all__ = [
    "ConstantSchedule",
    "LeftAlone",
    "MagnitudePruner",
    "PolynomialSchedule",
    "PrunedTensor",
    "PruningReport",
]
