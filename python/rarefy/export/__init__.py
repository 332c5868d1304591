"""Deployment formats.

>>> report = rf.export.to_onnx(model, example_inputs, "model.onnx")
>>> report = rf.export.to_executorch(model, example_inputs, "model.pte")
>>> rf.export.lint("model.onnx", target="tensorrt")
"""

from rarefy.export.coreml import to_coreml
from rarefy.export.executorch import to_executorch
from rarefy.export.lint import Finding, LintReport, lint, lint_tensorrt
from rarefy.export.litert import to_litert
from rarefy.export.onnx import to_onnx
from rarefy.export.openvino import to_openvino
from rarefy.export.report import Difference, ExportReport, NodeCheck, Operator, Overflow

__all__ = [
    "Difference",
    "ExportReport",
    "Finding",
    "LintReport",
    "NodeCheck",
    "Operator",
    "Overflow",
    "lint",
    "lint_tensorrt",
    "to_coreml",
    "to_executorch",
    "to_litert",
    "to_onnx",
    "to_openvino",
]
