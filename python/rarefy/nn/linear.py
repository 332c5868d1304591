"""A linear layer with fake-quantized input and weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import WeightedLayer


class LinearLayer(WeightedLayer):
    """What linear layers share, whichever way their weight lies: ``channel_axis`` is that of the output features."""

    quantizes_output = False
    _integer_devices = ("cpu", "cuda")

    def _input_axis(self, dims: int) -> int | None:
        return dims - 1

    def _by_input(self, values: Tensor) -> Tensor:
        return values.unsqueeze(self.channel_axis)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.channel_axis == 1 else weight, bias)

    def _compute_integer(
        self,
        x: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        grids: tuple[object, ...],
        relu: bool,
    ) -> Tensor:
        transposed, bf16 = self.channel_axis == 1, self.gradient_dtype is torch.bfloat16
        return torch.ops.rarefy.integer_linear(x, weight, bias, *grids, transposed, relu, bf16, None)


class Linear(LinearLayer, nn.Linear):
    """``torch.nn.Linear`` in quantization-aware training: x [..., in] to [..., out].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Linear``, whose Parameter objects it keeps.
    """
