"""Pruning: weights held at zero by packed masks beside untouched parameters."""

import rarefy.quantization  # noqa: F401  (rarefy.nn, which the surgery knows, takes its fake quantizers from there)
from rarefy._core.pruning import (
    ConstantSchedule,
    Cut,
    LeftAlone,
    PolynomialSchedule,
    PrunedTensor,
    PruningReport,
)
from rarefy.pruning.magnitude import MagnitudePruner
from rarefy.pruning.manifest import load_pruned, save_pruned
from rarefy.pruning.surgery import Surgery

__all__ = [
    "ConstantSchedule",
    "Cut",
    "LeftAlone",
    "MagnitudePruner",
    "PolynomialSchedule",
    "PrunedTensor",
    "PruningReport",
    "Surgery",
    "load_pruned",
    "save_pruned",
]
