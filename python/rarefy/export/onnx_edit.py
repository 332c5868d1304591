"""Reading and editing a graph: what the passes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def integer_limits(dtype: np.dtype) -> tuple[int, int] | None:
    """The smallest and largest integer of a type, those of 4 bits included; None of others."""
    try:
        info = ml_dtypes.iinfo(dtype)
    except ValueError:
        return None
    return int(info.min), int(info.max)


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two inputs are one value, or equal constants."""
    if a is b:
        return True
    x, y = constant(a), constant(b)
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def axis_of(node: ir.Node) -> int | None:
    """The channel axis, or None for one scale."""
    scale = node.inputs[1]
    if scale.shape is None or len(scale.shape) == 0:
        return None
    return node.attributes.get_int("axis", 1)


def same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Whether two Quantize- or DequantizeLinear use equal scales and zero points along the same axis."""
    return axis_of(a) == axis_of(b) and all(same(x, y) for x, y in zip(a.inputs[1:3], b.inputs[1:3], strict=True))


def only_consumers(value: ir.Value, op_type: str) -> bool:
    """Whether nodes of the type, one or more, read the value, and nobody else does."""
    consumers = value.consumers()
    return bool(consumers) and not value.is_graph_output() and all(node.op_type == op_type for node in consumers)


def is_dequantized(value: ir.Value) -> bool:
    """Whether a DequantizeLinear makes the value."""
    return value.producer() is not None and value.producer().op_type == "DequantizeLinear"


def nodes_of(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these types at the time of the call, so that the graph may change meanwhile."""
    for node in [node for node in graph if node.op_type in op_types]:
        if node.graph is graph:
            yield node


def bypass(node: ir.Node, replacement: ir.Value) -> None:
    """Removes a node with one output and lets its readers read `replacement`; a graph output keeps its name."""
    output = node.outputs[0]
    if output.is_graph_output():
        if replacement.is_graph_output() or replacement.producer() is None:
            return  # that value has a name of its own to keep
        name = output.name
        output.name = f"{name}_bypassed"
        replacement.name = name
        if replacement.shape is None:
            replacement.shape = output.shape
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def unique(graph: ir.Graph, name: str) -> str:
    """The name, or the first of name_2, name_3, ... that no node and no tensor has."""
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph:
        taken.add(node.name)
        taken.update(value.name for value in node.outputs)
    base, count = name, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of the graph."""
    name = unique(graph, name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def add_node(
    anchor: ir.Node,
    before: bool,
    op_type: str,
    inputs: list[ir.Value],
    like: ir.Value,
    dtype: ir.DataType,
    name: str,
    attributes: Mapping[str, object] | None = None,
) -> ir.Value:
    """Inserts a node next to `anchor`; its output has the shape of `like`."""
    name = unique(anchor.graph, name)
    node = ir.node(op_type, inputs, dict(attributes or {}), name=name)
    value = node.outputs[0]
    value.name, value.shape, value.type = name, like.shape, ir.TensorType(dtype)
    (anchor.prepend if before else anchor.append)(node)
    return value


def remove_unused(graph: ir.Graph) -> None:
    """Removes nodes and initializers that nothing reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
