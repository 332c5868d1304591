"""Formats beside plain grids of integers, as programs: weights by their codes, activations by the format's formula."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import (
    MX,
    NVFP4,
    Binary,
    Codebook,
    Integer,
    Minifloat,
    PerChannel,
    PerTensor,
    QuantizedTensorParts,
    Scheme,
    Ternary,
    quantize_to,
)
from rarefy.nn.packed import PackedLayer
from rarefy.quantization import FakeQuantizer

_SMALLEST_SCALE, _LARGEST_GRID_VALUE = 2.0**-60, float.fromhex("0x1.fffep127")
_NUMBERS = itertools.count(1)


def is_bytes(quantizer: FakeQuantizer) -> bool:
    """Whether a weight is integers of at most 8 bits with an observed scale per tensor or channel."""
    scheme = quantizer.scheme
    return is_observed_grid(scheme) and scheme.bits <= 8 and scheme.rounding != "stochastic"


def is_observed_grid(scheme: Scheme) -> bool:
    """Whether activations are integers with an observed scale per tensor or channel, however it follows from the range."""
    per = isinstance(scheme.granularity, (PerTensor, PerChannel))
    return isinstance(scheme.format, Integer) and not scheme.dynamic and per


def is_float8(format: object) -> str | None:
    """The name of the type of ONNX that has the numbers of a format: "float8_e4m3fn", "float8_e5m2"; or None."""
    names = {Minifloat.e4m3(): "float8_e4m3fn", Minifloat.e5m2(): "float8_e5m2"}
    return names.get(format) if isinstance(format, Minifloat) else None


def is_quantized_to_float8(scheme: Scheme) -> bool:
    """Whether activations are written as QuantizeLinear to a type of 8 bits: E4M3 or E5M2 with an observed scale."""
    per = isinstance(scheme.granularity, (PerTensor, PerChannel))
    return is_float8(scheme.format) is not None and not scheme.dynamic and per


def element_float(element: str) -> Minifloat:
    """The numbers of MX elements as a minifloat; int8 is one whose numbers are evenly spaced."""
    return Minifloat(1, 6, 1) if element == "int8" else getattr(Minifloat, element)()


def holds_float8(scheme: Scheme) -> bool:
    """Whether a file holds numbers in FP8 for a tensor of this scheme, which operator set 19 brought."""
    kind = scheme.format
    return (
        isinstance(kind, NVFP4) or is_float8(element_float(kind.element) if isinstance(kind, MX) else kind) is not None
    )


def needs_blocks(scheme: Scheme) -> bool:
    """Whether a weight of this scheme is written with scales in blocks, which operator set 21 brought."""
    kind = scheme.format
    if isinstance(kind, MX):
        return kind.element == "int8" or holds_float8(scheme)
    by_scale = isinstance(kind, (Integer, Binary, Ternary)) or is_float8(kind) is not None
    return by_scale and bool(scheme.block)


# ---- weights --------------------------------------------------------------------------------------------------------


class _Parts:
    """A stored weight; copies of a program share it."""

    def __init__(self, parts: QuantizedTensorParts) -> None:
        self.parts = parts

    def __deepcopy__(self, memo: dict) -> _Parts:
        return self


@torch.no_grad()
def stored_parts(quantizer: FakeQuantizer, weight: Tensor) -> QuantizedTensorParts:
    """What a weight's quantizer makes of it, as codes and scales.

    Raises:
        ValueError: the weight is not float32.
    """
    scheme = quantizer.scheme
    if weight.dtype is not torch.float32:
        raise ValueError(
            f"[lower] a weight in {scheme} must be float32 to be exported, got {weight.dtype} in {quantizer.name or 'a layer'}"
        )
    values = weight.detach()
    if quantizer.observe:
        quantizer(values)
    scale, zero_point = (quantizer.scale, quantizer.zero_point) if scheme.needs_range else (None, None)
    if isinstance(scheme.format, Codebook):
        scale = quantizer.codebook
    if scheme.rounding == "stochastic":  # what evaluation draws is fixed, and on the grid of the scales
        if scheme.dynamic:
            scale, zero_point = torch.ops.rarefy.scheme_qparams(values, quantizer.plan.json)
        values = quantizer(values)
        scheme = Scheme.from_json(json.dumps({**json.loads(scheme.to_json()), "rounding": "nearest_even", "seed": 0}))
    return quantize_to(values, scheme, scale, zero_point)


def packed_parts(layer: PackedLayer) -> QuantizedTensorParts:
    """The weight of a converted layer, as it holds it.

    Raises:
        ValueError: it stands for numbers of another type than float32.
    """
    if layer.weight_dtype is not torch.float32:
        raise ValueError(f"[lower] a weight in {layer.scheme} must be float32 to be exported, got {layer.weight_dtype}")
    return layer.stored()


class FormatWeight(nn.Module):
    """A weight in a format. While a program is traced, one DequantizeLinear of a tensor that stands for it, by whose scale
    (`number`: exporters make one of tensors that are equal) `onnx_formats` finds it, and writes the operators of the format.

    Args:
        parts: the weight as it is stored.
        transposed: the program has it with its last two axes exchanged.
    """

    def __init__(self, parts: QuantizedTensorParts, transposed: bool = False) -> None:
        super().__init__()
        self._held, self.transposed = _Parts(parts), transposed
        self.number = next(_NUMBERS)
        shape = [*parts.shape[:-2], parts.shape[-1], parts.shape[-2]] if transposed else parts.shape
        self.register_buffer("stand_in", torch.zeros(shape, dtype=torch.int8))

    @property
    def parts(self) -> QuantizedTensorParts:
        """The weight as it is stored."""
        return self._held.parts

    def forward(self) -> Tensor:
        """The weight, float32."""
        if torch.compiler.is_exporting():
            arguments = (self.stand_in, float(self.number), 0, -128, 127, torch.int8)
            return torch.ops.quantized_decomposed.dequantize_per_tensor(*arguments)
        values = self.parts.dequantize()
        return values.transpose(-2, -1) if self.transposed else values


# ---- activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Floats:
    """A minifloat, by what its rounding needs; see `rarefy/quantization/format.h`."""

    mantissa_bits: int
    smallest: int  #: exponents
    greatest: int
    largest: float  #: number
    overflow: float  #: what a magnitude above it becomes
    cast: torch.dtype | None  #: torch's and ONNX's type with the same numbers

    @classmethod
    def of(cls, f: Minifloat, rounds_by_cast: bool = True) -> _Floats:
        overflow = f.greatest if f.saturate else float("inf") if f.specials == "ieee" else float("nan")
        name = is_float8(f)
        kind = getattr(torch, name) if name and rounds_by_cast else None
        return cls(f.mantissa_bits, 1 - f.bias, math.frexp(f.greatest)[1] - 1, f.greatest, overflow, kind)

    def round(self, y: Tensor) -> Tensor:
        """The nearest numbers, ties to even."""
        if self.cast is not None:
            return y.clamp(-self.largest, self.largest).to(self.cast).to(torch.float32)
        magnitude = y.abs().clamp(max=2.0 ** (self.greatest + 1))
        step = torch.full_like(magnitude, 2.0 ** (self.smallest - self.mantissa_bits))
        for exponent in range(self.smallest + 1, self.greatest + 1):
            step = torch.where(magnitude >= 2.0**exponent, 2.0 ** (exponent - self.mantissa_bits), step)
        rounded = torch.round(magnitude / step) * step
        if self.overflow == self.largest:
            rounded = rounded.clamp(max=self.largest)
        else:
            rounded = torch.where(rounded > self.largest, self.overflow, rounded)
        return rounded * torch.sign(y)


def _down_to_power_of_two(x: Tensor, powers: Tensor) -> Tensor:
    """The greatest power of two that is not above; 2^-127 below 2^-126. Log may be wrong by one, and is put right."""
    exponent = torch.floor(torch.log(x.clamp(min=2.0**-126)) * 1.4426950408889634).clamp(-126, 127)
    power = powers[(exponent + 126).to(torch.int64)]
    return torch.where(x >= power * 2, power * 2, torch.where(x < power, power * 0.5, power))


def _scale_of_largest(found: Tensor, greatest: float, reach: float) -> Tensor:
    wanted = (found.double() / greatest).clamp(max=_LARGEST_GRID_VALUE / reach).float().clamp(min=_SMALLEST_SCALE)
    return torch.where(found == 0, 1.0, wanted)


class FormatActivation(nn.Module):
    """What `torch.ops.rarefy.simulate` does to an activation, in operators that every exporter knows.

    The same bits for finite values: minifloats by the distance between neighbours, which follows from the power of two below;
    scales from the tensor in float64.

    Raises:
        ValueError: a format that ONNX has no operators for: formats of weights, stochastic rounding, observed scales in blocks.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.rounds = True
        scheme = quantizer.scheme
        self.dynamic, self.power_of_two = scheme.dynamic, scheme.power_of_two
        self.block_axis, self.block = scheme.block_axis, tuple(scheme.block)
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("powers", 2.0 ** torch.arange(-126, 128, dtype=torch.float32), persistent=False)
        self.text = str(scheme)
        self.seen: set[tuple[int, ...]] = set()  #: sizes of the axes of blocks in runs that are not traced
        self._round = self._rounding(scheme)

    def _rounding(self, scheme: Scheme) -> Callable[[Tensor, Any], Tensor]:
        kind = scheme.format
        if scheme.rounding == "stochastic":
            raise ValueError(
                f"[lower] ONNX has no operator that draws the numbers of stochastic rounding, got {scheme}"
            )
        if isinstance(kind, Integer) and scheme.dynamic:
            self.qmin, self.qmax, self.symmetric = scheme.qmin, scheme.qmax, scheme.symmetric
            return self._integers
        if isinstance(kind, Minifloat):
            self.floats = _Floats.of(kind)
            return self._minifloat
        if isinstance(kind, MX):
            self.floats = _Floats.of(element_float(kind.element))
            return self._mx
        if isinstance(kind, NVFP4):
            self.floats, self.scale_floats = _Floats.of(Minifloat.e2m1()), _Floats.of(Minifloat.e4m3())
            return self._nvfp4
        raise ValueError(f"[lower] ONNX has no operator that rounds activations to a format of weights, got {scheme}")

    def _integers(self, x: Tensor, axes: Any) -> Tensor:
        middle = (self.qmin + self.qmax + 1) >> 1
        if self.symmetric:
            scale = _scale_of_largest(x.abs().amax(axes, keepdim=True), self.qmax - middle, middle - self.qmin)
            zero_point: Tensor | int = middle
        else:
            low = x.amin(axes, keepdim=True).clamp(max=0.0).double()
            high = x.amax(axes, keepdim=True).clamp(min=0.0).double()
            reach = self.qmax - self.qmin
            wanted = ((high - low) / reach).clamp(max=_LARGEST_GRID_VALUE / reach).float().clamp(min=_SMALLEST_SCALE)
            scale = torch.where(high == low, 1.0, wanted)
            zero_point = (self.qmin - torch.round(low / scale.double())).clamp(self.qmin, self.qmax).float()
        if self.power_of_two:
            scale = self._up(scale)
        q = torch.round(x / scale)
        if self.symmetric and middle == 0:
            return q.clamp(self.qmin, self.qmax) * scale
        return ((q + zero_point).clamp(self.qmin, self.qmax) - zero_point) * scale

    def _up(self, scale: Tensor) -> Tensor:
        below = _down_to_power_of_two(scale, self.powers)
        return torch.where(scale > below, below * 2, below)

    def _minifloat(self, x: Tensor, axes: Any) -> Tensor:
        if self.dynamic:
            scale = _scale_of_largest(x.abs().amax(axes, keepdim=True), self.floats.largest, self.floats.largest)
            scale = self._up(scale) if self.power_of_two else scale
        else:
            shape = [1] * x.dim()
            if self.block_axis is not None:
                shape[self.block_axis] = -1
            scale = self.scale.view(shape)
        return self.floats.round(x / scale) * scale

    def _mx(self, x: Tensor, axes: Any) -> Tensor:
        found = x.abs().amax(axes, keepdim=True)
        scale = (_down_to_power_of_two(found, self.powers) * 2.0**-self.floats.greatest).clamp(min=2.0**-127)
        scale = torch.where(found == 0, 1.0, scale)
        return self.floats.round(x / scale) * scale

    def _nvfp4(self, x: Tensor, axes: Any) -> Tensor:
        found = x.abs().amax(axes, keepdim=True)
        whole = _scale_of_largest(found.amax(tuple(range(found.dim())), keepdim=True), 6.0 * 448.0, 6.0 * 448.0)
        wanted = (found.double() / (whole.double() * 6.0)).float()
        scale = self.scale_floats.round(wanted).clamp(min=2.0**-9) * whole
        return self.floats.round(x / scale) * scale

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the format's numbers; as it is when ``rounds`` is off."""
        if not self.rounds:
            return x
        return self._in_blocks(x.float()).to(x.dtype)

    def _in_blocks(self, x: Tensor) -> Tensor:
        rank = x.dim()
        if self.block_axis is None:
            return self._round(x, tuple(range(rank)))
        axis = self.block_axis % rank
        if not self.block:
            return self._round(x, tuple(i for i in range(rank) if i != axis))
        if self.block == (-1,):
            return self._round(x, axis)
        first = axis - len(self.block) + 1
        sizes = [x.shape[first + i] for i in range(len(self.block))]
        if not torch.compiler.is_compiling():
            self.seen.add(tuple(sizes))
        short = [-size % block for size, block in zip(sizes, self.block, strict=True)]
        if any(short):  # 0 widens no range of a block
            after = [(0, pad) for pad in (*short, *[0] * (rank - 1 - axis))]
            x = F.pad(x, [side for pair in reversed(after) for side in pair])
        for i in reversed(range(len(self.block))):
            x = x.unflatten(first + i, (-1, self.block[i]))
        y = self._round(x, tuple(first + 2 * i + 1 for i in range(len(self.block))))
        for i in range(len(self.block)):
            y = y.flatten(first + i, first + i + 1)
        for i, size in enumerate(sizes):
            if short[i]:
                y = y.narrow(first + i, 0, size)
        return y


class Float8QuantizeDequantize(FormatActivation):
    """E4M3 or E5M2 with an observed scale. While a program is traced, a QuantizeLinear and a DequantizeLinear of int8, which
    `onnx_formats.write_activations` gives the type."""

    def __init__(self, quantizer: FakeQuantizer) -> None:
        super().__init__(quantizer)
        name = is_float8(quantizer.scheme.format)
        assert name is not None
        self.type = name
        self.register_buffer("zero_point", torch.zeros(quantizer.scale.shape, dtype=torch.int64), persistent=False)
        self.step = float(quantizer.scale) if self.block_axis is None else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the format's numbers; as it is when ``rounds`` is off."""
        if not (self.rounds and torch.compiler.is_exporting()):
            return super().forward(x)
        ops, limits = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        if self.step is not None:
            return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, self.step, 0, *limits), self.step, 0, *limits)
        grid = (self.scale, self.zero_point, self.block_axis, *limits)
        return ops.dequantize_per_channel(ops.quantize_per_channel(x, *grid), *grid)
