"""What was quantized, what was left alone, and why."""

from __future__ import annotations

import html
from dataclasses import dataclass

from torch import nn

from rarefy import nn as rnn
from rarefy.nn._base import QuantizableLayer
from rarefy.nn.registry import is_layer, is_prepared, unsupported
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.tied import tied_note


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model."""

    name: str
    kind: str
    state: str  #: "prepared", "integer", "packed" (a weight kept as codes and scales) or "fp32"
    weight: str  #: scheme of the weight, or ""
    activation: str  #: scheme of the input, or ""
    note: str  #: what is fused, or why the layer is in FP32


@dataclass(frozen=True)
class QuantizationReport:
    """One row per layer that is quantized or could be."""

    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()  #: what the configuration asked for in vain
    target: str | None = None  #: the runtime that the model was prepared for

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers on integer grids."""
        return tuple(layer for layer in self.layers if layer.state != "fp32")

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers in FP32."""
        return tuple(layer for layer in self.layers if layer.state == "fp32")

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("layer", "kind", "state", "weight", "activation", "note")]
        rows += [(e.name, e.kind, e.state, e.weight, e.activation, e.note) for e in self.layers]
        return rows

    def _summary(self) -> str:
        target = "" if self.target is None else f", for {self.target}"
        return f"{len(self.quantized)} quantized, {len(self.skipped)} in FP32{target}"

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(self._summary())
        lines += self.warnings
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        summary = "; ".join([self._summary(), *self.warnings])
        return f"<table><caption>{html.escape(summary)}</caption><tr>{cells}</tr>{lines}</table>"


def _prepared(
    name: str, module: nn.Module, state: str, tied: str, contiguous: str = "", floats: str = ""
) -> LayerReport:
    quant: rnn.QuantState = module.quant  # type: ignore[assignment]
    quantizers = {child: q for child, q in quant.named_children() if isinstance(q, FakeQuantizer)}
    weight = next((q for child, q in quantizers.items() if child.startswith("weight")), None)
    first = next((q for child, q in quantizers.items() if child.startswith(("input", "query"))), quant.output)
    notes = []
    if isinstance(module, rnn.PackedLayer):
        notes.append(f"weight of {module.weight_bytes:,} bytes, {module.bits_per_value:.2f} bits per value")
    if isinstance(module, rnn.ConvBnLayer):
        notes.append("batch norm folded")
    if module.relu:
        notes.append("ReLU fused")
    if quant.output is not None:
        notes.append("output quantized")
    if isinstance(module, rnn.BoundaryLayer):
        notes.append("computed in floating point")
    if isinstance(module, (rnn.Mul, rnn.SDPA)):
        notes.append("simulated: there is no integer product of two activations")
    if isinstance(module, rnn.WeightedLayer) and not isinstance(module, rnn.TableLayer):
        reason = "as configured" if module.execution == "simulated" else module.float_reason
        if reason is None and module.execution is None and not module.trains_in_integers:
            reason = "integers would train slower (execution='integer' asks for them)"
        notes.append("executes in integers" if reason is None else f"simulated: {reason}")
    grouped = isinstance(module, (rnn.ConvTransposeLayer, rnn.QuantizedConvTranspose)) and module.groups > 1
    if grouped and module.target is not None and weight is not None and weight.axis is None:
        notes.append(f"one scale for the weight: {module.target} holds none for each channel of several groups")
    if isinstance(module, rnn.RecurrentLayer):
        reason = "as configured" if module.execution == "simulated" else module.float_reason
        products = "products with the input execute in integers, those with the hidden state are simulated"
        notes.append(products if reason is None else f"simulated: {reason}")
    if isinstance(module, rnn.MultiheadAttention):
        reason = "as configured" if module.execution == "simulated" else module.float_reason
        products = "projections execute in integers, the products of its heads are simulated"
        notes.append(products if reason is None else f"simulated: {reason}")
    if isinstance(module, rnn.QuantizedMultiheadAttention) and quant.find("query") is not None:
        notes.append("the products of its heads are simulated: there is no integer product of two activations")
    if tied:
        notes.append(tied)
    if contiguous and isinstance(module, rnn.ConvLayer) and module.weight.dim() == 4:
        notes.append(f"not channels-last: {contiguous}")
    if quant.next is not None:
        notes.append("gives bytes")
    elif floats:
        notes.append(f"gives floats: {floats}")
    if any(not q.calibrated for child, q in quantizers.items() if not child.startswith("weight")):
        notes.append("not calibrated")
    for child, quantizer in quantizers.items():
        if count := int(quantizer.skipped):
            notes.append(
                f"{child} not finite {count} times"
                if child.startswith("weight")
                else f"{count} batches not finite at {child}"
            )
    return LayerReport(
        name,
        type(module).__name__,
        state,
        str(module.scheme) if isinstance(module, rnn.PackedLayer) else "" if weight is None else str(weight.scheme),
        "" if first is None else str(first.scheme),
        ", ".join(notes),
    )


def report(model: nn.Module) -> QuantizationReport:
    """What ``prepare_qat``, ``prepare`` or ``convert`` did to a model: a table that prints itself, also in notebooks."""
    skipped: dict[str, str] = getattr(model, "_rarefy_skipped", {})
    unlinked: dict[str, str] = getattr(model, "_rarefy_unlinked", {})
    layers, targets = [], []
    contiguous = getattr(model, "_rarefy_contiguous", "")
    holders: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (rnn.IntegerLayer, rnn.PackedLayer, QuantizableLayer)):
            targets.append(module.target)
        if isinstance(module, rnn.IntegerLayer):
            floats = unlinked.get(name, "")
            layers.append(_prepared(name, module, "integer", tied_note(model, name, holders), floats=floats))
        elif isinstance(module, rnn.PackedLayer):
            layers.append(_prepared(name, module, "packed", tied_note(model, name, holders)))
        elif is_prepared(module):
            layers.append(_prepared(name, module, "prepared", tied_note(model, name, holders), contiguous))
        elif is_layer(module):
            reason = skipped.get(name) or unsupported(module) or "not prepared"
            layers.append(LayerReport(name, type(module).__name__, "fp32", "", "", reason))
    unmatched = getattr(model, "_rarefy_unmatched", ())
    warnings = tuple(f"override {shown} matches no layer" for shown in unmatched)
    return QuantizationReport(tuple(layers), warnings, next((name for name in targets if name is not None), None))
