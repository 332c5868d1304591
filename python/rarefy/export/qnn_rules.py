"""Rules for Qualcomm's processors through QNN, over an ONNX graph: fixed sizes, and every operator between quantizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rarefy._core.quantization import target_profile
from rarefy.export.lint import Finding
from rarefy.export.lint_graph import DEQUANTIZE, QUANTIZE, LintGraph

if TYPE_CHECKING:
    import onnx

_ACTIVATIONS = {"INT8", "UINT8", "INT16", "UINT16"}
_RANK = 5
#: Operators that compute nothing with values: they move them, or work on sizes.
_FREE = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Cast", "Constant"})


def findings(graph: LintGraph) -> list[Finding]:
    """All findings, in the order of the file."""
    found: list[Finding] = []
    for value in graph.inputs:
        shape = graph.shape(value.name) or ()
        free = [str(size) for size in shape if not isinstance(size, int)]
        if free:
            rule, advice = "sizes must be fixed", "export with target='qnn', which fixes them"
            found.append(Finding("error", value.name, rule, f"free axes {', '.join(free)}", advice))
    for node in graph.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            found += _quantizer(graph, node)
        elif node.op_type not in _FREE:
            found += _operator(graph, node)
    return found


def _quantizer(graph: LintGraph, node: onnx.NodeProto) -> list[Finding]:
    name, found = graph.name(node), []
    kind = graph.integer_type(node)
    constant = graph.is_constant(node.input[0])
    if not constant and kind not in _ACTIVATIONS:
        rule = "activations must be integers of 8 or 16 bits"
        found.append(Finding("error", name, rule, kind, "quantize activations with 8 or 16 bits"))
    for index, what in ((1, "scales"), (2, "zero points")):
        if index < len(node.input) and node.input[index] and not graph.is_constant(node.input[index]):
            found.append(Finding("error", name, f"{what} must be constant", "computed ones", "quantize statically"))
    scale = graph.constant(node.input[1])
    if scale is None or scale.size == 1:
        return found
    if not constant:
        rule = "activations must have one scale"
        found.append(Finding("error", name, rule, f"{scale.size} scales", "give activations one scale: PerTensor()"))
        return found
    families = target_profile("qnn").per_channel
    for reader in graph.readers(node.output[0]):
        if "conv" in families and reader.op_type in ("Conv", "ConvTranspose"):
            continue
        rule = "only weights of convolutions may have a scale per channel"
        value = f"{scale.size} scales of a weight of {reader.op_type}"
        found.append(Finding("error", name, rule, value, "prepare with QConfig.int8(target='qnn')"))
    zero_point = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero_point is not None and np.asarray(zero_point, np.int64).any():
        rule = "weights with a scale per channel must be symmetric"
        found.append(Finding("error", name, rule, "a zero point that is not 0", "use a symmetric scheme"))
    return found


def _operator(graph: LintGraph, node: onnx.NodeProto) -> list[Finding]:
    name, found = graph.name(node), []
    for tensor in (*node.input, *node.output):
        shape = graph.shape(tensor)
        if shape is not None and len(shape) > _RANK:
            rule = f"tensors must have {_RANK} axes at most"
            found.append(
                Finding("error", name, rule, f"{len(shape)} axes of {tensor!r}", "reshape around the operator")
            )
            break
    computed = [t for t in node.input if t and not graph.is_constant(t) and graph.type(t) in ("FLOAT", "UNDEFINED")]
    floats = [t for t in computed if graph.dequantizer(t) is None]
    outputs = [t for t in node.output if graph.type(t) in ("FLOAT", "UNDEFINED")]
    bare = [t for t in outputs if not graph.readers(t) or any(r.op_type != QUANTIZE for r in graph.readers(t))]
    fused = [t for t in bare if all(r.op_type in ("Relu", "Clip") for r in graph.readers(t)) and graph.readers(t)]
    after = graph.producer.get(floats[0]) if len(floats) == 1 else None
    fused_before = node.op_type in ("Relu", "Clip") and after is not None
    if (floats and not fused_before) or (set(bare) - set(fused)):
        side = "a float input" if floats and not fused_before else "a result that is not quantized"
        rule = "operators must stand between quantizers to run in integers"
        found.append(Finding("warning", name, rule, side, "quantize both, or expect float or another processor"))
    return found
