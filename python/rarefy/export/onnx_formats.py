"""Writes formats beside plain grids into an exported graph: what stands for them there is replaced by their operators."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from rarefy._core.quantization import TargetProfile, onnx_weight_form
from rarefy.export.lowering_formats import Float8QuantizeDequantize, FormatWeight
from rarefy.export.onnx_edit import add_node, bypass, initializer, nodes_of, remove_unused

_TYPES = {torch.float32: ir.DataType.FLOAT, torch.int32: ir.DataType.INT32}


def _array(tensor: Tensor, is_int4: bool) -> np.ndarray:
    if is_int4:
        return tensor.numpy().astype(ml_dtypes.int4 if tensor.dtype is torch.int8 else ml_dtypes.uint4)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.uint8).numpy().view(np.dtype(getattr(ml_dtypes, name)))
    return tensor.numpy()


def write_formats(model: ir.Model, lowered: nn.Module, profile: TargetProfile, opset: int) -> None:
    """Replaces what stands for weights and activations in formats.

    Args:
        model: of the exporter, with nodes called after their modules.
        lowered: the program that it was made from.
        profile: of the target.
        opset: of the file.

    Raises:
        ValueError: the operator set cannot say it.
    """
    _write_weights(model.graph, lowered, profile, opset)
    _write_activations(model.graph, lowered)
    remove_unused(model.graph)


def _write_weights(graph: ir.Graph, lowered: nn.Module, profile: TargetProfile, opset: int) -> None:
    weights = {m.number: (name, m) for name, m in lowered.named_modules() if isinstance(m, FormatWeight)}
    if not weights:
        return
    written: dict[int, ir.Value] = {}
    for node in nodes_of(graph, "DequantizeLinear"):
        if (node.inputs[0].name or "").rpartition(".")[2] != "stand_in":
            continue
        number = int(node.inputs[1].const_value.numpy())
        if number not in written:
            name, module = weights[number]
            written[number] = _write_weight(graph, node, module, name, profile, opset)
        bypass(node, written[number])


def _write_weight(
    graph: ir.Graph, anchor: ir.Node, module: FormatWeight, path: str, profile: TargetProfile, opset: int
) -> ir.Value:
    tensors, nodes = onnx_weight_form(module.parts, opset, module.transposed, profile.weight_zero_points)
    base = f"{path.removesuffix('format')}weight" if path.rpartition(".")[2] in ("format", "") else path
    values = {
        name: initializer(graph, f"{base}{name.removeprefix('weight')}", _array(tensor, is_int4))
        for name, tensor, is_int4 in tensors
    }
    stem = anchor.name.rpartition("/")[0]
    result = anchor.outputs[0]
    first = next(iter(graph))  # several readers may come later
    for op_type, inputs, output, attributes, dtype, shape in nodes:
        arguments = [values[name] for name in inputs]
        block, size = attributes.get("block_size", 1), shape[attributes.get("axis", 0)] if shape else 1
        if profile.name == "openvino" and size % block:
            raise ValueError(
                f"[to_onnx] OpenVINO has scales of blocks that divide the axis alone, got blocks of {block} along {size} for "
                f"{module.parts.scheme} in {stem or 'the root'}"
            )
        name = f"{stem}/{op_type}" if stem else op_type
        kind = _TYPES[dtype]
        result = add_node(first, True, op_type, arguments, result, kind, name, attributes)
        result.shape = ir.Shape(shape)
        values[output] = result
    return result


def _write_activations(graph: ir.Graph, lowered: nn.Module) -> None:
    types = {
        name: module.type for name, module in lowered.named_modules() if isinstance(module, Float8QuantizeDequantize)
    }
    for node in nodes_of(graph, "QuantizeLinear", "DequantizeLinear") if types else ():
        kind = types.get(node.name.rpartition("/")[0])
        if kind is None:
            continue
        scale = node.inputs[1]
        shape = () if scale.shape is None else tuple(int(size) for size in scale.shape)
        zero_point = initializer(graph, f"{node.name}_zero_point", np.zeros(shape, np.dtype(getattr(ml_dtypes, kind))))
        node.replace_input_with(2, zero_point)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(zero_point.dtype)
            node.attributes.pop("output_dtype", None)
