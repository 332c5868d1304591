"""From fake-quantized modules to a program of integers: what every deployment format starts from.

A model that `prepare_qat` or `prepare` made computes with float numbers that lie on an integer grid. `lower` writes the
same computation with the integers in the open: weights become int8 buffers behind a dequantize operator, and every
fake quantizer becomes a quantize and a dequantize operator of the `quantized_decomposed` library that torch carries.
`torch.export` keeps those as single nodes, and the exporters translate them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import nn as rnn
from rarefy.quantization import FakeQuantizer


def named_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """All fake quantizers of the model by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}


class QuantizeDequantize(nn.Module):
    """`clamp(round(x / scale) + zero_point, qmin, qmax)` as integers, and back; one scale for the tensor or one per channel.

    With `unsigned`, an int8 quantizer is written as uint8: zero point and range move by 128, and no value changes.
    """

    def __init__(self, quantizer: FakeQuantizer, unsigned: bool) -> None:
        super().__init__()
        self.dtype = quantizer.dtype
        self.qmin, self.qmax = int(quantizer.qmin), int(quantizer.qmax)
        self.axis = quantizer.axis
        zero_point = quantizer.zero_point.detach().to(torch.int64)
        if unsigned and self.dtype == torch.int8:
            self.dtype = torch.uint8
            self.qmin, self.qmax, zero_point = self.qmin + 128, self.qmax + 128, zero_point + 128
        if self.axis is None:
            self.scale, self.zero_point = float(quantizer.scale), int(zero_point)
        else:
            self.register_buffer("scale", quantizer.scale.detach().clone())
            self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        limits = (self.qmin, self.qmax, self.dtype)
        if self.axis is not None:
            q = ops.quantize_per_channel(x, self.scale, self.zero_point, self.axis, *limits)
            return ops.dequantize_per_channel(q, self.scale, self.zero_point, self.axis, *limits)
        q = ops.quantize_per_tensor(x, self.scale, self.zero_point, *limits)
        info = torch.iinfo(self.dtype)
        if (self.qmin, self.qmax) != (info.min, info.max):
            # Formats saturate at the limits of the type, and torch's ONNX translation drops qmin and qmax.
            q = torch.clamp(q, self.qmin, self.qmax)
        return ops.dequantize_per_tensor(q, self.scale, self.zero_point, *limits)


class _Lowered(nn.Module):
    """What the lowered modules share: the quantizers under their names, and the epilogue."""

    def __init__(self, module: nn.Module, unsigned: bool) -> None:
        super().__init__()
        self.relu = bool(module.relu)
        self.quant = nn.Module()
        for name in ("input", "input0", "input1", "output"):
            quantizer = getattr(module.quant, name, None)
            self.quant.add_module(
                name, nn.Identity() if quantizer is None else QuantizeDequantize(quantizer, unsigned)
            )

    def finish(self, y: Tensor) -> Tensor:
        return self.quant.output(torch.relu(y) if self.relu else y)


class _LoweredWeighted(_Lowered):
    """A layer with a weight: int8 buffer and dequantize operator, or float where the weight has no quantizer."""

    def __init__(self, module: nn.Module, unsigned: bool, transposed: bool) -> None:
        super().__init__(module, unsigned)
        integers = module.integer_weight()
        values, self.axis = integers.values.detach(), integers.axis
        if transposed:
            values = values.t()
            self.axis = None if self.axis is None else 1 - self.axis
        self.register_buffer("weight", values.contiguous().clone())
        self.limits = (int(module.quant.weight.qmin), int(module.quant.weight.qmax), values.dtype)
        if self.axis is None:
            self.scale, self.zero_point = float(integers.scale), int(integers.zero_point)
        else:
            self.register_buffer("scale", integers.scale.detach().clone())
            self.register_buffer("zero_point", integers.zero_point.detach().to(torch.int64))
        self.register_buffer("bias", None if integers.bias is None else integers.bias.detach().clone())

    def float_weight(self) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.axis is None:
            return ops.dequantize_per_tensor(self.weight, self.scale, self.zero_point, *self.limits)
        return ops.dequantize_per_channel(self.weight, self.scale, self.zero_point, self.axis, *self.limits)


class _LoweredLinear(_LoweredWeighted):
    """Stores the weight transposed, as formats multiply, so that no transpose stands between its integers and the product."""

    def __init__(self, module: rnn.Linear, unsigned: bool) -> None:
        super().__init__(module, unsigned, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.quant.input(x), self.float_weight())
        return self.finish(y if self.bias is None else y + self.bias)


class _LoweredConv2d(_LoweredWeighted):
    def __init__(self, module: rnn.Conv2d, unsigned: bool) -> None:
        super().__init__(module, unsigned, transposed=False)
        self.arguments = (module.stride, module.padding, module.dilation, module.groups)
        self.pad = None
        if module.padding_mode != "zeros":
            self.pad = (tuple(module._reversed_padding_repeated_twice), module.padding_mode)
            self.arguments = (module.stride, 0, module.dilation, module.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant.input(x)
        if self.pad is not None:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        return self.finish(F.conv2d(x, self.float_weight(), self.bias, *self.arguments))


class _LoweredAdd(_Lowered):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.finish(self.quant.input0(a) + self.quant.input1(b))


_LOWERED: dict[type[nn.Module], Callable[[nn.Module, bool], nn.Module]] = {
    rnn.ConvBn2d: _LoweredConv2d,
    rnn.Conv2d: _LoweredConv2d,
    rnn.Linear: _LoweredLinear,
    rnn.Add: _LoweredAdd,
    FakeQuantizer: QuantizeDequantize,
}


def check_quantizers(function: str, model: nn.Module) -> None:
    """Throws ValueError naming every quantizer that has seen no data, or whose scale or range cannot be written."""
    quantizers = named_quantizers(model)
    missing = [name for name, q in quantizers.items() if not q.calibrated]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ValueError(
            f"[{function}] every quantizer must have observed data (train, or calibrate), "
            f"got {len(missing)} of {len(quantizers)} without: {shown}"
        )
    for name, q in quantizers.items():
        if q.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"[{function}] quantizers must give int8 or uint8, got {q.dtype} in {name}")
        smallest, largest = float(q.scale.min()), float(q.scale.max())
        if not (smallest > 0 and math.isfinite(largest)):
            raise ValueError(
                f"[{function}] scales must be finite and positive, got {smallest:g} to {largest:g} in {name}"
            )


def lower(model: nn.Module, unsigned: bool) -> nn.Module:
    """Replaces every quantized module of `model` by its integer form, in place, and returns the model.

    Args:
        model: a copy that the caller owns, in evaluation mode. May itself be one of the modules that are replaced.
        unsigned: write int8 activations as uint8 with zero point + 128, which changes no value.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)

    done: dict[nn.Module, nn.Module] = {}  # a module that occurs twice stays one module

    def replace(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        result = module
        for kind, lowered in _LOWERED.items():
            if isinstance(module, kind):
                if type(module).forward is not kind.forward:
                    raise TypeError(
                        f"[lower] a subclass of {kind.__name__} with its own forward cannot be exported, "
                        f"got {type(module).__name__} at {name or 'the root'}"
                    )
                result = lowered(module, unsigned)
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
