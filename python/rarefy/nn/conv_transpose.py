"""Transposed convolutions of 1, 2 and 3 dimensions with fake-quantized input and weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import Scheme
from rarefy.nn._base import WeightedLayer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def weight_by_channel(weight: Tensor, groups: int) -> Tensor:
    """A weight [in, out / groups, kernel...] as [in / groups, out, kernel...]: an index of axis 1 for each output channel."""
    return weight if groups == 1 else weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


def weight_by_group(weight: Tensor, groups: int) -> Tensor:
    """The inverse of ``weight_by_channel``."""
    return weight if groups == 1 else weight.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


class Movement(NamedTuple):
    """How a transposed convolution moves over its output, in the order in which the operators take it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def for_size(self, x: Tensor, kernel_size: Sequence[int], output_size: Sequence[int] | None) -> Movement:
        """The same with the output padding that gives the spatial sizes ``output_size``, where they are told.

        Args:
            x: [N, in, spatial...], or without N.
            kernel_size: a value for each dimension.
            output_size: the spatial sizes of the result, or all sizes of it.

        Raises:
            ValueError: no output padding gives that size.
        """
        if output_size is None:
            return self
        dims = len(self.stride)
        if len(output_size) not in (dims, x.dim()):
            raise ValueError(
                f"[ConvTranspose{dims}d] output_size must have {dims} or {x.dim()} values, got {len(output_size)}"
            )
        given = tuple(output_size)[-dims:]
        moves = zip(x.shape[-dims:], self.stride, self.padding, self.dilation, kernel_size, strict=True)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in moves]
        room = [max(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        if not all(low <= size < low + more for low, size, more in zip(least, given, room, strict=True)):
            limits = ", ".join(f"{low} to {low + more - 1}" for low, more in zip(least, room, strict=True))
            raise ValueError(f"[ConvTranspose{dims}d] output_size must be within {limits}, got {given}")
        return self._replace(output_padding=tuple(size - low for size, low in zip(given, least, strict=True)))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution, in as many dimensions as the weight has."""
        stride, padding, output_padding, dilation, groups = self
        function = _CONVOLVE[weight.dim() - 2]
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)


class ConvTransposeLayer(WeightedLayer):
    """What the transposed convolutions of all dimensions share.

    The weight is [in, out / groups, kernel...]. Scales per channel are on axis 1, one for each of the ``out`` channels: every
    group has scales of its own, that of channel o of group g being number ``g * (out / groups) + o``.

    Training is simulated unless ``execution="integer"`` asks otherwise: one integer convolution for each residue of the
    stride, and its backward pass, take longer than the float layer. Converted layers are faster than it.
    """

    channel_axis = 1
    trains_in_integers = False
    _integer_devices = ("cpu",)

    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why a transposed convolution cannot be quantized, or None."""
        return None if module.padding_mode == "zeros" else f"padding_mode {module.padding_mode!r} is not supported"

    def movement(self) -> Movement:
        """How the layer moves over its output, in numbers."""
        return Movement(self.stride, self.padding, self.output_padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def _weight_quantizer(self, config: QConfig) -> FakeQuantizer:
        profile, scheme = config.profile, config.weight
        if scheme is not None and self.groups > 1 and profile is not None and not profile.scales_of_groups:
            one = Scheme(
                bits=scheme.bits, symmetric=scheme.symmetric, signed=scheme.signed, narrow_range=scheme.narrow_range
            )
            config = replace(config, weight=one)
        return super()._weight_quantizer(config)

    def _channels(self) -> int:
        return self.out_channels

    def _by_channel(self, weight: Tensor) -> Tensor:
        return weight_by_channel(weight, self.groups)

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight_by_group(weight, self.groups)

    def _input_axis(self, dims: int) -> int | None:
        return dims - self.weight.dim() + 1

    def _by_input(self, values: Tensor) -> Tensor:
        # By channel the weight is [in / groups, out, ...], and each group of outputs reads the inputs of its own group.
        columns = values.view(self.groups, -1).t()
        if self.groups > 1:
            columns = columns.repeat_interleave(self.out_channels // self.groups, 1)
        return columns.reshape(*columns.shape, *[1] * (self.weight.dim() - 2))

    def _why_never_integer(self, config: QConfig) -> str | None:
        if self.weight.dim() == 5 and self.groups > 1:
            return "there is no integer kernel for groups in three dimensions"
        return super()._why_never_integer(config)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The layer on the grids of its input and weight; ``output_size`` as of torch's transposed convolutions."""
        assert self.quant.weight is not None
        movement = self.movement().for_size(x, self.kernel_size, output_size)
        if self._runs_in_integers(x):
            grids = self._grids(x, self.weight)
            single = x.dim() == self.weight.dim() - 1  # one sample, as torch's convolutions take it
            bf16 = self.gradient_dtype is torch.bfloat16
            y = torch.ops.rarefy.integer_conv_transpose(
                x.unsqueeze(0) if single else x, self.weight, self.bias, *grids, *movement, self.relu, bf16, None
            )
            return self._finish(y.squeeze(0) if single else y, rectified=self.relu)
        return self._finish(movement.convolve(self._quantized_input(x), *self._rounded()))


class ConvTranspose1d(ConvTransposeLayer, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` in quantization-aware training: x [N, in, L] to [N, out, l].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.ConvTranspose1d``, whose Parameter objects it
    keeps.
    """


class ConvTranspose2d(ConvTransposeLayer, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` in quantization-aware training: x [N, in, H, W] to [N, out, h, w].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.ConvTranspose2d``, whose Parameter objects it
    keeps.
    """


class ConvTranspose3d(ConvTransposeLayer, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` in quantization-aware training: x [N, in, D, H, W] to [N, out, d, h, w].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.ConvTranspose3d``, whose Parameter objects it
    keeps.
    """
