"""Quantization: schemes, fake quantizers, quantization-aware training, calibration, integer execution."""

from rarefy._core.quantization import (
    MX,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    Integer,
    Latest,
    Minifloat,
    MinMax,
    MovingAverage,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizedTensorParts,
    Scheme,
    Ternary,
    quantize_to,
    MSE,
    SQNR,
    HalfQuadratic,
    Histogram,
    MeanNoOutliers,
    Percentile,
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
    "MX",
    "NF4",
    "NVFP4",
    "Binary",
    "Codebook",
    "FakeQuantizer",
    "Integer",
    "MSE",
    "SQNR",
    "HalfQuadratic",
    "Histogram",
    "Latest",
    "LayerReport",
    "MeanNoOutliers",
    "MinMax",
    "Minifloat",
    "MovingAverage",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "Percentile",
    "PerTensor",
    "PerToken",
    "QATSchedule",
    "QConfig",
    "QuantizationReport",
    "QuantizedTensorParts",
    "Scheme",
    "Ternary",
    "calibrate",
    "checkpoint_context",
    "convert",
    "freeze_batch_norm",
    "load_float_state_dict",
    "load_quantized",
    "load_statistics",
    "prepare",
    "prepare_qat",
    "quantize_to",
    "reestimate_batch_norm",
    "report",
    "save_quantized",
    "save_statistics",
    "set_state",
]
