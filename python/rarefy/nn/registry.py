"""Which layer takes the place of which: the one table. A new layer is one row of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rarefy.nn._base import QuantizableLayer
from rarefy.nn.add import Add
from rarefy.nn.conv import Conv1d, Conv2d, Conv3d
from rarefy.nn.conv_bn import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnLayer,
    FoldedBatchNorm,
    FoldedBatchNorm1d,
    FoldedBatchNorm2d,
    FoldedBatchNorm3d,
)
from rarefy.nn.linear import Linear
from rarefy.nn.quantized import QuantizedConv2d, QuantizedLinear


@dataclass(frozen=True)
class Fold:
    """How the batch normalization after a layer is folded into it."""

    batch_norm: type[nn.Module]  #: in the float model
    folded: type[FoldedBatchNorm]  #: what takes its place
    layer: type[ConvBnLayer]  #: what takes the place of the layer before it


@dataclass(frozen=True)
class Row:
    """What becomes of one floating-point type."""

    floating: type[nn.Module]
    layer: type[QuantizableLayer]  #: after prepare
    integer: type[nn.Module] | None = None  #: after convert; None: stays simulated
    fold: Fold | None = None


_ROWS = (
    Row(nn.Linear, Linear, QuantizedLinear),
    Row(nn.Conv1d, Conv1d, None, Fold(nn.BatchNorm1d, FoldedBatchNorm1d, ConvBn1d)),
    Row(nn.Conv2d, Conv2d, QuantizedConv2d, Fold(nn.BatchNorm2d, FoldedBatchNorm2d, ConvBn2d)),
    Row(nn.Conv3d, Conv3d, None, Fold(nn.BatchNorm3d, FoldedBatchNorm3d, ConvBn3d)),
    Row(ConvBn1d, ConvBn1d, None),
    Row(ConvBn2d, ConvBn2d, QuantizedConv2d),
    Row(ConvBn3d, ConvBn3d, None),
    Row(Add, Add),
)
_BY_TYPE = {row.floating: row for row in _ROWS}
_INTEGER = {row.layer: row.integer for row in _ROWS}

# Layers with weights that no row takes: named in reports, so that nobody believes them quantized.
_WITHOUT_ROW = (
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
)


def row_of(module: nn.Module) -> Row | None:
    """The row that takes a floating-point module; None for other modules, subclasses and prepared layers included."""
    row = _BY_TYPE.get(type(module))
    return None if row is None or is_prepared(module) else row


def is_prepared(module: nn.Module) -> bool:
    """Whether a module is a layer of ``rarefy.nn`` that has quantizers."""
    return isinstance(module, QuantizableLayer) and module.prepared


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a kind that a report should name: taken by a row, prepared, or left alone for a reason."""
    return row_of(module) is not None or is_prepared(module) or unsupported(module) is not None


def unsupported(module: nn.Module) -> str | None:
    """Why a floating-point layer cannot be quantized; None when it can, and for what is no such layer."""
    row = row_of(module)
    if row is not None:
        return row.layer.unsupported(module)
    if isinstance(module, QuantizableLayer):
        return None
    kind = type(module).__name__
    for floating in _BY_TYPE:
        # A subclass may do anything in its forward, and may keep its weight in another form.
        if isinstance(module, floating):
            return f"{kind} is a subclass of {floating.__name__}"
    return f"{kind} is not supported" if isinstance(module, _WITHOUT_ROW) else None


def integer_type(layer: QuantizableLayer) -> type[nn.Module] | None:
    """What ``convert`` makes of a prepared layer; None when it stays simulated."""
    return _INTEGER.get(type(layer))
