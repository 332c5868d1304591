"""Architectures of Hugging Face's transformers, small and randomly initialized: prepare, train a step, convert, report.

Nothing is downloaded: every model is made from its configuration.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from configured_models import ARCHITECTURES, build, floats
from transformers.pytorch_utils import Conv1D

from rarefy.quantization import QConfig, convert, prepare_qat, report

# What is left in FP32 and why, by architecture; of all others every layer is quantized.
SKIPPED: dict[str, set[str]] = {
    "wav2vec 2.0": {"ParametrizedConv1d is a subclass of Conv1d"},  # weight normalization
    "HuBERT": {"ParametrizedConv1d is a subclass of Conv1d"},
    "OPT": {"OPTLearnedPositionalEmbedding is a subclass of Embedding"},
    "BART": {
        "BartLearnedPositionalEmbedding is a subclass of Embedding",
        "BartScaledWordEmbedding is a subclass of Embedding",
    },
    "DeBERTa-v3": {"not called by the example inputs"},  # reads the weight of its relative positions
    "Whisper": {"WhisperPositionalEmbedding is a subclass of Embedding"},
    "Mamba": {"not called by the example inputs"},  # its scan reads the weights of conv1d and dt_proj
}


def could_be_quantized(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, Conv1D)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def same_parameters(model: nn.Module) -> set[frozenset[str]]:
    """Which names mean one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values()}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    model, inputs = build(name)
    layers = could_be_quantized(model)
    prepared = prepare_qat(model, QConfig.int8(), inputs, strict=False)

    # The report names every layer: quantized, or left alone for a reason that is known here.
    table = report(prepared)
    rows = {row.name: row for row in table.layers}
    assert layers <= set(rows)
    assert len(table.quantized) + len(table.skipped) == len(rows)
    assert len(table.quantized) >= 0.5 * len(layers)
    assert {row.note for row in table.skipped} == SKIPPED.get(name, set())
    assert same_parameters(prepared) == same_parameters(model)

    # A training step reaches every quantized weight.
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-2)
    loss = sum(x.square().mean() for x in floats(prepared(**inputs)) if x.requires_grad)
    loss.backward()
    assert torch.isfinite(loss)
    for row in table.quantized:
        weights = dict(prepared.get_submodule(row.name).named_parameters(recurse=False))  # an attention has several
        for key, weight in weights.items():
            if "weight" in key and weight.requires_grad:  # Whisper's sinusoids do not
                assert weight.grad is not None, row.name
                assert torch.isfinite(weight.grad).all(), row.name
    optimizer.step()

    # What is deployed computes what was trained: the mean square of the difference, relative to that of the output.
    with torch.no_grad():
        expected = floats(prepared.eval()(**inputs))
        converted = convert(prepared)
        got = floats(converted(**inputs))
    assert {row.name for row in report(converted).quantized} == {row.name for row in table.quantized}
    assert {row.state for row in report(converted).quantized} == {"integer"}
    assert len(got) == len(expected) > 0
    for x, y in zip(expected, got, strict=True):
        assert torch.isfinite(y).all()
        error = float((x - y).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-12))
        assert error < TOLERANCE, f"relative error {error:.2e}"


# Float rounding in the layers between may move a value over a rounding edge, by one step of 1/255 of a range (the
# greatest error seen is 1.3e-3, then); without such a value the error is 1e-7.
TOLERANCE = 0.01


def test_twenty_architectures_are_here():
    assert len(ARCHITECTURES) >= 20
