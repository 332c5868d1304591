"""Layers: in quantization-aware training (Linear, Conv2d, ConvBn2d, Add, ...) and in integers (QuantizedLinear, ...)."""

from rarefy.nn._base import IntegerWeight, QuantizableLayer, QuantState, WeightedLayer
from rarefy.nn.add import Add
from rarefy.nn.conv import Conv1d, Conv2d, Conv3d, ConvLayer
from rarefy.nn.conv_bn import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnLayer,
    FoldedBatchNorm,
    FoldedBatchNorm1d,
    FoldedBatchNorm2d,
    FoldedBatchNorm3d,
)
from rarefy.nn.linear import Linear
from rarefy.nn.quantized import QuantizedConv2d, QuantizedLinear

__all__ = [
    "Add",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnLayer",
    "ConvLayer",
    "FoldedBatchNorm",
    "FoldedBatchNorm1d",
    "FoldedBatchNorm2d",
    "FoldedBatchNorm3d",
    "IntegerWeight",
    "Linear",
    "QuantState",
    "QuantizableLayer",
    "QuantizedConv2d",
    "QuantizedLinear",
    "WeightedLayer",
]
