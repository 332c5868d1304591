"""Quantization: schemes, fake quantizers, quantization-aware training, calibration, integer execution."""

from rarefy._core.quantization import (
    MSE,
    MX,
    NF4,
    NVFP4,
    SQNR,
    Binary,
    Codebook,
    HalfQuadratic,
    Histogram,
    Integer,
    Latest,
    MeanNoOutliers,
    Minifloat,
    MinMax,
    MovingAverage,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizedTensorParts,
    Scheme,
    Ternary,
    part_names,
    quantize_to,
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
    "MX",
    "NF4",
    "NVFP4",
    "SQNR",
    "Binary",
    "Codebook",
    "FakeQuantizer",
    "HalfQuadratic",
    "Histogram",
    "Integer",
    "Latest",
    "LayerReport",
    "MeanNoOutliers",
    "MinMax",
    "Minifloat",
    "MovingAverage",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
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
    "part_names",
    "prepare",
    "prepare_qat",
    "quantize_to",
    "reestimate_batch_norm",
    "report",
    "save_quantized",
    "save_statistics",
    "set_state",
]
