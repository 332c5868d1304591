"""Verification of exported files: every quantized tensor is compared, and a wrong node is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export_onnx import PooledCnn, ResNet, files, mlp, prepared, put_on_coarse_grid
from torch import Tensor, nn

import rarefy as rf

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from rarefy.export import onnx as to_onnx_module  # noqa: E402
from rarefy.export import onnx_edit, onnx_targets, onnx_verify, shapes  # noqa: E402

QConfig = rf.quantization.QConfig


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_runtime(report: rf.export.ExportReport) -> dict[str, list[rf.export.NodeCheck]]:
    result: dict[str, list[rf.export.NodeCheck]] = {}
    for check in report.nodes_checked:
        result.setdefault(check.runtime, []).append(check)
    return result


PLAIN = "ONNX Runtime with optimizations off"
FUSED = "ONNX Runtime with optimizations on"


# ---- what is checked ------------------------------------------------------------------------------------------------


def test_every_quantized_tensor_is_compared_by_every_means(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(prepared(ResNet(), x), x, path)
    checks = by_runtime(report)
    assert list(checks) == ["reference evaluator", PLAIN, FUSED]
    makers = [
        "stem.0.quant.input/QuantizeLinear", "stem.0/Conv", "block1.conv1/Conv", "block1.conv2/Conv", "block1.add/Add",
        "block2.conv1/Conv", "block2.conv2/Conv", "block2.shortcut.0/Conv", "block2.add/Add", "pool/GlobalAveragePool",
    ]  # fmt: skip
    for found in checks.values():
        assert sorted(check.name for check in found) == sorted(makers)
        assert {check.op_type for check in found} == {"QuantizeLinear", "Conv", "Add", "GlobalAveragePool"}
        assert len({check.quantizer for check in found}) == len(found)
    sizes = {check.name: check.values for check in checks[PLAIN]}
    assert sizes["stem.0/Conv"] == 4 * 8 * 16 * 16
    for check in report.nodes_checked:
        assert check.steps <= (2 if check.runtime == FUSED else 1)
        assert (check.steps == 0) == (check.differing == 0)
        assert check.differing <= 0.01
    assert files(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "qnn"])
def test_sums_that_are_exact_leave_no_mismatch(tmp_path, target):
    x = torch.randn(16, 1, 14, 14)
    model = prepared(PooledCnn(), x, QConfig.int8(target=target))
    put_on_coarse_grid(model)
    if target == "openvino":
        pytest.importorskip("openvino")
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    assert report.nodes_checked
    assert {(c.steps, c.differing) for c in report.nodes_checked if c.runtime in (PLAIN, "reference evaluator")} == {
        (0, 0.0)
    }
    assert {d.max_abs for d in report.differences if d.runtime == PLAIN} == {0.0}


def test_the_report_tells_nodes_and_what_was_skipped(tmp_path):
    x = torch.randn(9, 12)
    report = rf.export.to_onnx(prepared(mlp(), x), x, tmp_path / "m.onnx", opset=18)
    text, table = repr(report), report._repr_html_()
    assert report.skipped == ("reference evaluator: opset 18 is older than 19, from which on it has DequantizeLinear",)
    assert "reference evaluator: opset 18 is older" in text
    assert f"2 tensors, {PLAIN}" in text
    assert "4 comparisons of quantized tensors" in table
    assert table.count("0/Gemm") >= 1
    assert len(text.splitlines()) < 20


def test_large_networks_skip_the_reference_evaluator_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_verify, "_REFERENCE_MACS", 1000)
    x = torch.randn(9, 12)
    report = rf.export.to_onnx(prepared(mlp(), x), x, tmp_path / "m.onnx")
    (reason,) = report.skipped
    assert reason.startswith("reference evaluator: ")
    assert "multiply-adds, more than" in reason
    assert "reference evaluator" not in by_runtime(report)


def test_a_module_that_is_called_twice_is_compared_at_both_calls(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    x = torch.randn(9, 12)
    report = rf.export.to_onnx(prepared(Twice(), x), x, tmp_path / "m.onnx")
    assert len(by_runtime(report)[PLAIN]) == 3
    assert not any("quantizers are checked" in text for text in report.skipped)


# ---- what is wrong is named -----------------------------------------------------------------------------------------


def replace_constant(graph, node, index: int, change) -> None:
    array = onnx_edit.constant(node.inputs[index])
    node.replace_input_with(index, onnx_edit.initializer(graph, "spoiled", change(array).astype(array.dtype)))


def wrong_constant(name: str, index: int, change):
    def fault(graph) -> None:
        (node,) = [node for node in graph if node.name == name]
        replace_constant(graph, node, index, change)

    return fault


def weights_of(layer: str, index: int, change):
    """A fault in the DequantizeLinear of a layer's weight."""

    def fault(graph) -> None:
        (node,) = [n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].name == f"{layer}.weight"]
        replace_constant(graph, node, index, change)

    return fault


def swap_zero_point(name: str):
    """The quantizer and all that read it, so that the file stays consistent in itself."""

    def fault(graph) -> None:
        (node,) = [node for node in graph if node.name == name]
        readers = node.outputs[0].consumers()
        old = onnx_edit.constant(node.inputs[2])
        value = onnx_edit.initializer(graph, "spoiled", np.array(255 - int(old), old.dtype))
        for reader in (node, *readers):
            reader.replace_input_with(2, value)

    return fault


def drop_clip(name: str):
    def fault(graph) -> None:
        (node,) = [node for node in graph if node.name == name]
        onnx_edit.bypass(node, node.inputs[0])

    return fault


FAULTS = {
    "scale of a quantizer": (
        wrong_constant("block1.conv2.quant.input/QuantizeLinear", 1, lambda s: s * 1.3),
        "block1.conv1/Conv",
    ),
    "scale of a dequantizer": (
        wrong_constant("block1.conv2.quant.input/DequantizeLinear", 1, lambda s: s * 1.001),
        "block1.conv2.quant.input/DequantizeLinear",
    ),
    "zero point": (swap_zero_point("block1.conv2.quant.input/QuantizeLinear"), "block1.conv1/Conv"),
    "scale of a weight": (weights_of("block2.conv2", 1, lambda s: s * 1.05), "block2.conv2/Conv"),
    "one channel's scale": (
        weights_of("block2.conv1", 1, lambda s: np.where(np.arange(s.size) == 3, 2 * s, s)),
        "block2.conv1/Conv",
    ),
    "one weight": (
        weights_of("block2.shortcut.0", 0, lambda w: np.where(np.arange(w.size).reshape(w.shape) == 5, -w - 9, w)),
        "block2.shortcut.0/Conv",
    ),
    "bias": (wrong_constant("block1.conv1/Conv", 2, lambda b: b + 0.1), "block1.conv1/Conv"),
    "dropped ReLU": (drop_clip("block1.conv2.quant.input/Clip"), "block1.conv1/Conv"),
    "weight of the last layer": (weights_of("fc", 1, lambda s: s * 1.01), "fc/MatMul"),
}


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_wrong_node_is_named(tmp_path, monkeypatch, fault, reference):
    """Symmetric activations, whose ReLUs are limits of the integers."""
    spoil, node = FAULTS[fault]
    x = torch.randn(4, 3, 16, 16)
    config = QConfig.int8(activation=rf.quantization.Scheme(bits=8, symmetric=True))
    model = prepared(ResNet(), x, config)
    passes = onnx_targets.place

    def faulty(ir_model, profile):
        passes(ir_model, profile)
        spoil(ir_model.graph)
        onnx_edit.remove_unused(ir_model.graph)

    monkeypatch.setattr(onnx_targets, "place", faulty)
    if not reference:
        monkeypatch.setattr(onnx_verify, "_REFERENCE_MACS", 0)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the older file")
    runtime = "reference evaluator" if reference else PLAIN
    with pytest.raises(RuntimeError, match=rf"^\[to_onnx\] verification failed: node '{node}' \(\w+\), {runtime}: "):
        rf.export.to_onnx(model, x, path)
    assert files(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"the older file"


def test_what_the_fused_kernels_get_wrong_is_named(tmp_path, monkeypatch):
    """A runtime whose optimizations drop a limit: only the run with optimizations is wrong."""
    x = torch.randn(4, 3, 16, 16)
    model = prepared(ResNet(), x)
    session = onnx_verify._session

    class Wrong:
        def __init__(self, session):
            self.session = session

        def run(self, names, feed):
            values = self.session.run(names, feed)
            at = list(names).index("spoiled") if "spoiled" in names else len(values) // 2
            values[at] = np.where(values[at] < 255, values[at] + np.uint8(3), values[at])
            return values

    def faulty(path, optimized, **keywords):
        made = session(path, optimized, **keywords)
        return Wrong(made) if optimized and path.name.startswith("exposed-") else made

    monkeypatch.setattr(onnx_verify, "_session", faulty)
    with pytest.raises(RuntimeError, match=rf"failed: node '[\w./]+' \(\w+\), {FUSED}: .* by up to 3 steps"):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    assert files(tmp_path) == []


def test_a_model_without_finite_outputs_cannot_be_verified(tmp_path):
    model = mlp()
    nn.init.constant_(model[2].bias, float("nan"))
    with pytest.raises(RuntimeError, match=r"output 'output', .*: the model gives no finite value on the example"):
        rf.export.to_onnx(model, torch.randn(9, 12), tmp_path / "m.onnx")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([[-np.inf, np.nan, 1.0]], np.float32), "output 'scores', .* has other infinities or NaN"),
        (np.array([2]), "output 'best', .* differs from the model in 100.0% of its values"),
    ],
    ids=["infinity", "index"],
)
def test_one_wrong_value_that_is_no_number_is_found(tmp_path, monkeypatch, wrong, message):
    class Best(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x / x.new_tensor([0.0, 0.0, 1.0]), x.argmax(1)

    x = torch.tensor([[1.0, 0.0, 1.0]])
    keywords = {"output_names": ["scores", "best"], "dynamic_batch": False}
    rf.export.to_onnx(Best(), x, tmp_path / "m.onnx", **keywords)
    session = onnx_verify._session

    class Wrong:
        def __init__(self, session):
            self.session = session

        def run(self, names, feed):
            values = self.session.run(names, feed)
            return [wrong if value.dtype == wrong.dtype else value for value in values]

    monkeypatch.setattr(onnx_verify, "_session", lambda *a, **k: Wrong(session(*a, **k)))
    with pytest.raises(RuntimeError, match=message):
        rf.export.to_onnx(Best(), x, tmp_path / "m.onnx", **keywords)


# ---- free axes ------------------------------------------------------------------------------------------------------


class Sentences(nn.Module):
    """Two inputs of [batch, sequence], as language models have."""

    def __init__(self, longest: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(longest, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        scores = x @ x.transpose(1, 2) + (mask[:, None, :] - 1) * 1e4
        return self.fc2(torch.tanh(self.fc1(torch.softmax(scores, -1) @ x)))


def sentences(batch: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(20, (batch, length)), "mask": torch.ones(batch, length)}


def trained_sentences(inputs: dict[str, Tensor], longest: int = 12) -> nn.Module:
    model = rf.quantization.prepare(Sentences(longest), QConfig.int8(), inputs)
    rf.quantization.calibrate(model, [inputs])
    return model.eval()


def run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 12])
def test_sequences_of_any_length(tmp_path, batch, length):
    inputs = sentences(batch, length)
    model = trained_sentences(inputs)
    path = tmp_path / "m.onnx"
    axes = {"ids": {1: "sequence"}, "mask": {-1: "sequence"}}
    report = rf.export.to_onnx(model, inputs, path, dynamic_shapes=axes)
    seen = {d.sizes for d in report.differences}
    other = 6 if length == 12 else 2
    assert seen == {(("batch", batch), ("sequence", length)), (("batch", batch + 1), ("sequence", other))}
    for value in onnx.load(path).graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    for shape in ((3, 7), (1, 1), (5, 12)):
        more = sentences(*shape)
        with torch.no_grad():
            expected = model(**more)
        torch.testing.assert_close(run(path, more), expected, rtol=0.05, atol=0.05 * float(expected.std()))


def test_a_batch_by_another_name_and_a_fixed_one(tmp_path):
    inputs = sentences(2, 6)
    model, path = trained_sentences(inputs), tmp_path / "m.onnx"
    rf.export.to_onnx(
        model, list(inputs.values()), path, dynamic_shapes=[{0: "people"}, {0: "people"}], input_names=["a", "b"]
    )
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["people", 6]
    rf.export.to_onnx(model, inputs, path, dynamic_batch=False, dynamic_shapes={"ids": {1: "n"}, "mask": {1: "n"}})
    dims = onnx.load(path).graph.input[1].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == [2, "n"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"word": {1: "n"}}, ValueError, r"dynamic_shapes must name inputs \(ids, mask\), got 'word'"),
        ([{1: "n"}], ValueError, r"dynamic_shapes must hold one mapping for each of 2 inputs, got \[\{1: 'n'\}\]"),
        ({"ids": {2: "n"}}, ValueError, r"dynamic_shapes must name axes that exist, got axis 2 of 'ids', which has 2"),
        ({"ids": {1: 7}}, TypeError, r"dynamic_shapes must map axes \(integers\) to names, got 1: 7 for 'ids'"),
        ({"ids": ["n"]}, TypeError, r"dynamic_shapes must map axes to names, got \['n'\] for 'ids'"),
        ("n", TypeError, r"dynamic_shapes must be mappings of axes to names, got 'n'"),
        (
            {"ids": {1: "batch"}},
            ValueError,
            r"dynamic_shapes: axes of one name must have one size, at least 1, got 2 for 'batch' in 'ids' and 6 in ",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(tmp_path, given, error, message):
    inputs = sentences(2, 6)
    with pytest.raises(error, match=r"^\[to_onnx\] " + message):
        rf.export.to_onnx(trained_sentences(inputs), inputs, tmp_path / "m.onnx", dynamic_shapes=given)
    assert files(tmp_path) == []


def test_an_axis_that_the_model_fixes_is_an_error(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 6) * 2

    with pytest.raises(
        ValueError, match=r"^\[to_onnx\] the model must run at other sizes of the free axis 'batch' than 2"
    ):
        rf.export.to_onnx(Fixed(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert files(tmp_path) == []


@pytest.mark.parametrize("arguments", [{"dynamic_batch": True}, {"dynamic_shapes": {"ids": {1: "n"}}}])
def test_axes_that_the_target_forbids_are_refused_up_front(tmp_path, monkeypatch, arguments):
    inputs = sentences(2, 6)
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("exported first"))
    (name,) = arguments
    with pytest.raises(
        ValueError, match=rf"^\[to_onnx\] {name} must not be set for qnn, which needs fixed sizes, got "
    ):
        rf.export.to_onnx(Sentences(), inputs, tmp_path / "m.onnx", target="qnn", **arguments)
    assert files(tmp_path) == []


def test_a_target_with_fixed_sizes_gets_them(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    path = tmp_path / "m.onnx"
    rf.export.to_onnx(prepared(ResNet(), x, QConfig.int8(target="qnn")), x, path, target="qnn")
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [4, 3, 16, 16]


def test_sizes_to_try():
    assert shapes.other_sizes(1, "batch") == [2]
    assert shapes.other_sizes(128, "sequence")[0] == 64
    assert shapes.other_sizes(7, "sequence") == [6, 8, 14]
    assert shapes.other_sizes(1, "sequence") == [2, 2]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch) -> None:
    """Files whose tensors take more than 1000 bytes keep them beside."""
    monkeypatch.setattr(to_onnx_module, "_LARGEST_FILE", 1000)


@pytest.mark.usefixtures("small_files")
def test_large_tensors_are_beside_the_file(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    model = prepared(ResNet(), x)
    path = tmp_path / "m.onnx"
    report = rf.export.to_onnx(model, x, path)
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    graph = onnx.load(path, load_external_data=False).graph
    outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {"m.onnx.data"}
    assert report.nodes_checked
    assert report.in_float == ()
    assert not (tmp_path / "m.onnx").read_bytes().count(str(tmp_path).encode())
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model.eval()(x)
    got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    assert (got - expected).abs().max() <= 0.05 * expected.std()
    assert rf.export.lint(path).operators


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("existing", [True, False])
def test_both_files_appear_or_none(tmp_path, monkeypatch, existing):
    x = torch.randn(9, 40)
    model = prepared(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 7)), x)
    path = tmp_path / "m.onnx"
    if existing:
        path.write_bytes(b"the older file")
        (tmp_path / "m.onnx.data").write_bytes(b"the older data")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def full(source, target):
        if Path(target) == path:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        rf.export.to_onnx(model, x, path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("exported first"))
    x = torch.randn(9, 12)
    with pytest.raises(OSError, match=r"^\[to_onnx\] path must be in a folder that can be written, got /proc/m.onnx"):
        rf.export.to_onnx(prepared(mlp(), x), x, "/proc/m.onnx")


@pytest.mark.parametrize("when", ["translation", "check", "verification"])
def test_nothing_is_left_whatever_fails(tmp_path, monkeypatch, when):
    x = torch.randn(9, 12)
    model = prepared(mlp(), x)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the older file")

    def fail(*arguments, **keywords):
        raise RuntimeError("on purpose")

    owner, name = {
        "translation": (torch.onnx, "export"),
        "check": (onnx.checker, "check_model"),
        "verification": (onnx_verify, "verify"),
    }[when]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        rf.export.to_onnx(model, x, path)
    assert files(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"the older file"


def test_the_copy_shares_no_state_with_the_model(tmp_path):
    """Parameters are read where they lie; what exporting does to the copy's parameters stays there."""
    x = torch.randn(9, 12)
    model = prepared(nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 7)), x).train()
    before = {name: (p, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    for name, parameter in model.named_parameters():
        same, requires_grad, value = before[name]
        assert parameter is same
        assert parameter.requires_grad == requires_grad
        assert torch.equal(parameter, value)
