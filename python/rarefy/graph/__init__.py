"""A recording of one eager forward pass: every operator, its tensors and its constants."""

from rarefy._core.graph import Graph, Node, Value
from rarefy.graph.record import record

__all__ = ["Graph", "Node", "Value", "record"]
