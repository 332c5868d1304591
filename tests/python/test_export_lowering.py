"""The forms of a lowered program: each computes what the fake-quantized model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_export_layers import CASES, trained
from torch import nn

import rarefy as rf
from rarefy.export.lowering import QuantizeDequantize, lower
from rarefy.quantization import PerChannel, PerTensor, QConfig, Scheme


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_every_form_computes_the_same(name):
    make, example = CASES[name]
    x = example()
    model = trained(make(), x)
    with torch.no_grad():
        expected = model(x)
        outputs = {
            (weights, linear, unsigned): lower(copy.deepcopy(model), unsigned, weights=weights, linear=linear)(x)
            for weights in ("integers", "quantize")
            for linear in ("matmul", "linear")
            for unsigned in (True, False)
        }
    for form, output in outputs.items():
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6, msg=str(form))
        same_product = outputs["integers", form[1], True]
        assert torch.equal(output, same_product), form  # neither the weights' form nor the labels change a value


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
def test_activations_have_the_type_asked_for(symmetric, unsigned):
    config = QConfig.int8(activation=Scheme(bits=8, symmetric=symmetric))
    lowered = lower(trained(nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6), config=config), unsigned)
    activations = [module for module in lowered.modules() if isinstance(module, QuantizeDequantize)]
    dtype = torch.uint8 if unsigned else torch.int8
    info = torch.iinfo(dtype)
    assert activations
    assert {(q.dtype, q.qmin, q.qmax) for q in activations} == {(dtype, info.min, info.max)}


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("linear", ["matmul", "linear"])
def test_quantizing_the_stored_weights_gives_the_trained_integers(granularity, bits, linear):
    config = QConfig.int8(weight=Scheme(bits=bits, symmetric=True, granularity=granularity))
    model = trained(nn.Sequential(nn.Linear(64, 50)), torch.randn(5, 64), config=config)
    integers = model[0].integer_weight()
    layer = lower(copy.deepcopy(model), False, weights="quantize", linear=linear)[0]
    assert layer._buffers["weight"].dtype == torch.float32
    expected = integers.values.float() * integers.scale.reshape(-1, 1)
    assert torch.equal(layer.weight, expected)
    assert layer._buffers["weight"].shape == ((64, 50) if linear == "matmul" else (50, 64))


def test_converted_models_have_the_same_forms():
    x = torch.randn(5, 12)
    model = trained(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    converted = rf.quantization.convert(copy.deepcopy(model))
    with torch.no_grad():
        a = lower(model, False, weights="quantize", linear="linear")(x)
        b = lower(converted, False, weights="quantize", linear="linear")(x)
    assert torch.equal(a, b)
