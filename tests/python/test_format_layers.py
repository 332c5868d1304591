"""Formats in fake quantizers and layers: buffers, observing, training, calibration, reports, refusals."""

import copy
import re

import pytest
import torch
from test_formats import data
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    MX,
    NF4,
    Binary,
    Codebook,
    FakeQuantizer,
    Latest,
    Minifloat,
    MinMax,
    MovingAverage,
    PerBlock,
    PerChannel,
    PerGroup,
    PerToken,
    QConfig,
    Scheme,
    Ternary,
    calibrate,
    convert,
    prepare,
    prepare_qat,
    report,
)
from rarefy.quantization.distributed import RangeSync

ops = torch.ops.rarefy

WEIGHTS = {
    "int4 groups": (Scheme(bits=4, granularity=PerGroup(8)), (6, 3)),
    "uint4 blocks": (Scheme(bits=4, symmetric=False, granularity=PerBlock(4, 5)), (2, 4)),
    "power of two": (Scheme(bits=4, granularity=PerChannel(0), power_of_two=True), (6,)),
    "fp8": (Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0)), (6,)),
    "fp6 tensor": (Scheme(format=Minifloat.e2m3()), (1,)),
    "mx": (Scheme(format=MX("e2m1")), (1,)),
    "nf4": (Scheme(format=NF4(True)), (1,)),
    "codebook": (Scheme(format=Codebook(4), granularity=PerGroup(8)), (6, 3)),
    "binary": (Scheme(format=Binary(), granularity=PerChannel(0)), (6,)),
    "ternary": (Scheme(format=Ternary(), granularity=PerChannel(0)), (6,)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_buffers_and_values(name):
    scheme, shape = WEIGHTS[name]
    w = data((6, 20))
    quantizer = FakeQuantizer(scheme, Latest(), channels=6, shape=w.shape)
    for buffer in ("scale", "zero_point", "min_val", "max_val"):
        assert tuple(getattr(quantizer, buffer).shape) == shape, buffer
    y = quantizer(w)
    assert y.shape == w.shape
    assert quantizer.calibrated
    if scheme.needs_range:
        scale, zero_point = ops.scheme_qparams(w, scheme.to_json())
        assert torch.equal(quantizer.scale, scale)
        assert torch.equal(quantizer.zero_point, zero_point)
        low, high = ops.block_range(w, scheme.block_axis, scheme.block)
        assert torch.equal(quantizer.min_val, low)
        assert torch.equal(quantizer.max_val, high)
    # The state of another quantizer gives the same result.
    frozen = FakeQuantizer(scheme, Latest(), channels=6, shape=w.shape)
    frozen.load_state_dict(quantizer.state_dict())
    frozen.observe = False
    assert torch.equal(frozen(w), y)
    assert str(scheme) in repr(quantizer)


def test_codebook_stays_while_weights_move():
    quantizer = FakeQuantizer(Scheme(format=Codebook(4)), Latest(), shape=(6, 20))
    w = data((6, 20))
    assert quantizer.codebook.shape == (4,)
    quantizer(w)
    before = quantizer.codebook.clone()
    y = quantizer(w + 1)
    assert torch.equal(quantizer.codebook, before)
    assert set(y.unique().tolist()) <= set(before.tolist())


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.25)])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(format=Minifloat.e4m3()),
        Scheme(bits=5, power_of_two=True),
        Scheme(bits=8, symmetric=False, straight_through="pass"),
    ],
    ids=str,
)
def test_activation_ranges_follow_the_data(scheme, observer):
    quantizer = FakeQuantizer(scheme, observer)
    plain = FakeQuantizer(Scheme(bits=8, symmetric=False), observer)
    for seed in range(4):
        x = data((4, 9), seed=seed)
        y = quantizer(x)
        plain(x)
    assert torch.equal(quantizer.min_val, plain.min_val)
    assert torch.equal(quantizer.max_val, plain.max_val)
    scale, zero_point = ops.scheme_qparams(torch.stack([plain.min_val, plain.max_val]), scheme.to_json())
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)
    assert torch.equal(y, ops.simulate(x, scale, zero_point, scheme.to_json()))
    quantizer.eval()
    quantizer(x * 100)
    assert torch.equal(quantizer.scale, scale)


def test_batches_that_are_not_finite_are_left_out():
    quantizer = FakeQuantizer(Scheme(format=Minifloat.e4m3()))
    quantizer(torch.ones(3))
    scale = quantizer.scale.clone()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        y = quantizer(torch.tensor([1.0, float("nan"), float("inf")]))
    assert torch.equal(quantizer.scale, scale)
    assert int(quantizer.skipped) == 1
    assert y.isnan().tolist() == [False, True, False]
    weight = FakeQuantizer(Scheme(format=MX()), Latest())
    weight.name = "fc.quant.weight"
    with pytest.raises(
        ValueError, match=r"the weight of fc.quant.weight must be finite, got 1 NaN or infinite values of 3"
    ):
        weight(torch.tensor([1.0, float("nan"), 2.0]))


def test_an_observed_format_must_have_observed():
    quantizer = FakeQuantizer(Scheme(format=Minifloat.e4m3())).eval()
    with pytest.raises(ValueError, match="must observe data before it quantizes"):
        quantizer(torch.ones(3))
    assert FakeQuantizer(Scheme(granularity=PerToken())).eval()(torch.ones(2, 3)).shape == (2, 3)


def test_stochastic_rounding_counts_its_calls():
    scheme = Scheme(bits=4, rounding="stochastic", seed=11, granularity=PerGroup(4))
    quantizer = FakeQuantizer(scheme, Latest(), shape=(4, 8))
    x = data((4, 8))
    first, second = quantizer(x), quantizer(x)
    assert quantizer.draws.tolist() == [11, 2]
    assert not torch.equal(first, second)
    quantizer.draws[1] = 0
    assert torch.equal(quantizer(x), first)
    quantizer.eval()
    assert torch.equal(quantizer(x), quantizer(x))


def test_straight_through():
    x = torch.tensor([0.1, 500.0, -900.0], requires_grad=True)
    for kind, expected in (("clipped", [1.0, 0.0, 0.0]), ("pass", [1.0, 1.0, 1.0])):
        quantizer = FakeQuantizer(Scheme(format=Minifloat.e4m3(), straight_through=kind))
        quantizer(torch.tensor([448.0]))
        quantizer.eval()
        x.grad = None
        quantizer(x).sum().backward()
        assert x.grad.tolist() == expected


# --- Models ------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.fc = nn.Linear(48, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        return self.fc(torch.relu(self.norm(self.conv(x))).mean(-1))


CONFIGS = {
    "int8_dynamic": QConfig.int8_dynamic(),
    "int4_weight_only": QConfig.int4_weight_only(16),
    "fp8": QConfig.fp8(),
    "mxfp8": QConfig.mxfp8(),
    "nvfp4": QConfig.nvfp4(),
    "nf4": QConfig.nf4(),
    "codebook": QConfig(weight=Scheme(format=Codebook(16))),
    "ternary": QConfig(weight=Scheme(format=Ternary(), granularity=PerChannel(0)), activation=Scheme(symmetric=False)),
    "stochastic": QConfig(weight=Scheme(granularity=PerChannel(0), rounding="stochastic"), activation=Scheme()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_train_evaluate_and_stay_simulated(name):
    torch.manual_seed(0)
    tokens = torch.randint(0, 10, (4, 6))
    model = prepare_qat(Net(), CONFIGS[name], tokens)
    text = repr(report(model))
    assert "simulated" in text
    assert str(CONFIGS[name].weight).split(" per-")[0] in text
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(tokens), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(tokens)
    converted = convert(model)
    assert torch.equal(converted(tokens), expected)
    assert all(row.state != "integer" for row in report(converted).layers if "Embedding" not in row.kind)
    again = prepare_qat(Net(), CONFIGS[name], tokens).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), expected)
    assert torch.equal(copy.deepcopy(model)(tokens), expected)


@pytest.mark.parametrize("name", ["int8_dynamic", "int4_weight_only", "fp8", "mxfp8", "nvfp4", "nf4"])
def test_calibration(name):
    torch.manual_seed(0)
    model, tokens = Net().eval(), torch.randint(0, 10, (16, 6))
    exact = model(tokens)
    prepared = prepare(model, CONFIGS[name], tokens)
    calibrate(prepared, [tokens[:8], tokens[8:]])
    error = ((prepared(tokens) - exact).norm() / exact.norm()).detach()
    assert 0 < float(error) < (0.35 if name in ("nvfp4", "int4_weight_only", "nf4") else 0.1)


def test_execution_in_integers_is_refused_by_name():
    config = QConfig(weight=Scheme(format=Minifloat.e4m3()), activation=Scheme(), execution="integer")
    with pytest.raises(ValueError, match="cannot execute in integers: e4m3 has no integer kernels"):
        prepare_qat(nn.Sequential(nn.Linear(4, 4)), config)


@pytest.mark.parametrize("name", ["mxfp8", "int4_weight_only"])
def test_files_refuse_formats_by_name(name, tmp_path):
    tokens = torch.randint(0, 10, (4, 6))
    model = prepare(Net().eval(), CONFIGS[name], tokens)
    calibrate(model, [tokens])
    rule = "must have a format that a file for the target can hold, but qnn holds"
    with pytest.raises(ValueError, match=re.escape(rule)):
        rf.export.to_onnx(model, tokens, tmp_path / "model.onnx", target="qnn")
    assert not (tmp_path / "model.onnx").exists()


def test_compiled():
    model = prepare_qat(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), QConfig.mxfp8())
    x = torch.randn(3, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


class _TwoProcesses(RangeSync):
    """As if another process had seen [-7, 3]."""

    def is_active(self) -> bool:
        return True

    def _merge(self, minimum: torch.Tensor, maximum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        both = [
            torch.maximum(-minimum, torch.tensor([7.0])),
            torch.maximum(maximum, torch.tensor([3.0])),
            count.float(),
        ]
        return torch.cat(both)


def test_scales_follow_ranges_of_several_processes():
    quantizer = FakeQuantizer(Scheme(format=Minifloat.e4m3()), MinMax())
    quantizer(torch.tensor([1.0, -2.0]))
    sync = _TwoProcesses()
    sync.merge([quantizer])
    assert float(quantizer.scale) == float(torch.tensor(7.0) / 448)
    quantizer.sync = sync
    quantizer(torch.tensor([14.0, 0.0]))
    assert float(quantizer.scale) == float(torch.tensor(14.0) / 448)
