"""Deployment formats.

>>> report = rf.export.to_onnx(model, example_inputs, "model.onnx")
"""

from rarefy.export.onnx import to_onnx
from rarefy.export.report import Difference, ExportReport, Operator, Overflow

__all__ = ["Difference", "ExportReport", "Operator", "Overflow", "to_onnx"]
