"""Prepared layers in floating point, for whoever reads what a model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rarefy.nn._base import QuantizableLayer
from rarefy.quantization.fake_quantizer import FakeQuantizer


@contextmanager
def simulation(model: nn.Module) -> Iterator[None]:
    """Layers that are prepared for quantization compute in floating point, on the grids that they have.

    Quantizers that have seen nothing yet leave what they get as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizableLayer) and module.prepared]
    quantizers = [module for layer in layers for module in layer.quant.children() if isinstance(module, FakeQuantizer)]
    execution = [layer.execution for layer in layers]
    switches = [(quantizer.observe, quantizer.quantize) for quantizer in quantizers]
    for layer in layers:
        layer.execution = "simulated"
    for quantizer in quantizers:
        quantizer.observe, quantizer.quantize = False, quantizer.quantize and quantizer.calibrated
    try:
        yield
    finally:
        for layer, kind in zip(layers, execution, strict=True):
            layer.execution = kind
        for quantizer, (observe, quantize) in zip(quantizers, switches, strict=True):
            quantizer.observe, quantizer.quantize = observe, quantize
