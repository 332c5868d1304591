"""What a model holds that a target's files cannot, or not everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from rarefy import nn as rnn
from rarefy._core.quantization import Integer, Scheme, TargetProfile, has_exact_integer_products
from rarefy.export.lowering import QuantizeDequantize, _LoweredConv, _LoweredLinear
from rarefy.export.lowering_formats import FormatActivation, holds_float8, needs_blocks
from rarefy.export.report import Overflow
from rarefy.quantization import FakeQuantizer

#: What layers are to a profile.
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (rnn.ConvLayer, "Conv2d"),
    (rnn.QuantizedConv, "Conv2d"),
    (rnn.ConvTransposeLayer, "ConvTranspose2d"),
    (rnn.QuantizedConvTranspose, "ConvTranspose2d"),
    (rnn.RecurrentLayer, "LSTM"),
    (rnn.QuantizedRecurrent, "LSTM"),
    (rnn.BoundaryLayer, "LayerNorm"),
    (rnn.SDPA, "SDPA"),
    (rnn.MultiheadAttention, "MultiheadAttention"),
    (rnn.QuantizedMultiheadAttention, "MultiheadAttention"),
    (rnn.Linear, "Linear"),
    (rnn.TransposedLinear, "Linear"),
    (rnn.QuantizedLinear, "Linear"),
    (rnn.TableLayer, "Embedding"),
    (rnn.QuantizedTable, "Embedding"),
    (rnn.Add, "Add"),
    (rnn.QuantizedAdd, "Add"),
    (rnn.Mul, "Mul"),
    (rnn.Cat, "Cat"),
    (rnn.QuantizedCat, "Cat"),
)


def _activations(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer) and not module.is_weight:
            yield name, module


def _weights(model: nn.Module) -> Iterator[tuple[str, Scheme]]:
    """The scheme of every weight: of its quantizer, or of what a converted layer holds packed."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer) and module.is_weight:
            yield name, module.scheme
        elif isinstance(module, rnn.PackedLayer):
            yield f"{name}.weight" if name else "weight", module.scheme


def chosen_target(model: nn.Module) -> str:
    """The target that the model was prepared for; "onnxruntime" when none was chosen."""
    chosen = (getattr(module, "target", None) for module in model.modules() if hasattr(module, "quant"))
    return next((name for name in chosen if isinstance(name, str)), "onnxruntime")


def check_target(function: str, model: nn.Module, profile: TargetProfile) -> None:
    """Whether a file for the target can hold every layer and every grid of the model.

    Raises:
        ValueError: it cannot; names the layer, the rule and the value.
    """
    hint = f"prepare the model with QConfig.int8(target={profile.name!r})"
    for name, quantizer in _activations(model):
        reason = profile.why_not_written(quantizer.scheme)
        if reason is not None and not quantizer.is_plain:
            raise ValueError(
                f"[{function}] {name} must have a format that a file for the target can hold, but {reason}"
            )
        if reason is not None:
            raise ValueError(f"[{function}] {name} must have a grid that the target can hold, but {reason}; {hint}")
    for name, scheme in _weights(model):
        reason = profile.why_weight_not_written(scheme)
        if reason is not None:
            raise ValueError(
                f"[{function}] {name} must have a format that a file for the target can hold, but {reason}"
            )
    for name, module in model.named_modules():
        kind = next((kind for type_, kind in _KINDS if isinstance(module, type_)), None)
        state = getattr(module, "quant", None)
        if kind is None or not isinstance(state, rnn.QuantState) or not state._modules:
            continue
        if not profile.stores(kind):
            families = ", ".join(profile.families)
            raise ValueError(
                f"[{function}] layer {name} must be one that the target runs in integers ({profile.name}: {families}), got "
                f"{type(module).__name__}; {hint}"
            )
        transposed = isinstance(module, (rnn.ConvTransposeLayer, rnn.QuantizedConvTranspose))
        grouped = transposed and module.groups > 1 and state.weight is not None and state.weight.axis is not None
        if grouped and not profile.scales_of_groups:
            raise ValueError(
                f"[{function}] layer {name} must have one scale for its weight ({profile.name} holds none for each channel of "
                f"several groups), got {state.weight.scheme}; {hint}"  # type: ignore[union-attr]
            )
        weights = (q for key, q in state.named_children() if key.startswith("weight") and isinstance(q, FakeQuantizer))
        per_channel = next((q for q in weights if q.axis is not None), None)
        if per_channel is not None and not profile.has_per_channel(kind):
            raise ValueError(
                f"[{function}] layer {name} must have one scale for its weight ({profile.name} has scales per channel for "
                f"{', '.join(profile.per_channel)}), got {per_channel.scheme}; {hint}"
            )


def needs_newer_types(model: nn.Module) -> tuple[str, int] | None:
    """What in the model needs types that came with an operator set, and that set; the newest, or None."""
    found: list[tuple[str, int]] = []
    weights = [(name, scheme, "weights") for name, scheme in _weights(model)]
    activations = [(name, quantizer.scheme, "activations") for name, quantizer in _activations(model)]
    for name, scheme, side in weights + activations:
        if isinstance(scheme.format, Integer) and scheme.bits > 8 and not scheme.dynamic:
            found.append((f"{scheme.bits}-bit {side} ({name})", 21))
        elif side == "weights" and needs_blocks(scheme):
            found.append((f"{scheme} ({name})", 21))
        elif holds_float8(scheme):
            found.append((f"{scheme} ({name})", 19))
    return max(found, key=lambda item: item[1], default=None)


def has_blocks(model: nn.Module) -> bool:
    """Whether activations have scales per group or block."""
    return any(quantizer.scheme.block not in ([], [-1]) for _, quantizer in _activations(model))


def check_blocks(function: str, lowered: nn.Module) -> None:
    """Whether all blocks of activations lay along axes of one size in the runs so far.

    Raises:
        ValueError: one did not; names the module.
    """
    for name, module in lowered.named_modules():
        if isinstance(module, FormatActivation) and len(module.seen) > 1:
            sizes = " and ".join(str(list(size)) for size in sorted(module.seen))
            raise ValueError(
                f"[{function}] the axes of blocks must have a fixed size to be exported, got {sizes} for {module.text} in "
                f"{name or 'the root'} (dynamic_batch=False fixes the batch)"
            )


def warn_of_overflow(function: str, overflow: tuple[Overflow, ...]) -> None:
    """Warns where this very processor adds products of bytes in 16 bits and some activations would saturate."""
    if overflow and not has_exact_integer_products():
        pairs = sum(layer.pairs for layer in overflow)
        warnings.warn(
            f"[{function}] this processor has no VNNI: sums of uint8 activations and int8 weights may saturate in "
            f"{len(overflow)} layers ({pairs} pairs of weights), {overflow[0].layer} among them; weights of 7 bits do not: "
            f"QConfig.int8(reduce_range=True)",
            stacklevel=3,
        )


def pairwise_overflow(lowered: nn.Module) -> tuple[Overflow, ...]:
    """The layers whose sums may overflow where products of bytes are added in pairs in 16 bits (vpmaddubsw).

    Such kernels compute a0 * w0 + a1 * w1 of unsigned activations a in [0, qmax] and weights that follow one another along
    the input features or channels, and saturate at -32768 and 32767. That happens to some activations when
    qmax * (max(w0, 0) + max(w1, 0)) > 32767 or qmax * (min(w0, 0) + min(w1, 0)) < -32768.

    Args:
        lowered: of `lower`, with unsigned activations. Layers with a float or signed input cannot overflow so.
    """
    found = []
    for name, module in lowered.named_modules():
        if not isinstance(module, (_LoweredConv, _LoweredLinear)):
            continue
        quantizer = module.quant.input
        if not isinstance(quantizer, QuantizeDequantize) or quantizer.dtype != torch.uint8:
            continue
        weight = module._buffers["weight"]
        if weight is None or weight.dtype is not torch.int8:  # another format, more bits: no products of bytes
            continue
        if isinstance(module, _LoweredConv):
            rows = weight.movedim(1, -1)  # [out, kernel..., in / groups]
        else:
            rows = weight.t() if module.matmul else weight
        if rows.shape[-1] % 2:
            rows = F.pad(rows, (0, 1))
        pairs = rows.to(torch.int32).unflatten(-1, (-1, 2))
        above = quantizer.qmax * pairs.clamp(min=0).sum(-1) > 32767
        below = quantizer.qmax * pairs.clamp(max=0).sum(-1) < -32768
        if count := int((above | below).sum()):
            found.append(Overflow(name, count, above.numel()))
    return tuple(found)
