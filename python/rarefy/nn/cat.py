"""Concatenation with one scale for all inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.nn._base import QuantizableLayer, QuantState, activation_quantizer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig


class Cat(QuantizableLayer):
    """``torch.cat`` as a module, so that all its inputs share one scale and zero point.

    Floating point until ``prepare_qat`` or ``prepare``; then every input is quantized with the parameters of
    ``quant.input``, whose range covers all of them, so that concatenating moves integers and changes none.

    Args:
        dim: the dimension along which the inputs are joined.
    """

    fuses_relu = False
    quantizes_output = False  # the result lies on the grid of the inputs

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.relu = False
        self.quant = QuantState()

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        return {"input": activation_quantizer(config)}

    def forward(self, *tensors: Tensor) -> Tensor:
        """The inputs, one or more of equal size but in ``dim``, one after the other."""
        # Rounding what was joined is joining what was rounded, in one pass and with the range of all.
        joined = torch.cat(tensors, self.dim)
        return joined if self.quant.input is None else self.quant.input(joined)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"
