"""Multi-head attention as a program of integers: projections and the products of heads with their integers in the open."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rarefy import nn as rnn
from rarefy.export.lowering import Form, QuantizeDequantize, _LoweredLinear, quantize_dequantize
from rarefy.export.lowering_formats import FormatWeight, is_bytes, stored_parts
from rarefy.export.lowering_recurrent import LoweredWeight, product
from rarefy.nn.attention import PARTS, AttentionForward


class LoweredMultiheadAttention(AttentionForward, nn.Module):
    """A prepared or converted attention, with its arguments."""

    def __init__(self, module: rnn.MultiheadAttention | rnn.QuantizedMultiheadAttention, form: Form) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = module.embed_dim, module.num_heads
        self.kdim, self.vdim, self.head_dim, self.v_head_dim = (
            module.kdim,
            module.vdim,
            module.head_dim,
            module.v_head_dim,
        )
        self.scale, self.dropout = module.scale, module.dropout
        self.batch_first, self.add_zero_attn = module.batch_first, module.add_zero_attn
        self._qkv_same_embed_dim = False  # what torch's encoder layers ask before they read the weights by themselves
        quant: rnn.QuantState = module.quant
        self.matmul = form.linear == "matmul"
        tensors, formats = dict(module.named_buffers(recurse=False)), self._formats(module, form)
        if isinstance(module, rnn.MultiheadAttention):
            tensors = module.biases() if formats else module.integer_tensors()
        for part in PARTS:
            name = f"{part[0]}_proj_weight"
            weight = formats.get(part) or LoweredWeight(tensors[name], quant.find(f"weight_{part}"), form)
            self.add_module(name, weight)
        for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
            tensor = None if name == "in_proj_weight" else tensors.get(name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        self.quant = nn.Module()
        for name, quantizer in quant.named_children():
            if not name.startswith("weight"):
                self.quant.add_module(name, quantize_dequantize(quantizer, form))
        self.out_proj = module.out_proj
        if isinstance(module.out_proj, (rnn.Linear, rnn.QuantizedLinear, rnn.PackedLinear)):
            self.out_proj = _LoweredLinear(module.out_proj, form)

    def _formats(self, module: nn.Module, form: Form) -> dict[str, FormatWeight]:
        """The weights of projections that are not integers of at most 8 bits: all of them, as one scheme is for all."""
        found: dict[str, FormatWeight] = {}
        if isinstance(module, rnn.MultiheadAttention):
            for part, weight in zip(PARTS, module.projections(), strict=True):
                quantizer = module.quant.find(f"weight_{part}")
                assert quantizer is not None
                if not is_bytes(quantizer):
                    if not form.formats:
                        raise ValueError(f"[lower] weights must be integers of at most 8 bits, got {quantizer.scheme}")
                    found[part] = FormatWeight(stored_parts(quantizer, weight), self.matmul)
        return found

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.split(self._sizes())
        # One tensor is quantized once for the projections that read it on one grid, as they do who saw the same data.
        done: list[tuple[Tensor, nn.Module, Tensor]] = []

        def quantized(x: Tensor, part: str) -> Tensor:
            quantizer = self.quant._modules.get(f"input_{part}")
            if quantizer is None:
                return x
            for seen, other, result in done:
                if seen is x and isinstance(quantizer, QuantizeDequantize) and quantizer.is_same(other):
                    return result
            done.append((x, quantizer, quantizer(x)))
            return done[-1][2]

        projected = []
        for part, x, b in zip(PARTS, (query, key, value), biases, strict=True):
            lowered: LoweredWeight | FormatWeight = getattr(self, f"{part[0]}_proj_weight")
            projected.append(product(quantized(x, part), lowered(), b, self.matmul))
        return projected[0], projected[1], projected[2]


LOWERED_ATTENTION: dict[type[nn.Module], Callable[[nn.Module, Form], nn.Module]] = {
    rnn.MultiheadAttention: LoweredMultiheadAttention,
    rnn.QuantizedMultiheadAttention: LoweredMultiheadAttention,
}
