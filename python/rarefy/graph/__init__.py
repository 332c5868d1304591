"""A recording of one eager forward pass: every operator, its tensors and its constants."""

from rarefy._core.graph import Graph, Node, Timing, Value, measure
from rarefy.graph.record import record

__all__ = ["Graph", "Node", "Timing", "Value", "measure", "record"]
