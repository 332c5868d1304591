"""TensorRT's rules of explicit quantization, over an ONNX graph.

From TensorRT 11 on networks are strongly typed and Q/DQ pairs are the only way to integers. The rules are those of
NvInfer.h, of the onnx-tensorrt parser, and of NVIDIA's guides on the placement of Q/DQ pairs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rarefy.export.lint import Finding
from rarefy.export.lint_graph import DEQUANTIZE, QUANTIZE, LintGraph

if TYPE_CHECKING:
    import onnx

_OPSETS = (9, 25)
_TYPES = {"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}
_BLOCK_TYPES = {"INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}
_SCALE_TYPES = {"FLOAT", "FLOAT16", "BFLOAT16"}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def findings(graph: LintGraph) -> list[Finding]:
    """All findings, node by node in the order of the file."""
    found: list[Finding] = []
    if not _OPSETS[0] <= graph.opset <= _OPSETS[1]:
        found.append(
            Finding(
                "error", "the file", f"operator sets {_OPSETS[0]} to {_OPSETS[1]} are read", f"opset {graph.opset}",
                "export with opset=19",
            )
        )  # fmt: skip
    for node in graph.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            found += _quantizer(graph, node)
        elif node.op_type in _WEIGHTED:
            found += _weighted(graph, node)
        elif node.op_type == "Add":
            found += _residual(graph, node)
        elif node.op_type == "BatchNormalization" and graph.attribute(node, "training_mode", 0):
            rule = "batch normalization must be in evaluation mode"
            found.append(Finding("error", graph.name(node), rule, "training_mode 1", "export the model after eval()"))
    return found


# ---- one quantizer --------------------------------------------------------------------------------------------------


def _quantizer(graph: LintGraph, node: onnx.NodeProto) -> list[Finding]:
    name, found = graph.name(node), []

    def error(rule: str, value: str, advice: str) -> None:
        found.append(Finding("error", name, rule, value, advice))

    if node.domain not in ("", "ai.onnx"):
        error("quantizers must be of the standard's operator set", f"domain {node.domain}", "export standard ONNX")
    kind = graph.integer_type(node)
    quantizes_constant = graph.is_constant(node.input[0])
    if kind == "INT32" and node.op_type == DEQUANTIZE:
        error("biases must be float", "an INT32 bias behind DequantizeLinear", "leave biases float: they are fused")
        return found
    has_zero_point = len(node.input) > 2 and bool(node.input[2])
    if kind not in _TYPES:
        if not has_zero_point and node.op_type == QUANTIZE:
            advice = "write a zero point of int8 zeros: without one ONNX means uint8 and TensorRT int8"
            error("the type must be said", "no zero point", advice)
        else:
            advice = "quantize with QConfig.int8(target='tensorrt'), or subtract 128 from integers and zero points"
            error("integers must be INT8 (or INT4 and FP8 formats)", kind, advice)
    found += _zero_point(graph, node, name) if has_zero_point else []
    found += _scale(graph, node, name)

    scale_shape = graph.shape(node.input[1])
    size = int(np.prod(scale_shape)) if scale_shape is not None and all(isinstance(d, int) for d in scale_shape) else 1
    block = graph.attribute(node, "block_size", 0)
    weight = _is_weight(graph, node)
    if size > 1 and not weight and not block:
        advice = "give activations one scale: PerTensor()"
        error("activations must have one scale", f"{size} scales", advice)
    if block and kind not in _BLOCK_TYPES:
        error(
            "only INT4 and FP8 formats have scales per block", f"{kind} in blocks of {block}", "use scales per channel"
        )
    elif block:
        rank = len(graph.shape(node.input[0]) or ())
        axis = graph.attribute(node, "axis", 1)
        if rank and axis % rank < rank - 2:
            error(
                "blocks must lie along the last or the last but one axis", f"axis {axis} of {rank}", "move the blocks"
            )
    if kind == "INT4":
        shape = graph.shape(node.input[0])
        if not weight:
            error("INT4 is for weights alone", "an INT4 activation", "quantize activations with 8 bits")
        if shape and isinstance(shape[-1], int) and shape[-1] % 2:
            error("the last axis of INT4 tensors must be even", f"shape {list(shape)}", "pad it, or use 8 bits")
    if size > 1 and weight and not block:
        found += _channel_axis(graph, node, name)
    if node.op_type == DEQUANTIZE and not quantizes_constant:
        found += _between_fused(graph, node, name)
    return found


def _is_weight(graph: LintGraph, node: onnx.NodeProto) -> bool:
    if graph.is_constant(node.input[0]):
        return True
    source = graph.producer.get(node.input[0])
    return (
        node.op_type == DEQUANTIZE and source is not None and source.op_type == QUANTIZE and _is_weight(graph, source)
    )


def _zero_point(graph: LintGraph, node: onnx.NodeProto, name: str) -> list[Finding]:
    rule = "zero points must be constant zeros"
    values = graph.constant(node.input[2])
    if values is None:
        return [Finding("error", name, rule, "a computed zero point", "store it in the file")]
    found = []
    numbers = np.asarray(values, dtype=np.float32)
    if numbers.any():
        value = f"{numbers.reshape(-1)[int(np.argmax(numbers.reshape(-1) != 0))]:g}"
        advice = "quantize symmetrically: QConfig.int8(target='tensorrt')"
        found.append(Finding("error", name, rule, value, advice))
    scale = graph.shape(node.input[1])
    if scale is not None and all(isinstance(d, int) for d in scale) and numbers.size != int(np.prod(scale)):
        value = f"{numbers.size} zero points and {int(np.prod(scale))} scales"
        found.append(Finding("error", name, "there must be as many zero points as scales", value, "repeat the zero"))
    return found


def _scale(graph: LintGraph, node: onnx.NodeProto, name: str) -> list[Finding]:
    kind = graph.type(node.input[1])
    found = []
    if kind not in _SCALE_TYPES and kind != "UNDEFINED":
        found.append(Finding("error", name, "scales must be FP32, FP16 or BF16", kind, "store them as FP32"))
    values = graph.constant(node.input[1])
    if values is None:
        found.append(Finding("error", name, "scales must be constant", "a computed scale", "quantize statically"))
        return found
    numbers = np.asarray(values, dtype=np.float32)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        bad = numbers.reshape(-1)[int(np.argmin(np.where(np.isfinite(numbers), numbers, -np.inf).reshape(-1)))]
        advice = "give channels that are all zero a positive scale"
        found.append(Finding("error", name, "scales must be finite and positive", f"{bad:g}", advice))
    real = graph.type(node.input[0] if node.op_type == QUANTIZE else node.output[0])
    if real in ("FLOAT16", "BFLOAT16") and kind in _SCALE_TYPES and kind != real:
        found.append(Finding("error", name, f"a scale of a {real} tensor must be {real}", kind, "cast the scale"))
    return found


def _channel_axis(graph: LintGraph, node: onnx.NodeProto, name: str) -> list[Finding]:
    rank = len(graph.shape(node.input[0]) or ())
    axis = graph.attribute(node, "axis", 1)
    for reader in graph.readers(node.output[0]):
        side = list(reader.input).index(node.output[0])
        if reader.op_type == "Conv":
            want = 0
        elif reader.op_type == "ConvTranspose":
            want = 1
        elif reader.op_type == "Gemm":
            want = (0 if graph.attribute(reader, "transB", 0) else 1) if side == 1 else 0
        elif reader.op_type == "MatMul":
            want = rank - 1 if side == 1 else rank - 2
        else:
            continue
        if rank and axis % rank != want:
            rule = f"the scales of a weight of {reader.op_type} must lie along its output channels, axis {want}"
            return [Finding("error", name, rule, f"axis {axis}", "quantize along the output channels")]
    return []


def _between_fused(graph: LintGraph, node: onnx.NodeProto, name: str) -> list[Finding]:
    quantize = graph.producer.get(node.input[0])
    before = graph.producer.get(quantize.input[0]) if quantize is not None and quantize.op_type == QUANTIZE else None
    found = []
    for reader in graph.readers(node.output[0]):
        if (
            before is not None
            and before.op_type in _WEIGHTED
            and reader.op_type in ("BatchNormalization", "Relu", "Clip")
        ):
            rule = f"no quantizer may stand between {before.op_type} and {reader.op_type}, which are fused"
            advice = "quantize behind the activation"
            found.append(Finding("warning", name, rule, f"one before {graph.name(reader)}", advice))
    return found


# ---- operators ------------------------------------------------------------------------------------------------------


def _weighted(graph: LintGraph, node: onnx.NodeProto) -> list[Finding]:
    name, found = graph.name(node), []
    sides = [graph.dequantizer(tensor) for tensor in node.input[:2]]
    quantized = [side is not None for side in sides]
    if not any(quantized):
        return found
    weight_only = any(side is not None and graph.integer_type(side) == "INT4" for side in sides)
    if not all(quantized):
        if not weight_only:
            rule = "both inputs of a product must be quantized to run in integers"
            value = "a float activation" if quantized[1] else "a float weight"
            found.append(Finding("warning", name, rule, value, "quantize the other input too"))
        return found
    shapes = [graph.shape(tensor) for tensor in node.input[:2]]
    if node.op_type in ("Gemm", "MatMul"):
        for side, axis, letter in ((0, -2, "M"), (1, -1, "N")):
            shape = shapes[side]
            if node.op_type == "Gemm" and graph.attribute(node, "transA" if side == 0 else "transB", 0):
                axis = -1 if axis == -2 else -2
            if shape is not None and len(shape) >= 2 and shape[axis] == 1:
                rule = "products with M or N = 1 are faster in float"
                found.append(Finding("warning", name, rule, f"{letter} = 1", "leave this layer out (overrides)"))
    if node.op_type == "Conv" and shapes[1] is not None and all(isinstance(d, int) for d in shapes[1]):
        found += _channels(graph, node, name, shapes[1])
    return found


def _channels(graph: LintGraph, node: onnx.NodeProto, name: str, shape: tuple) -> list[Finding]:
    groups = graph.attribute(node, "group", 1)
    outputs, inputs = shape[0], shape[1]
    first = any(value.name == _source(graph, node.input[0]) for value in graph.inputs)
    multiple = 8 if first or groups > 1 else 16
    counted = [("output", outputs)] if first or groups > 1 else [("input", inputs), ("output", outputs)]
    rule = f"int8 convolutions are fastest with channels in multiples of {multiple}"
    return [
        Finding("warning", name, rule, f"{count} {side} channels", "choose other widths where the model is yours")
        for side, count in counted
        if count % multiple
    ]


def _source(graph: LintGraph, tensor: str) -> str:
    """The tensor before the quantizers in front of a tensor."""
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in (QUANTIZE, DEQUANTIZE):
        tensor = node.input[0]
        node = graph.producer.get(tensor)
    return tensor


def _residual(graph: LintGraph, node: onnx.NodeProto) -> list[Finding]:
    if len(node.input) != 2 or any(graph.is_constant(tensor) for tensor in node.input):
        return []
    fused = [_quantized_conv(graph, tensor) for tensor in node.input]
    if not any(fused) or any(graph.dequantizer(tensor) is not None for tensor in node.input):
        return []
    identity = "both branches" if all(fused) else f"a float branch {node.input[0 if fused[1] else 1]!r}"
    rule = (
        "the identity branch of a residual must be quantized, so that convolution and addition become one int8 kernel"
    )
    advice = "use rarefy.nn.Add and QConfig.int8(target='tensorrt')"
    return [Finding("warning", graph.name(node), rule, f"{identity} without a quantizer", advice)]


def _quantized_conv(graph: LintGraph, tensor: str) -> bool:
    node = graph.producer.get(tensor)
    while node is not None and node.op_type == "BatchNormalization":
        node = graph.producer.get(node.input[0])
    return (
        node is not None
        and node.op_type in ("Conv", "ConvTranspose")
        and all(graph.dequantizer(side) is not None for side in node.input[:2])
    )


# ---- the builder ----------------------------------------------------------------------------------------------------


def build(path: Path) -> tuple[list[Finding], tuple[str, ...]]:
    """Parses the file with TensorRT and builds an engine, where the package and a GPU are there; or says why not."""
    if importlib.util.find_spec("tensorrt") is None:
        return [], ("TensorRT's own parser and builder were not run: the package tensorrt is not installed",)
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        return [], (f"TensorRT's own parser and builder were not run: {error}",)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    if builder is None:
        return [], ("TensorRT's builder was not run: there is no GPU",)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    rule = "TensorRT must read the file"
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return [
            Finding("error", e.node_name() or "the file", rule, e.desc(), "see the rule that it names") for e in errors
        ], ()
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [size if size > 0 else 1 for size in tensor.shape]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        return [Finding("error", "the file", "TensorRT must build an engine", "none", "see TensorRT's log")], ()
    return [], ("TensorRT's parser and builder accept the file",)
