"""A linear layer with fake-quantized input and weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import WeightedLayer


class Linear(WeightedLayer, nn.Linear):
    """``torch.nn.Linear`` in quantization-aware training: x [..., in] to [..., out].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Linear``, whose Parameter objects it keeps.
    """

    quantizes_output = False

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)
