"""The residual addition."""

from __future__ import annotations

from torch import Tensor

from rarefy.nn._base import QuantizableLayer, QuantState, activation_quantizer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig


class Add(QuantizableLayer):
    """``a + b`` as a module, so that a residual addition can be quantized.

    Floating point until ``prepare_qat`` or ``prepare``; then both inputs are quantized, each with its own parameters
    (``quant.input0``, ``quant.input1``), as integer runtimes do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu = False
        self.quant = QuantState()

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        return {name: activation_quantizer(config) for name in ("input0", "input1")}

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two tensors of one shape, or broadcastable."""
        quant = self.quant
        if quant.input0 is not None and quant.input1 is not None:
            a, b = quant.input0(a), quant.input1(b)
        return self._finish(a + b)
