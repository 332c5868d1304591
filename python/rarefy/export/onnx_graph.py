"""Rewrites of an exported graph, so that ONNX Runtime's x86 kernels find the patterns that they run in integers.

Each pass keeps the function that the graph computes: bit for bit, or, where it says so, up to the order of a float sum.
What ONNX Runtime fuses, measured with 1.32:

* a convolution or a 2-D Gemm runs in integers when a QuantizeLinear follows it directly; a Relu between them is only
  absorbed where the zero point is the smallest integer of the type, so clipping moves behind the quantizer;
* Add runs in integers between two DequantizeLinear and one QuantizeLinear;
* MatMul runs in integers with a float result; but MatMul + Add(bias) is first fused to a Gemm, which without a
  QuantizeLinear behind it is float, at six times the cost. Sum(MatMul, bias) adds the same number and is left alone;
* pooling and reshaping between a DequantizeLinear and a QuantizeLinear of equal parameters run on the integers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

#: Operators that give back elements of their first input, so that quantizing before or after them is the same.
_MOVES_VALUES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})


def tidy(model: ir.Model) -> None:
    """Names nodes after the modules that they come from, and removes what the exporter noted: source paths among it."""
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        path = ast.literal_eval(scopes)[:-1][-1:] if scopes else []
        base = f"{path[0]}/{node.op_type}" if path and path[0] else node.op_type
        taken[base] = taken.get(base, 0) + 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "rarefy"
    model.producer_version = None
    model.doc_string = None


def prepare_for_onnxruntime(model: ir.Model) -> None:
    """All passes, in the order in which they feed each other. Leaves a graph without quantizers as it is."""
    graph = model.graph
    if not any(node.op_type == "QuantizeLinear" for node in graph):
        return
    merge_duplicates(graph)
    drop_idle_relus(graph)
    mean_to_global_pool(graph)
    while hoist_quantizers(graph):
        merge_duplicates(graph)
    absorb_clipping(graph)
    split_linear_bias(graph)
    remove_unused(graph)


# ---- reading the graph ----------------------------------------------------------------------------------------------


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is b:
        return True
    x, y = constant(a), constant(b)
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _axis(node: ir.Node) -> int | None:
    """The channel axis, or None for one scale."""
    scale = node.inputs[1]
    if scale.shape is None or len(scale.shape) == 0:
        return None
    return node.attributes.get_int("axis", 1)


def same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Whether two Quantize- or DequantizeLinear use equal scales and zero points along the same axis."""
    return _axis(a) == _axis(b) and all(_same(x, y) for x, y in zip(a.inputs[1:3], b.inputs[1:3], strict=True))


def _only_consumers(value: ir.Value, op_type: str) -> bool:
    consumers = value.consumers()
    return bool(consumers) and not value.is_graph_output() and all(node.op_type == op_type for node in consumers)


def _is_dequantized(value: ir.Value) -> bool:
    return value.producer() is not None and value.producer().op_type == "DequantizeLinear"


def _nodes(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these types at the time of the call, so that the graph may change meanwhile."""
    for node in [node for node in graph if node.op_type in op_types]:
        if node.graph is graph:
            yield node


# ---- changing it ----------------------------------------------------------------------------------------------------


def _bypass(node: ir.Node, replacement: ir.Value) -> None:
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


def _unique(graph: ir.Graph, name: str) -> str:
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


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    name = _unique(graph, name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def _add_node(
    anchor: ir.Node,
    before: bool,
    op_type: str,
    inputs: list[ir.Value],
    like: ir.Value,
    dtype: ir.DataType,
    name: str,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    """Inserts a node next to `anchor`; its output has the shape of `like`."""
    name = _unique(anchor.graph, name)
    node = ir.node(op_type, inputs, attributes or {}, name=name)
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


# ---- the passes -----------------------------------------------------------------------------------------------------


def merge_duplicates(graph: ir.Graph) -> int:
    """Makes one of the equal quantizers (and their clips and dequantizers) that read the same tensor.

    A QuantizeLinear behind a DequantizeLinear of equal parameters gives the integers back and goes too.
    """
    merged = 0

    def fold(op_type: str, equal: Callable[[ir.Node, ir.Node], bool]) -> None:
        nonlocal merged
        for node in _nodes(graph, op_type):
            for other in node.inputs[0].consumers():
                if other is node or other.op_type != op_type or other.inputs[0] is not node.inputs[0]:
                    continue
                if equal(node, other) and not other.outputs[0].is_graph_output():
                    _bypass(other, node.outputs[0])
                    merged += 1

    def equal_clip(a: ir.Node, b: ir.Node) -> bool:
        return len(a.inputs) == len(b.inputs) and all(
            _same(x, y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True)
        )

    fold("QuantizeLinear", same_parameters)
    fold("Clip", equal_clip)
    fold("DequantizeLinear", same_parameters)
    for node in _nodes(graph, "QuantizeLinear"):
        source = node.inputs[0].producer()
        if source is not None and source.op_type == "DequantizeLinear" and same_parameters(source, node):
            _bypass(node, source.inputs[0])
            merged += 1
    if merged:  # merged quantizers let more dequantizers meet
        fold("Clip", equal_clip)
        fold("DequantizeLinear", same_parameters)
    return merged


def _never_negative(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Relu":
        return True
    if node.op_type == "DequantizeLinear":
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero_point is not None and (zero_point == np.iinfo(zero_point.dtype).min).all():
            return True
        source = node.inputs[0].producer()
        if source is not None and source.op_type == "Clip":
            source = source.inputs[0].producer()
        # What was not negative before it was quantized is not negative afterwards: 0 is on the grid.
        if source is None or source.op_type != "QuantizeLinear" or not same_parameters(source, node):
            return False
        return _never_negative(source.inputs[0])
    if node.op_type in _MOVES_VALUES:
        return _never_negative(node.inputs[0])
    return False


def drop_idle_relus(graph: ir.Graph) -> None:
    """Removes a Relu whose input cannot be negative: the model's own ReLU behind a module that has applied it."""
    for node in _nodes(graph, "Relu"):
        if _never_negative(node.inputs[0]):
            _bypass(node, node.inputs[0])


def mean_to_global_pool(graph: ir.Graph) -> None:
    """Writes the mean over the two last axes of dequantized images as GlobalAveragePool (its sum has another order)."""
    for node in _nodes(graph, "ReduceMean"):
        source, output = node.inputs[0], node.outputs[0]
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if not _is_dequantized(source) or source.shape is None or len(source.shape) != 4 or axes is None:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        keep = bool(node.attributes.get_int("keepdims", 1))
        stem = node.name.removesuffix("ReduceMean")
        pooled = _add_node(
            node, True, "GlobalAveragePool", [source], output, ir.DataType.FLOAT, f"{stem}GlobalAveragePool"
        )
        if not keep:
            pooled.shape = ir.Shape([*output.shape, 1, 1])
            pooled = _add_node(
                node, True, "Flatten", [pooled], output, ir.DataType.FLOAT, f"{stem}Flatten", attributes={"axis": 1}
            )
        _bypass(node, pooled)


def hoist_quantizers(graph: ir.Graph) -> int:
    """Quantizes before an operator that only moves values where all its readers quantize, and returns how often.

    The pair behind the operator stays: between equal parameters ONNX Runtime runs the operator on integers.
    """
    hoisted = 0
    for node in _nodes(graph, *_MOVES_VALUES):
        source, output = node.inputs[0], node.outputs[0]
        consumers = output.consumers()
        if len(node.outputs) != 1 or len(consumers) != 1 or not _only_consumers(output, "QuantizeLinear"):
            continue
        quantize = consumers[0]
        if _axis(quantize) is not None or source.producer() is None or _is_dequantized(source):
            continue
        parameters = list(quantize.inputs[1:3])
        integer = quantize.outputs[0].dtype
        stem = source.producer().name
        q = _add_node(node, True, "QuantizeLinear", [source, *parameters], source, integer, f"{stem}/QuantizeLinear")
        dq = _add_node(
            node, True, "DequantizeLinear", [q, *parameters], source, ir.DataType.FLOAT, f"{stem}/DequantizeLinear"
        )
        node.replace_input_with(0, dq)
        hoisted += 1
    return hoisted


def _clip_limits(node: ir.Node) -> tuple[float, float] | None:
    """What Relu or a float Clip with constant limits lets through; None for anything else."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip" or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    limits = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = constant(value)
        if value is not None and array is None:
            return None
        limits.append(default if array is None else float(array))
    return limits[0], limits[1]


def absorb_clipping(graph: ir.Graph) -> None:
    """Moves Relu and Clip behind the quantizers that read them, as limits of the integers where those do not saturate.

    round is monotone, so Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b)).
    """
    for node in _nodes(graph, "Relu", "Clip"):
        limits = _clip_limits(node)
        quantizers = list(node.outputs[0].consumers())
        if limits is None or not _only_consumers(node.outputs[0], "QuantizeLinear"):
            continue
        if any(_axis(q) is not None or len(q.inputs) < 3 or constant(q.inputs[2]) is None for q in quantizers):
            continue
        for quantize in quantizers:
            _limit_integers(graph, quantize, limits)
            quantize.replace_input_with(0, node.inputs[0])
        graph.remove(node, safe=True)


def _limit_integers(graph: ir.Graph, quantize: ir.Node, limits: tuple[float, float]) -> None:
    scale, zero_point = np.float32(constant(quantize.inputs[1])), constant(quantize.inputs[2])
    info = np.iinfo(zero_point.dtype)
    with np.errstate(over="ignore"):
        low, high = (
            int(np.clip(np.rint(np.float32(limit) / scale) + np.float32(zero_point), info.min, info.max))
            for limit in limits
        )
    output = quantize.outputs[0]
    consumers = output.consumers()
    if len(consumers) == 1 and consumers[0].op_type == "Clip" and not output.is_graph_output():
        clip = consumers[0]  # a range of fewer bits: intersect
        low = int(np.clip(low, constant(clip.inputs[1]), constant(clip.inputs[2])))
        high = int(np.clip(high, constant(clip.inputs[1]), constant(clip.inputs[2])))
        _bypass(clip, output)
    if (low, high) == (info.min, info.max):
        return
    readers = list(output.uses())
    bounds = [
        _initializer(graph, f"{output.name}_{side}", np.array(limit, zero_point.dtype))
        for side, limit in (("min", low), ("max", high))
    ]
    clipped = _add_node(
        quantize, False, "Clip", [output, *bounds], output, output.dtype, f"{quantize.name.rpartition('/')[0]}/Clip"
    )
    for reader, index in readers:
        reader.replace_input_with(index, clipped)


def split_linear_bias(graph: ir.Graph) -> None:
    """Writes the bias of a quantized linear layer so that its product runs in integers.

    Into a Gemm where the product is 2-D and goes straight to one quantizer, as Sum(product, bias) elsewhere.
    """
    for node in _nodes(graph, "MatMul"):
        product = node.outputs[0]
        consumers = product.consumers()
        if not all(_is_dequantized(value) for value in node.inputs) or product.is_graph_output() or len(consumers) != 1:
            continue
        add = consumers[0]
        if add.op_type != "Add":
            continue
        bias = next((value for value in add.inputs if value is not product), None)
        array = constant(bias)
        if array is None or array.ndim != 1:
            continue
        output = add.outputs[0]
        two_dimensional = product.shape is not None and len(product.shape) == 2
        if two_dimensional and len(output.consumers()) == 1 and _only_consumers(output, "QuantizeLinear"):
            inputs, op_type = [*node.inputs, bias], "Gemm"
        else:
            inputs, op_type = [product, bias], "Sum"
        name = f"{add.name.rpartition('/')[0]}/{op_type}"
        _bypass(add, _add_node(add, True, op_type, inputs, output, ir.DataType.FLOAT, name))
        if op_type == "Gemm":
            graph.remove(node, safe=True)
