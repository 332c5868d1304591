"""Layers: in quantization-aware training (Linear, Conv2d, ConvBn2d, Add, ...) and in integers (QuantizedLinear, ...)."""

from rarefy.nn._base import ByteGrid, IntegerWeight, QuantizableLayer, QuantState, WeightedLayer
from rarefy.nn.add import Add
from rarefy.nn.attention import MultiheadAttention
from rarefy.nn.boundaries import (
    GELU,
    BoundaryLayer,
    GroupNorm,
    Hardswish,
    LayerNorm,
    RMSNorm,
    SiLU,
    Softmax,
    with_boundaries,
)
from rarefy.nn.cat import Cat
from rarefy.nn.conv import Conv1d, Conv2d, Conv3d, ConvLayer
from rarefy.nn.conv_bn import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnLayer,
    FoldedBatchNorm,
    FoldedBatchNorm1d,
    FoldedBatchNorm2d,
    FoldedBatchNorm3d,
    SpentBatchNorm,
)
from rarefy.nn.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, ConvTransposeLayer
from rarefy.nn.embedding import Embedding, EmbeddingBag, TableLayer
from rarefy.nn.linear import Linear
from rarefy.nn.lora import LoRALinear, add_lora, merge_lora
from rarefy.nn.max_pool import MaxPool2d
from rarefy.nn.mul import Mul
from rarefy.nn.packed import (
    PackedConv,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedEmbedding,
    PackedEmbeddingBag,
    PackedLayer,
    PackedLinear,
    PackedTable,
)
from rarefy.nn.quantized import (
    IntegerLayer,
    QuantizedConv,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedTable,
)
from rarefy.nn.quantized_attention import QuantizedMultiheadAttention
from rarefy.nn.quantized_conv_transpose import (
    QuantizedConvTranspose,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from rarefy.nn.quantized_operations import QuantizedAdd, QuantizedCat
from rarefy.nn.quantized_recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRecurrent,
)
from rarefy.nn.recurrent import GRU, LSTM, GRUCell, LSTMCell, RecurrentLayer
from rarefy.nn.relu import ReLU
from rarefy.nn.sdpa import SDPA
from rarefy.nn.sparse_linear import SparseLinear
from rarefy.nn.transposed_linear import TransposedLinear

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "SDPA",
    "Add",
    "BoundaryLayer",
    "ByteGrid",
    "Cat",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnLayer",
    "ConvLayer",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConvTransposeLayer",
    "Embedding",
    "EmbeddingBag",
    "FoldedBatchNorm",
    "FoldedBatchNorm1d",
    "FoldedBatchNorm2d",
    "FoldedBatchNorm3d",
    "GRUCell",
    "GroupNorm",
    "Hardswish",
    "IntegerLayer",
    "IntegerWeight",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "LoRALinear",
    "MaxPool2d",
    "Mul",
    "MultiheadAttention",
    "PackedConv",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedEmbedding",
    "PackedEmbeddingBag",
    "PackedLayer",
    "PackedLinear",
    "PackedTable",
    "QuantState",
    "QuantizableLayer",
    "QuantizedAdd",
    "QuantizedCat",
    "QuantizedConv",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "QuantizedRecurrent",
    "QuantizedTable",
    "RMSNorm",
    "ReLU",
    "RecurrentLayer",
    "SiLU",
    "Softmax",
    "SparseLinear",
    "SpentBatchNorm",
    "TableLayer",
    "TransposedLinear",
    "WeightedLayer",
    "add_lora",
    "merge_lora",
    "with_boundaries",
]
