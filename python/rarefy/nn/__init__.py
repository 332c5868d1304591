"""Layers: in quantization-aware training (Linear, Conv2d, ConvBn2d, Add) and in integers (QuantizedLinear, ...)."""

from rarefy.nn._base import IntegerWeight, QuantState, WeightedLayer
from rarefy.nn.add import Add
from rarefy.nn.conv import Conv2d, ConvBn2d, FoldedBatchNorm2d
from rarefy.nn.linear import Linear
from rarefy.nn.quantized import QuantizedConv2d, QuantizedLinear

__all__ = [
    "Add",
    "Conv2d",
    "ConvBn2d",
    "FoldedBatchNorm2d",
    "IntegerWeight",
    "Linear",
    "QuantState",
    "QuantizedConv2d",
    "QuantizedLinear",
    "WeightedLayer",
]
