"""A linear layer that stores its weight transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.nn._base import WeightedLayer


class TransposedLinear(WeightedLayer):
    """A linear layer whose weight is [in, out], as Hugging Face's ``Conv1D`` (GPT-2) stores it: x [..., in] to [..., out].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from a ``transformers.pytorch_utils.Conv1D``, whose
    Parameter objects, names and layout it keeps.
    """

    quantizes_output = False
    channel_axis = 1
    _integer_devices = ("cpu", "cuda")

    nx: int
    nf: int

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t(), bias)

    def _compute_integer(
        self,
        x: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        grids: tuple[object, ...],
        relu: bool,
    ) -> Tensor:
        bf16 = self.gradient_dtype is torch.bfloat16
        return torch.ops.rarefy.integer_linear(x, weight, bias, *grids, True, relu, bf16, None)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
