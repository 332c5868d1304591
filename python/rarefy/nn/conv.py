"""Convolutions of 1, 2 and 3 dimensions with fake-quantized input and weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import WeightedLayer
from rarefy.quantization.qconfig import QConfig

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """How a convolution moves over its input, in numbers. ``pad`` comes first, by ``mode``; then the convolution itself."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  #: zeros, the same on both sides
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]  #: of ``F.pad``: last dimension first; empty when ``padding`` says everything
    mode: str  #: of ``F.pad``

    def padded(self, x: Tensor) -> Tensor:
        """``x`` with what the convolution does not pad by itself. Values on a grid stay on it, as it holds 0."""
        return F.pad(x, self.pad, self.mode) if self.pad else x

    @property
    def zeros(self) -> tuple[int, ...]:
        """The zeros around the input: a number for each dimension, or before and after each."""
        if not self.pad:
            return self.padding
        dims = len(self.stride)
        return tuple(self.pad[2 * (dims - 1 - i) + side] for i in range(dims) for side in (0, 1))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, in as many dimensions as the weight has."""
        function = _CONVOLVE[weight.dim() - 2]
        return function(self.padded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _sides(kernel_size: Sequence[int], dilation: Sequence[int], padding: str | Sequence[int]) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0) for _ in kernel_size]
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in padding]  # type: ignore[misc]


def geometry_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    """The geometry of a convolution, with paddings by name and padding modes spelled out."""
    sides = _sides(module.kernel_size, module.dilation, module.padding)
    by_itself = module.padding_mode == "zeros" and all(before == after for before, after in sides)
    padding = tuple(before if by_itself else 0 for before, _ in sides)
    pad = () if by_itself else tuple(amount for side in reversed(sides) for amount in side)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return Geometry(module.stride, padding, module.dilation, module.groups, pad, mode)


class ConvLayer(WeightedLayer):
    """What the convolutions of all dimensions share."""

    _integer_devices = ("cpu",)

    def geometry(self) -> Geometry:
        """How the layer moves over its input, in numbers."""
        return geometry_of(self)  # type: ignore[arg-type]

    def _input_axis(self, dims: int) -> int | None:
        return dims - self.weight.dim() + 1

    def _by_input(self, values: Tensor) -> Tensor:
        # Each group of outputs reads the inputs of its own group.
        rows = values.view(self.groups, -1)
        if self.groups > 1:
            rows = rows.repeat_interleave(self.out_channels // self.groups, 0)
        return rows.reshape(*rows.shape, *[1] * (self.weight.dim() - 2))

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        keeper = self._keeper
        layout = None if keeper is None else keeper.layout(x, self.stride)
        if keeper is not None and layout is not None:
            rounded = weight
            weight = keeper.get(layout, (rounded,), lambda: rounded.contiguous(memory_format=layout))
            x = x.contiguous(memory_format=layout)
        return self.geometry().convolve(x, weight, bias)

    def _why_never_integer(self, config: QConfig) -> str | None:
        if self.weight.dim() == 5 and self.groups > 1:
            return "there is no integer kernel for groups in three dimensions"
        return super()._why_never_integer(config)

    def _compute_integer(
        self,
        x: Tensor,
        weight: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        grids: tuple[object, ...],
        relu: bool,
    ) -> Tensor:
        if x.dim() == weight.dim() - 1:  # one sample, as torch's convolutions take it
            return self._compute_integer(x.unsqueeze(0), weight, factor, bias, grids, relu).squeeze(0)
        g, bf16 = self.geometry(), self.gradient_dtype is torch.bfloat16
        return torch.ops.rarefy.integer_conv(
            g.padded(x), weight, factor, bias, *grids, g.stride, g.padding, g.dilation, g.groups, relu, bf16, None
        )


class Conv1d(ConvLayer, nn.Conv1d):
    """``torch.nn.Conv1d`` in quantization-aware training: x [N, in, L] to [N, out, l].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Conv1d``, whose Parameter objects it keeps.
    """


class Conv2d(ConvLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` in quantization-aware training: x [N, in, H, W] to [N, out, h, w].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Conv2d``, whose Parameter objects it keeps.
    """


class Conv3d(ConvLayer, nn.Conv3d):
    """``torch.nn.Conv3d`` in quantization-aware training: x [N, in, D, H, W] to [N, out, d, h, w].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Conv3d``, whose Parameter objects it keeps.
    """
