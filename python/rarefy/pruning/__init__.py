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
    SparseFileReport,
    SparseReport,
    SparsifyReport,
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
from rarefy.pruning.measure import measure
from rarefy.pruning.permutation import permute_for_nm
from rarefy.pruning.sparse_file import load_sparse, save_sparse, sparse_size
from rarefy.pruning.sparsify import sparsify, to_dense
from rarefy.pruning.structured import StructuredPruner
from rarefy.pruning.surgery import Surgery
from rarefy.pruning.torch_pruning import export_torch_pruning, import_torch_pruning

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
    "SparseFileReport",
    "SparseReport",
    "SparsifyReport",
    "Structure",
    "StructuredPruner",
    "StructuredReport",
    "Surgery",
    "Unstructured",
    "choose_masks",
    "erk_sparsities",
    "export_torch_pruning",
    "import_torch_pruning",
    "importance",
    "load_pruned",
    "load_sparse",
    "measure",
    "pack_mask",
    "parse_pattern",
    "permute_for_nm",
    "save_pruned",
    "save_sparse",
    "sparse_size",
    "sparsify",
    "to_dense",
    "unpack_mask",
]
