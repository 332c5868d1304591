"""The files that C++ writes (rarefy::export_onnx), checked and run, against the outputs of the C++ models."""

import subprocess

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
load_file = pytest.importorskip("safetensors.numpy").load_file

from rarefy.export.onnx_verify import check_operators  # noqa: E402

NETWORKS = ("residual", "mlp", "transformer", "signals", "patches")
TARGETS = ("onnxruntime", "openvino", "tensorrt", "qnn")
CASES = [
    *(f"{network}-{target}" for network in NETWORKS for target in TARGETS),
    *(f"{network}-onnxruntime-{opset}" for network in NETWORKS for opset in (13, 17, 18, 21)),
    *(f"{network}-{kind}-onnxruntime" for network in NETWORKS for kind in ("signed", "exact", "float")),
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    program = request.config.rootpath / "build" / "dev" / "tests" / "cpp" / "rarefy_onnx_models"
    if not program.exists():
        pytest.skip("rarefy_onnx_models is not built (-DRAREFY_BUILD_TESTS=ON)")
    folder = tmp_path_factory.mktemp("cpp_onnx")
    subprocess.run([program, folder], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return folder


def run(path, inputs, optimized=True):
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)


def load(folder, case):
    model = onnx.load(folder / f"{case}.onnx")
    tensors = load_file(folder / f"{case}.safetensors")
    inputs = [tensors[f"input.{i}"] for i in range(len(model.graph.input))]
    outputs = [tensors[f"output.{i}"] for i in range(len(model.graph.output))]
    return model, inputs, outputs


def distance(got, want):
    """Root mean square of the difference, in that of the output."""
    assert got.shape == want.shape and got.dtype == want.dtype
    return float(np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2)))


@pytest.mark.parametrize("case", CASES)
def test_runs_as_the_model(folder, case):
    path = folder / f"{case}.onnx"
    model, inputs, outputs = load(folder, case)
    onnx.checker.check_model(model, full_check=True)
    assert model.producer_name == "rarefy"
    # Float sums in another order: 1e-5. A value on the other side of a tie is a step of 8 bits, and it spreads.
    for optimized, tolerance in ((False, 1e-5 if "exact" in case or "float" in case else 5e-3), (True, 2e-2)):
        tolerance = 1e-5 if "float" in case else tolerance
        for got, want in zip(run(path, inputs, optimized), outputs, strict=True):
            assert distance(got, want) < tolerance, f"optimized={optimized}"
    one = run(path, [x[:1] for x in inputs])
    for got, want in zip(one, outputs, strict=True):
        assert got.shape == want[:1].shape
