"""A recording of one eager forward pass: every operator, its tensors and its constants."""

from rarefy._core.graph import (
    ConvBnPair,
    Cost,
    Costs,
    Graph,
    ModuleCost,
    Node,
    OperatorCost,
    Timing,
    Value,
    constant_nodes,
    conv_bn_pairs,
    count_costs,
    fold_constants,
    measure,
)
from rarefy.graph.record import record

__all__ = [
    "ConvBnPair",
    "Cost",
    "Costs",
    "Graph",
    "ModuleCost",
    "Node",
    "OperatorCost",
    "Timing",
    "Value",
    "constant_nodes",
    "conv_bn_pairs",
    "count_costs",
    "fold_constants",
    "measure",
    "record",
]
