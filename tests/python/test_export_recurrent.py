"""Export of recurrent layers, transposed convolutions, bags, attention, boundaries: the file computes what the model does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_nn_boundaries import Heads
from test_nn_conv_transpose import Decoder
from test_nn_recurrent import Tagger
from torch import Tensor, nn

import rarefy as rf
from rarefy.export.lowering import lower
from rarefy.quantization import PerChannel, QConfig, Scheme, calibrate, convert, prepare, prepare_qat

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class First(nn.Module):
    """A recurrent layer's states beside its last state, through a linear layer."""

    def __init__(self, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(features, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(x)
        return self.out(y), state[0] if isinstance(state, tuple) else state


class Cells(nn.Module):
    """Two cells, unrolled by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTMCell(5, 6), nn.GRUCell(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, h = None, None
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            h = self.gru(state[0], h)
        return self.out(h)


class Bags(nn.Module):
    def __init__(self, mode: str, padding_idx: int | None) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(9, 6, mode=mode, padding_idx=padding_idx), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.bag(ids))


def transposed(dim: int, groups: int, **options: object) -> nn.Module:
    kind = getattr(nn, f"ConvTranspose{dim}d")
    return nn.Sequential(kind(4, 6, 3, stride=2, padding=1, groups=groups, **options), nn.ReLU(), kind(6, 2, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        f"transposed {dim}d, {groups} groups": (
            lambda dim=dim, groups=groups: transposed(dim, groups, output_padding=1),
            lambda dim=dim: torch.randn(3, 4, *(6, 5, 4)[:dim]),
        )
        for dim in (1, 2, 3)
        for groups in (1, 2)
    },
    "decoder": (Decoder, lambda: torch.randn(3, 8, 3, 3)),
    "lstm": (lambda: First(nn.LSTM(5, 6), 6), lambda: torch.randn(4, 3, 5)),
    "lstm without bias": (lambda: First(nn.LSTM(5, 6, bias=False), 6), lambda: torch.randn(4, 3, 5)),
    "gru": (lambda: First(nn.GRU(5, 6), 6), lambda: torch.randn(4, 3, 5)),
    "gru without bias": (lambda: First(nn.GRU(5, 6, bias=False), 6), lambda: torch.randn(4, 3, 5)),
    "deep lstm": (
        lambda: First(nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True), 12),
        lambda: torch.randn(3, 4, 5),
    ),
    "deep gru": (
        lambda: First(nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True), 12),
        lambda: torch.randn(3, 4, 5),
    ),
    "cells": (Cells, lambda: torch.randn(3, 4, 5)),
    "tagger": (Tagger, lambda: torch.randint(12, (3, 7))),
    **{
        f"bag of {mode}, padding {padding}": (
            lambda mode=mode, padding=padding: Bags(mode, padding),
            lambda: torch.randint(9, (3, 4)),
        )
        for mode in ("sum", "mean", "max")
        for padding in (None, 2)
    },
    "attention": (Heads, lambda: torch.randn(3, 5, 8)),
    "boundaries": (
        lambda: rf.nn.with_boundaries(
            nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(-1))
        ),
        lambda: torch.randn(3, 6),
    ),
}
BATCH_SECOND = ("lstm", "lstm without bias", "gru", "gru without bias")


def trained(make: Callable[[], nn.Module], example: Callable[[], Tensor], config: QConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    x = example()
    model = prepare_qat(make(), QConfig.int8() if config is None else config, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        y = model(example())
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        optimizer.step()
    return model.eval()


# What runs at every commit; the rest is slow.
QUICK = {
    ("transposed 2d, 2 groups", False),
    ("transposed 1d, 1 groups", True),
    ("lstm", True),
    ("gru without bias", False),
    ("bag of mean, padding 2", False),
    ("attention", False),
    ("boundaries", False),
}


def marked(case: str, converted: bool):
    marks = () if (case, converted) in QUICK else pytest.mark.slow
    return pytest.param(case, converted, marks=marks, id=f"{case}, {'converted' if converted else 'prepared'}")


@pytest.mark.parametrize(
    ("case", "converted"), [marked(case, converted) for case in CASES for converted in (False, True)]
)
def test_a_file_computes_what_the_model_computes(case, converted, tmp_path):
    make, example = CASES[case]
    model = trained(make, example)
    if converted:
        model = convert(model)
    x = example()
    options = {"dynamic_shapes": [{1: "sequences"}], "dynamic_batch": False} if case in BATCH_SECOND else {}
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", **options)
    assert report.differences  # it was verified
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0.05, atol=0.03)


def initializers(path, dtype=None):
    model = onnx.load(path)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n: v for n, v in found.items() if dtype is None or v.dtype == dtype}


@pytest.mark.slow
def test_recurrent_products_run_in_integers(tmp_path):
    """Every product of the file, of all steps, is one of integers in ONNX Runtime."""
    make, example = CASES["deep lstm"]
    model = trained(make, example)
    report = rf.export.to_onnx(model, example(), tmp_path / "m.onnx")
    kinds = {operator.name: operator for operator in report.operators}
    assert kinds
    # 2 layers x 2 directions: one product with the input each, and one with the hidden state at 4 - 1 steps; the head.
    assert report.nodes["MatMul"] + report.nodes.get("Gemm", 0) == 4 + 4 * 3 + 1
    assert not [name for name, op in kinds.items() if "MatMul" in name and not op.integer], report


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_transposed_convolution_keeps_a_scale_for_every_channel_of_every_group(groups, tmp_path):
    model = trained(lambda: transposed(2, groups), lambda: torch.randn(3, 4, 5, 4))
    model(torch.randn(3, 4, 5, 4))  # the scales follow the last step
    rf.export.to_onnx(model, torch.randn(3, 4, 5, 4), tmp_path / "m.onnx")
    weights = initializers(tmp_path / "m.onnx", np.int8)
    scales = [v for v in initializers(tmp_path / "m.onnx", np.float32).values() if v.shape == (6,)]
    assert any(v.shape == (4 // groups, 6, 3, 3) for v in weights.values())
    assert any(np.allclose(v, model[0].quant.weight.scale.numpy()) for v in scales)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "tensorrt", "qnn"])
@pytest.mark.parametrize("case", ["decoder", "deep lstm", "bag of mean, padding 2", "attention"])
def test_other_targets(case, target, tmp_path):
    if target == "tensorrt" and case in ("bag of mean, padding 2", "attention"):
        pytest.skip("kept in FP32 for TensorRT")
    if target == "openvino":
        pytest.importorskip("openvino")
    make, example = CASES[case]
    model = trained(make, example, QConfig.int8(target=target))
    report = rf.export.to_onnx(model, example(), tmp_path / "m.onnx")
    assert report.target == target


def test_what_no_file_holds_says_so(tmp_path):
    base = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(3, 64)
    for kind in ("float", "int8", "nf4"):
        model = rf.nn.add_lora(base, rank=2, base=kind)
        nn.init.normal_(model[0].lora_b)
        rf.export.to_onnx(model.eval(), x, tmp_path / f"{kind}.onnx")
    assert torch.equal(model[0].stored_base().dequantize(), model[0].base_weight())
    assert torch.equal(model[2].stored_base().dequantize(), model[2].base_weight())
    with pytest.raises(ValueError, match="no operator of these files holds NormalFloat"):
        lower(model, True)
    bag = nn.EmbeddingBag(9, 6)

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = bag

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.bag(ids, offsets)

    model = prepare_qat(Offsets(), QConfig.int8()).eval()
    inputs = (torch.randint(9, (6,)), torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="must be given its bags as rows of a matrix to be exported"):
        rf.export.to_onnx(model, inputs, tmp_path / "bag.onnx", dynamic_batch=False)


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_scales_of_groups_are_one_where_a_target_holds_no_more(target, tmp_path):
    x = torch.randn(3, 8, 3, 3)
    model = calibrate(prepare(Decoder(), QConfig.int8(target=target), x), [x])
    assert model.up1.quant.weight.scale.shape == (1,)
    notes = {r.name: r.note for r in rf.quantization.report(model).layers}
    assert f"one scale for the weight: {target} holds none for each channel of several groups" in notes["up1"]
    free = calibrate(prepare(Decoder(), QConfig.int8(activation=Scheme()), x), [x])
    with pytest.raises(
        ValueError, match=rf"layer up1 must have one scale for its weight \({target} holds none for each"
    ):
        rf.export.to_onnx(free, x, tmp_path / "m.onnx", target=target)


def test_onnxruntime_stores_transposed_convolutions_and_computes_them_in_floating_point():
    x = torch.randn(3, 8, 3, 3)
    chosen = prepare(Decoder(), QConfig.int8(target="onnxruntime"), x)
    assert type(chosen.up1) is nn.ConvTranspose2d
    notes = {r.name: r.note for r in rf.quantization.report(chosen).layers}
    assert notes["up1"] == "kept in FP32: onnxruntime does not run it in integers"
    override = QConfig.int8(target="onnxruntime", overrides={"up*": QConfig.int8(target="onnxruntime")})
    assert type(calibrate(prepare(Decoder(), override, x), [x]).up1) is rf.nn.ConvTranspose2d


@pytest.mark.slow
def test_four_bit_weights(tmp_path):
    config = QConfig(Scheme(bits=4, narrow_range=True, granularity=PerChannel(0)), Scheme(symmetric=False))
    for case in ("decoder", "deep gru"):
        make, example = CASES[case]
        rf.export.to_onnx(trained(make, example, config), example(), tmp_path / "m.onnx")
