"""The residual addition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import QuantState, activation_quantizer
from rarefy.quantization.qconfig import QConfig


class Add(nn.Module):
    """``a + b`` as a module, so that a residual addition can be quantized.

    Floating point until ``prepare_qat`` or ``prepare``; then both inputs are quantized, each with its own parameters
    (``quant.input0``, ``quant.input1``), as integer runtimes do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu = False
        self.quant = QuantState()

    @classmethod
    def from_float(cls, module: Add, config: QConfig, *, relu: bool = False, quantize_output: bool = False) -> Add:
        """A quantized addition."""
        layer = cls()
        if config.activation is not None:
            names = ["input0", "input1", *(["output"] if quantize_output else [])]
            layer.quant = QuantState(**{name: activation_quantizer(config) for name in names})
            layer.relu = relu
        layer.train(module.training)
        return layer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two tensors of one shape, or broadcastable."""
        quant = self.quant
        if quant.input0 is not None and quant.input1 is not None:
            a, b = quant.input0(a), quant.input1(b)
        y = a + b
        if self.relu:
            y = F.threshold(y, 0.0, 0.0)  # as in WeightedLayer: an in-place ReLU may follow
        return y if quant.output is None else quant.output(y)
