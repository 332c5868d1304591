"""Formats beside plain grids in ONNX files: codes and operators against the simulation, in ONNX Runtime's own arithmetic."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy._core.quantization import onnx_weight_form, target_names
from rarefy.quantization import (
    MX,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    FakeQuantizer,
    Latest,
    Minifloat,
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
)

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from rarefy.export.lowering_formats import FormatActivation  # noqa: E402
from rarefy.export.onnx_formats import _array  # noqa: E402

GROUPS = PerGroup(4, 1)
WEIGHTS = {
    "int12": Scheme(bits=12, granularity=PerChannel(0)),
    "int16": Scheme(bits=16),
    "int2": Scheme(bits=2, granularity=PerChannel(0)),
    "int4 groups": Scheme(bits=4, granularity=GROUPS),
    "uint4 groups": Scheme(bits=4, symmetric=False, granularity=GROUPS),
    "uint3 blocks": Scheme(bits=3, symmetric=False, granularity=PerBlock(2, 3)),
    "int7 blocks": Scheme(bits=7, narrow_range=True, granularity=PerBlock(3, 2)),
    "int16 groups": Scheme(bits=16, granularity=GROUPS),
    "one group": Scheme(bits=4, granularity=PerGroup(100, 1)),
    "groups of one": Scheme(bits=4, granularity=PerGroup(1, 1)),
    "other axis": Scheme(bits=8, granularity=PerGroup(2, 0)),
    "power of two": Scheme(bits=8, granularity=PerChannel(0), power_of_two=True),
    "dynamic": Scheme(bits=5, granularity=GROUPS, dynamic=True),
    "binary": Scheme(format=Binary(), granularity=PerChannel(0)),
    "binary groups": Scheme(format=Binary(), granularity=GROUPS),
    "ternary": Scheme(format=Ternary(), granularity=PerGroup(3, 1)),
    "e4m3": Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0)),
    "e4m3 groups": Scheme(format=Minifloat.e4m3(), granularity=GROUPS),
    "e5m2": Scheme(format=Minifloat.e5m2()),
    "e3m2": Scheme(format=Minifloat.e3m2(), granularity=PerGroup(3, 1)),
    "e2m1": Scheme(format=Minifloat.e2m1(), granularity=PerBlock(2, 3)),
    "e3m4": Scheme(format=Minifloat(3, 4), granularity=PerChannel(0)),
    **{f"mx {e}": Scheme(format=MX(e), granularity=GROUPS) for e in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")},
    "nvfp4": Scheme(format=NVFP4(), granularity=GROUPS),
    "nf4": Scheme(format=NF4(), granularity=GROUPS),
    "nf4 double": Scheme(format=NF4(True, 4), granularity=GROUPS),
    "nf4 double, one": Scheme(format=NF4(True), granularity=GROUPS),
    "codebook": Scheme(format=Codebook(7)),
    "codebook channels": Scheme(format=Codebook(5), granularity=PerChannel(0)),
    "codebook groups": Scheme(format=Codebook(3), granularity=GROUPS),
}
ACTIVATIONS = {
    "uint12": Scheme(bits=12, symmetric=False),
    "int9": Scheme(bits=9, narrow_range=True),
    "power of two": Scheme(bits=8, power_of_two=True),
    "pass-through": Scheme(bits=6, symmetric=False, straight_through="pass"),
    "dynamic": Scheme(bits=8, dynamic=True),
    "dynamic asymmetric": Scheme(bits=4, symmetric=False, dynamic=True),
    "dynamic unsigned": Scheme(bits=8, signed=False, dynamic=True, granularity=PerToken()),
    "token": Scheme(bits=8, granularity=PerToken(), dynamic=True),
    "token asymmetric": Scheme(bits=8, symmetric=False, granularity=PerToken(), dynamic=True),
    "groups": Scheme(bits=4, granularity=PerGroup(4), dynamic=True, power_of_two=True),
    "blocks": Scheme(bits=4, granularity=PerBlock(2, 3), dynamic=True),
    "e4m3": Scheme(format=Minifloat.e4m3()),
    "e5m2": Scheme(format=Minifloat.e5m2()),
    "e5m2 unsaturated": Scheme(format=Minifloat(5, 2, specials="ieee", saturate=False)),
    "e3m2": Scheme(format=Minifloat.e3m2()),
    "e2m1 token": Scheme(format=Minifloat.e2m1(), granularity=PerToken(), dynamic=True),
    "e4m3 groups": Scheme(format=Minifloat.e4m3(), granularity=PerGroup(3), dynamic=True, power_of_two=True),
    **{f"mx {e}": Scheme(format=MX(e), granularity=PerGroup(4)) for e in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")},
    "nvfp4": Scheme(format=NVFP4(), granularity=PerGroup(4)),
}  # fmt: skip


def session_of(model, optimized: bool = False):
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def random_weight(shape: tuple[int, ...]) -> Tensor:
    """With a row of zeros, and magnitudes that vary."""
    weight = torch.randn(shape) * torch.exp2(torch.randint(-6, 3, shape).float())
    weight[0] = 0
    return weight


def stored(scheme: Scheme, weight: Tensor):
    """The weight as its fake quantizer rounds it, and as it is stored."""
    quantizer = FakeQuantizer(scheme, Latest(), weight.shape[scheme.axis or 0], weight.shape)
    rounded = quantizer(weight)
    scale = quantizer.codebook if isinstance(scheme.format, Codebook) else quantizer.scale
    needed = scheme.needs_range or isinstance(scheme.format, Codebook)
    args = (scale, quantizer.zero_point) if needed else ()
    return rounded, rf.quantization.quantize_to(weight, scheme, *args)


def graph_of(forms: dict[str, tuple[list, list]], opset: int) -> bytes:
    """A model without inputs that returns the weight of every form."""
    nodes, initializers, outputs = [], [], []
    for key, (tensors, operations) in forms.items():
        initializers += [onnx.numpy_helper.from_array(_array(t, four), f"{key}.{name}") for name, t, four in tensors]
        for op, inputs, output, attributes, _, _ in operations:
            node = onnx.helper.make_node(op, [f"{key}.{i}" for i in inputs], [f"{key}.{output}"], **attributes)
            nodes.append(node)
        last = operations[-1]
        outputs.append(onnx.helper.make_tensor_value_info(f"{key}.{last[2]}", onnx.TensorProto.FLOAT, last[5]))
    graph = onnx.helper.make_graph(nodes, "weights", [], outputs, initializers)
    ir_version = {21: 10, 19: 9, 13: 7}[opset]
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.mark.parametrize("shape", [(5, 9), (4, 6, 2, 3), (7, 5)])
@pytest.mark.parametrize("opset", [21, 19, 13])
def test_stored_weights_are_exact(shape, opset):
    """Every format, every way to share scales, both orders of the axes, in one graph."""
    forms, expected, refused = {}, {}, {}
    for name, scheme in WEIGHTS.items():
        rounded, parts = stored(scheme, random_weight(shape))
        for transposed in (False, True):
            try:
                forms[f"{name}{transposed}"] = onnx_weight_form(parts, opset, transposed, zero_points=not transposed)
            except ValueError as error:
                refused[name] = str(error)
                continue
            expected[f"{name}{transposed}"] = rounded.transpose(-2, -1) if transposed else rounded
    session = session_of(graph_of(forms, opset))
    for (name, want), got in zip(expected.items(), session.run(None, {}), strict=True):
        assert np.array_equal(got, want.detach().numpy()), name
    if opset == 21:
        assert not refused
    else:
        assert all(re.search(f"need operator set (19|21), got {opset} for ", text) for text in refused.values())
        assert {"int12", "int16", "int4 groups", "mx e4m3"} <= refused.keys()
        assert refused.keys().isdisjoint({"e4m3", "nvfp4"}) == (opset == 19)
        assert refused.keys().isdisjoint(
            {"nf4", "codebook groups", "e2m1", "mx e2m1", "binary", "power of two", "int2"}
        )


def test_codes_take_as_few_bits_as_there_are_types_for():
    def first(name: str, opset: int = 21):
        tensors, _ = onnx_weight_form(stored(WEIGHTS[name], random_weight((8, 8)))[1], opset)
        return str(_array(tensors[0][1], tensors[0][2]).dtype if tensors[0][0] == "weight" else tensors[1][1].dtype)

    for name, kind in {"int2": "int4", "int4 groups": "int4", "uint4 groups": "uint4", "uint3 blocks": "uint4",
                       "int7 blocks": "int8", "int12": "int16", "binary": "int4", "ternary": "int4",
                       "e4m3": "float8_e4m3fn", "mx e5m2": "float8_e5m2", "mx int8": "int8"}.items():  # fmt: skip
        assert first(name) == kind, name
    assert first("int2", 19) == first("binary", 19) == "int8"
    for name in ("nf4", "e2m1", "nvfp4", "codebook"):
        tensors, nodes = onnx_weight_form(stored(WEIGHTS[name], random_weight((8, 8)))[1], 21)
        codes = next(t for t in tensors if t[0] == "weight")
        assert str(_array(codes[1], codes[2]).dtype) == "uint4"
        assert [n[0] for n in nodes if n[0] == "Gather"]


class Rounded(nn.Module):
    """One output per format."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(FakeQuantizer(scheme) for scheme in ACTIVATIONS.values())
        for quantizer in self.quantizers:
            quantizer.quantize = False
            quantizer(x)
            quantizer.quantize = True
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [quantizer(x) for quantizer in self.quantizers]


def varied(*shape: int) -> Tensor:
    """Normal numbers over many powers of two, zeros, ties, powers of two."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 12, shape).float())
    flat = x.view(-1)
    flat[::5] = torch.exp2(torch.randint(-8, 8, flat[::5].shape).float())
    flat[1::7] = torch.randint(-40, 40, flat[1::7].shape).float() / 4
    x[0, 0] = 0
    return x


@pytest.mark.parametrize("name", [name for name, scheme in ACTIVATIONS.items() if not scheme.is_plain])
def test_formulas_are_the_simulation(name):
    x = torch.cat([varied(6, 5, 10), 2.0 ** torch.arange(-150, 150).float().view(6, 5, 10)]).clamp(-1e38, 1e38)
    if name == "e5m2 unsaturated":
        x = x.clamp(-1e6, 1e6)
    quantizer = FakeQuantizer(ACTIVATIONS[name])
    quantizer.quantize = False
    quantizer(x / 1.3 if x.max() < 1e30 else varied(4, 4))
    quantizer.quantize = True
    if ACTIVATIONS[name].dynamic or not isinstance(ACTIVATIONS[name].format, type(Scheme().format)):
        got, want = FormatActivation(quantizer.eval())(x), quantizer(x)
        assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


def test_activations_in_a_file(tmp_path):
    x = varied(4, 6, 10)
    model = Rounded(x)
    names = [name.replace(" ", "_") for name in ACTIVATIONS]
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", output_names=names, dynamic_batch=True)
    assert report.opset == 21
    other = varied(5, 6, 10)
    for optimized in (False, True):
        session = session_of(tmp_path / "m.onnx", optimized)
        for tensor in (x, other):
            for name, got, want in zip(names, session.run(None, {"input": tensor.numpy()}), model(tensor), strict=True):
                assert np.array_equal(got, want.numpy()), (name, optimized)
    types = {t.name: t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2, onnx.TensorProto.UINT16} <= set(types.values())


class Net(nn.Module):
    """A convolution with batch normalization, a grouped transposed one, a table, a recurrent layer, attention, products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.words = nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.Embedding(9, 6)
        self.bag, self.lstm, self.sdpa = nn.EmbeddingBag(9, 8), nn.LSTM(6, 8, batch_first=True), rf.nn.SDPA()
        self.fc1, self.fc2 = nn.Linear(8, 20), nn.Linear(20, 5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        image = torch.relu(self.up(torch.relu(self.bn(self.conv(x))))).mean((2, 3))
        y = self.lstm(self.words(ids) + image.unsqueeze(1))[0].unsqueeze(1)
        y = self.sdpa(y, y, y).squeeze(1).mean(1) + self.bag(ids)
        return self.fc2(torch.relu(self.fc1(y)))


LAYERS = ("conv", "up", "words", "bag", "lstm", "fc1", "fc2")


def prepared(config: QConfig) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    inputs = torch.randn(4, 3, 6, 6), torch.randint(0, 9, (4, 2))
    model = prepare(Net().eval(), config, inputs)
    calibrate(model, [inputs], forward=lambda m, batch: m(*batch))
    return model, inputs


@pytest.mark.parametrize("turn", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_every_layer_in_every_format(turn, tmp_path):
    """Each export has another format of weights in every layer."""
    names = [name for name in WEIGHTS if name not in ("groups of one", "other axis", "e3m4", "nf4 double", "one group")]
    schemes = [WEIGHTS[names[(turn * len(LAYERS) + i) % len(names)]] for i in range(len(LAYERS))]
    schemes[-1] = Scheme(bits=4, granularity=PerChannel(0), rounding="stochastic", seed=turn)
    activation = [None, Scheme(symmetric=False), ACTIVATIONS["token"], ACTIVATIONS["e4m3"], ACTIVATIONS["mx e4m3"]][
        turn
    ]
    overrides = {name: QConfig(weight=s, activation=activation) for name, s in zip(LAYERS, schemes, strict=True)}
    config = QConfig(weight=Scheme(granularity=PerChannel(0)), activation=activation, overrides=overrides)
    model, inputs = prepared(config)
    report = rf.export.to_onnx(model, inputs, tmp_path / "m.onnx")
    session = session_of(tmp_path / "m.onnx")
    got = session.run(None, {"input_0": inputs[0].numpy(), "input_1": inputs[1].numpy()})[0]
    want = model(*inputs).detach().numpy()
    # No quantizer of an activation: the same numbers in another order of sums.
    assert np.abs(got - want).max() <= (2e-6 if activation is None else 0.15) * np.abs(want).max()
    assert report.differences
    # Layers that are converted hold the same codes, packed.
    packed = convert(model)
    assert sum(isinstance(module, rf.nn.PackedLayer) for module in packed.modules()) >= 2
    rf.export.to_onnx(packed, inputs, tmp_path / "packed.onnx")
    again = session_of(tmp_path / "packed.onnx").run(None, {"input_0": inputs[0].numpy(), "input_1": inputs[1].numpy()})
    assert np.array_equal(again[0], got)


@pytest.mark.parametrize("config", [QConfig.int4_weight_only(8), QConfig.nf4(), QConfig.fp8()])
def test_weights_of_one_shape_are_told_apart(config, tmp_path):
    """Attention has four of them: as prepared and as converted."""
    x = torch.randn(3, 5, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).eval()
    model = prepare(layer, config, x)
    calibrate(model, [x])
    rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    got = session_of(tmp_path / "m.onnx").run(None, {"input": x.numpy()})[0]
    want = model(x).detach().numpy()
    assert np.abs(got - want).max() <= (1e-5 if config.activation is None else 0.15) * np.abs(want).max()
    rf.export.to_onnx(convert(model), x, tmp_path / "packed.onnx")
    assert np.array_equal(session_of(tmp_path / "packed.onnx").run(None, {"input": x.numpy()})[0], got)


def test_int4_groups_are_blocks_of_4_bits(tmp_path):
    model = prepare(nn.Sequential(nn.Linear(64, 16)), QConfig.int4_weight_only(16))
    x = torch.randn(3, 64)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {t.name: t for t in graph.initializer}
    (node,) = (n for n in graph.node if n.op_type == "DequantizeLinear")
    assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 16}
    assert values["0.weight"].data_type == onnx.TensorProto.INT4
    assert list(values["0.weight_scale"].dims) == [4, 16]
    assert len(values["0.weight"].raw_data) == 64 * 16 // 2
    by_hand = onnx.numpy_helper.to_array(values["0.weight"]).astype(np.float32)
    by_hand *= np.repeat(onnx.numpy_helper.to_array(values["0.weight_scale"]), 16, axis=0)
    assert np.array_equal(by_hand.T, model[0].quant.weight(model[0].weight).detach().numpy())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (QConfig.mxfp8(), {"opset": 19}, "opset must be 21 or more for mx e4m3 per-group"),
        (QConfig.fp8(), {"opset": 17}, "opset must be 19 or more for e4m3"),
        (QConfig(weight=Scheme(bits=12)), {"opset": 17}, "opset must be 21 or more for 12-bit weights (0.quant.weight)"),
        (
            QConfig(weight=Scheme(), activation=Scheme(rounding="stochastic")),
            {},
            "ONNX has no operator that draws the numbers of stochastic rounding, got int8 symmetric",
        ),
        (QConfig.mxfp8(), {"target": "qnn"}, "qnn holds integers with one observed scale per tensor or channel, got mx e4m3"),
        (
            QConfig(weight=Scheme(bits=4, granularity=PerGroup(24, 1))),
            {"target": "openvino", "verify": False},
            "OpenVINO has scales of blocks that divide the axis alone, got blocks of 24 along 64 for int4",
        ),
        (QConfig.nf4(), {"target": "tensorrt"}, "tensorrt holds weights as integers with one observed scale"),
        (QConfig(weight=Scheme(bits=12)), {"target": "tensorrt"}, "tensorrt has no weights of more than 8 bits"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_hold_is_said_by_name(config, options, message, tmp_path):
    x = torch.randn(3, 64)
    model = prepare(nn.Sequential(nn.Linear(64, 16)), config, x)
    calibrate(model, [x])
    with pytest.raises(ValueError, match=re.escape(message)):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_formats_of_weights_are_none_of_activations(tmp_path):
    model = nn.Sequential(FakeQuantizer(Scheme(format=NF4()))).eval()
    with pytest.raises(
        ValueError, match="nf4 is a format of weights: ONNX has no operator that rounds activations to it"
    ):
        rf.export.to_onnx(model, torch.randn(3, 64), tmp_path / "m.onnx")


def test_blocks_along_a_free_axis(tmp_path):
    scheme = Scheme(bits=4, granularity=PerBlock(2, 4), dynamic=True)
    model = nn.Sequential(FakeQuantizer(scheme)).eval()
    with pytest.raises(
        ValueError, match=r"the axes of blocks must have a fixed size to be exported, got \[6, 8\] and \[7, 8\]"
    ):
        rf.export.to_onnx(model, torch.randn(6, 8), tmp_path / "m.onnx")
    x = torch.randn(6, 8)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False)
    assert np.array_equal(session_of(tmp_path / "m.onnx").run(None, {"input": x.numpy()})[0], model(x).numpy())


def test_profiles_say_which_formats_they_hold():
    profiles = {name: QConfig(target=name).profile for name in target_names()}
    assert {name: p.formats for name, p in profiles.items()} == {
        "onnxruntime": "all", "openvino": "all", "tensorrt": "explicit", "qnn": "none"}  # fmt: skip
    for name, config in {"int4": QConfig.int4_weight_only(), "fp8": QConfig.fp8(), "nf4": QConfig.nf4()}.items():
        held = {target for target, p in profiles.items() if p.why_weight_not_written(config.weight) is None}
        assert held == {"onnxruntime", "openvino"} | ({"tensorrt"} if name in ("int4", "fp8") else set())
