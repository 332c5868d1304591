"""Pruning: weights held at zero by packed masks beside untouched parameters, and channels that are removed."""

import rarefy.quantization  # noqa: F401  (rarefy.nn, which the surgery knows, takes its fake quantizers from there)
from rarefy._core.pruning import (
    NM,
    Block,
    Channels,
    Column,
    ConstantSchedule,
    Cut,
    Filter,
    Group,
    Head,
    LeftAlone,
    Macs,
    Member,
    Parameters,
    PermutationReport,
    Pinned,
    PolynomialSchedule,
    PrunedTensor,
    PruningReport,
    Row,
    Structure,
    StructuredReport,
    Unstructured,
    erk_sparsities,
    parse_pattern,
)
from rarefy.pruning import importance
from rarefy.pruning.magnitude import MagnitudePruner
from rarefy.pruning.manifest import load_pruned, save_pruned
from rarefy.pruning.masks import choose_masks, pack_mask, unpack_mask
from rarefy.pruning.permutation import permute_for_nm
from rarefy.pruning.structured import StructuredPruner
from rarefy.pruning.surgery import Surgery

__all__ = [
    "NM",
    "Block",
    "Channels",
    "Column",
    "ConstantSchedule",
    "Cut",
    "Filter",
    "Group",
    "Head",
    "LeftAlone",
    "Macs",
    "MagnitudePruner",
    "Member",
    "Parameters",
    "PermutationReport",
    "Pinned",
    "PolynomialSchedule",
    "PrunedTensor",
    "PruningReport",
    "Row",
    "Structure",
    "StructuredPruner",
    "StructuredReport",
    "Surgery",
    "Unstructured",
    "choose_masks",
    "erk_sparsities",
    "importance",
    "load_pruned",
    "pack_mask",
    "parse_pattern",
    "permute_for_nm",
    "save_pruned",
    "unpack_mask",
]
