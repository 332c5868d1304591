"""Quantization: schemes, fake quantizers, quantization-aware training, calibration, integer execution."""

from rarefy._core.quantization import (
    MSE,
    SQNR,
    HalfQuadratic,
    Histogram,
    Latest,
    MeanNoOutliers,
    MinMax,
    MovingAverage,
    Percentile,
    PerChannel,
    PerTensor,
    Scheme,
)
from rarefy.quantization.batch_norm import freeze_batch_norm, reestimate_batch_norm
from rarefy.quantization.checkpoint import checkpoint_context
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.prepare import calibrate, convert, prepare, prepare_qat, set_state
from rarefy.quantization.qconfig import QConfig
from rarefy.quantization.report import LayerReport, QuantizationReport, report
from rarefy.quantization.saved import load_quantized, save_quantized
from rarefy.quantization.schedule import QATSchedule
from rarefy.quantization.state import load_float_state_dict
from rarefy.quantization.statistics import load_statistics, save_statistics

__all__ = [
    "MSE",
    "SQNR",
    "FakeQuantizer",
    "HalfQuadratic",
    "Histogram",
    "Latest",
    "LayerReport",
    "MeanNoOutliers",
    "MinMax",
    "MovingAverage",
    "PerChannel",
    "PerTensor",
    "Percentile",
    "QATSchedule",
    "QConfig",
    "QuantizationReport",
    "Scheme",
    "calibrate",
    "checkpoint_context",
    "convert",
    "freeze_batch_norm",
    "load_float_state_dict",
    "load_quantized",
    "load_statistics",
    "prepare",
    "prepare_qat",
    "reestimate_batch_norm",
    "report",
    "save_quantized",
    "save_statistics",
    "set_state",
]
