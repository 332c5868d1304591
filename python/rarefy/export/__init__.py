"""Deployment formats.

>>> report = rf.export.to_onnx(model, example_inputs, "model.onnx")
"""

from rarefy.export.onnx import to_onnx
from rarefy.export.report import Difference, ExportReport, Operator

__all__ = ["Difference", "ExportReport", "Operator", "to_onnx"]
