"""Recurrent layers that execute in integers: what ``rarefy.quantization.convert`` makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.nn.quantized import IntegerLayer, grid_arguments
from rarefy.nn.recurrent import (
    Direction,
    GRUCellForward,
    GRUForward,
    LSTMCellForward,
    LSTMForward,
    RecurrentLayer,
    Run,
)


class QuantizedRecurrent(Run, IntegerLayer):
    """int8 weights, float biases, and the parameters of inputs, hidden states and weights under ``quant``.

    The buffers have the names of the parameters that they come from: ``weight_ih_l0``, ...
    """

    def __init__(self, layer: RecurrentLayer) -> None:
        super().__init__()
        self.sizes = layer.sizes
        # The attributes of torch's recurrent layers, which models read.
        self.input_size, self.hidden_size, self.num_layers = self.sizes.input_size, self.sizes.hidden_size, 1
        if not self.sizes.is_cell:
            self.num_layers, self.batch_first = self.sizes.num_layers, self.sizes.batch_first
            self.bidirectional, self.dropout, self.proj_size = self.sizes.bidirectional, self.sizes.dropout, 0
        for name, tensor in layer.integer_tensors().items():
            self.register_buffer(name, tensor)
        self.quant = layer.quant
        self.relu, self.target = False, layer.target
        self.train(layer.training)

    def flatten_parameters(self) -> None:
        """Nothing: integer weights have no other layout."""

    def _scale(self, name: str) -> Tensor:
        quantizer = self.quant.find(name)
        assert quantizer is not None
        return quantizer.scale

    def _bias(self, part: str, direction: Direction) -> Tensor | None:
        return getattr(self, f"bias_{part}{direction.suffix}") if self.sizes.bias else None

    def _dequantized(self, name: str) -> Tensor:
        return getattr(self, name).float() * self._scale(name).view(-1, 1)

    def _layer_input(self, rows: Tensor, layer: str) -> Tensor:
        quantizer = self.quant.find(f"input{layer}")
        if quantizer is None:
            return rows
        grid = grid_arguments(quantizer)
        return torch.ops.rarefy.requantize(rows, *grid, *grid)  # once for both directions

    def _input_gates(self, x: Tensor, direction: Direction) -> Tensor:
        name, quantizer = f"weight_ih{direction.suffix}", self.quant.find(f"input{direction.layer}")
        bias = self._bias("ih", direction)
        if quantizer is None:
            return F.linear(x, self._dequantized(name), bias)
        weighted = (getattr(self, name), self._scale(name), bias)
        return torch.ops.rarefy.quantized_linear(x, *weighted, *grid_arguments(quantizer), False)

    def _hidden(self, direction: Direction) -> tuple[object, ...]:
        name, quantizer = f"weight_hh{direction.suffix}", self.quant.find(f"hidden{direction.suffix}")
        bias = self._bias("hh", direction)
        if quantizer is None:
            return self._dequantized(name), None, bias, None, None, 0, 255
        return getattr(self, name), self._scale(name), bias, *grid_arguments(quantizer)

    def extra_repr(self) -> str:
        """Sizes."""
        shown = f"{self.sizes.input_size}, {self.sizes.hidden_size}"
        if self.sizes.is_cell:
            return shown
        return f"{shown}, num_layers={self.sizes.num_layers}, bidirectional={self.sizes.bidirectional}"


class QuantizedLSTM(LSTMForward, QuantizedRecurrent):
    """``torch.nn.LSTM`` on int8 kernels, with its arguments, packed sequences included. For inference."""


class QuantizedGRU(GRUForward, QuantizedRecurrent):
    """``torch.nn.GRU`` on int8 kernels, with its arguments, packed sequences included. For inference."""


class QuantizedLSTMCell(LSTMCellForward, QuantizedRecurrent):
    """``torch.nn.LSTMCell`` on int8 kernels. For inference."""


class QuantizedGRUCell(GRUCellForward, QuantizedRecurrent):
    """``torch.nn.GRUCell`` on int8 kernels. For inference."""
