"""Operations of several tensors that execute on integers: what ``rarefy.quantization.convert`` makes of Add and Cat."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.nn.add import Add
from rarefy.nn.cat import Cat
from rarefy.nn.quantized import IntegerLayer, grid_arguments


class QuantizedAdd(IntegerLayer):
    """``a + b`` of two tensors, each on its grid (``quant.input0``, ``quant.input1``), in one pass over their bytes."""

    def __init__(self, layer: Add) -> None:
        super().__init__()
        self.quant = layer.quant
        self.relu, self.target = layer.relu, layer.target
        self.train(layer.training)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of two tensors of one shape, or broadcastable."""
        first, second = self.quant.input0, self.quant.input1
        assert first is not None
        assert second is not None
        grids = (*grid_arguments(first), *grid_arguments(second))
        return self._finish(torch.ops.rarefy.quantized_add(a, b, *grids, self.relu, *self._output()))

    def extra_repr(self) -> str:
        """What is fused."""
        return f"relu={self.relu}"


class QuantizedCat(IntegerLayer):
    """``torch.cat`` of tensors that share the grid ``quant.input``: bytes are moved and none changes."""

    def __init__(self, layer: Cat) -> None:
        super().__init__()
        self.quant = layer.quant
        self.dim, self.relu, self.target = layer.dim, layer.relu, layer.target
        self.train(layer.training)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The inputs, one or more of equal size but in ``dim``, one after the other."""
        assert self.quant.input is not None
        grid = grid_arguments(self.quant.input)
        requantize = torch.ops.rarefy.requantize
        if any(x.dtype is torch.uint8 for x in tensors):
            tensors = tuple(x if x.dtype is torch.uint8 else requantize(x, *grid, *grid) for x in tensors)
        return requantize(torch.cat(tensors, self.dim), *grid, *self._output())

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"
