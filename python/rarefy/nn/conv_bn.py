"""Convolutions of 1, 2 and 3 dimensions with the batch normalization after them folded in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import QuantState
from rarefy.nn.conv import ConvLayer
from rarefy.quantization.qconfig import QConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class FoldedBatchNorm(nn.Module):
    """A batch normalization that the convolution before it applies: the identity, holding parameters and statistics.

    It stays where the model has it, so that parameter names do not change.
    """

    frozen: bool = False  #: normalize with the running statistics and leave them alone, in training too

    @property
    def moves(self) -> bool:
        """Whether the batch's statistics are used, and the running ones follow them."""
        return self.training and not self.frozen

    @classmethod
    def from_float(cls, module: nn.Module) -> Self:
        """The same parameters and buffers, as the identity."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Batch normalization proper: with the batch's statistics when it moves, the running ones otherwise."""
        if self.training and self.frozen:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class FoldedBatchNorm1d(FoldedBatchNorm, nn.BatchNorm1d):
    """The batch normalization of a ``ConvBn1d``."""


class FoldedBatchNorm2d(FoldedBatchNorm, nn.BatchNorm2d):
    """The batch normalization of a ``ConvBn2d``."""


class FoldedBatchNorm3d(FoldedBatchNorm, nn.BatchNorm3d):
    """The batch normalization of a ``ConvBn3d``."""


class SpentBatchNorm(nn.Identity):
    """Stands where a batch normalization was that is part of the integers of a convolution by now: the identity."""


class ConvBnLayer(ConvLayer):
    """A convolution with the batch normalization after it folded in.

    The convolution runs with the weight that will be deployed, w * gamma / sqrt(running_var + eps), on the grid. In
    training its result is divided by that factor again and normalized with the batch's statistics (Krishnamoorthi, 2018,
    arXiv:1806.08342, section 3.2.2); in evaluation the folded weight and bias give the result directly.

    In training gamma learns through the normalization alone. The convolution's own result does not depend on the factor
    but by rounding: straight-through, d(fq(w f) / f) / df = w / f - w f / f^2 = 0.

    ``prepare_qat`` and ``prepare`` make it from a convolution whose only consumer is a batch normalization. It can also
    be a part of a model from the start, as in C++: arguments of the convolution (``bias`` is False by default); it then
    owns its batch normalization as the child ``bn`` and is floating point until prepared.
    """

    _SMALLEST_FACTOR: ClassVar[float] = 1e-12
    _batch_norm: ClassVar[type[FoldedBatchNorm]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        **conv_arguments: object,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, **conv_arguments)
        self.add_module("bn", self._batch_norm(out_channels, eps=eps, momentum=momentum))
        self.quant = QuantState()
        self.relu = False

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        config: QConfig,
        *,
        bn: FoldedBatchNorm | None = None,
        relu: bool = False,
        quantize_output: bool = False,
    ) -> Self:
        """A quantized layer over the parameters of ``module`` that applies ``bn``, which stays a module elsewhere.

        ``bn`` is None for a layer that owns its batch normalization.
        """
        layer = super().from_float(module, config, relu=relu, quantize_output=quantize_output)
        if bn is not None:
            # A list hides it from nn.Module: the batch normalization is registered once, under its own name.
            layer._linked_bn = [bn]
        return layer

    @property
    def bn(self) -> FoldedBatchNorm:
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

    def _per_filter(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (self.weight.dim() - 1))

    def folded(self) -> tuple[Tensor, Tensor]:
        """The float weight and bias that are quantized, with the running statistics."""
        bn, factor = self.bn, self._factor()
        assert bn.running_mean is not None
        centered = -bn.running_mean if self.bias is None else self.bias - bn.running_mean
        return self.weight * self._per_filter(factor), bn.bias + centered * factor

    def _sources(self) -> tuple[Tensor | None, ...]:
        bn = self.bn
        return self.weight, self.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and batch normalization on the grids of input and folded weight."""
        if self.quant.weight is None:
            return self.bn.normalize(self._compute(x, self.weight, self.bias))
        if self._runs_in_integers(x):
            return self._forward_integer(x)
        x = self._quantized_input(x)
        if not self.bn.moves:
            return self._finish(self._compute(x, *self._rounded()))
        factor = self._factor().detach()
        weight = self.quant.weight(self.weight * self._per_filter(factor))
        per_channel = (1, -1, *[1] * (self.weight.dim() - 2))
        y = self._compute(x, weight, None) / factor.view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return self._finish(self.bn.normalize(y))

    def _forward_integer(self, x: Tensor) -> Tensor:
        if not self.bn.moves:
            weight, bias = self.folded()
            y = self._compute_integer(x, weight, None, bias, self._grids(x, weight), self.relu)
            return self._finish(y, rectified=self.relu)
        factor = self._factor().detach()
        y = self._compute_integer(x, self.weight, factor, self.bias, self._grids(x, self.weight, factor), relu=False)
        return self._finish(self.bn.normalize(y))


class ConvBn1d(ConvBnLayer, nn.Conv1d):
    """``torch.nn.Conv1d`` and the ``BatchNorm1d`` after it as one layer: see ``ConvBnLayer``."""

    _batch_norm = FoldedBatchNorm1d


class ConvBn2d(ConvBnLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` and the ``BatchNorm2d`` after it as one layer: see ``ConvBnLayer``."""

    _batch_norm = FoldedBatchNorm2d


class ConvBn3d(ConvBnLayer, nn.Conv3d):
    """``torch.nn.Conv3d`` and the ``BatchNorm3d`` after it as one layer: see ``ConvBnLayer``."""

    _batch_norm = FoldedBatchNorm3d
