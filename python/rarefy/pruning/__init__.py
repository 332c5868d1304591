"""Pruning: weights held at zero by packed masks beside untouched parameters, and channels that are removed."""

import rarefy.quantization  # noqa: F401  (rarefy.nn, which the surgery knows, takes its fake quantizers from there)
from rarefy._core.pruning import (
    Channels,
    ConstantSchedule,
    Cut,
    Group,
    LeftAlone,
    Macs,
    Member,
    Parameters,
    Pinned,
    PolynomialSchedule,
    PrunedTensor,
    PruningReport,
    Structure,
    StructuredReport,
)
from rarefy.pruning import importance
from rarefy.pruning.enforce import check_masks, masked, remask, remove_masks
from rarefy.pruning.magnitude import MagnitudePruner
from rarefy.pruning.manifest import load_pruned, save_pruned
from rarefy.pruning.structured import StructuredPruner
from rarefy.pruning.surgery import Surgery

__all__ = [
    "Channels",
    "ConstantSchedule",
    "Cut",
    "Group",
    "LeftAlone",
    "Macs",
    "MagnitudePruner",
    "Member",
    "Parameters",
    "Pinned",
    "PolynomialSchedule",
    "PrunedTensor",
    "PruningReport",
    "Structure",
    "StructuredPruner",
    "StructuredReport",
    "Surgery",
    "check_masks",
    "importance",
    "load_pruned",
    "masked",
    "remask",
    "remove_masks",
    "save_pruned",
]
