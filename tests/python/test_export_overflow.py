"""What the report says of sums in 16 bits, held against kernels that add so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import QConfig

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RUN = {
    "onnxruntime": """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input": numpy.load(sys.argv[2])})[0])
""",
    "openvino": """
import sys, numpy, openvino
core = openvino.Core()
model = core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
numpy.save(sys.argv[3], model(numpy.load(sys.argv[2]))[0])
""",
}


def outputs(runtime: str, path: Path, x: torch.Tensor, older: bool) -> np.ndarray:
    """The file's outputs, in a process of its own, on this processor or on one without VNNI."""
    given, result = path.with_suffix(".in.npy"), path.with_suffix(".out.npy")
    np.save(given, x.numpy())
    command = [sys.executable, "-c", RUN[runtime], str(path), str(given), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if older and runtime == "onnxruntime":
        command = ["valgrind", "--tool=none", "-q", *command]  # presents a processor with AVX2 and no VNNI
    elif older:
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    subprocess.run(command, check=True, env=environment, timeout=500, capture_output=True)
    return np.load(result)


def export(path: Path, runtime: str, reduce_range: bool) -> tuple[rf.export.ExportReport, nn.Module, torch.Tensor]:
    """Layers whose weights agree in sign, and inputs near the largest: what 16 bits do not hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(0.1 * (1 - 0.2 * torch.rand_like(layer.weight)))
    x = 1 - 0.1 * torch.rand(4, 8, 6, 6)
    config = QConfig.int8(target=runtime, reduce_range=reduce_range)
    model = rf.quantization.calibrate(rf.quantization.prepare(model.eval(), config, x), [x])
    return rf.export.to_onnx(model, x, path, target=runtime), model, x


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_processors_without_vnni(tmp_path, runtime):
    pytest.importorskip(runtime)
    if runtime == "onnxruntime" and shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    for reduce_range in (False, True):
        report, model, x = export(tmp_path / "m.onnx", runtime, reduce_range)
        with torch.no_grad():
            expected = model(x).numpy()
        error = np.abs(outputs(runtime, report.path, x, older=True) - expected).max() / np.abs(expected).max()
        assert bool(report.overflow) != reduce_range
        # Saturated sums are far off; others as close as on any processor.
        assert (error > 0.05) if report.overflow else (error < 0.02), error
