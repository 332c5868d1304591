"""Pruning: weights held at zero by packed masks beside untouched parameters, and channels that are removed."""

from rarefy._core.pruning import (
    Channels,
    ConstantSchedule,
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
)
from rarefy.pruning import importance
from rarefy.pruning.magnitude import MagnitudePruner

__all__ = [
    "Channels",
    "ConstantSchedule",
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
    "importance",
]
