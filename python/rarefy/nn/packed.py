"""Layers whose weight stays as a format stores it: what ``rarefy.quantization.convert`` makes of weights without integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import QuantizedTensorParts, Scheme, part_names
from rarefy.nn._base import QuantState, WeightedLayer
from rarefy.nn.conv import ConvLayer
from rarefy.nn.conv_transpose import ConvTransposeLayer, weight_by_group
from rarefy.nn.dequantized import DequantizedWeight
from rarefy.nn.embedding import Embedding, EmbeddingBag, TableLayer, reduce_bags
from rarefy.nn.linear import LinearLayer

if TYPE_CHECKING:
    from collections.abc import Sequence


class UnpackedWeight(DequantizedWeight):
    """The numbers that codes and scales stand for, computed when somebody computes with them: to be read, not written."""

    _unpack: Callable[[], Tensor]

    @staticmethod
    def __new__(  # type: ignore[override]
        cls, unpack: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> UnpackedWeight:
        """A tensor without storage of its own."""
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._unpack = unpack
        return weight

    @staticmethod
    def _numbers(weight: DequantizedWeight) -> Tensor:
        assert isinstance(weight, UnpackedWeight)
        return weight._unpack()


class PackedLayer(nn.Module):
    """A weight as codes and scales, in the buffers ``weight_data``, ``weight_scale`` and what else its format has
    (``rarefy.quantization.part_names``), and a bias as it was trained.

    It computes what the prepared layer computes: the numbers of the weight are the same, bit for bit. They are made a few rows
    at a time where the layer allows (linear layers, tables), and take no memory between calls. Inputs keep their quantizers
    (``quant.input``). The attribute ``weight`` is what the codes stand for, for models that read it.
    """

    bias: Tensor | None
    quant: QuantState
    relu: bool
    target: str | None = None  #: as in QConfig

    def __init__(self, layer: WeightedLayer) -> None:
        super().__init__()
        parts, bias = layer.packed_weight()
        self._hold(parts)
        self.register_buffer("bias", bias)
        self.quant = QuantState(**{name: q for name, q in layer.quant.named_children() if name != "weight"})
        self.relu, self.target, self.channel_axis = layer.relu, layer.target, layer.channel_axis
        self.train(layer.training)

    def _hold(self, parts: QuantizedTensorParts) -> None:
        self.scheme: Scheme = parts.scheme
        self.weight_shape, self.weight_dtype = tuple(parts.shape), parts.dtype
        # Plain Python values, so that forward reads no bound object and torch.compile sees constants.
        self._names = tuple(f"weight_{name}" for name in part_names(parts.scheme))
        self._form = (parts.scheme.to_json(), list(parts.shape), parts.dtype)
        for name in self._names:
            self.register_buffer(name, parts.tensors[name.removeprefix("weight_")])

    def stored(self) -> QuantizedTensorParts:
        """The weight as ``quantize_to`` gave it: without the layout of ``weight``, where that differs."""
        tensors = {name.removeprefix("weight_"): self._buffers[name] for name in self._names}
        return QuantizedTensorParts(self.scheme, self.weight_shape, self.weight_dtype, tensors)

    def parts(self) -> list[Tensor]:
        """The buffers of the weight, as the operators take them."""
        return [self._buffers[name] for name in self._names]  # type: ignore[misc]

    @property
    def weight_bytes(self) -> int:
        """What the weight takes."""
        return sum(part.numel() * part.element_size() for part in self.parts())

    @property
    def bits_per_value(self) -> float:
        """The same for each of its values, scales included."""
        return 8 * self.weight_bytes / max(1, torch.Size(self.weight_shape).numel())

    def unpacked(self) -> Tensor:
        """The whole weight as numbers, in the shape and type of the float layer's."""
        return self._as_stored(torch.ops.rarefy.dequantize_packed(self.parts(), *self._form))

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, computed when it is used."""
        if torch.compiler.is_compiling():  # a compiler drops by itself what nobody uses
            return self.unpacked()
        return UnpackedWeight(self.unpacked, self._stored_shape(), self.weight_dtype, self.parts()[0].device)

    def _stored_shape(self) -> tuple[int, ...]:
        return self.weight_shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        # Codes and scales move between devices and keep their types; the numbers that they stand for take the bias's.
        packed = {name: self._buffers.pop(name) for name in self._names}
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            assert tensor is not None
            self._buffers[name] = tensor if tensor.is_meta else tensor.to(fn(tensor.new_empty(0)).device)
        kind = fn(torch.empty(0, dtype=self.weight_dtype, device=self.parts()[0].device)).dtype
        self.weight_dtype, self._form = kind, (*self._form[:2], kind)
        return self

    def _input(self, x: Tensor) -> Tensor:
        return x if self.quant.input is None else self.quant.input(x)

    def _finish(self, y: Tensor) -> Tensor:
        y = torch.relu(y) if self.relu else y
        return y if self.quant.output is None else self.quant.output(y)

    def _sizes(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes, format and bytes."""
        return f"{self._sizes()}, {self.scheme}, {self.weight_bytes} bytes ({self.bits_per_value:.2f} bits per value)"


class PackedLinear(PackedLayer):
    """A linear layer with a packed weight: x [..., in] to [..., out]. Gradients reach x and the bias."""

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__(layer)
        rows, columns = self.weight_shape
        self.out_features, self.in_features = (columns, rows) if self.channel_axis == 1 else (rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, with the numbers of its weight."""
        x = self._input(x)
        if self.channel_axis == 1:  # stored as [in, out]
            return self._finish(F.linear(x, self.unpacked().t(), self.bias))
        return self._finish(torch.ops.rarefy.packed_linear(x, self.parts(), self.bias, *self._form))

    def _sizes(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class PackedConv(PackedLayer):
    """A convolution with a packed weight, of one to three dimensions."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        # The attributes of torch's convolution, which models read.
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.geometry = layer.geometry()

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, with the numbers of its weight."""
        return self._finish(self.geometry.convolve(self._input(x), self.unpacked(), self.bias))

    def _sizes(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}"


class PackedConv1d(PackedConv):
    """A convolution with a packed weight: x [N, in, L] to [N, out, l]."""


class PackedConv2d(PackedConv):
    """A convolution with a packed weight: x [N, in, H, W] to [N, out, h, w]."""


class PackedConv3d(PackedConv):
    """A convolution with a packed weight: x [N, in, D, H, W] to [N, out, d, h, w]."""


class PackedConvTranspose(PackedLayer):
    """A transposed convolution with a packed weight, of one to three dimensions."""

    def __init__(self, layer: ConvTransposeLayer) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.output_padding = layer.dilation, layer.output_padding
        self.movement = layer.movement()

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight_by_group(weight, self.groups)

    def _stored_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As ``nn.ConvTranspose2d.forward``, with the numbers of the weight."""
        movement = self.movement.for_size(x, self.kernel_size, output_size)
        return self._finish(movement.convolve(self._input(x), self.unpacked(), self.bias))

    def _sizes(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}"


class PackedConvTranspose1d(PackedConvTranspose):
    """A transposed convolution with a packed weight: x [N, in, L]."""


class PackedConvTranspose2d(PackedConvTranspose):
    """A transposed convolution with a packed weight: x [N, in, H, W]."""


class PackedConvTranspose3d(PackedConvTranspose):
    """A transposed convolution with a packed weight: x [N, in, D, H, W]."""


class PackedTable(PackedLayer):
    """A table with packed rows: only those that are looked up become numbers."""

    def __init__(self, layer: TableLayer) -> None:
        super().__init__(layer)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def _rows(self, indices: Tensor) -> Tensor:
        return torch.ops.rarefy.packed_embedding(indices, self.parts(), *self._form)

    def _sizes(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class PackedEmbedding(PackedTable):
    """A table with packed rows: indices of any shape to [..., embedding_dim]."""

    def __init__(self, layer: Embedding) -> None:
        super().__init__(layer)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows of the indices."""
        return self._rows(indices)


class PackedEmbeddingBag(PackedTable):
    """Sums, means or largest values of packed rows: [bags, embedding_dim]."""

    def __init__(self, layer: EmbeddingBag) -> None:
        super().__init__(layer)
        self.mode, self.include_last_offset = layer.mode, layer.include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        options = (self.mode, self.include_last_offset, self.padding_idx)
        return reduce_bags(self._rows(input.reshape(-1)), input, offsets, per_sample_weights, *options)


def share_packed(model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Let the packed layers of each group, which quantized one Parameter, hold one set of buffers where these are equal."""
    for group in groups:
        kept: list[PackedLayer] = []
        for layer in (model.get_submodule(name) for name in group):
            if not isinstance(layer, PackedLayer):
                continue
            form = (layer._form, layer.channel_axis)
            equal = next(
                (
                    other
                    for other in kept
                    if (other._form, other.channel_axis) == form
                    and all(_same(a, b) for a, b in zip(layer.parts(), other.parts(), strict=True))
                ),
                None,
            )
            if equal is None:
                kept.append(layer)
                continue
            for name in layer._names:
                layer._buffers[name] = equal._buffers[name]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
