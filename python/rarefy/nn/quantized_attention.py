"""Multi-head attention that executes in integers: what ``rarefy.quantization.convert`` makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.nn.attention import PARTS, AttentionForward, MultiheadAttention
from rarefy.nn.quantized import IntegerLayer, grid_arguments


class QuantizedMultiheadAttention(AttentionForward, IntegerLayer):
    """``nn.MultiheadAttention`` with its projections on int8 kernels, with its arguments. For inference.

    Buffers ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` (int8, also where the float layer packs them), and of
    float32 ``in_proj_bias``, ``bias_k`` and ``bias_v``; the child ``out_proj`` is converted by itself. What the heads multiply
    stays simulated: there is no integer product of two activations. ``in_proj_weight`` is None, as there is no packed weight.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None

    def __init__(self, layer: MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = layer.embed_dim, layer.num_heads
        self.kdim, self.vdim, self.head_dim, self.v_head_dim = layer.kdim, layer.vdim, layer.head_dim, layer.v_head_dim
        self.scale, self.dropout = layer.scale, layer.dropout
        self.batch_first, self.add_zero_attn = layer.batch_first, layer.add_zero_attn
        tensors = layer.integer_tensors()
        names = (*(f"{part[0]}_proj_weight" for part in PARTS), "in_proj_weight", "in_proj_bias", "bias_k", "bias_v")
        for name in names:
            self.register_buffer(name, tensors.get(name))
        self.out_proj = layer.out_proj
        self.quant = layer.quant
        self.relu, self.target = False, layer.target
        self.train(layer.training)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # What torch's encoder layers ask before they take the path that reads the weights by itself.
        return False

    def _product(self, part: str, x: Tensor, bias: Tensor | None) -> Tensor:
        weight, w = getattr(self, f"{part[0]}_proj_weight"), self.quant.find(f"weight_{part}")
        quantizer = self.quant.find(f"input_{part}")
        assert w is not None
        if quantizer is None:
            return F.linear(x, weight.float() * w.scale.view(-1, 1), bias)
        return torch.ops.rarefy.quantized_linear(x, weight, w.scale, bias, *grid_arguments(quantizer), False)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.split(self._sizes())
        q, k, v = (self._product(part, x, b) for part, x, b in zip(PARTS, (query, key, value), biases, strict=True))
        return q, k, v

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
