"""A linear layer with fake-quantized input and weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import WeightedLayer
from rarefy.quantization.qconfig import QConfig


class Linear(WeightedLayer, nn.Linear):
    """``torch.nn.Linear`` in quantization-aware training: x [..., in] to [..., out].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Linear``, whose Parameter objects it keeps.
    """

    @classmethod
    def from_float(
        cls, module: nn.Linear, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Linear:
        """A quantized layer over the parameters of ``module``."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer._attach(config, relu, quantize_output)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the grids of its input and weight."""
        assert self.quant.weight is not None
        return self._finish(F.linear(self._quantized_input(x), self.quant.weight(self.weight), self.bias))
