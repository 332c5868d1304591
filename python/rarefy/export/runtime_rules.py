"""Why ONNX Runtime or OpenVINO left an operator with quantized inputs in float, from the graph that they execute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rarefy.export.lint import Finding
from rarefy.export.lint_graph import DEQUANTIZE, QUANTIZE, LintGraph
from rarefy.export.report import Operator

if TYPE_CHECKING:
    import onnx

_NARROW = ("INT4", "UINT4", "INT2", "UINT2")


def findings(graph: LintGraph, target: str) -> tuple[tuple[Operator, ...], list[Finding]]:
    """What the runtime executes, and findings about operators whose inputs are quantized and that run in float."""
    if target == "openvino":
        from rarefy.export import openvino_verify

        operators = openvino_verify.executed_operators(openvino_verify.compile_file("lint", graph.path), graph.model)
    else:
        from rarefy.export import onnx_verify

        operators = onnx_verify.check_operators(graph.path, graph.model, "lint")
    found = _dropped_relus(graph) if target == "onnxruntime" else _openvino_rules(graph)
    nodes = {node.name: node for node in graph.graph.node if node.name}
    for operator in operators:
        node = nodes.get(operator.name)
        if operator.integer or node is None:
            continue
        data = [tensor for tensor in node.input[:2] if tensor]
        if not all(graph.dequantizer(tensor) is not None for tensor in data):
            continue  # float by the model's own wish
        why, advice = (
            _why(graph, node) if target == "onnxruntime" else ("OpenVINO decides so", "see its executed graph")
        )
        rule = f"{node.op_type} with quantized inputs runs in integers"
        found.append(Finding("warning", operator.name, rule, f"{operator.runtime}, in float: {why}", advice))
    return operators, found


def _why(graph: LintGraph, node: onnx.NodeProto) -> tuple[str, str]:
    """What ONNX Runtime's fusions on x86 miss, as measured with 1.32."""
    kinds = {graph.integer_type(side) for t in node.input[:2] if (side := graph.dequantizer(t)) is not None}
    readers = graph.readers(node.output[0])
    types = {graph.integer_type(side) for t in node.input[:1] if (side := graph.dequantizer(t)) is not None}
    if kinds & set(_NARROW):
        return f"there is no kernel for {', '.join(sorted(kinds))}", "use 8 bits"
    if node.op_type in ("Conv", "Add", "AveragePool", "GlobalAveragePool"):
        behind, clipped = readers, False
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            behind, clipped = graph.readers(readers[0].output[0]), True
        if len(behind) != 1 or behind[0].op_type != QUANTIZE:
            return "no QuantizeLinear follows as its only reader", "quantize its result"
        if clipped:
            return (
                "a Relu or Clip stands before a zero point that is not the type's minimum",
                "limit the integers instead",
            )
    if node.op_type == "MatMul" and readers and readers[0].op_type == "Add":
        return "the product and a bias [N] are fused to a float Gemm", "store the bias as [1, 1, N], or write Sum"
    if "INT8" in types:
        return "activations are int8", "use uint8 activations on x86"
    return "no fusion takes it", "see the table of fusions in the guide"


def _dropped_relus(graph: LintGraph) -> list[Finding]:
    """A Relu before a quantizer of 4 bits or fewer is left out by ONNX Runtime even where the zero point is in the middle."""
    found = []
    for node in graph.nodes("Relu"):
        for quantize in graph.readers(node.output[0]):
            if quantize.op_type != QUANTIZE or graph.integer_type(quantize) not in _NARROW:
                continue
            zero_point = graph.constant(quantize.input[2]) if len(quantize.input) > 2 else None
            kind = graph.integer_type(quantize)
            lowest = 0 if kind.startswith("U") else -(2 ** (int(kind[3:]) - 1))
            if zero_point is None or (np.asarray(zero_point, np.int64) != lowest).any():
                rule = "Relu before a quantizer of fewer than 8 bits is dropped: results are wrong"
                advice = "use a zero point at the type's minimum, or 8 bits"
                found.append(Finding("error", graph.name(node), rule, kind, advice))
    return found


def _openvino_rules(graph: LintGraph) -> list[Finding]:
    found = []
    for node in graph.nodes(DEQUANTIZE):
        if graph.integer_type(node) not in ("INT4", "UINT4") or len(node.input) < 3 or not node.input[2]:
            continue
        zero_point = graph.constant(node.input[2])
        if zero_point is not None and not np.asarray(zero_point, np.int64).any():
            rule = "symmetric 4-bit weights need no zero point: with one they run at half the speed"
            found.append(Finding("warning", graph.name(node), rule, "a zero point of zeros", "leave it out"))
    for node in graph.nodes(QUANTIZE):
        if graph.integer_type(node) in ("INT16", "UINT16"):
            rule = "OpenVINO rounds 16-bit activations in another way: results are not the file's"
            found.append(Finding("error", graph.name(node), rule, graph.integer_type(node), "use 8 bits"))
    return found
