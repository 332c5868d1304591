"""One model to every runtime that is installed, and one table of what each makes of it.

    python examples/python/deploy_all.py                     # scikit-learn's digits, a minute or two
    python examples/python/deploy_all.py --data DIR          # the 32x32 colour images of DIR/cifar10_subset.npz
    python examples/python/deploy_all.py --quick             # seconds, to see that it works

A small ResNet is trained, then trained on with 8-bit weights and activations, and written for ONNX Runtime, OpenVINO,
ExecuTorch, LiteRT and Core ML, and converted for PyTorch itself. Every file is run on the test images: the table says
how often a runtime and the trained model name the same class, how far the outputs are apart in steps of their grid, how
long one image takes on one thread, and how large the file is. A runtime that is not installed is listed with what
installs it; Core ML runs on Apple's systems only and is converted. deploy.md, deploy.json and deploy.png keep the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import Images, TrainingBatches, accuracy, atomic, interleaved_medians, load_digits, load_npz, open_onnx
from compress_cnn import ResNet, one_cycle
from torch import Tensor, nn
from tqdm import tqdm

import rarefy as rf

Run = Callable[[Tensor], Tensor]

# ---- runtimes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """A runtime: what it needs, how a file for it is written, and how one is run on one thread."""

    name: str
    extra: str  #: pip install rarefy[extra]
    packages: tuple[str, ...]
    export: Callable[..., rf.export.ExportReport]
    file: str
    open: Callable[[Path], Run] | None  #: None: cannot be run here

    @property
    def installed(self) -> bool:
        """Whether its packages are there."""
        return all(importlib.util.find_spec(name) is not None for name in self.packages)


def open_openvino(path: Path) -> Run:
    import openvino

    # Some processors would compute in bfloat16 by default, what is not quantized too.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(np.array(request.infer([x.contiguous().numpy()])[0]))


def open_executorch(path: Path) -> Run:
    import executorch.kernels.quantized  # noqa: F401  (kernels outside of XNNPACK)
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)  # before anything runs: there is no other switch
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda x: method.execute([x.contiguous()])[0].clone()


def open_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x: Tensor) -> Tensor:
        # Inputs and outputs are int8 in the file: what a device's camera gives needs no float in between.
        scale, zero_point = source["quantization"]
        integers = torch.clamp(torch.round(x.contiguous() / scale) + zero_point, -128, 127).to(torch.int8)
        interpreter.set_tensor(source["index"], integers.numpy())
        interpreter.invoke()
        scale, zero_point = result["quantization"]
        return (torch.from_numpy(interpreter.get_tensor(result["index"])).float() - zero_point) * scale

    return run


DEPLOYMENTS = (
    Deployment(
        "ONNX Runtime", "onnx", ("onnx", "onnxscript", "onnxruntime"), rf.export.to_onnx, "model.onnx",
        partial(open_onnx, threads=1),
    ),
    Deployment(
        "OpenVINO", "openvino", ("openvino", "onnx", "onnxscript"), rf.export.to_openvino, "model.xml", open_openvino
    ),
    Deployment(
        "ExecuTorch", "executorch", ("executorch",), rf.export.to_executorch, "model.pte", open_executorch
    ),
    Deployment(
        "LiteRT", "litert", ("litert_torch", "ai_edge_litert"), rf.export.to_litert, "model.tflite", open_litert
    ),
    Deployment("Core ML", "coreml", ("coremltools",), rf.export.to_coreml, "model.mlpackage", None),
)  # fmt: skip


# ---- training -------------------------------------------------------------------------------------------------------


def train(name: str, model: nn.Module, batches: TrainingBatches, epochs: int, rate: float) -> None:
    """Train on the labels."""
    optimizer, schedule = one_cycle(model, rate, epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        bar = tqdm(batches, desc=f"{name}, epoch {epoch + 1}/{epochs}", unit="batch")
        for images, labels in bar:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


def train_models(data: Images, epochs: tuple[int, int], seed: int) -> tuple[nn.Module, nn.Module]:
    """The float network, and the one that was trained on in integers; its outputs are quantized too."""
    torch.manual_seed(seed)
    batches = TrainingBatches(data, 64)
    model = ResNet(data.train_images.shape[1], data.classes, width=32, blocks=1).to(memory_format=torch.channels_last)
    train("FP32", model, batches, epochs[0], 0.1)
    network = rf.quantization.prepare_qat(model, rf.quantization.QConfig.int8(), data.test_images[:1])
    # Runtimes for phones run a layer in integers where its result is quantized: the last one needs a quantizer of its own.
    scheme = rf.quantization.Scheme(bits=8, symmetric=False)
    quantized = nn.Sequential(network, rf.quantization.FakeQuantizer(scheme))
    train("int8", quantized, batches, epochs[1], 0.01)
    return model, quantized


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    runtime: str
    note: str = ""
    integer: str = ""  #: operators in integers, of all
    accuracy: float | None = None  #: percent of the test images
    agreement: float | None = None  #: percent of the images for which the class is that of the trained model
    steps: float | None = None  #: largest difference of an output from the trained model's, in steps of its grid
    ms: float | None = None  #: latency of one image on one thread
    ratio: float | None = None  #: latency, of that of the FP32 model in ONNX Runtime (or, without it, PyTorch)
    bytes: int | None = None  #: size of the file


def one_by_one(run: Run, images: Tensor, name: str) -> Tensor:
    """The outputs for all images: files for phones take the one batch size that they were written for."""
    bar = tqdm(images.split(1), desc=f"{name}, test images", unit="image", leave=False)
    return torch.cat([run(x) for x in bar])


@torch.no_grad()
def deploy(data: Images, folder: Path, seconds: float, models: tuple[nn.Module, nn.Module]) -> list[Row]:
    """Write, run and time everything."""
    float_model, quantized = models
    images, labels, example = data.test_images, data.test_labels, data.test_images[:1].contiguous()
    expected, step = quantized(images), float(quantized[1].scale)
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}

    def add(name: str, run: Run | None, **facts: object) -> None:
        rows[name] = row = Row(name, **facts)  # type: ignore[arg-type]
        if run is None:
            return
        runs[name] = run
        outputs = one_by_one(run, images, name)
        row.accuracy = 100 * float((outputs.argmax(1) == labels).float().mean())
        row.agreement = 100 * float((outputs.argmax(1) == expected.argmax(1)).float().mean())
        row.steps = float((outputs - expected).abs().max()) / step

    def size(path: Path) -> int:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, model in (("PyTorch FP32", float_model), ("PyTorch int8", rf.quantization.convert(quantized))):
        path = folder / f"{name.split()[1].lower()}.pt"
        with atomic(path) as temporary:
            torch.save(model.state_dict(), temporary)
        add(name, model, bytes=size(path))
    baseline = "PyTorch FP32"
    for deployment in tqdm(DEPLOYMENTS, desc="export", unit="runtime"):
        if not deployment.installed:
            add(deployment.name, None, note=f"not installed: pip install rarefy[{deployment.extra}]")
            continue
        path = folder / deployment.file
        if deployment.name == "ONNX Runtime":
            baseline, float_path = "ONNX Runtime FP32", folder / "float.onnx"
            report = deployment.export(float_model, example, float_path)
            add(baseline, deployment.open(float_path), bytes=report.bytes)
        report = deployment.export(quantized, example, path)
        tqdm.write(repr(report))
        facts = {"bytes": report.bytes, "integer": f"{len(report.in_integers)} of {len(report.operators)}"}
        if deployment.open is None:
            add(deployment.name, None, note="converted, not run", bytes=report.bytes)
        else:
            add(deployment.name, deployment.open(path), **facts)

    tqdm.write("timing")
    latency = interleaved_medians({name: partial(run, example) for name, run in runs.items()}, seconds)
    torch.set_num_threads(threads)
    for name, milliseconds in latency.items():
        rows[name].ms, rows[name].ratio = milliseconds, milliseconds / latency[baseline]
    return list(rows.values())


def format_rows(rows: list[Row]) -> str:
    """The rows as Markdown that also reads well in a terminal."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [("runtime", "in integers", "accuracy %", "same class %", "steps", "ms", "of FP32", "file KiB", "")]
    for row in rows:
        numbers = (number(row.accuracy, ".2f"), number(row.agreement, ".2f"), number(row.steps, ".1f"))
        times = (number(row.ms, ".3f"), number(row.ratio, ".2f"))
        kib = number(None if row.bytes is None else row.bytes / 1024, ".1f")
        cells.append((row.runtime, row.integer or "-", *numbers, *times, kib, row.note))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    left = (0, len(widths) - 1)
    cells.insert(1, tuple("-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)))
    return "\n".join(
        f"| {' | '.join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))} |"
        for line in cells
    )


NOTES = """\
- *in integers*: operators that the runtime computes in integers, of those that its report counts.
- *same class*, *steps*: against the fake-quantized model that was trained; one step is one integer of the outputs.
- *ms*: one image on one thread, median of calls that take turns.
- *of FP32*: latency, of that of the FP32 network in ONNX Runtime where that is installed, else in PyTorch.
- *file*: what has to be shipped; PyTorch's rows are state dicts, without the code of the model."""


def write_plot(path: Path, rows: list[Row], title: str) -> None:
    """Latency and size of every runtime, as bars."""
    import matplotlib

    matplotlib.use("Agg")  # a file is written, no window is opened
    import matplotlib.pyplot as plt

    figure, (times, sizes) = plt.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.5), sharey=True)
    for axis, label, values in (
        (times, "latency of one image, ms", [row.ms for row in rows]),
        (sizes, "file, KiB", [row.bytes and row.bytes / 1024 for row in rows]),
    ):
        colours = ["C7" if row.runtime.endswith("FP32") else "C0" for row in rows]
        bars = axis.barh([row.runtime for row in rows], [value or 0 for value in values], color=colours)
        axis.bar_label(bars, ["" if value is None else f"{value:.3g}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    times.invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Export one int8 model to every installed runtime, and compare them.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of cifar10_subset.npz (default: digits)")
    parser.add_argument("--out", type=Path, default=Path("out/deploy_all"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that everything works")
    arguments = parser.parse_args()
    try:
        if arguments.data is None:
            data = load_digits(arguments.seed)
        else:
            data = load_npz(arguments.data / "cifar10_subset.npz")
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    epochs = (2, 1) if arguments.quick else (10, 3)
    print(f"{data.name}: {len(data.train_labels)} images to train, {len(data.test_labels)} to test")
    models = train_models(data, epochs, arguments.seed)
    trained = accuracy(models[1], data)
    rows = deploy(data, arguments.out, 1 if arguments.quick else 8, models)
    finding = f"The model that was trained recognizes {trained:.2f} % of the test images."
    table, title = format_rows(rows), f"One int8 ResNet on {data.name}, in every runtime"
    plot = importlib.util.find_spec("matplotlib") is not None
    with atomic(arguments.out / "deploy.md") as temporary:
        picture = ["![latency and size](deploy.png)"] if plot else []
        temporary.write_text("\n\n".join([f"# {title}", table, finding, NOTES, *picture]) + "\n")
    content = {
        "data": data.name,
        "epochs": epochs,
        "trained_accuracy": trained,
        "runtimes": [asdict(row) for row in rows],
        "rarefy": rf.__version__,
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
    }
    with atomic(arguments.out / "deploy.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    if plot:
        write_plot(arguments.out / "deploy.png", rows, title)
    print(f"\n{table}\n\n{finding}\n\nfiles and table: {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
