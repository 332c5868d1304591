"""2-d convolutions with fake-quantized input and weight, alone and with batch normalization folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.nn._base import QuantState, WeightedLayer
from rarefy.quantization.qconfig import QConfig


def unsupported(module: nn.Conv2d) -> str | None:
    """Why a convolution cannot be quantized, or None."""
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r} is not supported"
    if isinstance(module.padding, str):
        return f"padding {module.padding!r} by name is not supported"
    return None


class Conv2d(WeightedLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` in quantization-aware training: x [N, in, H, W] to [N, out, h, w].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Conv2d``, whose Parameter objects it keeps.
    """

    @classmethod
    def from_float(
        cls, module: nn.Conv2d, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Conv2d:
        """A quantized layer over the parameters of ``module``."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        layer._attach(config, relu, quantize_output)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the grids of its input and weight."""
        assert self.quant.weight is not None
        weight = self.quant.weight(self.weight)
        return self._finish(self._conv_forward(self._quantized_input(x), weight, self.bias))


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch normalization that the convolution before it applies: the identity, holding parameters and statistics.

    It stays where the model has it, so that parameter names do not change.
    """

    @classmethod
    def from_float(cls, module: nn.BatchNorm2d) -> FoldedBatchNorm2d:
        """The same parameters and buffers, as the identity."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Batch normalization proper: with the batch's statistics in training, the running ones otherwise."""
        return nn.BatchNorm2d.forward(self, x)


class ConvBn2d(WeightedLayer, nn.Conv2d):
    """A convolution with the batch normalization after it folded in.

    The convolution runs with the weight that will be deployed, w * gamma / sqrt(running_var + eps), on the grid. In
    training its result is divided by that factor again and normalized with the batch's statistics (Krishnamoorthi, 2018,
    arXiv:1806.08342, section 3.2.2); in evaluation the folded weight and bias give the result directly.

    ``prepare_qat`` and ``prepare`` make it from an ``nn.Conv2d`` whose only consumer is an ``nn.BatchNorm2d``. It can also
    be a part of a model from the start, as in C++: arguments of ``nn.Conv2d`` (``bias`` is False by default); it then owns
    its batch normalization as the child ``bn`` and is floating point until prepared.
    """

    _SMALLEST_FACTOR = 1e-12

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        **conv_arguments: object,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, bias=bias, **conv_arguments)  # type: ignore[arg-type]
        reason = unsupported(self)
        if reason is not None:
            raise ValueError(f"[ConvBn2d] {reason}")
        self.add_module("bn", FoldedBatchNorm2d(out_channels, eps=eps, momentum=momentum))
        self.quant = QuantState()
        self.relu = False

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        bn: FoldedBatchNorm2d | None,
        config: QConfig,
        *,
        relu: bool = False,
        quantize_output: bool = False,
    ) -> ConvBn2d:
        """A quantized layer over the parameters of ``module`` that applies ``bn``, which stays a module elsewhere.

        ``bn`` is None for a ``ConvBn2d`` that owns its batch normalization.
        """
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        layer._modules = module._modules.copy()
        if bn is not None:
            # A list hides it from nn.Module: the batch normalization is registered once, under its own name.
            layer._linked_bn = [bn]
        layer._attach(config, relu, quantize_output)
        return layer

    @property
    def bn(self) -> FoldedBatchNorm2d:
        """The batch normalization that is folded in."""
        own = self._modules.get("bn")
        return self._linked_bn[0] if own is None else own  # type: ignore[return-value]

    def _factor(self) -> Tensor:
        bn = self.bn
        assert bn.running_var is not None
        factor = bn.weight * torch.ops.rarefy.inverse_std(bn.running_var, bn.eps)
        # A channel whose gamma is 0 would divide by 0 in forward: keep its factor away from 0, where it still folds to
        # almost nothing.
        tiny = torch.full_like(factor, self._SMALLEST_FACTOR)
        return torch.where(factor.abs() < self._SMALLEST_FACTOR, tiny, factor)

    def folded(self) -> tuple[Tensor, Tensor]:
        """The float weight and bias that are quantized, with the running statistics."""
        bn, factor = self.bn, self._factor()
        assert bn.running_mean is not None
        centered = -bn.running_mean if self.bias is None else self.bias - bn.running_mean
        return self.weight * factor.view(-1, 1, 1, 1), bn.bias + centered * factor

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and batch normalization on the grids of input and folded weight."""
        if self.quant.weight is None:
            return self.bn.normalize(self._conv_forward(x, self.weight, self.bias))
        x = self._quantized_input(x)
        if not self.bn.training:
            weight, bias = self.folded()
            return self._finish(self._conv_forward(x, self.quant.weight(weight), bias))
        factor = self._factor()
        weight = self.quant.weight(self.weight * factor.view(-1, 1, 1, 1))
        y = self._conv_forward(x, weight, None) / factor.view(1, -1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1, 1)
        return self._finish(self.bn.normalize(y))
