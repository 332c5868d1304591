"""OpenVINO: the file runs, in integers, and computes what the model computes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rarefy as rf
from rarefy.export import to_openvino

ov = pytest.importorskip("openvino")
pytest.importorskip("onnx")
from rarefy.export import onnx_edit, onnx_targets  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "runtimes"))

from cases import Cnn, evaluate, make, mlp, trained, with_quantized_output  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(path, x: Tensor) -> np.ndarray:
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.array(compiled([x.numpy()])[0])


def files(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "integer", "in_float"),
    [
        ("cnn", {"stem.0", "block1.conv1", "block1.add", "block2.shortcut.0", "block2.add", "pool", "fc"}, set()),
        ("mlp", {"0", "2", "4"}, set()),
        ("mlp, 4-bit weights", {"0", "2", "4"}, set()),
        ("encoder", {"q", "k", "v", "out", "fc1", "fc2", "head", "add1"}, set()),
        ("depthwise", {"0", "2", "4", "6"}, set()),
        ("signal", {"0", "3"}, set()),
    ],
)
def test_case(name, integer, in_float, tmp_path):
    model, x = make(name)
    report = to_openvino(model, x, tmp_path / "model.xml")
    assert files(tmp_path) == ["model.bin", "model.xml"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    expected = evaluate(model, x)
    got = torch.from_numpy(run(tmp_path / "model.xml", x))
    torch.testing.assert_close(got, expected, rtol=0, atol=4.5 / 255 * float(expected.max() - expected.min()))
    names = {operator.name.rpartition("/")[0] for operator in report.in_integers}
    assert integer <= names
    assert in_float == {operator.name.rpartition("/")[0] for operator in report.in_float} - {""}


def test_whole_network_in_integers(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    whole = to_openvino(Cnn(), x, tmp_path / "float.xml")
    assert whole.in_integers == ()
    assert whole.max_abs < 1e-5
    model = with_quantized_output(trained(Cnn(), x), x)
    report = to_openvino(model, x, tmp_path / "model.xml")
    assert report.in_float == ()
    assert len(report.in_integers) == 10
    (difference,) = report.differences
    assert difference.steps <= 4.01
    sizes = [(tmp_path / name).stat().st_size for name in ("model.bin", "float.bin")]
    assert sizes[0] < 0.3 * sizes[1]


def test_the_file_holds_the_trained_integers(tmp_path):
    model, x = make("mlp")
    to_openvino(model, x, tmp_path / "model.xml")
    content = (tmp_path / "model.bin").read_bytes()
    for index in (0, 2, 4):
        assert model[index].integer_weight().values.t().contiguous().numpy().tobytes() in content


def test_any_batch_size(tmp_path):
    model, x = make("cnn")
    to_openvino(model, x, tmp_path / "model.xml")
    more = torch.cat([x, x, x])
    assert np.allclose(run(tmp_path / "model.xml", more)[:4], run(tmp_path / "model.xml", x))
    to_openvino(model, x, tmp_path / "fixed.xml", dynamic_batch=False)
    assert list(ov.Core().read_model(tmp_path / "fixed.xml").input().shape) == [4, 3, 16, 16]


def test_float16_halves_what_is_float(tmp_path):
    x = torch.randn(5, 64)
    whole = to_openvino(mlp(), x, tmp_path / "a.xml", verify=False)
    half = to_openvino(mlp(), x, tmp_path / "b.xml", float16=True, verify=False)
    assert whole.differences == ()
    assert (tmp_path / "b.bin").stat().st_size < 0.52 * (tmp_path / "a.bin").stat().st_size
    assert half.bytes < whole.bytes


def test_float16_is_verified(tmp_path):
    x = torch.randn(5, 64)
    report = to_openvino(mlp(), x, tmp_path / "a.xml", float16=True)
    assert 0 < report.max_abs < 1e-2
    to_openvino(*make("cnn"), tmp_path / "b.xml", float16=True)


def test_every_quantized_tensor_is_compared(tmp_path):
    report = to_openvino(*make("mlp"), tmp_path / "model.xml")
    assert {check.runtime for check in report.nodes_checked} >= {"OpenVINO", "ONNX Runtime with optimizations off"}
    report = to_openvino(*make("mlp"), tmp_path / "model.xml", verify=False)
    assert report.nodes_checked == ()


def test_few_bits_hide_no_error(tmp_path, monkeypatch):
    """The noise of rounding to 2 bits is as large as the output, so that outputs alone say nothing."""
    x = torch.randn(8, 64)
    config = rf.quantization.QConfig.int8(activation=rf.quantization.Scheme(bits=2, symmetric=False))
    model = rf.quantization.prepare(mlp().eval(), config, x)
    rf.quantization.calibrate(model, [x])
    to_openvino(model, x, tmp_path / "model.xml")
    original = rf.export.openvino._run

    def zeros(*arguments):
        operators, outputs = original(*arguments)
        return operators, [np.zeros_like(output) for output in outputs]

    monkeypatch.setattr(rf.export.openvino, "_run", zeros)
    with pytest.raises(
        RuntimeError, match=r"\[to_openvino\] verification failed: output_0 (of the file is not|differs)"
    ):
        to_openvino(model, x, tmp_path / "other.xml")
    monkeypatch.undo()
    place = onnx_targets.place

    def faulty(ir_model, profile):
        place(ir_model, profile)
        node = [node for node in ir_model.graph if node.op_type == "DequantizeLinear"][-1]
        array = onnx_edit.constant(node.inputs[1])
        node.replace_input_with(1, onnx_edit.initializer(ir_model.graph, "spoiled", (array * 0).astype(array.dtype)))

    monkeypatch.setattr(onnx_targets, "place", faulty)
    with pytest.raises(RuntimeError, match=r"verification failed: node '4/\w+'"):
        to_openvino(model, x, tmp_path / "other.xml")
    assert files(tmp_path) == ["model.bin", "model.xml"]


def test_bad_input(tmp_path, monkeypatch):
    model, x = make("mlp")
    path = tmp_path / "model.xml"
    with pytest.raises(TypeError, match=r"\[to_openvino\] model must be a torch.nn.Module, got int"):
        to_openvino(3, x, path)
    with pytest.raises(ValueError, match=r"\[to_openvino\] path must end in .xml, got .*model.onnx"):
        to_openvino(model, x, tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"\[to_openvino\] path must be in a folder that exists"):
        to_openvino(model, x, tmp_path / "missing" / "model.xml")
    (tmp_path / "folder.xml").mkdir()
    with pytest.raises(IsADirectoryError, match=r"\[to_openvino\] path must name a file, got a folder"):
        to_openvino(model, x, tmp_path / "folder.xml")
    (tmp_path / "folder.xml").rmdir()
    untrained = rf.quantization.prepare_qat(mlp(), rf.quantization.QConfig.int8(), x)
    with pytest.raises(ValueError, match=r"\[to_openvino\] every quantizer must have observed data"):
        to_openvino(untrained, x, path)
    assert files(tmp_path) == []

    path.write_bytes(b"before")
    original = rf.export.openvino._run

    def wrong(*arguments):
        operators, outputs = original(*arguments)
        outputs[0][0, 0] += 1.0
        return operators, outputs

    monkeypatch.setattr(rf.export.openvino, "_run", wrong)
    with pytest.raises(RuntimeError, match=r"\[to_openvino\] verification failed: output_0 differs from the model by"):
        to_openvino(model, x, path)
    assert files(tmp_path) == ["model.xml"]
    assert path.read_bytes() == b"before"
