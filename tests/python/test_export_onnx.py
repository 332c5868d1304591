"""Export to ONNX: what is in the file, what ONNX Runtime makes of it, and that it computes what the model computes."""

import copy
import importlib.util
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from rarefy.export import onnx_edit, onnx_targets  # noqa: E402

Scheme, PerChannel = rf.quantization.Scheme, rf.quantization.PerChannel


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add = rf.nn.Add()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(y, self.shortcut(x)))


class ResNet(nn.Module):
    """Stem, two blocks (one with a convolution in the shortcut), global average pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block2(self.block1(self.stem(x)))).flatten(1))


class PooledCnn(nn.Module):
    """Max pooling and flattening between quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 7))


def prepared(model: nn.Module, example: Tensor, config: rf.quantization.QConfig | None = None) -> nn.Module:
    """Trained for a few steps, so that batch norms, ranges and weights have moved; in evaluation mode."""
    model = rf.quantization.prepare_qat(model.train(), config or rf.quantization.QConfig.int8(), example)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn_like(example)).square().mean().backward()
        optimizer.step()
    return model.eval()


def run(path, x: Tensor, optimized: bool) -> Tensor:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = prepared(ResNet(), x).train()
    path = tmp_path_factory.mktemp("resnet") / "resnet.onnx"
    return model, x, path, rf.export.to_onnx(model, x, path)


# ---- residual networks ----------------------------------------------------------------------------------------------


def test_every_operator_of_a_resnet_runs_in_integers(resnet):
    _model, _, path, report = resnet
    assert report.in_float == ()
    assert {op.name for op in report.in_integers} == {
        "stem.0/Conv", "block1.conv1/Conv", "block1.conv2/Conv", "block1.add/Add", "block2.conv1/Conv",
        "block2.conv2/Conv", "block2.shortcut.0/Conv", "block2.add/Add", "pool/GlobalAveragePool", "fc/MatMul",
    }  # fmt: skip
    runtime = {op.name: op.runtime for op in report.operators}
    assert runtime["block1.conv1/Conv"] == "QLinearConv"
    assert runtime["block2.add/Add"] == "QLinearAdd"
    assert runtime["fc/MatMul"] == "MatMulIntegerToFloat"
    assert "Relu" not in report.nodes
    assert path.stat().st_size == report.bytes


def test_the_file_holds_the_trained_integers(resnet):
    model, _, path, _ = resnet
    arrays = initializers(path)
    layer = model.eval().block1.conv1
    integers = layer.integer_weight()
    model.train()
    np.testing.assert_array_equal(arrays["block1.conv1.weight"], integers.values.numpy())
    np.testing.assert_array_equal(arrays["block1.conv1.bias"], integers.bias.numpy())
    assert arrays["block1.conv1.weight"].dtype == np.int8
    assert arrays["fc.weight"].dtype == np.int8
    assert arrays["fc.weight"].shape == (16, 10)
    assert not any(a.dtype == np.float32 and a.ndim > 1 for a in arrays.values())


def test_a_tensor_with_two_readers_is_quantized_once(resnet):
    _, _, path, _ = resnet
    graph = onnx.load(path).graph
    quantized = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) == len(set(quantized))
    # input; results of stem, 2 x (conv1, conv2), shortcut, 2 x add; mean, and the same reshaped
    assert len(quantized) == 11


def test_resnet_matches_the_model_at_both_levels(resnet):
    model, x, path, report = resnet
    expected = evaluate(copy.deepcopy(model).eval(), x)
    spread = expected.std()
    assert (run(path, x, optimized=False) - expected).abs().max() <= 0.02 * spread
    assert (run(path, x, optimized=True) - expected).abs().max() <= 0.05 * spread
    assert [(d.optimized, d.batch) for d in report.differences] == [(False, 4), (False, 5), (True, 4), (True, 5)]
    assert report.max_abs == max(d.max_abs for d in report.differences)
    for d in report.differences:
        assert d.rms <= d.allowed
        assert d.rms <= d.max_abs


def test_the_file_takes_any_batch(resnet):
    _model, _, path, _ = resnet
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert [d.dim_value for d in dims[1:]] == [3, 16, 16]
    for batch in (1, 7):
        x = torch.randn(batch, 3, 16, 16)
        assert run(path, x, optimized=True).shape == (batch, 10)


def test_the_report_can_be_read(resnet):
    _, _, path, report = resnet
    text, table = repr(report), report._repr_html_()
    assert report.opset == 21
    assert report.target == "onnxruntime"
    assert report.path == path
    assert report.nodes["Conv"] == 6
    assert report.nodes["DequantizeLinear"] > report.nodes["QuantizeLinear"]
    assert "in integers" in text
    assert "10 of 10 operators" in text
    assert re.search(
        r"output, ONNX Runtime with optimizations on, batch 5 +max difference [\d.e-]+, [\d.]+% of values differ", text
    )
    assert table.startswith("<table>")
    assert "10 of 10 operators" in table
    with pytest.raises(AttributeError):
        report.bytes = 0


def test_nothing_of_this_machine_is_in_the_file(resnet):
    _, _, path, _ = resnet
    model = onnx.load(path)
    assert model.producer_name == "rarefy"
    assert b".py" not in path.read_bytes()
    assert b"pkg.torch" not in path.read_bytes()


# ---- exact numbers --------------------------------------------------------------------------------------------------


def put_on_coarse_grid(model: nn.Module) -> None:
    """Powers of two as scales, and biases on the grid of the products: every float sum is then exact, in any order."""
    for module in model.modules():
        if isinstance(module, rf.quantization.FakeQuantizer):
            module.observe = False
            module.scale.copy_(2.0 ** torch.ceil(torch.log2(module.scale)))
    for module in model.modules():
        if isinstance(module, rf.nn.WeightedLayer):
            step = module.quant.input.scale * module.quant.weight.scale
            module.bias.data = torch.round(module.bias / step) * step


@pytest.mark.parametrize("signed", [False, True])
def test_exact_sums_give_the_same_bits(tmp_path, signed):
    """int8 activations too: the file holds them as uint8, with zero points 128 higher."""
    x = torch.randn(16, 1, 14, 14)
    activation = Scheme(bits=8, symmetric=signed)
    model = prepared(PooledCnn(), x, rf.quantization.QConfig.int8(activation=activation))
    put_on_coarse_grid(model)
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(model, x, path)
    expected = evaluate(model, x)
    assert torch.equal(run(path, x, optimized=False), expected)
    assert torch.equal(run(path, x, optimized=True), expected)
    assert report.in_float == ()
    assert report.max_abs == 0
    arrays = initializers(path)
    zero_points = {
        int(arrays[node.input[2]]) for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"
    }
    assert all(
        arrays[n.input[2]].dtype == np.uint8 for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"
    )
    assert zero_points == {128} if signed else 0 in zero_points
    assert ("Clip" in report.nodes) == signed  # ReLU with zero point 128 limits the integers, with 0 nothing is left


@pytest.mark.parametrize("bits", [2, 7])
def test_fewer_bits_saturate_at_their_own_limits(tmp_path, bits):
    x = torch.randn(16, 1, 14, 14)
    config = rf.quantization.QConfig(
        weight=Scheme(bits=bits, narrow_range=True, granularity=PerChannel(axis=0)),
        activation=Scheme(bits=bits, symmetric=False),
    )
    model = prepared(PooledCnn(), x, config)
    put_on_coarse_grid(model)
    path = tmp_path / "m.onnx"
    x = 3 * x  # far beyond the observed range
    report = rf.export.to_onnx(model, x, path)
    assert torch.equal(run(path, x, optimized=False), evaluate(model, x))
    assert torch.equal(run(path, x, optimized=True), evaluate(model, x))
    arrays, graph = initializers(path), onnx.load(path).graph
    assert np.abs(arrays["conv1.weight"]).max() <= 2 ** (bits - 1) - 1
    limits = [arrays[node.input[2]] for node in graph.node if node.op_type == "Clip"]
    assert len(limits) == 4
    assert {int(limit) for limit in limits} == {2**bits - 1}
    assert report.in_float == ()


@pytest.mark.parametrize("weight", [Scheme(bits=8), Scheme(bits=8, granularity=PerChannel(axis=0))])
def test_linear_layers_of_any_rank(tmp_path, weight):
    x = torch.randn(5, 6, 12)
    model = prepared(mlp(), x, rf.quantization.QConfig.int8(weight=weight))
    put_on_coarse_grid(model)
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(model, x, path)
    assert torch.equal(run(path, x, optimized=False), evaluate(model, x))
    assert torch.equal(run(path, x, optimized=True), evaluate(model, x))
    assert [op.runtime for op in report.operators] == ["MatMulIntegerToFloat"] * 2
    axes = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith("weight")]
    arrays = initializers(path)
    assert {arrays[n.input[1]].size for n in axes} == ({1} if weight.axis is None else {24, 7})


def test_a_2d_linear_layer_is_one_integer_operator_with_its_quantizer(tmp_path):
    x = torch.randn(9, 12)
    report = rf.export.to_onnx(prepared(mlp(), x), x, tmp_path / "m.onnx")
    assert [(op.name, op.runtime) for op in report.operators] == [
        ("0/Gemm", "QGemm"), ("2/MatMul", "MatMulIntegerToFloat")
    ]  # fmt: skip


def test_differences_are_told_in_steps_of_a_quantized_output(tmp_path):
    x = torch.randn(3, 3, 10, 10)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(8))
    model = prepared(model, x)
    model = nn.Sequential(model[0], model[1])  # ends where the quantizer of the convolution's output is
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    scale = float(model[0].quant.output.scale)
    for d in report.differences:
        assert d.steps == pytest.approx(d.max_abs / scale)
        assert d.steps <= 1.01
        assert d.differing < 0.01
    assert report.in_float == ()


# ---- other models ---------------------------------------------------------------------------------------------------


def test_the_model_is_not_touched(tmp_path):
    x = torch.randn(4, 1, 14, 14)
    model = prepared(PooledCnn(), x).train()
    model.conv2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", verify=False)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.training
    assert all(modules[name] is module for name, module in model.named_modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_float_model(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    model = ResNet().eval()
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    assert report.in_integers == ()
    assert "QuantizeLinear" not in report.nodes
    assert "BatchNormalization" not in report.nodes
    assert report.max_abs < 1e-5
    assert "in float" not in repr(report)


def test_float_parts_stay_float_and_are_named(tmp_path):
    x = torch.randn(9, 12)
    config = rf.quantization.QConfig.int8(overrides={"2": None})
    report = rf.export.to_onnx(prepared(mlp(), x, config), x, tmp_path / "m.onnx")
    assert [op.name for op in report.in_float] == ["0/MatMul", "2/Gemm"] or [op.name for op in report.in_float] == [
        "2/Gemm"
    ]
    assert "2/Gemm" in repr(report)


def test_weights_alone(tmp_path):
    x = torch.randn(9, 12)
    model = prepared(mlp(), x, rf.quantization.QConfig(weight=Scheme(bits=8, granularity=PerChannel(axis=0))))
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(model, x, path)
    assert "QuantizeLinear" not in report.nodes
    assert report.nodes["DequantizeLinear"] == 2
    torch.testing.assert_close(run(path, x, optimized=False), evaluate(model, x), rtol=1e-5, atol=1e-5)
    # ONNX Runtime's own choice for the second one, which rounds its input by blocks.
    assert [(op.runtime, op.integer) for op in report.operators] == [("FusedGemm", False), ("MatMulNBits", True)]
    assert (run(path, x, optimized=True) - evaluate(model, x)).abs().max() < 0.02 * evaluate(model, x).std()


def test_a_converted_model_gives_the_same_file(tmp_path):
    x = torch.randn(4, 1, 14, 14)
    model = prepared(PooledCnn(), x)
    rf.export.to_onnx(model, x, tmp_path / "qat.onnx", verify=False)
    report = rf.export.to_onnx(rf.quantization.convert(model), x, tmp_path / "int8.onnx")
    assert report.in_float == ()
    a, b = initializers(tmp_path / "qat.onnx"), initializers(tmp_path / "int8.onnx")
    for name in ("conv1.weight", "conv2.bias", "fc1.weight", "fc2.bias"):
        np.testing.assert_array_equal(a[name], b[name])
    assert torch.equal(run(tmp_path / "qat.onnx", x, True), run(tmp_path / "int8.onnx", x, True))


def test_several_inputs_by_name_and_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 5)

        def forward(self, left, right):
            y = self.a(left) + self.b(right)
            return {"scores": y, "best": y.argmax(1)}

    inputs = {"left": torch.randn(8, 6), "right": torch.randn(8, 4)}
    model = rf.quantization.prepare(Two(), rf.quantization.QConfig.int8(), inputs)
    rf.quantization.calibrate(model, [inputs])
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(model, inputs, path, output_names=["scores", "best"])
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["left", "right"]
    assert [o.name for o in graph.output] == ["scores", "best"]
    assert {d.output for d in report.differences} == {"scores", "best"}


def test_an_input_may_have_the_name_of_the_output(tmp_path):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, output):
            return self.layer(output)

    x = torch.randn(8, 6)
    rf.export.to_onnx(Loss(), {"output": x}, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["output"], ["output_0"])


def test_autocast_around_the_export_changes_nothing(tmp_path):
    x = torch.randn(9, 12)
    model = prepared(mlp(), x)
    rf.export.to_onnx(model, x, tmp_path / "a.onnx")
    with torch.autocast("cpu", torch.bfloat16):
        rf.export.to_onnx(model, x, tmp_path / "b.onnx")
    assert torch.equal(run(tmp_path / "a.onnx", x, True), run(tmp_path / "b.onnx", x, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types(tmp_path, dtype):
    x = torch.randn(9, 12).to(dtype)
    model = mlp().to(dtype)
    rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    got = run(tmp_path / "m.onnx", x, True)
    assert got.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=2e-3, atol=2e-3)


def test_constants_by_name_are_fixed_in_the_file(tmp_path):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x, factor=1.0, use_cache=True):
            y = factor * self.layer(x)
            return {"scores": y, "cache": DynamicCache()} if use_cache else {"scores": y}

    class DynamicCache:
        pass

    x = torch.randn(8, 6)
    model = rf.quantization.prepare_qat(Cached(), rf.quantization.QConfig.int8(), {"x": x, "use_cache": False})
    model(x, use_cache=False)
    path = tmp_path / "m.onnx"
    with pytest.raises(TypeError, match=r"must return tensors, got DynamicCache among them \(use_cache=False"):
        rf.export.to_onnx(model, {"x": x}, path)
    rf.export.to_onnx(model, {"x": x, "factor": 3.0, "use_cache": False}, path)
    assert [i.name for i in onnx.load(path).graph.input] == ["x"]
    with torch.no_grad():
        expected = model.eval()(x, 3.0, use_cache=False)["scores"]
    torch.testing.assert_close(run(path, x, False), expected)


def test_a_single_example_and_a_fixed_batch(tmp_path):
    x = torch.randn(9, 12)
    model = prepared(mlp(), x)
    report = rf.export.to_onnx(model, x[:1], tmp_path / "any.onnx")
    assert [d.batch for d in report.differences] == [1, 2, 1, 2]
    assert run(tmp_path / "any.onnx", x, True).shape == (9, 7)
    report = rf.export.to_onnx(model, x, tmp_path / "nine.onnx", dynamic_batch=False, opset=18, input_names=["image"])
    assert report.opset == 18
    assert [d.batch for d in report.differences] == [None, None]
    stored = onnx.load(tmp_path / "nine.onnx")
    assert stored.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 9
    assert stored.graph.input[0].name == "image"
    assert stored.opset_import[0].version == 18


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def simple():
    x = torch.randn(9, 12)
    return prepared(mlp(), x), x


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_quantizers_without_data_are_named(tmp_path):
    model = rf.quantization.prepare(mlp(), rf.quantization.QConfig.int8(), torch.randn(2, 12))
    message = r"\[to_onnx\] every quantizer must have observed data .* got 2 of 4: 0.quant.input, 2.quant.input"
    with pytest.raises(ValueError, match=message):
        rf.export.to_onnx(model, torch.randn(2, 12), tmp_path / "m.onnx")
    assert files(tmp_path) == []


def test_quantizers_that_are_off_are_named(simple, tmp_path):
    model, x = simple
    rf.quantization.set_state(model, quantize=False)
    with pytest.raises(ValueError, match=r"\[to_onnx\] every quantizer must quantize .* got 4 of 4: 0.quant.input"):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive(simple, tmp_path, scale):
    model, x = simple
    model[0].quant.input.scale.fill_(scale)
    with pytest.raises(ValueError, match=r"\[to_onnx\] scales must be finite and positive, got .* in 0.quant.input"):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "tflite"}, ValueError, r"target must be one of onnxruntime, openvino, tensorrt, qnn, got 'tflite'"),
        ({"opset": 12}, ValueError, r"opset must be between 13 and \d+ .*, got 12"),
        ({"opset": 1000}, ValueError, r"opset must be between 13 and \d+ .*, got 1000"),
        ({"opset": "21"}, TypeError, r"opset must be an integer, got '21'"),
        ({"input_names": ["a", "b"]}, ValueError, r"input_names must be 1 different names, got \['a', 'b'\]"),
        ({"output_names": []}, ValueError, r"output_names must be 1 different names, got \[\]"),
        ({"input_names": [""]}, ValueError, r"input_names must be 1 different names, got \[''\]"),
        ({"input_names": [1]}, TypeError, r"input_names must be a sequence of strings, got \[1\]"),
        ({"input_names": 3}, TypeError, r"input_names must be a sequence of strings, got 3"),
        ({"output_names": "y"}, TypeError, r"output_names must be a sequence of strings, got 'y'"),
        (
            {"input_names": ["x"], "output_names": ["x"]},
            ValueError,
            r"output_names must differ from the names of the inputs, got 'x' in both",
        ),
        ({"example_inputs": {1: torch.zeros(2, 12)}}, TypeError, r"example_inputs must have names .* got 1 among them"),
        ({"path": None}, TypeError, r"path must be a string or a pathlib.Path, got None"),
        ({"path": 3}, TypeError, r"path must be a string or a pathlib.Path, got 3"),
        ({"path": "folder/"}, IsADirectoryError, r"path must name a file, got a folder: folder/"),
        (
            {"model": nn.Linear(12, 2).bfloat16()},
            TypeError,
            r"parameters must be .* got bfloat16 at weight; call model",
        ),
        ({"example_inputs": 3}, TypeError, r"example_inputs must be tensors, got int"),
        ({"example_inputs": [1.0]}, TypeError, r"example_inputs must be tensors, got float among them"),
        ({"example_inputs": []}, ValueError, r"example_inputs must hold at least one tensor"),
        (
            {"example_inputs": torch.tensor(1.0)},
            ValueError,
            r"dynamic_batch needs inputs that share .* got shapes \(\)",
        ),
        ({"example_inputs": torch.zeros(0, 12)}, ValueError, r"dynamic_batch needs inputs .* got shapes \(0, 12\)"),
        (
            {"example_inputs": [torch.zeros(2, 12), torch.zeros(3, 1)]},
            ValueError,
            r"dynamic_batch .* share the size .* \(2, 12\), \(3, 1\)",
        ),
        ({"model": torch.relu}, TypeError, r"model must be a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(simple, tmp_path, arguments, error, message):
    model, x = simple
    call = {"model": model, "example_inputs": x, "path": tmp_path / "m.onnx", **arguments}
    with pytest.raises(error, match=r"^\[to_onnx\] " + message):
        rf.export.to_onnx(**call)
    assert files(tmp_path) == []


def test_the_path_is_checked_before_the_work(simple, tmp_path, monkeypatch):
    model, x = simple
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("exported first"))
    with pytest.raises(FileNotFoundError, match=r"\[to_onnx\] path must be in a folder that exists, got .*nowhere"):
        rf.export.to_onnx(model, x, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(IsADirectoryError, match=r"\[to_onnx\] path must name a file, got a folder"):
        rf.export.to_onnx(model, x, tmp_path)
    with pytest.raises(OSError, match=r"\[to_onnx\] path must be in a folder that can be written, got /proc/m.onnx"):
        rf.export.to_onnx(model, x, "/proc/m.onnx")


def test_missing_packages_are_named_with_their_extra(simple, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    model, x = simple
    with pytest.raises(ImportError, match=r"\[to_onnx\] needs onnxruntime: pip install rarefy\[onnx\]"):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", verify=False)  # which needs no runtime


def test_what_cannot_be_translated_leaves_no_file(tmp_path):
    class Sorted(nn.Module):
        def forward(self, x):
            return x * len(set(x.tolist()))

    with pytest.raises(
        RuntimeError,
        match=r"\[to_onnx\] torch.onnx.export cannot translate the model \(an axis .* here free: batch\)",
    ):
        rf.export.to_onnx(Sorted(), torch.randn(3), tmp_path / "m.onnx")
    assert files(tmp_path) == []


def spoil(op_type: str, index: int, factor: float):
    """A pass that multiplies a constant input of the last node of a type."""

    def fault(graph) -> None:
        node = [node for node in graph if node.op_type == op_type][-1]
        array = onnx_edit.constant(node.inputs[index])
        spoiled = onnx_edit.initializer(graph, "spoiled", (array * factor).astype(array.dtype))
        node.replace_input_with(index, spoiled)

    return fault


@pytest.mark.parametrize(
    ("fault", "node"),
    [
        pytest.param(spoil("QuantizeLinear", 1, 1.5), "1/Tanh", id="scale"),
        pytest.param(spoil("QuantizeLinear", 2, 0), "1/Tanh", id="zero point"),
        pytest.param(spoil("Sum", 1, 0), "2/MatMul", id="bias"),
        pytest.param(spoil("DequantizeLinear", 1, 1.1), "2/MatMul", id="weight scale"),
    ],
)
def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch, fault, node):
    x = torch.randn(9, 12)
    model = prepared(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 7)), x)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the older file")
    passes = onnx_targets.place

    def faulty(ir_model, profile):
        passes(ir_model, profile)
        fault(ir_model.graph)
        onnx_edit.remove_unused(ir_model.graph)

    monkeypatch.setattr(onnx_targets, "place", faulty)
    message = (
        rf"^\[to_onnx\] verification failed: node '{node}' \(\w+\), reference evaluator: .* differs? from the model"
    )
    with pytest.raises(RuntimeError, match=message):
        rf.export.to_onnx(model, x, path)
    assert files(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"the older file"


def test_the_exporter_is_quiet_and_warnings_of_the_model_are_not(tmp_path, capfd, recwarn):
    import warnings

    class Warns(nn.Module):
        def forward(self, x):
            warnings.warn("the model says so", UserWarning, stacklevel=1)
            return x + 1

    rf.export.to_onnx(Warns(), torch.randn(3, 2), tmp_path / "m.onnx")
    assert {str(w.message) for w in recwarn} == {"the model says so"}
    assert capfd.readouterr() == ("", "")
