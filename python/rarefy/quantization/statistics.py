"""What calibration has seen, on the disk: ranges can be chosen again without data."""

from __future__ import annotations

import os

import torch
from torch import nn

from rarefy import _core
from rarefy._core.quantization import QuantizerStatistics
from rarefy.quantization.fake_quantizer import FakeQuantizer


def save_statistics(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what the activation quantizers of a prepared model have seen to one file of the safetensors format.

    C++ reads the same files (``rarefy::quantization::load_statistics``). The file is written under another name beside its
    place and renamed, so that a failure leaves what was there.

    Args:
        model: of ``prepare`` or ``prepare_qat``, calibrated or trained, on any device.
        path: of the file.

    Raises:
        ValueError: the model is not prepared, or a quantizer has seen nothing (they are listed).
        RuntimeError: the file cannot be written.
    """
    quantizers = _activation_quantizers("save_statistics", model)
    empty = [name for name, quantizer in quantizers.items() if not quantizer.calibrated]
    if empty:
        raise ValueError(
            f"[save_statistics] every quantizer must have seen data, but these have not: {', '.join(empty)}"
        )
    saved = {}
    for name, quantizer in quantizers.items():
        tensors = {key: getattr(quantizer, key) for key in ("min_val", "max_val", "skipped")}
        if quantizer.statistics is not None:
            tensors |= quantizer.statistics.tensors()
        saved[name] = QuantizerStatistics(str(quantizer.observer), str(quantizer.scheme), quantizer.axis, tensors)
    _core.quantization.write_statistics(saved, os.fspath(path))


def load_statistics(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Give the activation quantizers of a prepared model what those of a file have seen, and choose their ranges.

    The grids may differ from those that were calibrated, and so may the searches: a histogram serves ``Histogram`` with
    every search, ``Percentile`` and ``SQNR`` of as many bins, and ``MinMax``.

    Args:
        model: of ``prepare`` or ``prepare_qat``; the names of its quantizers must be those of the file.
        path: of a file that ``save_statistics`` has written, in either language.

    Returns:
        ``model`` itself, with quantizing activations, as after ``calibrate``.

    Raises:
        ValueError: names that differ (they are listed), statistics that an observer cannot use, another axis or number of
            rows, a damaged file. The quantizer, the rule and the value are named, and the model is as it was.
        RuntimeError: the file cannot be read.
    """
    quantizers = _activation_quantizers("load_statistics", model)
    saved = _core.quantization.read_statistics(os.fspath(path))
    missing, unexpected = sorted(quantizers.keys() - saved.keys()), sorted(saved.keys() - quantizers.keys())
    if missing or unexpected:
        raise ValueError(
            f"[load_statistics] {os.fspath(path)}: the quantizers must be those of the model; missing: "
            f"[{', '.join(missing)}], unexpected: [{', '.join(unexpected)}]"
        )
    buffers = {
        name: _core.quantization.statistics_for(name, saved[name], q.observer, q.axis, len(q.scale))
        for name, q in quantizers.items()
    }
    with torch.no_grad():
        for name, quantizer in quantizers.items():
            quantizer.take_statistics(buffers[name])
            quantizer.observe, quantizer.quantize = False, True
    return model


def _activation_quantizers(function: str, model: nn.Module) -> dict[str, FakeQuantizer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}
    if not found:
        raise ValueError(f"[{function}] the model must have prepared layers; call prepare first")
    return {name: quantizer for name, quantizer in found.items() if not quantizer.is_weight}
