"""Which rewrites of an exported graph each target gets: the profile's data, and the passes that follow from it.

What the kernels find, measured:

* ONNX Runtime 1.32 on x86. A convolution or a 2-D Gemm runs in integers when a QuantizeLinear follows it directly; a Relu
  between them is only absorbed where the zero point is the smallest integer of the type, so clipping moves behind the
  quantizer. Add runs in integers between two DequantizeLinear and one QuantizeLinear. MatMul runs in integers with a float
  result; but MatMul + Add(bias) is first fused to a Gemm, which without a QuantizeLinear behind it is float, at six times
  the cost. Sum(MatMul, bias) adds the same number and is left alone, and so is Sum before LayerNormalization, which Add
  there is fused with to a slower kernel. Pooling and reshaping between equal parameters run on the integers.
* OpenVINO 2026.4: reads any of it; zero points of weights, even zeros, cost it the int4 kernels.
* TensorRT: fuses convolution, addition and ReLU where they are, between quantizers of the convolution's inputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rarefy._core.quantization import TargetProfile
from rarefy.export import onnx_graph
from rarefy.export.onnx_edit import (
    add_node,
    axis_of,
    bypass,
    constant,
    initializer,
    integer_limits,
    is_dequantized,
    nodes_of,
    remove_unused,
)

_INT4_OPSET = 21

#: The types of integers that Gather takes.
_GATHERED = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16)


def place(model: ir.Model, profile: TargetProfile) -> None:
    """All passes of the target, in the order in which they feed each other; a graph without integers stays as it is."""
    graph = model.graph
    if not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph):
        return
    onnx_graph.merge_duplicates(graph)
    onnx_graph.drop_idle_relus(graph)
    gather_integers(graph)
    if profile.pools_means:
        onnx_graph.mean_to_global_pool(graph)
    while profile.quantizes_before_moves and onnx_graph.hoist_quantizers(graph):
        onnx_graph.merge_duplicates(graph)
    if profile.clipping != "keep":
        onnx_graph.absorb_clipping(graph, integers=profile.clipping == "integers")
    if profile.clipping != "keep":
        keep_clipping(graph)
    if profile.splits_linear_bias:
        onnx_graph.split_linear_bias(graph)
    else:
        widen_linear_bias(graph)
    if profile.residual_as_sum:
        residual_to_sum(graph)
    if profile.int4_weights and graph.opset_imports.get("", 0) >= _INT4_OPSET:
        pack_int4(graph)
    if not profile.weight_zero_points:
        drop_weight_zero_points(graph)
    remove_unused(graph)


def gather_integers(graph: ir.Graph) -> None:
    """Looks rows of a table up before they are dequantized: the table stays small, and one row is scaled, not all.

    Gather(q * s, i) = Gather(q, i) * Gather(s, i), the same product of the same numbers.
    """
    for node in nodes_of(graph, "Gather"):
        dequantize = node.inputs[0].producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, scale = dequantize.inputs[0], dequantize.inputs[1]
        zero_point = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
        if constant(table) is None or len(table.shape) != 2 or axis_of(dequantize) not in (None, 0):
            continue
        if "block_size" in dequantize.attributes or table.dtype not in _GATHERED:
            continue
        if axis_of(dequantize) == 0 and zero_point is not None and zero_point.any():
            continue
        output, stem = node.outputs[0], node.name.rpartition("/")[0]
        rows = add_node(node, True, "Gather", [table, node.inputs[1]], output, table.dtype, f"{stem}/Gather")
        if axis_of(dequantize) is None:
            parameters = list(dequantize.inputs[1:3])
            found = add_node(
                node, True, "DequantizeLinear", [rows, *parameters], output, output.dtype, f"{stem}/DequantizeLinear"
            )
        else:
            column = initializer(graph, f"{scale.name}_column", constant(scale).reshape(-1, 1))
            real = add_node(node, True, "Cast", [rows], output, output.dtype, f"{stem}/Cast", {"to": int(output.dtype)})
            scales = add_node(node, True, "Gather", [column, node.inputs[1]], output, output.dtype, f"{stem}/Gather")
            if output.shape is not None:
                scales.shape = ir.Shape([*output.shape[:-1], 1])
            found = add_node(node, True, "Mul", [real, scales], output, output.dtype, f"{stem}/Mul")
        bypass(node, found)


def keep_clipping(graph: ir.Graph) -> None:
    """Writes a Relu or Clip before a quantizer to FP8 as Max and Min.

    ONNX Runtime 1.32 drops those before a quantizer whose type it does not ask for.
    """
    for node in nodes_of(graph, "QuantizeLinear"):
        clip, zero_point = node.inputs[0].producer(), constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if clip is None or clip.op_type not in ("Relu", "Clip") or zero_point is None:
            continue
        if integer_limits(zero_point.dtype) is not None:
            continue
        value, stem = clip.inputs[0], clip.name.rpartition("/")[0]
        limits = [("Max", initializer(graph, f"{stem}/zero", np.zeros((), np.float32)))]
        if clip.op_type == "Clip":
            sides = zip(("Max", "Min"), clip.inputs[1:], strict=False)
            limits = [(op_type, limit) for op_type, limit in sides if limit is not None]
        for op_type, limit in limits:
            value = add_node(clip, True, op_type, [value, limit], clip.outputs[0], value.dtype, f"{stem}/{op_type}")
        node.replace_input_with(0, value)


def residual_to_sum(graph: ir.Graph) -> None:
    """Writes the addition before a LayerNormalization as Sum, which adds the same two numbers."""
    for node in nodes_of(graph, "Add"):
        output = node.outputs[0]
        if not any(reader.op_type == "LayerNormalization" for reader in output.consumers()):
            continue
        if any(constant(value) is not None for value in node.inputs):
            continue
        stem = node.name.rpartition("/")[0]
        bypass(node, add_node(node, True, "Sum", list(node.inputs), output, output.dtype, f"{stem}/Sum"))


def widen_linear_bias(graph: ir.Graph) -> None:
    """Gives the bias behind a product of integers the product's rank, [1, 1, N] say.

    ONNX Runtime makes a Gemm of a product of three dimensions and a bias [N], which it cannot load with int8 activations
    from operator set 21 on. The sum is the same.
    """
    for node in nodes_of(graph, "MatMul"):
        product = node.outputs[0]
        rank = len(product.shape) if product.shape is not None else 0
        if rank < 3 or not all(is_dequantized(value) for value in node.inputs):
            continue
        for reader, index in list(product.uses()):
            bias = reader.inputs[1 - index] if reader.op_type == "Add" else None
            array = constant(bias)
            if array is not None and array.ndim == 1:
                wide = initializer(graph, bias.name, array.reshape([1] * (rank - 1) + [-1]))
                reader.replace_input_with(1 - index, wide)


def pack_int4(graph: ir.Graph) -> None:
    """Stores the weights of products with a float input as INT4 where their integers fit: two in a byte."""
    for node in nodes_of(graph, "DequantizeLinear"):
        value, readers = node.inputs[0], node.outputs[0].consumers()
        array = constant(value)
        if array is None or array.dtype != np.int8 or array.ndim != 2 or array.size == 0:
            continue
        if array.min() < -8 or array.max() > 7 or node.outputs[0].is_graph_output():
            continue
        if not all(reader.op_type == "MatMul" and not is_dequantized(reader.inputs[0]) for reader in readers):
            continue
        packed = _int4(graph, f"{value.name}_int4", array)
        node.replace_input_with(0, packed)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            zero_point = node.inputs[2]
            node.replace_input_with(2, _int4(graph, f"{zero_point.name}_int4", constant(zero_point)))


def _int4(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    import ml_dtypes

    return initializer(graph, name, array.astype(ml_dtypes.int4))


def drop_weight_zero_points(graph: ir.Graph) -> None:
    """Leaves out the zero points of constant integers where all are 0, which is what none means."""
    for node in nodes_of(graph, "DequantizeLinear"):
        if len(node.inputs) < 3 or constant(node.inputs[0]) is None:
            continue
        zero_point = constant(node.inputs[2])
        if zero_point is not None and not zero_point.astype(np.int32).any():
            node.resize_inputs(2)
