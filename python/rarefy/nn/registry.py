"""Which layer takes the place of which: the one table. A new layer is one row of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rarefy.nn._base import QuantizableLayer, WeightedLayer
from rarefy.nn.add import Add
from rarefy.nn.attention import MultiheadAttention
from rarefy.nn.boundaries import GELU, GroupNorm, Hardswish, LayerNorm, RMSNorm, SiLU, Softmax
from rarefy.nn.cat import Cat
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
from rarefy.nn.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from rarefy.nn.embedding import Embedding, EmbeddingBag
from rarefy.nn.linear import Linear
from rarefy.nn.mul import Mul
from rarefy.nn.packed import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedEmbedding,
    PackedEmbeddingBag,
    PackedLinear,
)
from rarefy.nn.quantized import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLinear,
)
from rarefy.nn.quantized_attention import QuantizedMultiheadAttention
from rarefy.nn.quantized_conv_transpose import (
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from rarefy.nn.quantized_operations import QuantizedAdd, QuantizedCat
from rarefy.nn.quantized_recurrent import QuantizedGRU, QuantizedGRUCell, QuantizedLSTM, QuantizedLSTMCell
from rarefy.nn.recurrent import GRU, LSTM, GRUCell, LSTMCell
from rarefy.nn.sdpa import SDPA
from rarefy.nn.transposed_linear import TransposedLinear
from rarefy.quantization.fake_quantizer import FakeQuantizer


@dataclass(frozen=True)
class Fold:
    """How the batch normalization after a layer is folded into it."""

    batch_norm: type[nn.Module]  #: in the float model
    folded: type[FoldedBatchNorm]  #: what takes its place
    layer: type[ConvBnLayer]  #: what takes the place of the layer before it


@dataclass(frozen=True)
class Row:
    """What becomes of one floating-point type."""

    floating: type[nn.Module] | str  #: by its full name where its package may be absent
    layer: type[QuantizableLayer]  #: after prepare
    integer: type[nn.Module] | None = None  #: after convert; None: stays simulated
    fold: Fold | None = None


_ROWS = (
    Row(nn.Linear, Linear, QuantizedLinear),
    Row(nn.modules.linear.NonDynamicallyQuantizableLinear, Linear, QuantizedLinear),  # out_proj of an attention
    Row("transformers.pytorch_utils.Conv1D", TransposedLinear, QuantizedLinear),
    Row(nn.Embedding, Embedding, QuantizedEmbedding),
    Row(nn.EmbeddingBag, EmbeddingBag, QuantizedEmbeddingBag),
    Row(nn.Conv1d, Conv1d, QuantizedConv1d, Fold(nn.BatchNorm1d, FoldedBatchNorm1d, ConvBn1d)),
    Row(nn.Conv2d, Conv2d, QuantizedConv2d, Fold(nn.BatchNorm2d, FoldedBatchNorm2d, ConvBn2d)),
    Row(nn.Conv3d, Conv3d, QuantizedConv3d, Fold(nn.BatchNorm3d, FoldedBatchNorm3d, ConvBn3d)),
    Row(nn.ConvTranspose1d, ConvTranspose1d, QuantizedConvTranspose1d),
    Row(nn.ConvTranspose2d, ConvTranspose2d, QuantizedConvTranspose2d),
    Row(nn.ConvTranspose3d, ConvTranspose3d, QuantizedConvTranspose3d),
    Row(nn.LSTM, LSTM, QuantizedLSTM),
    Row(nn.GRU, GRU, QuantizedGRU),
    Row(nn.LSTMCell, LSTMCell, QuantizedLSTMCell),
    Row(nn.GRUCell, GRUCell, QuantizedGRUCell),
    Row(nn.MultiheadAttention, MultiheadAttention, QuantizedMultiheadAttention),
    Row(MultiheadAttention, MultiheadAttention, QuantizedMultiheadAttention),
    Row(ConvBn1d, ConvBn1d, QuantizedConv1d),
    Row(ConvBn2d, ConvBn2d, QuantizedConv2d),
    Row(ConvBn3d, ConvBn3d, QuantizedConv3d),
    Row(Add, Add, QuantizedAdd),
    Row(Mul, Mul),
    Row(Cat, Cat, QuantizedCat),
    Row(SDPA, SDPA),
    *(Row(kind, kind) for kind in (LayerNorm, GroupNorm, RMSNorm, GELU, SiLU, Hardswish, Softmax)),
)
_BY_TYPE = {row.floating: row for row in _ROWS}
_INTEGER = {row.layer: row.integer for row in _ROWS}
_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: PackedLinear,
    TransposedLinear: PackedLinear,
    Embedding: PackedEmbedding,
    EmbeddingBag: PackedEmbeddingBag,
    **dict.fromkeys((Conv1d, ConvBn1d), PackedConv1d),
    **dict.fromkeys((Conv2d, ConvBn2d), PackedConv2d),
    **dict.fromkeys((Conv3d, ConvBn3d), PackedConv3d),
    ConvTranspose1d: PackedConvTranspose1d,
    ConvTranspose2d: PackedConvTranspose2d,
    ConvTranspose3d: PackedConvTranspose3d,
}

# Layers with weights that no row takes: named in reports, so that nobody believes them quantized.
_WITHOUT_ROW = (
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
)


def _row_of_type(kind: type) -> Row | None:
    return _BY_TYPE.get(kind) or _BY_TYPE.get(f"{kind.__module__}.{kind.__qualname__}")


def row_of(module: nn.Module) -> Row | None:
    """The row that takes a floating-point module; None for other modules, subclasses and prepared layers included."""
    return None if is_prepared(module) else _row_of_type(type(module))


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
    # A subclass may do anything in its forward, and may keep its weight in another form.
    kind, *bases = type(module).__mro__
    for base in bases:
        if _row_of_type(base) is not None:
            return f"{kind.__name__} is a subclass of {base.__name__}"
    return f"{kind.__name__} is not supported" if isinstance(module, _WITHOUT_ROW) else None


def converted_type(layer: QuantizableLayer) -> type[nn.Module] | None:
    """What ``convert`` makes of a prepared layer: one of integers or of a packed weight; None when it stays simulated."""
    if isinstance(layer, WeightedLayer) and layer.packs_weight:
        return _PACKED.get(type(layer))
    if isinstance(layer, Add) and (layer.quant.input0 is None or layer.quant.input1 is None):
        return None  # one of its inputs is floating point
    quant = layer.quant
    grids = (q for name, q in quant.named_children() if isinstance(q, FakeQuantizer) and name != "output")
    if any(not q.is_plain or q.qmax - q.qmin > 255 for q in grids):
        return None  # other formats, more than 8 bits: there are no such kernels
    return _INTEGER.get(type(layer))
