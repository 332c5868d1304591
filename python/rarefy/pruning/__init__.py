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
    SparseFileReport,
    SparseReport,
    SparsifyReport,
    Structure,
    StructuredReport,
)
from rarefy.pruning import importance
from rarefy.pruning.magnitude import MagnitudePruner
from rarefy.pruning.manifest import load_pruned, save_pruned
from rarefy.pruning.measure import measure
from rarefy.pruning.sparse_file import load_sparse, save_sparse, sparse_size
from rarefy.pruning.sparsify import sparsify, to_dense
from rarefy.pruning.structured import StructuredPruner
from rarefy.pruning.surgery import Surgery
from rarefy.pruning.torch_pruning import export_torch_pruning, import_torch_pruning

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
    "SparseFileReport",
    "SparseReport",
    "SparsifyReport",
    "Structure",
    "StructuredPruner",
    "StructuredReport",
    "Surgery",
    "export_torch_pruning",
    "import_torch_pruning",
    "importance",
    "load_pruned",
    "load_sparse",
    "measure",
    "save_pruned",
    "save_sparse",
    "sparse_size",
    "sparsify",
    "to_dense",
]
