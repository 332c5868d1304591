"""From fake-quantized modules to a program of integers: what every deployment format starts from.

A model that `prepare_qat` or `prepare` made computes with float numbers that lie on an integer grid. `lower` writes the
same computation with the integers in the open: weights become int8 buffers behind a dequantize operator, and every
fake quantizer becomes a quantize and a dequantize operator of the `quantized_decomposed` library that torch carries.
`torch.export` keeps those as single nodes, and the exporters translate them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import nn as rnn
from rarefy.export.lowering_formats import (
    Float8QuantizeDequantize,
    FormatActivation,
    FormatWeight,
    is_bytes,
    is_observed_grid,
    is_quantized_to_float8,
    packed_parts,
    stored_parts,
)
from rarefy.nn.conv_transpose import weight_by_channel, weight_by_group
from rarefy.nn.sdpa import attention
from rarefy.quantization import FakeQuantizer


@dataclass(frozen=True)
class Form:
    """How a lowered program is written; every form computes the same values. The fields are `lower`'s arguments."""

    unsigned: bool
    weights: Literal["integers", "quantize"] = "integers"
    linear: Literal["matmul", "linear"] = "matmul"
    formats: bool = False


#: From the type of a quantizer, and whether it is written unsigned, to the type that is written and how far it moves.
_RELABELLED = {
    (torch.int8, True): (torch.uint8, 128),
    (torch.uint8, False): (torch.int8, -128),
    (torch.int16, True): (torch.uint16, 32768),
    (torch.uint16, False): (torch.int16, -32768),
}


class QuantizeDequantize(nn.Module):
    """`clamp(round(x / scale) + zero_point, qmin, qmax)` as integers, and back; per tensor or per channel.

    A quantizer is written in the type that the form asks for, unsigned or signed: zero point and range move by half the
    type's range (128 for 8 bits), and no value changes.
    """

    def __init__(self, quantizer: FakeQuantizer, form: Form) -> None:
        super().__init__()
        self.rounds = True
        self.dtype = quantizer.dtype
        self.qmin, self.qmax = int(quantizer.qmin), int(quantizer.qmax)
        self.axis = quantizer.axis
        zero_point = quantizer.zero_point.detach().to(torch.int64)
        self.dtype, move = _RELABELLED.get((self.dtype, form.unsigned), (self.dtype, 0))
        self.qmin, self.qmax, zero_point = self.qmin + move, self.qmax + move, zero_point + move
        if self.axis is None:
            self.scale, self.zero_point = float(quantizer.scale), int(zero_point)
        else:
            self.register_buffer("scale", quantizer.scale.detach().clone())
            self.register_buffer("zero_point", zero_point)

    def is_same(self, other: QuantizeDequantize) -> bool:
        """Whether both write one grid, with one scale for the tensor."""
        grids = [(q.axis, q.dtype, q.qmin, q.qmax, q.scale, q.zero_point) for q in (self, other) if q.axis is None]
        return len(grids) == 2 and grids[0] == grids[1]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid; only clamped to its range when ``rounds`` is off."""
        if not self.rounds:
            return self._clamp(x)
        ops = torch.ops.quantized_decomposed
        limits = (self.qmin, self.qmax, self.dtype)
        if self.axis is not None:
            q = ops.quantize_per_channel(x, self.scale, self.zero_point, self.axis, *limits)
            return ops.dequantize_per_channel(q, self.scale, self.zero_point, self.axis, *limits)
        info = torch.iinfo(self.dtype)
        narrow = (self.qmin, self.qmax) != (info.min, info.max)
        if narrow and info.bits > 8:  # runtimes have no Clip of 16 bits; (k * s) / s rounds to k
            x, narrow = torch.clamp(x, *self._ends()), False
        q = ops.quantize_per_tensor(x, self.scale, self.zero_point, *limits)
        if narrow:
            # Formats saturate at the limits of the type, and torch's ONNX translation drops qmin and qmax.
            q = torch.clamp(q, self.qmin, self.qmax)
        return ops.dequantize_per_tensor(q, self.scale, self.zero_point, *limits)

    def _ends(self) -> tuple[float, float]:
        """The ends of the range, as float32 has them."""
        scale = np.float32(self.scale)
        return tuple(float(np.float32(q - self.zero_point) * scale) for q in (self.qmin, self.qmax))  # type: ignore[return-value]

    def _clamp(self, x: Tensor) -> Tensor:
        scale, zero_point = torch.as_tensor(self.scale, dtype=x.dtype), torch.as_tensor(self.zero_point)
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return torch.clamp(x, (self.qmin - zero_point) * scale, (self.qmax - zero_point) * scale)


def quantize_dequantize(quantizer: FakeQuantizer, form: Form) -> nn.Module:
    """An activation's quantizer as a program has it."""
    if is_observed_grid(quantizer.scheme) and quantizer.scheme.rounding != "stochastic":
        return QuantizeDequantize(quantizer, form)
    if is_quantized_to_float8(quantizer.scheme):
        return Float8QuantizeDequantize(quantizer)
    return FormatActivation(quantizer)


class _Lowered(nn.Module):
    """What the lowered modules share: the numbers of the layer, the quantizers under their names, and the epilogue."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        for name, value in vars(module).items():  # sizes and the like, which models read in their forward
            if not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple)):
                setattr(self, name, value)
        self.relu = bool(module.relu)
        self.quant = nn.Module()
        for name in ("input", "input0", "input1", "output"):
            quantizer = getattr(module.quant, name, None)
            self.quant.add_module(name, nn.Identity() if quantizer is None else quantize_dequantize(quantizer, form))

    def finish(self, y: Tensor) -> Tensor:
        return self.quant.output(torch.relu(y) if self.relu else y)


class _LoweredWeighted(_Lowered):
    """A layer whose weight is an int8 buffer behind a dequantize operator, or a float one behind both operators."""

    def __init__(
        self,
        module: nn.Module,
        form: Form,
        transposed: bool,
        layout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(module, form)
        self.format = self._format_of(module, form, transposed)
        if self.format is not None:
            self.transposed, self.quantizes, self.axis = transposed, False, None
            self._buffers["weight"] = None
            bias = module.bias if isinstance(module, rnn.PackedLayer) else module.folded()[1]
            self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
            return
        quantizer = module.quant.weight
        if isinstance(module, rnn.WeightedLayer):
            integers = module.integer_weight()
        else:  # converted: the integers are its parameters
            state = (quantizer.scale, quantizer.zero_point, quantizer.axis, module.bias)
            integers = rnn.IntegerWeight(module.integer_weight, *state)
        values, self.axis = integers.values.detach(), integers.axis
        self.transposed = transposed
        if transposed:
            values = values.t()
            self.axis = None if self.axis is None else 1 - self.axis
        if layout is not None and self.axis is not None:
            values = layout(values)
        self._buffers["weight"] = values.contiguous().clone()  # register_buffer refuses a name that is a property
        self.limits = (int(quantizer.qmin), int(quantizer.qmax), values.dtype)
        self.quantizes = False
        if self.axis is None:
            self.scale, self.zero_point = float(integers.scale), int(integers.zero_point)
        else:
            self.register_buffer("scale", integers.scale.detach().clone())
            self.register_buffer("zero_point", integers.zero_point.detach().to(torch.int64))
        self.register_buffer("bias", None if integers.bias is None else integers.bias.detach().clone())
        if form.weights == "quantize":  # (q * s) / s is less than half a step from q: quantizing gives q back
            self._buffers["weight"] = self.float_weight()
            self.quantizes = True

    @staticmethod
    def _format_of(module: nn.Module, form: Form, transposed: bool) -> FormatWeight | None:
        """The weight of a layer whose scheme is not integers of at most 8 bits, with all output channels on one axis."""
        packed = isinstance(module, rnn.PackedLayer)
        if not packed and is_bytes(module.quant.weight):
            return None
        if not form.formats:
            scheme = module.scheme if packed else module.quant.weight.scheme
            raise ValueError(f"[lower] weights must be integers of at most 8 bits, got {scheme}")
        if packed:
            return FormatWeight(packed_parts(module), transposed)
        quantizer = module.quant.weight
        values = module._by_channel(module.folded()[0])
        return FormatWeight(stored_parts(quantizer, values), transposed)

    @property
    def weight(self) -> Tensor:
        """What the integers stand for, for models that cast to its dtype or compute with it in their forward."""
        return self.float_weight().t() if self.transposed else self.float_weight()

    def float_weight(self) -> Tensor:
        if self.format is not None:
            return self.format()
        ops, integers = torch.ops.quantized_decomposed, self._buffers["weight"]
        if self.quantizes and self.axis is None:
            integers = ops.quantize_per_tensor(integers, self.scale, self.zero_point, *self.limits)
        elif self.quantizes:
            integers = ops.quantize_per_channel(integers, self.scale, self.zero_point, self.axis, *self.limits)
        if self.axis is None:
            return ops.dequantize_per_tensor(integers, self.scale, self.zero_point, *self.limits)
        return ops.dequantize_per_channel(integers, self.scale, self.zero_point, self.axis, *self.limits)


class _LoweredLinear(_LoweredWeighted):
    """Stores the weight as the product reads it: no transpose stands between its integers and the product.

    That is [in, out] for `matmul`, and [out, in] for `linear`.
    """

    def __init__(self, module: nn.Module, form: Form) -> None:
        matmul = form.linear == "matmul"
        super().__init__(module, form, transposed=(module.channel_axis == 0) == matmul)
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        if not self.matmul:
            return self.finish(F.linear(self.quant.input(x), self.float_weight(), self.bias))
        y = torch.matmul(self.quant.input(x), self.float_weight())
        return self.finish(y if self.bias is None else y + self.bias)


class _LoweredConv(_LoweredWeighted):
    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form, transposed=False)
        self.geometry = module.geometry() if isinstance(module, rnn.ConvLayer) else module.geometry

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.geometry.convolve(self.quant.input(x), self.float_weight(), self.bias))


class _LoweredConvTranspose(_LoweredWeighted):
    """Stores a weight of several groups with scales per channel as [in / groups, out, kernel...], where one axis has them."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form, transposed=False, layout=lambda values: weight_by_channel(values, module.groups))
        self.movement = module.movement() if isinstance(module, rnn.ConvTransposeLayer) else module.movement
        self.kernel_size = module.kernel_size

    @property
    def weight(self) -> Tensor:
        if self.axis is None and self.format is None:
            return self.float_weight()
        return weight_by_group(self.float_weight(), self.movement.groups)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        movement = self.movement.for_size(x, self.kernel_size, output_size)
        return self.finish(movement.convolve(self.quant.input(x), self.weight, self.bias))


class _LoweredEmbedding(_LoweredWeighted):
    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form, transposed=False)

    def forward(self, indices: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or self.format is not None or self.quantizes or self.axis not in (None, 0):
            return F.embedding(indices, self.float_weight())
        rows = F.embedding(indices, self._buffers["weight"]).float()  # the same numbers without a table of floats
        if self.axis is None:
            return (rows - self.zero_point) * self.scale
        return (rows - self.zero_point[indices].unsqueeze(-1)) * self.scale[indices].unsqueeze(-1)


class _LoweredEmbeddingBag(_LoweredEmbedding):
    """Bags of equal sizes, the rows of a matrix of indices."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form)
        self.mode, self.padding_idx = module.mode, module.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if input.dim() != 2 or offsets is not None:
            raise ValueError(
                f"[lower] EmbeddingBag must be given its bags as rows of a matrix to be exported, got an input of shape "
                f"{tuple(input.shape)}{'' if offsets is None else ' and offsets'}"
            )
        rows = super().forward(input)  # [bags, size, embedding_dim]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.to(rows.dtype).unsqueeze(-1)
        if self.padding_idx is None:
            return rows.mean(1) if self.mode == "mean" else rows.sum(1) if self.mode == "sum" else rows.amax(1)
        kept = (input != self.padding_idx).unsqueeze(-1)
        if self.mode == "max":
            largest = torch.where(kept, rows, torch.full_like(rows, float("-inf"))).amax(1)
            return torch.where(kept.any(1), largest, torch.zeros_like(largest))
        total = (rows * kept.to(rows.dtype)).sum(1)
        return total if self.mode == "sum" else total / kept.to(rows.dtype).sum(1).clamp(min=1)


class _LoweredAdd(_Lowered):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.finish(self.quant.input0(a) + self.quant.input1(b))


class _LoweredMul(_Lowered):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.finish(self.quant.input0(a) * self.quant.input1(b))


class _LoweredCat(_Lowered):
    """Quantizes before and after with the same parameters, between which runtimes concatenate integers."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module, form)
        self.dim = module.dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.quant.input(torch.cat([self.quant.input(x) for x in tensors], self.dim))


class _LoweredSDPA(nn.Module):
    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.quant = nn.Module()
        for name in ("query", "key", "probabilities", "value"):
            self.quant.add_module(name, quantize_dequantize(module.quant.find(name), form))

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
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, list(self.quant.children()))


class _LoweredLoRA(nn.Module):
    """The adapters merged into a float base; beside the integers of one in int8, and beside the codes of one in NF4."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        if module.base == "nf4" and not form.formats:
            raise ValueError(
                "[lower] a LoRALinear with a base in NF4 cannot be exported: no operator of these files holds NormalFloat; "
                "rarefy.nn.merge_lora makes plain linear layers"
            )
        self.base = module.base
        if self.base == "float":
            self.linear = module.merged()
            return
        for name in ("bias", "lora_a", "lora_b"):
            value = getattr(module, name)
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.scaling = module.scaling
        if self.base == "nf4":
            self.format = FormatWeight(module.stored_base())
            return
        self.register_buffer("weight", module.weight.detach().clone())
        self.register_buffer("weight_scale", module.weight_scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros_like(self.weight_scale, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.base == "float":
            return self.linear(x)
        if self.base == "nf4":
            weight = self.format()
        else:
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
            weight = dequantize(self.weight, self.weight_scale, self.zero_point, 0, -127, 127, torch.int8)
        y = F.linear(x, weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scaling


class _LoweredBoundary(nn.Module):
    """torch's own operation between quantizers."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules"))
        self.operation = kind.__new__(kind)
        self.operation.__dict__ = module.__dict__.copy()
        self.operation._modules = {}
        self.quant = nn.Module()
        for name in ("input", "output"):
            quantizer = getattr(module.quant, name)
            self.quant.add_module(name, nn.Identity() if quantizer is None else quantize_dequantize(quantizer, form))

    def forward(self, x: Tensor) -> Tensor:
        return self.quant.output(self.operation(self.quant.input(x)))


class _LoweredReLU(nn.ReLU):
    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()


_LOWERED: dict[type[nn.Module], Callable[[nn.Module, Form], nn.Module]] = {
    rnn.ConvLayer: _LoweredConv,
    rnn.QuantizedConv: _LoweredConv,
    rnn.PackedConv: _LoweredConv,
    rnn.ConvTransposeLayer: _LoweredConvTranspose,
    rnn.QuantizedConvTranspose: _LoweredConvTranspose,
    rnn.PackedConvTranspose: _LoweredConvTranspose,
    rnn.Linear: _LoweredLinear,
    rnn.TransposedLinear: _LoweredLinear,
    rnn.QuantizedLinear: _LoweredLinear,
    rnn.PackedLinear: _LoweredLinear,
    rnn.Embedding: _LoweredEmbedding,
    rnn.QuantizedEmbedding: _LoweredEmbedding,
    rnn.PackedEmbedding: _LoweredEmbedding,
    rnn.EmbeddingBag: _LoweredEmbeddingBag,
    rnn.QuantizedEmbeddingBag: _LoweredEmbeddingBag,
    rnn.PackedEmbeddingBag: _LoweredEmbeddingBag,
    rnn.Add: _LoweredAdd,
    rnn.QuantizedAdd: _LoweredAdd,
    rnn.Mul: _LoweredMul,
    rnn.Cat: _LoweredCat,
    rnn.QuantizedCat: _LoweredCat,
    rnn.SDPA: _LoweredSDPA,
    rnn.LoRALinear: _LoweredLoRA,
    rnn.BoundaryLayer: _LoweredBoundary,
    rnn.ReLU: _LoweredReLU,
    FakeQuantizer: quantize_dequantize,
}


def check_quantizers(function: str, model: nn.Module, formats: bool = False) -> None:
    """Whether every fake quantizer of the model can be written.

    Args:
        function: whose error it is.
        model: prepared, or converted.
        formats: the file may hold formats beside plain grids, where its target does (`targets.check_target`).

    Raises:
        ValueError: some have seen no data or are switched off (they are named), have a scale that is not positive, or a format
            that the file does not hold.
    """
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}

    def refuse(rule: str, names: list[str]) -> None:
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(
                f"[{function}] every quantizer must {rule}, got {len(names)} of {len(quantizers)}: {shown}"
            )

    for name, q in quantizers.items():
        grid = is_bytes(q) if q.is_weight else is_observed_grid(q.scheme) and q.scheme.rounding != "stochastic"
        if not grid and not formats:
            raise ValueError(
                f"[{function}] a file holds integers with one observed scale per tensor or channel (weights of at most 8 "
                f"bits), got {q.scheme} in {name}"
            )
    # A weight is observed when its integers are read; nobody needs to have run it before.
    waiting = [name for name, q in quantizers.items() if not q.calibrated and not (q.observe and q.is_weight)]
    refuse("have observed data (train a step, or calibrate), but these have not", waiting)
    refuse(
        "quantize (rarefy.quantization.set_state(model, quantize=True)), but these are switched off",
        [name for name, q in quantizers.items() if not q.quantize],
    )
    for name, q in quantizers.items():
        smallest, largest = (float(end) for end in q.scale.detach().aminmax())
        if not (smallest > 0 and math.isfinite(largest)):
            raise ValueError(
                f"[{function}] scales must be finite and positive, got {smallest:g} to {largest:g} in {name}"
            )


@contextmanager
def without_rounding(lowered: nn.Module) -> Iterator[None]:
    """Lets a lowered model clamp its activations to their ranges but not round them, to see what rounding does."""
    quantizers = [m for m in lowered.modules() if isinstance(m, (QuantizeDequantize, FormatActivation))]
    for quantizer in quantizers:
        quantizer.rounds = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.rounds = True


def _is_float(module: nn.Module) -> bool:
    """Whether a layer of rarefy.nn has not been prepared, and is exported as any other module."""
    return isinstance(module, rnn.QuantizableLayer) and not module.prepared


def lower(
    model: nn.Module,
    unsigned: bool,
    *,
    weights: Literal["integers", "quantize"] = "integers",
    linear: Literal["matmul", "linear"] = "matmul",
    formats: bool = False,
) -> nn.Module:
    """Replaces every quantized module of `model` by its integer form, in place, and returns the model.

    Args:
        model: a copy that the caller owns, in evaluation mode. May itself be one of the modules that are replaced.
        unsigned: write activations as uint8 (uint16), otherwise as int8 (int16); a zero point moves, and no value changes.
        weights: "integers" stores int8 behind a dequantize operator; "quantize" stores the float values that they stand
            for behind a quantize and a dequantize operator, for converters that want to find the integers themselves.
        linear: linear layers as "matmul" with a weight [in, out] and an addition, or as "linear" with [out, in].
        formats: the writer replaces what stands for weights in other formats than integers (`onnx_formats.write_formats`);
            without, they are an error.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)

    from rarefy.export.lowering_attention import LOWERED_ATTENTION
    from rarefy.export.lowering_recurrent import LOWERED_RECURRENT

    form = Form(unsigned, weights, linear, formats)
    table = {**_LOWERED, **LOWERED_RECURRENT, **LOWERED_ATTENTION}
    done: dict[nn.Module, nn.Module] = {}  # a module that occurs twice stays one module

    def replace(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        result = module
        for kind, lowered in table.items():
            if isinstance(module, kind) and not _is_float(module):
                if type(module).forward not in (kind.forward, rnn.ConvBnLayer.forward):
                    raise TypeError(
                        f"[lower] a subclass of {kind.__name__} with its own forward cannot be exported, "
                        f"got {type(module).__name__} at {name or 'the root'}"
                    )
                result = lowered(module, form)
                break
        else:
            done[module] = module
            for child_name, child in list(module.named_children()):
                new = replace(f"{name}.{child_name}" if name else child_name, child)
                if new is not child:
                    setattr(module, child_name, new)
        done[module] = result
        return result

    return replace("", model).eval().requires_grad_(False)
