"""Rewrites of an exported graph that several targets share; `onnx_targets` says which does what, and in which order.

Each pass keeps the function that the graph computes: bit for bit, or, where it says so, up to the order of a float sum.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rarefy.export.onnx_edit import (
    add_node,
    axis_of,
    bypass,
    constant,
    initializer,
    integer_limits,
    is_dequantized,
    nodes_of,
    only_consumers,
    same,
    same_parameters,
)

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


def merge_duplicates(graph: ir.Graph) -> int:
    """Makes one of the equal quantizers (and their clips and dequantizers) that read the same tensor.

    A QuantizeLinear behind a DequantizeLinear of equal parameters gives the integers back and goes too.
    """
    merged = 0

    def fold(op_type: str, equal: Callable[[ir.Node, ir.Node], bool]) -> None:
        nonlocal merged
        for node in nodes_of(graph, op_type):
            for other in node.inputs[0].consumers():
                if other is node or other.op_type != op_type or other.inputs[0] is not node.inputs[0]:
                    continue
                if equal(node, other) and not other.outputs[0].is_graph_output():
                    bypass(other, node.outputs[0])
                    merged += 1

    def equal_clip(a: ir.Node, b: ir.Node) -> bool:
        return len(a.inputs) == len(b.inputs) and all(
            same(x, y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True)
        )

    fold("QuantizeLinear", same_parameters)
    fold("Clip", equal_clip)
    fold("DequantizeLinear", same_parameters)
    for node in nodes_of(graph, "QuantizeLinear"):
        source = node.inputs[0].producer()
        if source is not None and source.op_type == "DequantizeLinear" and same_parameters(source, node):
            bypass(node, source.inputs[0])
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
        limits = None if zero_point is None else integer_limits(zero_point.dtype)
        if limits is not None and (zero_point.astype(np.int32) == limits[0]).all():
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
    for node in nodes_of(graph, "Relu"):
        if _never_negative(node.inputs[0]):
            bypass(node, node.inputs[0])


def mean_to_global_pool(graph: ir.Graph) -> None:
    """Writes the mean over the two last axes of dequantized images as GlobalAveragePool (its sum has another order)."""
    for node in nodes_of(graph, "ReduceMean"):
        source, output = node.inputs[0], node.outputs[0]
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if not is_dequantized(source) or source.shape is None or len(source.shape) != 4 or axes is None:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        keep = bool(node.attributes.get_int("keepdims", 1))
        stem = node.name.removesuffix("ReduceMean")
        pooled = add_node(
            node, True, "GlobalAveragePool", [source], output, ir.DataType.FLOAT, f"{stem}GlobalAveragePool"
        )
        if not keep:
            pooled.shape = ir.Shape([*output.shape, 1, 1])
            pooled = add_node(
                node, True, "Flatten", [pooled], output, ir.DataType.FLOAT, f"{stem}Flatten", attributes={"axis": 1}
            )
        bypass(node, pooled)


def hoist_quantizers(graph: ir.Graph) -> int:
    """Quantizes before an operator that only moves values where all its readers quantize, and returns how often.

    The pair behind the operator stays: between equal parameters ONNX Runtime runs the operator on integers.
    """
    hoisted = 0
    for node in nodes_of(graph, *_MOVES_VALUES):
        source, output = node.inputs[0], node.outputs[0]
        consumers = output.consumers()
        if len(node.outputs) != 1 or len(consumers) != 1 or not only_consumers(output, "QuantizeLinear"):
            continue
        quantize = consumers[0]
        if axis_of(quantize) is not None or source.producer() is None or is_dequantized(source):
            continue
        parameters = list(quantize.inputs[1:3])
        integer = quantize.outputs[0].dtype
        stem = source.producer().name
        q = add_node(node, True, "QuantizeLinear", [source, *parameters], source, integer, f"{stem}/QuantizeLinear")
        dq = add_node(
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


def absorb_clipping(graph: ir.Graph, integers: bool) -> None:
    """Moves Relu and Clip behind the quantizers that read them, as limits of the integers where those do not saturate.

    round is monotone, so Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b)). Without `integers`, and for 16 bits, which ONNX Runtime
    has no Clip of, only what saturation does goes.
    """
    for node in nodes_of(graph, "Relu", "Clip"):
        limits = _clip_limits(node)
        quantizers = list(node.outputs[0].consumers())
        if limits is None or not only_consumers(node.outputs[0], "QuantizeLinear"):
            continue
        if any(axis_of(q) is not None or len(q.inputs) < 3 or constant(q.inputs[2]) is None for q in quantizers):
            continue
        if any(integer_limits(constant(q.inputs[2]).dtype) is None for q in quantizers):
            continue  # FP8
        clips = integers and all(constant(q.inputs[2]).dtype.itemsize == 1 for q in quantizers)
        if not clips and not all(_saturates_at(q, limits) for q in quantizers):
            continue
        for quantize in quantizers:
            _limit_integers(graph, quantize, limits)
            quantize.replace_input_with(0, node.inputs[0])
        graph.remove(node, safe=True)


def _integer_limits(quantize: ir.Node, limits: tuple[float, float]) -> tuple[int, int]:
    scale, zero_point = np.float32(constant(quantize.inputs[1])), constant(quantize.inputs[2])
    info = np.iinfo(zero_point.dtype)
    with np.errstate(over="ignore"):
        low, high = (
            int(np.clip(np.rint(np.float32(limit) / scale) + np.float32(zero_point), info.min, info.max))
            for limit in limits
        )
    return low, high


def _saturates_at(quantize: ir.Node, limits: tuple[float, float]) -> bool:
    info = np.iinfo(constant(quantize.inputs[2]).dtype)
    return _integer_limits(quantize, limits) == (info.min, info.max)


def _limit_integers(graph: ir.Graph, quantize: ir.Node, limits: tuple[float, float]) -> None:
    zero_point = constant(quantize.inputs[2])
    info = np.iinfo(zero_point.dtype)
    low, high = _integer_limits(quantize, limits)
    output = quantize.outputs[0]
    consumers = output.consumers()
    if len(consumers) == 1 and consumers[0].op_type == "Clip" and not output.is_graph_output():
        clip = consumers[0]  # a range of fewer bits: intersect
        low = int(np.clip(low, constant(clip.inputs[1]), constant(clip.inputs[2])))
        high = int(np.clip(high, constant(clip.inputs[1]), constant(clip.inputs[2])))
        bypass(clip, output)
    if (low, high) == (info.min, info.max):
        return
    readers = list(output.uses())
    bounds = [
        initializer(graph, f"{output.name}_{side}", np.array(limit, zero_point.dtype))
        for side, limit in (("min", low), ("max", high))
    ]
    clipped = add_node(
        quantize, False, "Clip", [output, *bounds], output, output.dtype, f"{quantize.name.rpartition('/')[0]}/Clip"
    )
    for reader, index in readers:
        reader.replace_input_with(index, clipped)


def split_linear_bias(graph: ir.Graph) -> None:
    """Writes the bias of a quantized linear layer so that its product runs in integers.

    Into a Gemm where the product is 2-D and goes straight to one quantizer, as Sum(product, bias) elsewhere.
    """
    for node in nodes_of(graph, "MatMul"):
        product = node.outputs[0]
        consumers = product.consumers()
        if not all(is_dequantized(value) for value in node.inputs) or product.is_graph_output() or len(consumers) != 1:
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
        if two_dimensional and len(output.consumers()) == 1 and only_consumers(output, "QuantizeLinear"):
            inputs, op_type = [*node.inputs, bias], "Gemm"
        else:
            inputs, op_type = [product, bias], "Sum"
        name = f"{add.name.rpartition('/')[0]}/{op_type}"
        bypass(add, add_node(add, True, op_type, inputs, output, ir.DataType.FLOAT, name))
        if op_type == "Gemm":
            graph.remove(node, safe=True)
