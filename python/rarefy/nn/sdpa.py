"""Scaled-dot-product attention whose two products are of quantized tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import QuantizableLayer, QuantState, activation_quantizer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig


class SDPA(QuantizableLayer):
    """``torch.nn.functional.scaled_dot_product_attention`` as a module, so that it can be quantized:

        softmax(query key^T * scale + mask) value

    Floating point, and torch's own function, until ``prepare_qat`` or ``prepare``. Then query, key, probabilities and value
    are quantized, each with its own parameters (``quant.query``, ``quant.key``, ``quant.probabilities``, ``quant.value``), as
    integer runtimes multiply them; scores, mask and softmax are floating point. A product of two activations stays simulated
    after ``convert``; in files it is one of integers.
    """

    fuses_relu = False
    quantizes_output = False  # what comes next quantizes its input

    def __init__(self) -> None:
        super().__init__()
        self.relu = False
        self.quant = QuantState()

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        return {name: activation_quantizer(config) for name in ("query", "key", "probabilities", "value")}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """As the function: query [..., target, features], key [..., source, features], value [..., source, values].

        Raises:
            ValueError: ``attn_mask`` beside ``is_causal``.
        """
        if not self.prepared:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        quantizers = [self.quant.find(name) for name in ("query", "key", "probabilities", "value")]
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, quantizers)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    quantizers: Sequence[nn.Module | None],
) -> Tensor:
    """The attention of tensors that go through quantizers, of query, key, probabilities and value, before they are
    multiplied."""
    return attention_and_weights(query, key, value, attn_mask, dropout_p, is_causal, scale, quantizers)[0]


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    quantizers: Sequence[nn.Module | None],
) -> tuple[Tensor, Tensor]:
    """The same, and the probabilities before they are quantized. A quantizer that is None leaves its tensor as it is."""
    if is_causal and attn_mask is not None:
        raise ValueError("[SDPA] attn_mask must not be given beside is_causal")
    on_query, on_key, on_probabilities, on_value = ((lambda x: x) if q is None else q for q in quantizers)
    scores = torch.matmul(on_query(query), on_key(key).transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        target, source = scores.shape[-2:]
        attn_mask = torch.ones(target, source, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, dropout_p > 0)
    return torch.matmul(on_probabilities(weights), on_value(value)), weights
