"""Transposed convolutions that execute in integers: what ``rarefy.quantization.convert`` makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.nn.conv_transpose import ConvTransposeLayer
from rarefy.nn.quantized import QuantizedLayer, grid_arguments


class QuantizedConvTranspose(QuantizedLayer):
    """What the integer transposed convolutions of all dimensions share."""

    def __init__(self, layer: ConvTransposeLayer) -> None:
        super().__init__(layer)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.output_padding, self.dilation, self.groups = layer.output_padding, layer.dilation, layer.groups
        self.movement = layer.movement()

    def _broadcast_scale(self) -> Tensor:
        assert self.quant.weight is not None
        scale, ones = self.quant.weight.scale, [1] * (self.integer_weight.dim() - 2)
        if scale.numel() == 1:
            return scale.view(1, 1, *ones)
        # [groups, out / groups] for each input channel of the group
        rows = scale.view(self.groups, -1).repeat_interleave(self.in_channels // self.groups, 0)
        return rows.view(*rows.shape, *ones)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The layer in integers; with float input where the activation was not quantized."""
        if x.dim() == self.integer_weight.dim() - 1:  # one sample without a batch dimension
            return self.forward(x.unsqueeze(0), None if output_size is None else output_size[-(x.dim() - 1) :]).squeeze(
                0
            )
        movement = self.movement.for_size(x, self.kernel_size, output_size)
        quantizer = self.quant.input
        if quantizer is None:
            y = movement.convolve(x, self._dequantized_weight(), self.bias)
            return self._finish(torch.relu(y) if self.relu else y)
        grid = grid_arguments(quantizer)
        return self._finish(
            torch.ops.rarefy.quantized_conv_transpose(
                x, *self._weighted(), *grid, *movement, self.relu, *self._output()
            )
        )

    def extra_repr(self) -> str:
        """Sizes and what is fused."""
        stride, padding, output_padding, dilation, groups = self.movement
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={stride}, "
            f"padding={padding}, output_padding={output_padding}, dilation={dilation}, groups={groups}, "
            f"bias={self.bias is not None}, relu={self.relu}"
        )


class QuantizedConvTranspose1d(QuantizedConvTranspose):
    """A transposed convolution on int8 kernels: x [N, in, L] to [N, out, l]. For inference."""


class QuantizedConvTranspose2d(QuantizedConvTranspose):
    """A transposed convolution on int8 kernels: x [N, in, H, W] to [N, out, h, w]. For inference."""


class QuantizedConvTranspose3d(QuantizedConvTranspose):
    """A transposed convolution on int8 kernels: x [N, in, D, H, W] to [N, out, d, h, w]. For inference."""
