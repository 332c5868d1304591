"""Layers that execute in integers: what ``rarefy.quantization.convert`` makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import QuantState, WeightedLayer
from rarefy.nn.conv import ConvLayer
from rarefy.nn.dequantized import DequantizedWeight
from rarefy.nn.embedding import Embedding, EmbeddingBag, TableLayer, reduce_bags
from rarefy.nn.linear import Linear
from rarefy.nn.transposed_linear import TransposedLinear
from rarefy.quantization.fake_quantizer import FakeQuantizer


class IntegerLayer(nn.Module):
    """What ``convert`` makes: a layer that executes in integers and gives floats, or bytes to the layers that read it.

    Its input is floating point, or uint8 that lies on the layer's input grid already.
    """

    quant: QuantState
    relu: bool
    target: str | None = None  #: as in QConfig

    def _output(self) -> tuple[Tensor, Tensor, int, int] | tuple[()]:
        """The grid of the bytes that are handed on, as the operators take it."""
        grid = self.quant.next
        return () if grid is None else (grid.scale, grid.zero_point, grid.qmin, grid.qmax)

    def _finish(self, y: Tensor) -> Tensor:
        return y if self.quant.output is None else self.quant.output(y)


def grid_arguments(quantizer: FakeQuantizer) -> tuple[Tensor, Tensor, int, int]:
    """A quantizer's grid as the operators take it."""
    return quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax


class QuantizedLayer(IntegerLayer):
    """An int8 weight, a float bias, and the parameters of input and weight under ``quant``.

    ``integer_weight`` are the integers: the buffer that ``state_dict`` calls ``weight``. The attribute ``weight`` is what
    they stand for, in float32, so that a model which reads it (its dtype, say, to cast an input to) goes on to work.
    """

    bias: Tensor | None

    def __init__(self, layer: WeightedLayer) -> None:
        super().__init__()
        integers = layer.integer_weight()
        self._buffers["weight"] = integers.values  # register_buffer refuses a name that is a property
        self.register_buffer("bias", integers.bias)
        self.quant = layer.quant
        self.relu = layer.relu
        self.channel_axis = layer.channel_axis
        self.target = layer.target
        self.train(layer.training)

    @property
    def integer_weight(self) -> Tensor:
        """The integers: int8, in the shape of the weight."""
        weight = self._buffers["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for: ``integer_weight * scale``, float32, computed when it is used."""
        if torch.compiler.is_compiling():  # a compiler drops by itself what nobody uses
            return self._dequantized_weight()
        return DequantizedWeight(self.integer_weight, self._broadcast_scale())

    def __setattr__(self, name: str, value: object) -> None:
        # Module would put any tensor into the buffer. Integers may be set: load_state_dict(assign=True) does.
        if name == "weight" and not (isinstance(value, Tensor) and value.dtype == torch.int8):
            raise AttributeError(
                f"[{type(self).__name__}] weight is computed from integer_weight and cannot be set, got "
                f"{value.dtype if isinstance(value, Tensor) else type(value).__name__}"
            )
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def _broadcast_scale(self) -> Tensor:
        assert self.quant.weight is not None
        shape = [1] * self.integer_weight.dim()
        shape[self.channel_axis] = -1
        return self.quant.weight.scale.view(shape)

    def _dequantized_weight(self) -> Tensor:
        return self.integer_weight.float() * self._broadcast_scale()

    def _weighted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scale and bias as the operators take them."""
        assert self.quant.weight is not None
        return self.integer_weight, self.quant.weight.scale, self.bias


class QuantizedLinear(QuantizedLayer):
    """A linear layer on int8 kernels: x [..., in] to [..., out]. For inference."""

    def __init__(self, layer: Linear | TransposedLinear) -> None:
        super().__init__(layer)
        self.out_features, self.in_features = self._out_in(self.integer_weight).shape

    def _out_in(self, weight: Tensor) -> Tensor:
        return weight if self.channel_axis == 0 else weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """The layer in integers; with float input where the activation was not quantized."""
        quantizer = self.quant.input
        if quantizer is None:
            y = F.linear(x, self._out_in(self._dequantized_weight()), self.bias)
            return self._finish(torch.relu(y) if self.relu else y)
        weight, *rest = self._weighted()
        grid = grid_arguments(quantizer)
        return self._finish(
            torch.ops.rarefy.quantized_linear(x, self._out_in(weight), *rest, *grid, self.relu, *self._output())
        )

    def extra_repr(self) -> str:
        """Sizes and what is fused."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, relu={self.relu}"


class QuantizedConv(QuantizedLayer):
    """What the integer convolutions of all dimensions share."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        # The attributes of torch's convolution, which models read (to pad as TensorFlow does, say).
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.geometry = layer.geometry()

    def forward(self, x: Tensor) -> Tensor:
        """The layer in integers; with float input where the activation was not quantized."""
        if x.dim() == self.integer_weight.dim() - 1:  # one sample without a batch dimension
            return self.forward(x.unsqueeze(0)).squeeze(0)
        quantizer = self.quant.input
        if quantizer is None:
            y = self.geometry.convolve(x, self._dequantized_weight(), self.bias)
            return self._finish(torch.relu(y) if self.relu else y)
        stride, padding, dilation, groups, _, mode = self.geometry
        if mode == "constant":  # the operator knows which byte stands for 0
            padding = self.geometry.zeros
        else:
            x = self.geometry.padded(x)
        movement = (stride, padding, dilation, groups)
        grid = grid_arguments(quantizer)
        return self._finish(
            torch.ops.rarefy.quantized_conv(x, *self._weighted(), *grid, *movement, self.relu, *self._output())
        )

    def extra_repr(self) -> str:
        """Sizes and what is fused."""
        stride, padding, dilation, groups, pad, mode = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={stride}, "
            f"padding={pad if pad else padding} {mode}, dilation={dilation}, groups={groups}, "
            f"bias={self.bias is not None}, relu={self.relu}"
        )


class QuantizedConv1d(QuantizedConv):
    """A convolution on int8 kernels: x [N, in, L] to [N, out, l]. For inference."""


class QuantizedConv2d(QuantizedConv):
    """A convolution on int8 kernels: x [N, in, H, W] to [N, out, h, w]. For inference."""


class QuantizedConv3d(QuantizedConv):
    """A convolution on int8 kernels: x [N, in, D, H, W] to [N, out, d, h, w]. For inference."""


class QuantizedTable(QuantizedLayer):
    """A table of int8 rows, each with its scale."""

    def __init__(self, layer: TableLayer) -> None:
        super().__init__(layer)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def _rows(self, indices: Tensor) -> Tensor:
        """The rows of the indices, in floating point."""
        assert self.quant.weight is not None
        scale = self.quant.weight.scale
        if self.quant.weight.axis is not None:
            scale = scale[indices].unsqueeze(-1)
        return F.embedding(indices, self.integer_weight).float() * scale

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class QuantizedEmbedding(QuantizedTable):
    """A table of int8 rows, each with its scale: indices of any shape to [..., embedding_dim] (float32)."""

    def __init__(self, layer: Embedding) -> None:
        super().__init__(layer)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows of the indices, in floating point."""
        return self._rows(indices)


class QuantizedEmbeddingBag(QuantizedTable):
    """Sums, means or largest values of int8 rows, each with its scale: [bags, embedding_dim] (float32)."""

    def __init__(self, layer: EmbeddingBag) -> None:
        super().__init__(layer)
        self.mode, self.include_last_offset = layer.mode, layer.include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        options = (self.mode, self.include_last_offset, self.padding_idx)
        return reduce_bags(self._rows(input.reshape(-1)), input, offsets, per_sample_weights, *options)
