"""What prepare learns from the example run: which layers are called, how often, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import QConfig, calibrate, convert, prepare, prepare_qat, report


class Heads(nn.Module):
    """``first`` is declared last; ``unused`` is never called; ``kernel`` gives its weight away."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.kernel = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 3)
        self.last = nn.Linear(6, 2)
        self.first = nn.Linear(4, 6)

    def forward(self, x, unused=False):
        x = torch.tanh(self.block(torch.tanh(self.block(self.first(x)))))
        x = x @ self.kernel.weight
        return self.unused(x) if unused else self.last(x)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
UNCALLED = "not called by the example inputs"


@pytest.mark.parametrize("function", [prepare, prepare_qat])
def test_layers_that_are_never_called_stay_in_fp32(function):
    torch.manual_seed(0)
    model = Heads()
    prepared = function(model, QConfig.int8(), X, strict=True)
    assert {row.name: row.note for row in report(prepared).skipped} == {"kernel": UNCALLED, "unused": UNCALLED}
    assert type(prepared.unused) is nn.Linear
    prepared(X) if function is prepare_qat else calibrate(prepared, [X])
    converted = convert(prepared)
    assert {row.name for row in report(converted).quantized} == {"block", "first", "last"}
    assert {row.name: row.note for row in report(converted).skipped} == {"kernel": UNCALLED, "unused": UNCALLED}
    torch.testing.assert_close(converted(X), prepared.eval()(X), rtol=0, atol=1e-5)
    torch.testing.assert_close(converted(X, unused=True), prepared(X, unused=True), rtol=0, atol=1e-5)


def test_an_override_quantizes_a_layer_that_the_example_does_not_call():
    prepared = prepare_qat(Heads(), QConfig.int8(overrides={"unused": QConfig.int8()}), X)
    assert type(prepared.unused) is rf.nn.Linear
    assert [row.name for row in report(prepared).skipped] == ["kernel"]


def test_without_example_inputs_every_layer_is_prepared():
    assert len(report(prepare_qat(Heads(), QConfig.int8())).quantized) == 5


def test_a_model_that_calls_no_layer_is_refused():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"and that the example inputs reach, but has none"):
        prepare_qat(Idle(), QConfig.int8(), X)


def test_a_layer_inside_of_one_that_is_left_alone_counts_as_called():
    class Adapted(nn.Linear):  # a subclass: left alone, what it holds is not
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.adapter = nn.Linear(4, 4)

        def forward(self, x):
            return super().forward(x) + self.adapter(x)

    prepared = prepare_qat(nn.Sequential(Adapted()), QConfig.int8(), X, strict=False)
    assert {row.name for row in report(prepared).quantized} == {"0.adapter"}


def test_first_and_last_are_those_of_the_run():
    config = QConfig.int8(first_last_fp32=True)
    skipped = {row.name: row.note for row in report(prepare_qat(Heads(), config, X)).skipped}
    assert "as the first layer" in skipped["first"]
    assert "as the last layer" in skipped["last"]
    assert skipped.keys() == {"first", "last", "kernel", "unused"}


def test_first_and_last_count_every_call_of_a_layer():
    class Loop(nn.Module):
        """b a b: the first call and the last one are of the same layer."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.b(x)))))

    skipped = report(prepare_qat(Loop(), QConfig.int8(first_last_fp32=True), X)).skipped
    assert [row.name for row in skipped] == ["b"]


def test_nothing_is_fused_into_a_layer_that_runs_several_times():
    class Shared(nn.Module):
        """One convolution, its batch normalization and a ReLU, followed by a ReLU the first time only."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
            self.alias = self.conv

        def forward(self, x):
            return self.bn(self.alias(self.relu(self.bn(self.conv(x)))))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    prepared = prepare_qat(Shared(), QConfig.int8(), x)
    assert prepared.alias is prepared.conv
    assert type(prepared.conv) is rf.nn.Conv2d
    assert type(prepared.bn) is nn.BatchNorm2d
    assert not prepared.conv.relu
    assert prepared.conv.quant.output is None
    for _ in range(2):
        prepared(x)
    converted = convert(prepared)
    assert converted.alias is converted.conv
    torch.testing.assert_close(converted(x), prepared.eval()(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_encoder_computes_with_the_quantized_layers_in_evaluation_too(mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = {"src": x, "src_key_padding_mask": padding if mask else None}
    prepared = calibrate(prepare(model, QConfig.int8(), inputs, strict=False), [inputs])
    expected = prepared(**inputs)
    with torch.no_grad():
        got, full, integer = prepared(**inputs), model(**inputs), convert(prepared)(**inputs)
    seen = ~padding if mask else slice(None)
    torch.testing.assert_close(got[seen], expected[seen].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(integer[seen], expected[seen].detach(), rtol=0, atol=1e-5)
    assert (got[seen] - full[seen]).abs().max() > 1e-3
    assert model.layers[0].activation_relu_or_gelu == 1  # the given model is as it was
