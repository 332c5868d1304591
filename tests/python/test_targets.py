"""Deployment targets: what prepare refuses, and where it places quantizers."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy._core.quantization import layer_family, target_names, target_profile
from rarefy.quantization import PerChannel, PerTensor, QConfig, Scheme

TARGETS = ("onnxruntime", "openvino", "tensorrt", "qnn")


class Block(nn.Module):
    """A residual block with a downsampled identity, a gate, and a head."""

    def __init__(self, swapped: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.add = rf.nn.Add()
        self.gate = rf.nn.Mul()
        self.cat = rf.nn.Cat(1)
        self.fc = nn.Linear(16, 5)
        self.swapped = swapped

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv(x))
        y = torch.relu(self.add(x, y) if self.swapped else self.add(y, x))
        y = self.cat(y, self.gate(y, x))
        return self.fc(y.mean((2, 3)))


def quantizers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, rf.quantization.FakeQuantizer)}


def calibrated(model, config, x):
    prepared = rf.quantization.prepare(model, config, x)
    return rf.quantization.calibrate(prepared, [x])


def test_profiles_are_a_table():
    assert tuple(target_names()) == TARGETS
    for name in TARGETS:
        profile = target_profile(name)
        assert profile.name == name
        assert profile.oldest_opset == 13 <= profile.default_opset <= 21
        assert repr(profile) == f"TargetProfile('{name}')"
        assert pickle.loads(pickle.dumps(profile)).name == name
    assert not target_profile("tensorrt").zero_points
    assert layer_family("TransposedLinear") == "linear"
    assert (layer_family("ConvTranspose2d"), layer_family("GRUCell")) == ("conv_transpose", "recurrent")
    assert (layer_family("EmbeddingBag"), layer_family("GELU"), layer_family("SDPA")) == (
        "embedding",
        "boundary",
        "attention",
    )
    with pytest.raises(ValueError, match=r"\[layer_family\] kind must be .*, got RNN"):
        layer_family("RNN")


def test_unknown_target_is_an_error():
    known = r"\[target_profile\] target must be one of onnxruntime, openvino, tensorrt, qnn, got 'tflite'"
    for make in (QConfig.int8, lambda target: QConfig(weight=Scheme(), target=target)):
        with pytest.raises(ValueError, match=known):
            make(target="tflite")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("prepare", [rf.quantization.prepare, rf.quantization.prepare_qat])
def test_presets_pass_their_own_target(target, prepare):
    config = QConfig.int8(target=target)
    model = prepare(Block(), config, torch.randn(2, 3, 8, 8))
    assert config.target == target == rf.quantization.report(model).target
    assert f", for {target}" in repr(rf.quantization.report(model))
    assert str(config.activation) == (
        "int8 symmetric per-tensor [-128, 127]" if target == "tensorrt" else "uint8 asymmetric per-tensor [0, 255]"
    )
    back = pickle.loads(pickle.dumps(model))
    assert rf.quantization.report(back).target == target
    assert rf.quantization.report(copy.deepcopy(model)).target == target


def test_no_target_changes_nothing():
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    model = Block()
    free = calibrated(model, QConfig.int8(), x)
    chosen = calibrated(model, QConfig.int8(target="onnxruntime"), x)
    assert quantizers(free).keys() == quantizers(chosen).keys()
    assert torch.equal(free(x), chosen(x))
    assert rf.quantization.report(free).target is None
    assert repr(rf.quantization.report(free)).endswith("in FP32")


FORBIDDEN = {
    "zero points": ("tensorrt", Scheme(symmetric=False), "tensorrt knows no zero points", "uint8 asymmetric"),
    "unsigned": ("tensorrt", Scheme(signed=False), "tensorrt knows no zero points", "uint8 symmetric"),
    "int4": ("onnxruntime", Scheme(bits=4, symmetric=False), "onnxruntime executes activations of 5, 6, 7, 8", "uint4"),
    "7 bits": ("openvino", Scheme(bits=7, symmetric=False), "openvino executes activations of 8 bits", "uint7"),
    "narrow": ("qnn", Scheme(narrow_range=True), "whole range", "[-127, 127]"),
    "16 bits": ("openvino", Scheme(bits=16, symmetric=False), "openvino executes activations of 8 bits", "uint16"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
@pytest.mark.parametrize("prepare", [rf.quantization.prepare, rf.quantization.prepare_qat])
def test_forbidden_schemes_name_layer_rule_and_value(case, prepare):
    target, activation, rule, value = FORBIDDEN[case]
    model = Block()
    before = {name: type(module) for name, module in model.named_modules()}
    config = QConfig.int8(target=target, activation=activation)
    said = rf"layer stem must have schemes that the target executes, but .*{re.escape(rule)}.*got .*{re.escape(value)}"
    message = rf"\[{prepare.__name__}\] {said}"
    with pytest.raises(ValueError, match=message):
        prepare(model, config, torch.randn(2, 3, 8, 8), inplace=True)
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_an_override_is_checked_too():
    config = QConfig.int8(target="onnxruntime", overrides={"fc": QConfig.int8(activation=Scheme(bits=3))})
    with pytest.raises(ValueError, match=r"\[prepare\] layer fc must have .*onnxruntime executes .* got int3"):
        rf.quantization.prepare(Block(), config)
    config = QConfig.int8(target="tensorrt", overrides={rf.nn.Mul: QConfig.int8(target="tensorrt")})
    with pytest.raises(
        ValueError,
        match=r"layer gate must have .*tensorrt runs linear, conv, add, recurrent, conv_transpose in integers, got Mul",
    ):
        rf.quantization.prepare(Block(), config)
    with pytest.raises(ValueError, match=r"an override must be for the same target \('tensorrt'\), got 'qnn' for fc"):
        QConfig.int8(target="tensorrt", overrides={"fc": QConfig.int8(target="qnn")})
    with pytest.raises(ValueError, match=r"an override must be for the same target \(None\), got 'qnn' for stem"):
        rf.quantization.prepare(Block(), QConfig.int8(overrides=lambda name, module: QConfig.int8(target="qnn")))


@pytest.mark.parametrize("swapped", [False, True])
def test_tensorrt_quantizes_inputs_of_layers_and_identities(swapped):
    x = torch.randn(2, 3, 8, 8)
    model = calibrated(Block(swapped).eval(), QConfig.int8(target="tensorrt"), x)
    identity = "add.quant.input0" if swapped else "add.quant.input1"
    names = [f"{layer}.quant.{side}" for layer in ("stem", "conv", "fc") for side in ("input", "weight")]
    assert set(quantizers(model)) == {*names, identity}
    for quantizer in quantizers(model).values():
        assert (quantizer.zero_point == 0).all()
        assert (quantizer.scale > 0).all()
    skipped = {layer.name: layer.note for layer in rf.quantization.report(model).skipped}
    assert skipped == dict.fromkeys(("gate", "cat"), "kept in FP32: tensorrt does not run it in integers")
    assert torch.isfinite(model(x)).all()


def test_tensorrt_without_a_run_takes_the_second_input_for_the_identity():
    model = rf.quantization.prepare(Block(swapped=True), QConfig.int8(target="tensorrt"))
    assert "add.quant.input1" in quantizers(model)
    assert "add.quant.input0" not in quantizers(model)


def test_tensorrt_additions_behind_no_layer_are_quantized_on_both_sides():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.two, self.add, self.both = nn.Linear(4, 4), nn.Linear(4, 4), rf.nn.Add(), rf.nn.Add()

        def forward(self, x):
            # The layer's result is also read elsewhere, so that the addition cannot be its epilogue.
            y = self.fc(x)
            return self.both(self.add(torch.tanh(x), torch.sigmoid(y)), self.two(x)) * y

    model = rf.quantization.prepare(Sums(), QConfig.int8(target="tensorrt"), torch.randn(2, 4))
    names = [name for name in quantizers(model) if "add" in name or "both" in name]
    assert names == ["add.quant.input0", "add.quant.input1", "both.quant.input0"]


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_are_quantized_where_the_target_wants_it(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Hardsigmoid(), nn.Conv2d(4, 4, 1))
    prepared = rf.quantization.prepare(model, QConfig.int8(target=target), torch.randn(1, 3, 6, 6))
    assert (
        ("0.quant.output" in quantizers(prepared)) == target_profile(target).quantizes_outputs == (target != "tensorrt")
    )


def test_qnn_has_scales_per_channel_for_convolutions_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    prepared = rf.quantization.prepare(model, QConfig.int8(target="qnn"))
    assert prepared[0].quant.weight.scheme.granularity == PerChannel(0)
    assert prepared[2].quant.weight.scheme.granularity == PerTensor()
    table = rf.quantization.prepare(nn.Sequential(nn.Embedding(7, 3)), QConfig.int8(target="qnn"))
    assert table[0].quant.weight.scale.numel() == 1


def test_reduced_range():
    config = QConfig.int8(target="openvino", reduce_range=True)
    assert (config.weight.qmin, config.weight.qmax) == (-63, 63)
    assert QConfig.int8(reduce_range=True).weight.bits == 7
    assert 255 * 2 * 63 <= 32767


@pytest.mark.parametrize("target", TARGETS)
def test_dead_channels_have_positive_scales(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].weight[2] = 1e-44
    prepared = calibrated(model, QConfig.int8(target=target), torch.zeros(1, 3, 6, 6))
    assert all((q.scale > 0).all() for q in quantizers(prepared).values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_16_bit_activations(symmetric):
    x = torch.randn(4, 3, 8, 8)
    config = QConfig.int8(target="qnn", activation=Scheme(bits=16, symmetric=symmetric))
    assert config.activation.dtype == (torch.int16 if symmetric else torch.uint16)
    assert config.why_not_integer() == "activations of 16 bits have no integer kernels"
    model = Block().eval()
    prepared = calibrated(model, config, x)
    weights_only = rf.quantization.prepare(model, QConfig(weight=config.weight, target="qnn"), x)
    # 65,536 levels: the weights are what moves the result.
    assert (prepared(x) - weights_only(x)).abs().max() < 2e-3 * weights_only(x).abs().max()
    q = prepared.stem.quant.input
    rounded = (torch.round(x / q.scale) + q.zero_point).clamp(q.qmin, q.qmax)
    assert torch.equal(q(x), (rounded - q.zero_point) * q.scale)
    assert QConfig(weight=Scheme(bits=16), activation=Scheme()).why_not_integer() == (
        "weights of 16 bits have no integer kernels"
    )
    with pytest.raises(ValueError, match=r"layer stem cannot execute in integers: activations of 16 bits"):
        rf.quantization.prepare(model, QConfig(weight=Scheme(), activation=Scheme(bits=16), execution="integer"))


def test_converted_layers_keep_their_target():
    x = torch.randn(2, 3, 8, 8)
    model = calibrated(Block().eval(), QConfig.int8(target="tensorrt"), x)
    converted = rf.quantization.convert(model)
    assert rf.quantization.report(converted).target == "tensorrt"
    assert torch.allclose(converted(x), model(x), atol=1e-4)
