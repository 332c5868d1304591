"""Files for every target: they hold what its rules ask for, compute what the model computes, and name what they cannot hold."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from test_parity import EveryLayer, make_batch
from torch import nn

import rarefy as rf
from rarefy._core.quantization import target_profile
from rarefy.quantization import PerChannel, QConfig, Scheme

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TARGETS = ("onnxruntime", "openvino", "tensorrt", "qnn")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Encoder(nn.Module):
    """One transformer layer as Hugging Face writes it, behind a table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.k, self.v = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o, self.norm, self.up, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm2, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.o(y))
        return self.head(self.norm2(x + self.down(nn.functional.gelu(self.up(x)))))


class Residual(nn.Module):
    """Two convolutions and the identity around them, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.add, self.c, self.add2 = nn.BatchNorm2d(4), rf.nn.Add(), nn.Conv2d(4, 4, 1), rf.nn.Add()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.add(self.bn(self.b(torch.relu(self.a(x)))), x))
        x = torch.relu(self.add2(self.c(x), x))
        return self.fc(x.mean((2, 3)))


def quantized(model: nn.Module, config: QConfig, *inputs) -> nn.Module:
    """Calibrated on the inputs, in evaluation mode."""
    model = rf.quantization.prepare(model.eval(), config, inputs)
    if config.activation is not None:
        rf.quantization.calibrate(model, [inputs], forward=lambda m, batch: m(*batch))
    return model


class File:
    """What is in a file: nodes, constants, and who makes and reads what."""

    def __init__(self, path) -> None:
        self.model = onnx.load(path)
        self.nodes = list(self.model.graph.node)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}
        self.types = {t.name: t.data_type for t in self.model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.opset = self.model.opset_import[0].version

    def readers(self, name: str) -> list:
        return [node for node in self.nodes if name in node.input]

    def of(self, *op_types: str) -> list:
        return [node for node in self.nodes if node.op_type in op_types]

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])


def assert_follows(file: File, target: str) -> None:
    """The published and measured rules of the target, read from the file alone."""
    types = onnx.TensorProto
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        scale = file.constants[node.input[1]]
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        assert np.isfinite(scale).all()
        source = node.input[0]
        if node.op_type == "DequantizeLinear" and file.makers.get(source, node).op_type == "Gather":  # rows of a table
            source = file.makers[source].input[0]
        is_weight = source in file.constants
        if is_weight:
            assert file.types[source] == types.INT8
        else:
            assert scale.size == 1
        if not is_weight or target_profile(target).weight_zero_points:
            zero_point = file.constants[node.input[2]]
            assert zero_point.shape == scale.shape
            unsigned = not is_weight and target_profile(target).unsigned_activations
            assert file.types[node.input[2]] == (types.UINT8 if unsigned else types.INT8)
            assert unsigned or not zero_point.any()
        else:
            assert len(node.input) == 2
    for node in file.of("Conv", "Gemm", "MatMul"):
        if len(node.input) > 2:
            assert file.constants[node.input[2]].dtype == np.float32
    if target == "tensorrt":
        readers = {reader.op_type for node in file.of("DequantizeLinear") for reader in file.readers(node.output[0])}
        assert readers <= {"Conv", "MatMul", "Gemm", "Add"}
        for node in file.of("Conv"):
            assert file.makers[node.input[0]].op_type == "DequantizeLinear"
        assert not file.of("Clip")
    if target in ("openvino", "tensorrt", "qnn"):
        assert not file.of("Clip", "Sum")
    for node in file.of("LayerNormalization"):
        assert (file.makers[node.input[0]].op_type == "Sum") == target_profile(target).residual_as_sum


@pytest.mark.parametrize("opset", [None, 13])
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_for_every_target(tmp_path, target, opset):
    inputs = make_batch()
    model = quantized(EveryLayer(), QConfig.int8(target=target), *inputs)
    report = rf.export.to_onnx(model, inputs, tmp_path / "m.onnx", target=target, opset=opset)
    file = File(tmp_path / "m.onnx")
    assert report.target == target
    assert file.opset == report.opset == (opset or target_profile(target).default_opset)
    assert file.model.ir_version == {13: 7, 19: 9, 21: 10}[file.opset]
    assert_follows(file, target)
    with torch.no_grad():
        expected = model(*inputs)
    assert torch.allclose(file.run(*inputs), expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_attention_for_every_target(tmp_path, target):
    ids = torch.randint(9, (3, 5))
    model = quantized(Encoder(), QConfig.int8(target=target), ids)
    files = {}
    for opset in (None, 13):
        rf.export.to_onnx(model, ids, tmp_path / "m.onnx", target=target, opset=opset)
        files[opset] = File(tmp_path / "m.onnx")
        assert_follows(files[opset], target)
    assert len(files[None].of("LayerNormalization")) == 2
    assert not files[13].of("LayerNormalization")
    # Six of the products have a bias and three dimensions; what stays of it runs in integers at every operator set.
    wide = [a.shape for a in files[None].constants.values() if a.ndim == 3 and a.shape[:2] == (1, 1)]
    assert len(wide) == (0 if target == "onnxruntime" else 7)
    # The table is looked up before it is scaled.
    tables = [n for n in files[None].of("Gather") if files[None].types.get(n.input[0]) == onnx.TensorProto.INT8]
    assert len(tables) == (0 if target == "tensorrt" else 1)


def test_int8_activations_load_at_operator_set_21(tmp_path):
    """ONNX Runtime cannot load a product of three dimensions with a bias of one, in int8, from 21 on."""
    x = torch.randn(2, 3, 8)
    model = quantized(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), QConfig.int8(target="tensorrt"), x)
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="tensorrt", opset=21)
    assert {d.optimized for d in report.differences} == {False}  # TensorRT's kernels are not ONNX Runtime's
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, model(x).detach(), atol=0.02)


@pytest.mark.parametrize("target", TARGETS)
def test_residuals(tmp_path, target):
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Residual(), QConfig.int8(target=target), x)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    file = File(tmp_path / "m.onnx")
    assert_follows(file, target)
    adds = [node for node in file.of("Add") if not any(name in file.constants for name in node.input)]
    assert len(adds) == 2
    for node in adds:
        kinds = Counter(file.makers[name].op_type for name in node.input)
        assert kinds == ({"Conv": 1, "DequantizeLinear": 1} if target == "tensorrt" else {"DequantizeLinear": 2})
    after = {reader.op_type for node in file.of("Conv", "Add") for reader in file.readers(node.output[0])}
    if target in ("tensorrt", "openvino"):
        assert "Relu" in after
    else:
        assert not file.of("Relu")
    pools = file.of("GlobalAveragePool")
    assert bool(pools) == target_profile(target).pools_means


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_a_model_trained_for_a_target(tmp_path, target):
    x = torch.randn(4, 3, 6, 6)
    model = rf.quantization.prepare_qat(Residual(), QConfig.int8(target=target), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    assert all(p.grad is not None for p in model.parameters())
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    file = File(tmp_path / "m.onnx")
    assert_follows(file, target)
    with torch.no_grad():
        assert torch.allclose(file.run(x), model(x), atol=1e-5)


FOREIGN = {
    "zero points": (QConfig.int8(), "tensorrt", r"stem.quant.input must have a grid .*tensorrt knows no zero points"),
    "a table": (QConfig.int8(target="qnn"), "tensorrt", r"must have a grid that the target can hold, but tensorrt"),
    "4 bits": (QConfig.int8(activation=Scheme(bits=4)), "qnn", r"8 or 16 bits and their whole range, got int4"),
    "wide": (
        QConfig.int8(activation=Scheme(bits=16)),
        "openvino",
        r"openvino has no activations of 16 bits, got int16",
    ),
    "narrow": (QConfig.int8(activation=Scheme(narrow_range=True)), "qnn", r"whole range, got int8 .*\[-127, 127\]"),
    "per channel": (
        QConfig.int8(target="openvino"),
        "qnn",
        r"layer fc must have one scale for its weight .*, got int8",
    ),
    "16 bits": (
        QConfig.int8(activation=Scheme(bits=16)),
        "tensorrt",
        r"tensorrt has no activations of 16 bits, got int16",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("converted", [False, True])
def test_a_model_for_another_target_is_refused(tmp_path, case, converted):
    config, target, message = FOREIGN[case]
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Residual(), config, x)
    if converted:
        model = rf.quantization.convert(model)
    with pytest.raises(ValueError, match=rf"\[to_onnx\] .*{message}.*prepare the model with QConfig.int8\(target="):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_refused_by_tensorrt(tmp_path):
    ids = torch.randint(9, (3, 5))
    model = quantized(Encoder(), QConfig.int8(activation=Scheme(bits=8)), ids)
    with pytest.raises(ValueError, match=r"layer words must be one that the target runs in integers .*, got Embedding"):
        rf.export.to_onnx(model, ids, tmp_path / "m.onnx", target="tensorrt")


def test_the_target_is_the_one_that_was_chosen(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    for config, target in ((QConfig.int8(), "onnxruntime"), (QConfig.int8(target="tensorrt"), "tensorrt")):
        model = quantized(Residual(), config, x)
        for exported in (model, rf.quantization.convert(model)):
            assert rf.export.to_onnx(exported, x, tmp_path / "m.onnx", verify=False).target == target
    assert rf.export.to_onnx(Residual(), x, tmp_path / "m.onnx", verify=False).target == "onnxruntime"


def test_targets_that_agree_take_each_other(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Residual(), QConfig.int8(target="tensorrt"), x)
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    zero_points = {
        int(z) for z in (File(report.path).constants[n.input[2]] for n in File(report.path).of("QuantizeLinear"))
    }
    assert zero_points == {128}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_int4_weights(tmp_path, target):
    x = torch.randn(3, 5, 16)
    config = QConfig(weight=Scheme(bits=4, granularity=PerChannel(0)), target=target)
    model = quantized(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), config, x)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    file = File(tmp_path / "m.onnx")
    weights = {node.input[0] for node in file.of("DequantizeLinear")}
    assert {file.types[name] for name in weights} == {onnx.TensorProto.INT4}
    for index in (0, 2):
        (stored,) = [file.constants[name] for name in weights if name.startswith(f"{index}.")]
        np.testing.assert_array_equal(stored.astype(np.int8), model[index].integer_weight().values.t().numpy())
    assert all((len(n.input) == 3) == (target == "onnxruntime") for n in file.of("DequantizeLinear"))
    assert torch.allclose(file.run(x), model(x), atol=1e-5)
    # The same numbers in bytes, where the operator set has no INT4.
    rf.export.to_onnx(model, x, tmp_path / "older.onnx", target=target, opset=20)
    older = File(tmp_path / "older.onnx")
    assert {older.types[n.input[0]] for n in older.of("DequantizeLinear")} == {onnx.TensorProto.INT8}
    assert torch.allclose(older.run(x), model(x), atol=1e-5)


def test_int4_weights_with_integer_inputs_stay_bytes(tmp_path):
    x = torch.randn(3, 16)
    config = QConfig.int8(weight=Scheme(bits=4, granularity=PerChannel(0)), target="onnxruntime")
    model = quantized(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), config, x)
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    assert onnx.TensorProto.INT4 not in File(report.path).types.values()
    assert len(report.in_integers) == 2


@pytest.mark.parametrize(
    ("target", "symmetric"), [("onnxruntime", True), ("onnxruntime", False), ("qnn", True), ("qnn", False)]
)
def test_16_bit_activations(tmp_path, target, symmetric):
    x = torch.randn(2, 3, 6, 6)
    config = QConfig.int8(activation=Scheme(bits=16, symmetric=symmetric), target="qnn" if target == "qnn" else None)
    model = quantized(Residual(), config, x)
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    file = File(report.path)
    assert report.opset == 21
    assert {file.types[n.input[2]] for n in file.of("QuantizeLinear")} == {onnx.TensorProto.UINT16}
    assert torch.allclose(file.run(x), model(x), atol=1e-4)
    with pytest.raises(
        ValueError, match=r"opset must be 21 or more for 16-bit activations \(stem.quant.input\), got 20"
    ):
        rf.export.to_onnx(model, x, tmp_path / "older.onnx", target=target, opset=20)
    assert not (tmp_path / "older.onnx").exists()


# ---- sums in 16 bits ------------------------------------------------------------------------------------------------


def overflowing(layer: nn.Module, qmax: int = 255) -> tuple[int, int]:
    """By plain loops over the trained integers: pairs whose sums leave 16 bits, and all pairs."""
    values = layer.integer_weight().values
    rows = values.movedim(1, -1).reshape(-1, values.shape[1]) if values.dim() > 2 else values
    count = total = 0
    for row in rows.tolist():
        row = row + [0] * (len(row) % 2)
        for first, second in zip(row[::2], row[1::2], strict=True):
            sums = [a * first + b * second for a in (0, qmax) for b in (0, qmax)]
            count += max(sums) > 32767 or min(sums) < -32768
            total += 1
    return count, total


@pytest.mark.parametrize("reduce_range", [False, True])
def test_overflow_is_counted_by_pairs(tmp_path, reduce_range):
    x = torch.randn(4, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(96, 7), nn.Tanh(), nn.Linear(7, 2))
    model = quantized(model, QConfig.int8(target="onnxruntime", reduce_range=reduce_range), x)
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", verify=False)
    expected = {name: overflowing(model[int(name)]) for name in ("0", "2", "4")}
    assert {e.layer: (e.pairs, e.total) for e in report.overflow} == {n: c for n, c in expected.items() if c[0]}
    assert bool(report.overflow) != reduce_range
    assert ("16-bit sums" in repr(report)) == bool(report.overflow)
    # Converted, and with 7-bit activations, whose sums are half as large.
    converted = rf.export.to_onnx(rf.quantization.convert(model), x, tmp_path / "m.onnx", verify=False)
    assert converted.overflow == report.overflow
    narrow = QConfig.int8(activation=Scheme(bits=7, symmetric=False))
    narrow = quantized(nn.Sequential(nn.Linear(8, 4)), narrow, torch.randn(5, 8))
    assert rf.export.to_onnx(narrow, torch.randn(5, 8), tmp_path / "m.onnx", verify=False).overflow == ()


def test_signed_activations_do_not_overflow(tmp_path):
    x = torch.randn(4, 8)
    model = quantized(nn.Sequential(nn.Linear(8, 4)), QConfig.int8(target="tensorrt"), x)
    assert rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="tensorrt", verify=False).overflow == ()


def test_the_model_does_not_change(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Residual(), QConfig.int8(target="openvino"), x)
    before = copy.deepcopy(model.state_dict())
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="openvino", verify=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- OpenVINO -------------------------------------------------------------------------------------------------------


def openvino_run(path, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, str]]:
    """Outputs, and the precision that each layer executed in."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    output = torch.from_numpy(model([x.numpy() for x in inputs])[0])
    executed = {}
    for node in model.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "Eltwise", "MatMul"):
            executed[node.get_friendly_name()] = info["runtimePrecision"].astype(str)
    return output, executed


@pytest.mark.parametrize("opset", [13, None])
@pytest.mark.parametrize("activation", [Scheme(symmetric=False), Scheme(symmetric=True, narrow_range=True)])
def test_openvino_runs_its_files_in_integers(tmp_path, activation, opset):
    x = torch.randn(2, 3, 6, 6)
    model = quantized(Residual(), QConfig.int8(target="openvino", activation=activation), x)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="openvino", opset=opset)
    output, executed = openvino_run(tmp_path / "m.onnx", x)
    assert set(executed.values()) <= {"u8", "i8"}
    assert len(executed) >= 6  # convolutions, additions, one of them in an epilogue, and a linear layer
    with torch.no_grad():
        expected = model(x)
    assert (output - expected).abs().max() <= 0.03 * expected.abs().max()


def test_openvino_runs_int4_weights(tmp_path):
    x = torch.randn(3, 5, 64)
    config = QConfig(weight=Scheme(bits=4, granularity=PerChannel(0)), target="openvino")
    model = quantized(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16)), config, x)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target="openvino")
    output, executed = openvino_run(tmp_path / "m.onnx", x)
    assert set(executed.values()) == {"i4"}
    with torch.no_grad():  # it rounds the float input to 8 bits of its own accord
        assert (output - model(x)).abs().max() <= 0.05 * model(x).abs().max()
