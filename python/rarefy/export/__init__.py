"""Deployment formats.

>>> report = rf.export.to_onnx(model, example_inputs, "model.onnx")
>>> rf.export.lint("model.onnx", target="tensorrt")
"""

from rarefy.export.lint import Finding, LintReport, lint, lint_tensorrt
from rarefy.export.onnx import to_onnx
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
    "to_onnx",
]
