"""What the quantized layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import Latest
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig


class QuantState(nn.Module):
    """The fake quantizers of one layer: its child ``quant``. A name that is absent stays in floating point."""

    input: FakeQuantizer | None
    input0: FakeQuantizer | None
    input1: FakeQuantizer | None
    weight: FakeQuantizer | None
    output: FakeQuantizer | None

    def __init__(self, **quantizers: FakeQuantizer) -> None:
        super().__init__()
        for name in ("input", "input0", "input1", "weight", "output"):
            if name in quantizers:
                self.add_module(name, quantizers[name])
            else:
                self.__dict__[name] = None


class IntegerWeight(NamedTuple):
    """A trained weight as it is deployed."""

    values: Tensor  #: int8, shape of the weight
    scale: Tensor  #: float32, [out] or [1]
    zero_point: Tensor  #: int32, zeros, shape of scale
    axis: int | None  #: 0 per output channel, None per tensor
    bias: Tensor | None  #: float32 [out]


def activation_quantizer(config: QConfig) -> FakeQuantizer:
    """A quantizer of the configuration's activations."""
    assert config.activation is not None
    return FakeQuantizer(config.activation, config.observer)


class WeightedLayer(nn.Module):
    """A layer with a weight that is fake-quantized: the methods that Linear, Conv2d and ConvBn2d share."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    quant: QuantState
    relu: bool

    def _attach(self, config: QConfig, relu: bool, quantize_output: bool) -> None:
        assert config.weight is not None
        quantizers = {}
        if config.activation is not None:
            quantizers["input"] = activation_quantizer(config)
        quantizers["weight"] = FakeQuantizer(config.weight, Latest(), self.weight.shape[0])
        if quantize_output and config.activation is not None:
            quantizers["output"] = activation_quantizer(config)
        self.quant = QuantState(**quantizers).to(self.weight.device)
        self.quant.train(self.training)
        self.relu = relu

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The float weight and bias that are quantized."""
        return self.weight, self.bias

    @torch.no_grad()
    def integer_weight(self) -> IntegerWeight:
        """The trained integers, with batch normalization folded in where there is one."""
        weight, bias = self.folded()
        quantizer = self.quant.weight
        assert quantizer is not None
        if quantizer.observe:
            quantizer(weight)
        values = quantizer.quantize_to_integer(weight)
        bias = None if bias is None else bias.detach().float().clone()
        return IntegerWeight(values, quantizer.scale.clone(), quantizer.zero_point.clone(), quantizer.axis, bias)

    def _quantized_input(self, x: Tensor) -> Tensor:
        quantizer = self.quant.input
        return x if quantizer is None else quantizer(x)

    def _finish(self, y: Tensor) -> Tensor:
        if self.relu:
            # Not relu, which keeps its result for the backward pass: the model's own ReLU still follows, and may be in place.
            y = F.threshold(y, 0.0, 0.0)
        quantizer = self.quant.output
        return y if quantizer is None else quantizer(y)
