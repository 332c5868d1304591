"""The elementwise product."""

from __future__ import annotations

from torch import Tensor

from rarefy.nn._base import PairLayer


class Mul(PairLayer):
    """``a * b`` as a module, so that a gate or a scaling can be quantized.

    Floating point until ``prepare_qat`` or ``prepare``; then both inputs are quantized, each with its own parameters
    (``quant.input0``, ``quant.input1``), as integer runtimes do.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of two tensors of one shape, or broadcastable."""
        a, b = self._quantized_inputs(a, b)
        return self._finish(a * b)
