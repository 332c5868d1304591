"""The lint: rules that a file breaks are named with the node, on files from anyone; and what a runtime made integer."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from test_export_onnx import ResNet, files, mlp, prepared
from torch import nn

import rarefy as rf

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, numpy_helper  # noqa: E402

QConfig = rf.quantization.QConfig
TARGETS = ["onnxruntime", "openvino", "tensorrt", "qnn"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


#: A convolution in the form that TensorRT takes: int8, zero points of 0, symmetric.
CONSTANTS = """float s = {0.1}, int8 z = {0}, float[16] ws = {WS}, int8[16] wz = {WZ}, float[16] bias = {BIAS}"""
GOOD = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear<axis = 0>(w, ws, wz)
          y = Conv<pads = [1, 1, 1, 1]>(d, wd, bias)"""


def write(
    path,
    body: str,
    constants: str = CONSTANTS,
    opset: int = 21,
    x: str = "float[N,16,8,8] x",
    y: str = "float[N,16,8,8] y",
):
    """A file from text, with a weight w of [16, 16, 3, 3]."""
    many = {"WS": ", ".join(["0.01"] * 16), "WZ": ", ".join(["0"] * 16), "BIAS": ", ".join(["0.5"] * 16)}
    for name, values in many.items():
        constants = constants.replace(f"{{{name}}}", f"{{{values}}}")
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({x}) => ({y}) <{constants}> {{ {body} }}'
    model = onnx.parser.parse_model(text)
    if not any(tensor.name == "w" for tensor in model.graph.initializer):
        weight = np.random.default_rng(0).integers(-127, 128, (16, 16, 3, 3)).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT4:  # which the text parser does not pack
            tensor.CopyFrom(
                onnx.helper.make_tensor(tensor.name, TensorProto.INT4, tensor.dims, list(tensor.int32_data))
            )
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    onnx.save(model, path)
    return path


def findings(report: rf.export.LintReport, severity: str = "error") -> set[tuple[str, str]]:
    return {(f.node, f.value) for f in report.findings if f.severity == severity}


# ---- TensorRT -------------------------------------------------------------------------------------------------------


def test_a_file_that_keeps_the_rules_has_no_findings(tmp_path):
    report = rf.export.lint_tensorrt(write(tmp_path / "m.onnx", GOOD))
    assert report.findings == ()
    assert report.ok
    assert report.target == "tensorrt"
    assert "0 errors, 0 warnings" in repr(report)


def swap(old: str, new: str) -> tuple[str, str]:
    """GOOD and CONSTANTS with one thing changed."""
    assert (old in GOOD) != (old in CONSTANTS)
    return GOOD.replace(old, new), CONSTANTS.replace(old, new)


BROKEN = {
    "uint8": (*swap("int8 z = {0}", "uint8 z = {0}"), ("QuantizeLinear_0", "UINT8"), "integers must be INT8"),
    "int16": (*swap("int8 z = {0}", "int16 z = {0}"), ("DequantizeLinear_1", "INT16"), "integers must be INT8"),
    "zero point": (
        *swap("int8 z = {0}", "int8 z = {3}"),
        ("QuantizeLinear_0", "3"),
        "zero points must be constant zeros",
    ),
    "no zero point": (
        *swap("q = QuantizeLinear(x, s, z)", "q8 = QuantizeLinear(x, s) q = Cast<to = 3>(q8)"),
        ("QuantizeLinear_0", "no zero point"),
        "the type must be said",
    ),
    "scale of 0": (
        *swap("float s = {0.1}", "float s = {0.0}"),
        ("QuantizeLinear_0", "0"),
        "scales must be finite and positive",
    ),
    "negative scale": (
        *swap("float s = {0.1}", "float s = {-0.5}"),
        ("DequantizeLinear_1", "-0.5"),
        "scales must be finite and positive",
    ),
    "computed scale": (
        GOOD.replace("q = ", "m = ReduceMax<keepdims = 0>(x) q = ").replace("(x, s, z)", "(x, m, z)"),
        CONSTANTS,
        ("QuantizeLinear_1", "a computed scale"),
        "scales must be constant",
    ),
    "activation per channel": (
        GOOD.replace("QuantizeLinear(x, s, z)", "QuantizeLinear<axis = 1>(x, ws, wz)"),
        CONSTANTS,
        ("QuantizeLinear_0", "16 scales"),
        "activations must have one scale",
    ),
    "weight axis": (
        *swap("<axis = 0>", "<axis = 1>"),
        ("DequantizeLinear_2", "axis 1"),
        "the scales of a weight of Conv must lie along its output channels, axis 0",
    ),
    "int32 bias": (
        GOOD.replace("y = Conv", "bd = DequantizeLinear(b, s) y = Conv").replace("bias)", "bd)"),
        CONSTANTS + ", int32[16] b = {WZ}",
        ("DequantizeLinear_3", "an INT32 bias behind DequantizeLinear"),
        "biases must be float",
    ),
    "training": (
        GOOD.replace("y = Conv", "c = Conv")
        + " y, mean, var = BatchNormalization<training_mode = 1>(c, bias, bias, bias, bias)",
        CONSTANTS,
        ("BatchNormalization_4", "training_mode 1"),
        "batch normalization must be in evaluation mode",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rules_are_named(tmp_path, case):
    body, constants, place, rule = BROKEN[case]
    report = rf.export.lint(write(tmp_path / "m.onnx", body, constants), target="tensorrt")
    assert place in findings(report)
    (found, *_) = [f for f in report.findings if (f.node, f.value) == place]
    assert found.rule.startswith(rule)
    assert found.advice
    assert not report.ok
    assert f"error: {found.rule}" in repr(report)
    assert found.node in report._repr_html_()


def test_int4_weights(tmp_path):
    """Blocks along the last but one axis are fine; an odd last axis and an INT4 activation are not."""
    body = "wd = DequantizeLinear<axis = 0, block_size = 2>(w, ws) y = MatMul(x, wd)"
    shapes = {"x": "float[N,4] x", "y": "float[N,COLUMNS] y"}
    for columns, expected in ((2, set()), (3, {("DequantizeLinear_0", "shape [4, 3]")})):
        scales = ", ".join(["0.1"] * 2 * columns)
        values = ", ".join(["1"] * 4 * columns)
        constants = f"float[2,{columns}] ws = {{{scales}}}, int4[4,{columns}] w = {{{values}}}"
        path = write(
            tmp_path / "m.onnx", body, constants, x=shapes["x"], y=shapes["y"].replace("COLUMNS", str(columns))
        )
        assert findings(rf.export.lint_tensorrt(path)) == expected
    activation = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
    path = write(tmp_path / "a.onnx", activation, "float s = {0.1}, int4 z = {0}", x="float[N,4] x", y="float[N,4] y")
    assert ("QuantizeLinear_0", "an INT4 activation") in findings(rf.export.lint_tensorrt(path))


def test_blocks_of_int8_are_refused(tmp_path):
    body = "wd = DequantizeLinear<axis = 0, block_size = 2>(w, ws) y = MatMul(x, wd)"
    constants = "float[2,2] ws = {0.1, 0.1, 0.1, 0.1}, int8[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
    path = write(tmp_path / "m.onnx", body, constants, x="float[N,4] x", y="float[N,2] y")
    assert ("DequantizeLinear_0", "INT8 in blocks of 2") in findings(rf.export.lint_tensorrt(path))


def test_advice_on_speed(tmp_path):
    residual = GOOD.replace("y = Conv", "c = Conv") + " y = Add(c, x)"
    report = rf.export.lint_tensorrt(write(tmp_path / "a.onnx", residual))
    assert report.ok
    assert findings(report, "warning") == {("Add_4", "a float branch 'x' without a quantizer")}
    quantized = residual.replace("Add(c, x)", "Add(c, d)")
    assert rf.export.lint_tensorrt(write(tmp_path / "b.onnx", quantized)).findings == ()

    between = GOOD.replace("y = Conv", "c = Conv")
    between += " cq = QuantizeLinear(c, s, z) cd = DequantizeLinear(cq, s, z) y = Relu(cd)"
    report = rf.export.lint_tensorrt(write(tmp_path / "c.onnx", between))
    assert findings(report, "warning") == {("DequantizeLinear_5", "one before Relu_6")}

    float_input = GOOD.replace("Conv<pads = [1, 1, 1, 1]>(d,", "Conv<pads = [1, 1, 1, 1]>(x,")
    report = rf.export.lint_tensorrt(write(tmp_path / "d.onnx", float_input))
    assert ("Conv_3", "a float activation") in findings(report, "warning")

    vector = (
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear(w, s, z) y = MatMul(d, wd)"
    )
    constants = "float s = {0.1}, int8 z = {0}, int8[4,1] w = {1, 2, 3, 4}"
    path = write(tmp_path / "e.onnx", vector, constants, x="float[N,4] x", y="float[N,1] y")
    assert findings(rf.export.lint_tensorrt(path), "warning") == {("MatMul_3", "N = 1")}

    narrow = CONSTANTS.replace("16", "12").replace("{WS}", "{" + ", ".join(["0.1"] * 12) + "}")
    narrow = narrow.replace("{WZ}", "{" + ", ".join(["0"] * 12) + "}").replace(
        "{BIAS}", "{" + ", ".join(["0"] * 12) + "}"
    )
    narrow += ", int8[12,16,1,1] w = {" + ", ".join(["1"] * 192) + "}"
    path = write(tmp_path / "f.onnx", GOOD.replace("<pads = [1, 1, 1, 1]>", ""), narrow, y="float[N,12,8,8] y")
    assert findings(rf.export.lint_tensorrt(path), "warning") == {("Conv_3", "12 output channels")}


def test_old_operator_sets_are_refused(tmp_path):
    body = "y = Relu(x)"
    path = write(tmp_path / "m.onnx", body, "float s = {0.1}", opset=8, y="float[N,16,8,8] y")
    assert findings(rf.export.lint_tensorrt(path)) == {("the file", "opset 8")}


def test_other_libraries_files_are_judged(tmp_path):
    """ONNX Runtime's own static quantization: zero points and int32 biases, which TensorRT rejects."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    x = torch.randn(2, 3, 16, 16)
    rf.export.to_onnx(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval(), x, tmp_path / "float.onnx"
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"input": x.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    path = tmp_path / "m.onnx"
    quantize_static(tmp_path / "float.onnx", path, Reader(), activation_type=QuantType.QUInt8)
    report = rf.export.lint(path, target="tensorrt")
    rules = {f.rule for f in report.errors}
    assert {"biases must be float", "zero points must be constant zeros"} <= rules
    assert any(rule.startswith("integers must be INT8") for rule in rules)
    assert all(f.node for f in report.findings)
    assert len(repr(report).splitlines()) < 12  # one line a rule


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_files_keep_the_rules_of_their_target(tmp_path, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    x = torch.randn(4, 3, 16, 16)
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(prepared(ResNet(), x, QConfig.int8(target=target)), x, path, target=target)
    found = rf.export.lint(path, target=target)
    assert found.errors == ()
    assert found.operators == report.operators
    if target in ("onnxruntime", "openvino"):
        assert found.warnings == ()
        assert report.in_float == ()
        assert len(report.in_integers) >= 9
    else:
        assert any(f"{target} does not run here: its rules were checked" in text for text in report.skipped)


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_an_export_that_breaks_a_rule_leaves_no_file(tmp_path, monkeypatch, target):
    from rarefy.export import onnx_edit, onnx_targets

    x = torch.randn(4, 3, 16, 16)
    passes = onnx_targets.place

    def faulty(model, profile):
        """All of one dequantizer's scales in another input: computed, equal, and not constant."""
        passes(model, profile)
        node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
        old = node.inputs[1]
        computed = onnx_edit.add_node(node, True, "Identity", [old], old, old.dtype, "computed")
        node.replace_input_with(1, computed)

    monkeypatch.setattr(onnx_targets, "place", faulty)
    model = prepared(ResNet(), x, QConfig.int8(target=target))
    with pytest.raises(
        RuntimeError, match=rf"verification failed: node 'stem.0.quant.input/QuantizeLinear', rules of {target}: "
    ):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    assert files(tmp_path) == []


# ---- QNN ------------------------------------------------------------------------------------------------------------


def test_qnn_rules(tmp_path):
    report = rf.export.lint(write(tmp_path / "m.onnx", GOOD), target="qnn")
    assert findings(report) == {("x", "free axes N")}
    assert ("Conv_3", "a result that is not quantized") in findings(report, "warning")
    fixed = {"x": "float[2,16,8,8] x", "y": "float[2,16,8,8] y"}
    closed = GOOD.replace("y = Conv", "c = Conv") + " cq = QuantizeLinear(c, s, z) y = DequantizeLinear(cq, s, z)"
    assert rf.export.lint(write(tmp_path / "m.onnx", closed, **fixed), target="qnn").findings == ()
    clipped = closed.replace("cq = QuantizeLinear(c,", "r = Relu(c) cq = QuantizeLinear(r,")
    assert rf.export.lint(write(tmp_path / "m.onnx", clipped, **fixed), target="qnn").findings == ()
    constants = "float s = {0.1}, int8 z = {0}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0}"
    constants += ", int8[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
    body = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear<axis = 1>(w, ws, wz)
              m = MatMul(d, wd) mq = QuantizeLinear(m, s, z) y = DequantizeLinear(mq, s, z)"""
    path = write(tmp_path / "m.onnx", body, constants, x="float[2,4] x", y="float[2,2] y")
    assert findings(rf.export.lint(path, target="qnn")) == {("DequantizeLinear_2", "2 scales of a weight of MatMul")}


# ---- runtimes -------------------------------------------------------------------------------------------------------


def test_onnxruntime_says_why_an_operator_is_float(tmp_path):
    """What TensorRT wants is slow on x86: int8 activations, no quantizers behind convolutions."""
    x = torch.randn(4, 3, 16, 16)
    path = tmp_path / "m.onnx"
    rf.export.to_onnx(prepared(ResNet(), x, QConfig.int8(target="tensorrt")), x, path, target="tensorrt")
    report = rf.export.lint(path)
    assert report.ok
    values = {f.node: f.value for f in report.warnings}
    assert "no QuantizeLinear follows as its only reader" in values["block1.conv2/Conv"]
    assert "Relu or Clip stands before a zero point" in values["block1.conv1/Conv"]
    assert not any(op.integer for op in report.operators)
    assert "0 of 9 operators in integers" in repr(report)


def test_a_relu_that_onnxruntime_drops_is_an_error(tmp_path):
    body = "r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"
    path = write(tmp_path / "m.onnx", body, "float s = {0.1}, int4 z = {0}", x="float[N,4] x", y="float[N,4] y")
    assert findings(rf.export.lint(path)) == {("Relu_0", "INT4")}


def test_openvino_reads_back_what_it_executes(tmp_path):
    pytest.importorskip("openvino")
    x = torch.randn(9, 12)
    path = tmp_path / "m.onnx"
    config = QConfig.int8(target="openvino", overrides={"2": None})
    report = rf.export.to_onnx(prepared(mlp(), x, config), x, path, target="openvino")
    integer = {op.name.partition("/")[0]: op.integer for op in report.operators}
    assert integer == {"0": True, "2": False}
    assert {op.runtime for op in report.in_integers} == {"FullyConnected u8"}
    assert {d.runtime for d in report.differences} == {"ONNX Runtime with optimizations off", "OpenVINO"}
    assert [c.steps for c in report.nodes_checked if c.runtime == "OpenVINO"] == [0]


def test_openvino_four_bit_zero_points(tmp_path):
    pytest.importorskip("openvino")
    body = "wd = DequantizeLinear<axis = 1>(w, ws, wz) y = MatMul(x, wd)"
    constants = "float[2] ws = {0.1, 0.1}, int4[2] wz = {0, 0}, int4[4,2] w = {1, 2, 3, 4, 5, 6, 7, 1}"
    path = write(tmp_path / "m.onnx", body, constants, x="float[N,4] x", y="float[N,2] y")
    report = rf.export.lint(path, target="openvino")
    assert ("DequantizeLinear_0", "a zero point of zeros") in findings(report, "warning")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path, monkeypatch):
    path = write(tmp_path / "m.onnx", GOOD)
    with pytest.raises(ValueError, match=r"^\[lint\] target must be one of onnxruntime, openvino, .*, got 'tpu'"):
        rf.export.lint(path, target="tpu")
    with pytest.raises(FileNotFoundError, match=r"^\[lint\] path must name an ONNX file, got .*nothing.onnx"):
        rf.export.lint(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_bytes(b"\xff\xff no protobuf")
    with pytest.raises(ValueError, match=r"^\[lint\] path must name an ONNX file, got .*text.onnx"):
        rf.export.lint(tmp_path / "text.onnx")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    with pytest.raises(ImportError, match=r"^\[lint\] needs openvino: pip install rarefy\[openvino\]"):
        rf.export.lint(path, target="openvino")
    x = torch.randn(9, 12)
    model = prepared(mlp(), x, QConfig.int8(target="openvino"))
    with pytest.raises(ImportError, match=r"^\[to_onnx\] needs openvino: pip install rarefy\[openvino\]"):
        rf.export.to_onnx(model, x, tmp_path / "new.onnx", target="openvino")
    rf.export.to_onnx(model, x, tmp_path / "new.onnx", target="openvino", verify=False)
    assert files(tmp_path) == ["m.onnx", "new.onnx", "text.onnx"]


def test_nodes_without_names_are_told_by_place(tmp_path):
    path = write(tmp_path / "m.onnx", *swap("int8 z = {0}", "uint8 z = {0}"))
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, path)
    assert ("QuantizeLinear #0", "UINT8") in findings(rf.export.lint_tensorrt(path))
