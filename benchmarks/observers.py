"""Observers beside torch's, ONNX Runtime's and brevitas', as ratios to the time of reading the tensor once; and the cost of a
calibration beside one FP32 forward of the same images.

One JSON line per row on stdout, a table on stderr. The limit of a row is a sum over 32x64x56x56 floats, which reads them
once. "goal" is the ratio that the row is to stay below. Peers run where they are installed.

    python benchmarks/observers.py [--threads 2] [--repeats 11] [--quick] [--rows histogram ...]
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable

import torch
from models import ResNet18
from timing import interleaved
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import MSE, SQNR, HalfQuadratic, Histogram, MeanNoOutliers, MinMax, Percentile, QConfig

ops = torch.ops.rarefy
SHAPE = (32, 64, 56, 56)
BINS = 2048
Functions = dict[str, Callable[[], object]]


def range_state(channels: int) -> list[Tensor]:
    return [
        torch.full((channels,), torch.inf),
        torch.full((channels,), -torch.inf),
        torch.ones(channels),
        torch.zeros(channels, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
    ]


def counted(x: Tensor, axis: int | None = None) -> list[Tensor]:
    rows = 1 if axis is None else x.shape[axis]
    state = [torch.zeros(rows, BINS, dtype=torch.int64), *(torch.full((rows,), e) for e in (torch.inf, -torch.inf))]
    ops.histogram_observe(x, *state, torch.zeros(1, dtype=torch.int64), axis)
    return state


def chosen(x: Tensor, method: str, parameter: float, grid: tuple[int, int, bool], axis: int | None = None) -> object:
    return ops.choose_range_from_histogram(*counted(x, axis), method, parameter, *grid)


def per_channel(x: Tensor) -> Functions:
    state = range_state(64)
    observer = torch.ao.quantization.PerChannelMinMaxObserver(ch_axis=1)
    return {
        "rarefy": lambda: ops.observe(x, *state, 1, None, -128, 127, True),
        "torch eager": lambda: (x.amin((0, 2, 3)), x.amax((0, 2, 3))),
        "torch.ao PerChannelMinMaxObserver": lambda: observer(x),
    }


def histogram(x: Tensor) -> Functions:
    observer = torch.ao.quantization.HistogramObserver(bins=BINS)
    return {
        "rarefy": lambda: counted(x),
        "rarefy, bfloat16": (lambda y: lambda: counted(y))(x.bfloat16()),
        "torch.histc": lambda: torch.histc(x, BINS),
        "torch.ao HistogramObserver": lambda: observer(x),
    }


def percentile(x: Tensor) -> Functions:
    functions: Functions = {"rarefy": lambda: chosen(x, "percentile", 99.99, (0, 255, False))}
    if importlib.util.find_spec("onnxruntime") is not None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        def ort() -> object:
            collector = HistogramCollector("percentile", False, BINS, BINS, 99.99, "same")
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                collector.collect({"x": [x.numpy()]})
                return collector.compute_collection_result()

        functions["ONNX Runtime HistogramCollector"] = ort
    return functions


def divergence(x: Tensor) -> Functions:
    return {"rarefy": lambda: chosen(x, "kl", 0.0, (-128, 127, True))}


def mse(x: Tensor) -> Functions:
    functions: Functions = {
        "rarefy": lambda: ops.mse_range(x, None, -128, 127, True),
        "rarefy, uint8": lambda: ops.mse_range(x, None, 0, 255, False),
        "rarefy, 64 channels": lambda: ops.mse_range(x, 1, -128, 127, True),
    }
    if importlib.util.find_spec("brevitas") is not None:
        with contextlib.suppress(ImportError):  # not of the interface that this file knows
            from brevitas.nn import QuantIdentity
            from brevitas.quant import Int8ActPerTensorFloatMSE

            layer = QuantIdentity(act_quant=Int8ActPerTensorFloatMSE).train()
            functions["brevitas Int8ActPerTensorFloatMSE"] = lambda: layer(x)
    return functions


def weights(_: Tensor) -> Functions:
    w = torch.randn(512, 512, 3, 3) * 0.05
    importance = torch.rand(1, 512, 1, 1)
    return {
        "limit": lambda: w.sum(),
        "MSE, int8": lambda: ops.mse_range(w, 0, -127, 127, True),
        "MSE, int4": lambda: ops.mse_range(w, 0, -7, 7, True),
        "MSE, int4, importance": lambda: ops.mse_range(w, 0, -7, 7, True, importance=importance),
        "half-quadratic, uint4": lambda: ops.half_quadratic_qparams(w, 0, 0, 15, False),
    }


# Functions and goal.
ROWS: dict[str, tuple[Callable[[Tensor], Functions], float | None]] = {
    "per-channel min-max": (per_channel, 1.3),
    "per-channel min-max, channels-last": (
        lambda x: per_channel(x.contiguous(memory_format=torch.channels_last)),
        1.3,
    ),
    "histogram of 2048 bins": (histogram, 6.0),
    "percentile range": (percentile, 8.0),
    "KL range": (divergence, None),
    "MSE range": (mse, 8.0),
    "weights 512x512x3x3": (weights, None),
}

OBSERVERS = {
    "min-max": (MinMax(), 1.0),
    "histogram": (Histogram(), 1.2),
    "histogram, KL": (Histogram(search="kl"), None),
    "percentile": (Percentile(), None),
    "SQNR": (SQNR(), None),
    "mean without outliers": (MeanNoOutliers(), None),
}


def calibrations(images: Tensor) -> tuple[Functions, dict[str, float | None]]:
    """Static quantization of ResNet-18 with 64 images: calibrate and choose, after one FP32 forward of them."""
    torch.manual_seed(0)
    model = ResNet18().eval()
    batches = list(images.split(16))
    functions: Functions = {}

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    functions["limit"] = forward
    goals: dict[str, float | None] = {}
    for name, (observer, goal) in OBSERVERS.items():
        prepared = rf.quantization.prepare(model, QConfig.int8(observer=observer), images[:2])

        def run(prepared: nn.Module = prepared) -> None:
            for module in prepared.modules():
                if isinstance(module, rf.quantization.FakeQuantizer) and module.statistics is not None:
                    module.statistics.clear()
            rf.quantization.calibrate(prepared, batches)

        functions[name], goals[name] = run, goal
    searched = rf.quantization.prepare(model, QConfig.int8(weight_observer=MSE()), images[:2])
    functions["min-max, MSE weights"] = lambda: rf.quantization.calibrate(searched, batches)
    split = rf.quantization.prepare(model, QConfig.int8(weight_observer=HalfQuadratic()), images[:2])
    functions["min-max, half-quadratic weights"] = lambda: rf.quantization.calibrate(split, batches)
    return functions, goals


def report(row: str, medians: dict[str, float], goals: dict[str, float | None], threads: int) -> None:
    for name, seconds in medians.items():
        ratio = seconds / medians["limit"]
        record = {
            "benchmark": "observers",
            "row": row,
            "function": name,
            "milliseconds": round(seconds * 1e3, 4),
            "ratio_to_limit": round(ratio, 3),
            "goal": goals.get(name),
            "threads": threads,
            "instruction_set": rf._core.instruction_set(),
        }
        print(json.dumps(record), flush=True)
        print(f"{row:36} {name:36} {seconds * 1e3:10.3f} {ratio:8.2f} {goals.get(name) or '':>6}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--side", type=int, default=64, help="of the images that are calibrated with")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run, and roughly how fast")
    parser.add_argument("--process-time", action="store_true", help="processor time in place of wall time")
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 3 if arguments.quick else arguments.repeats
    clock = time.process_time if arguments.process_time else time.perf_counter

    print(f"{'row':36} {'function':36} {'ms':>10} {'/ limit':>8} {'goal':>6}", file=sys.stderr)
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    for row, (build, goal) in ROWS.items():
        if any(wanted in row for wanted in arguments.rows):
            functions = {"limit": lambda: x.sum()} | build(x)
            goals = {name: goal if name.startswith("rarefy") else None for name in functions}
            report(row, interleaved(functions, repeats, clock=clock), goals, arguments.threads)
    row = f"calibration of ResNet-18, 64 images of {arguments.side}"
    if any(wanted in row for wanted in arguments.rows):
        functions, goals = calibrations(torch.randn(64, 3, arguments.side, arguments.side))
        report(row, interleaved(functions, repeats, warmup=1, clock=clock), goals, arguments.threads)


if __name__ == "__main__":
    main()
