"""What an example needs beside compression: images, checkpoints, timing, table, report, plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import rarefy as rf

Key = TypeVar("Key")

# ---- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A data set in memory: images float32 [N, C, H, W], normalized, channels last; labels int64 [N]."""

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    flip: bool  #: a mirror image shows the same thing
    shift: int  #: a picture moved by so many pixels still shows the same thing


def _normalized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and deviation 1 per channel, by the statistics of the training images."""
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    normalized = [((x - mean) / std).contiguous(memory_format=torch.channels_last) for x in (train, test)]
    return normalized[0], normalized[1]


def load_digits(seed: int) -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, a fifth of each class for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    parts = train_test_split(
        digits.images.astype(np.float32), digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    x_train, x_test = _normalized(x_train[:, None], x_test[:, None])
    return Images("digits", 10, x_train, y_train, x_test, y_test, flip=False, shift=1)


def load_npz(path: Path) -> Images:
    """A file of colour images: train_images and test_images uint8 [N, H, W, 3], train_labels and test_labels [N].

    Raises ValueError where the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be an .npz file that can be read: {error}") from error
    for part in ("train", "test"):
        for name in (f"{part}_images", f"{part}_labels"):
            if name not in arrays:
                raise ValueError(f"{path} must hold {name}, got {', '.join(arrays) or 'nothing'}")
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or min(images.shape[:3]) == 0:
            raise ValueError(
                f"{path}: {part}_images must be uint8 [N, height, width, 3], got {images.dtype} {list(images.shape)}"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1] or labels.min() < 0:
            raise ValueError(
                f"{path}: {part}_labels must be integers from 0 on, [{len(images)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise ValueError(f"{path}: train_images and test_images must be of one size")
    classes, highest = int(arrays["train_labels"].max()) + 1, int(arrays["test_labels"].max())
    if highest >= classes:
        raise ValueError(f"{path}: test_labels must be labels of train_labels, below {classes}, got {highest}")
    x_train, x_test = _normalized(
        *(torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2) / 255 for part in ("train", "test"))
    )
    y_train, y_test = (torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test"))
    return Images(path.stem, classes, x_train, y_train, x_test, y_test, flip=True, shift=4)


class TrainingBatches:
    """Shuffled, augmented batches of the training images, by torch's global random numbers.

    For images in memory this is several times faster than a DataLoader, which collates them one by one.
    """

    def __init__(self, data: Images, batch_size: int) -> None:
        self.data, self.batch_size = data, min(batch_size, len(data.train_labels))
        self.padded = torch.nn.functional.pad(data.train_images, [data.shift] * 4)

    def __len__(self) -> int:
        return len(self.data.train_labels) // self.batch_size  # the rest waits for the next epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data.train_labels))
        for index in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self._augmented(index), self.data.train_labels[index]

    def _augmented(self, index: Tensor) -> Tensor:
        """Crop each image at its own place, and mirror every other one."""
        height, width = self.data.train_images.shape[2:]
        top, left = torch.randint(0, 2 * self.data.shift + 1, (2, len(index), 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        if self.data.flip:
            columns = torch.where(torch.rand(len(index), 1) < 0.5, columns, columns.flip(1))
        # Indices on both sides of a slice: the result is [N, H, W, C], which is channels last once permuted.
        return self.padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(forward: Callable[[Tensor], Tensor], data: Images, batch_size: int = 250) -> float:
    """Percent of the test images that ``forward`` (images to logits) recognizes."""
    correct = 0
    for x, y in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True):
        correct += int((forward(x).argmax(1) == y).sum())
    return 100 * correct / len(data.test_labels)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to ``path`` when the block succeeds: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """The output folder of a run that can be interrupted at any moment and started again.

    Every stage has one checkpoint: the states of its objects, the epochs done and the random numbers' state, written
    after each epoch. Started again with the same options, a run continues there and gives the same numbers.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], fresh: bool) -> None:
        """Open or make the folder. Raises ValueError when it holds a run with other options."""
        self.path = path
        self._checkpoints = path / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        file = path / "options.json"
        if fresh:
            for old in [*self._checkpoints.glob("*.pt"), file]:
                old.unlink(missing_ok=True)
        if file.exists():
            before = json.loads(file.read_text())
            names = [name for name in {**before, **options} if before.get(name) != options.get(name)]
            if names:
                changes = "; ".join(f"{name} was {before.get(name)}, is {options.get(name)}" for name in names)
                raise ValueError(
                    f"{path} holds a run with other options ({changes}): "
                    "add --fresh to start over, or name another folder with --out"
                )
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(dict(options), indent=2) + "\n")

    def epochs_done(self, stage: str) -> int:
        """Number of epochs in the checkpoint of a stage: 0 without checkpoint."""
        checkpoint = self._load(stage)
        return 0 if checkpoint is None else checkpoint["epochs"]

    def restore(self, stage: str, parts: Mapping[str, Any]) -> int:
        """Load the checkpoint of a stage into ``parts`` and return the number of epochs done: 0 without checkpoint."""
        checkpoint = self._load(stage)
        if checkpoint is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
        torch.set_rng_state(checkpoint["rng"])
        return checkpoint["epochs"]

    def _load(self, stage: str) -> dict[str, Any] | None:
        file = self._checkpoints / f"{stage}.pt"
        return torch.load(file) if file.exists() else None

    def save(self, stage: str, parts: Mapping[str, Any], epochs: int) -> None:
        """Write the checkpoint of a stage."""
        states = {name: part.state_dict() for name, part in parts.items()}
        with atomic(self._checkpoints / f"{stage}.pt") as temporary:
            torch.save({"parts": states, "epochs": epochs, "rng": torch.get_rng_state()}, temporary)


# ---- measuring ------------------------------------------------------------------------------------------------------


def count_values(model: torch.nn.Module) -> tuple[int, int]:
    """Number of weights and biases, and how many of them are not zero; the integers of converted layers too."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    values = [tensor for name, tensor in tensors if name.rpartition(".")[2] in ("weight", "bias")]
    return sum(v.numel() for v in values), sum(int(v.count_nonzero()) for v in values)


def open_onnx(path: Path, threads: int = 0) -> Callable[..., Tensor]:
    """A function from inputs to logits that ONNX Runtime computes from a file; 0 threads: one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


@torch.no_grad()
def interleaved_medians(functions: Mapping[Key, Callable[[], object]], seconds: float) -> dict[Key, float]:
    """Median wall-clock milliseconds of each function.

    They take turns, so that a busy or throttled machine is the same for all of them; the first call of a turn brings
    the caches back and does not count.
    """
    times: dict[Key, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 30:
        for name, function in functions.items():
            function()
            for _ in range(3):
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


# ---- report ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: a model as it is after a stage, in one runtime."""

    stage: str
    runtime: str
    accuracy: float  #: percent of the test images
    parameters: int
    nonzero: int
    file: str | None = None  #: the file that holds it
    bytes: int | None = None  #: size of that file
    compressed_bytes: int | None = None  #: its size after zlib
    torch_ms: float | None = None  #: latency in PyTorch
    onnx_ms: float | None = None  #: latency in ONNX Runtime

    def with_file(self, path: Path) -> Row:
        """Note the size of the file that holds the model."""
        content = path.read_bytes()
        self.file, self.bytes, self.compressed_bytes = path.name, len(content), len(zlib.compress(content, 9))
        return self


_HEAD = ("stage", "runs in", "accuracy %", "parameters", "non-zero", "file KiB", "zlib KiB", "torch ms", "ORT ms")


def format_table(rows: list[Row]) -> str:
    """The rows as Markdown that also reads well in a terminal."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def kib(value: int | None) -> str:
        return "-" if value is None else f"{value / 1024:.1f}"

    cells = [_HEAD]
    for row in rows:
        counts = (f"{row.parameters:,}", f"{row.nonzero:,}")
        sizes = (kib(row.bytes), kib(row.compressed_bytes))
        times = (number(row.torch_ms, ".3f"), number(row.onnx_ms, ".3f"))
        cells.append((row.stage, row.runtime, f"{row.accuracy:.2f}", *counts, *sizes, *times))
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
    cells.insert(1, tuple("-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)))  # names left
    padded = [
        [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def environment() -> dict[str, str]:
    """Versions and machine, for the report."""
    return {
        "rarefy": rf.__version__,
        "torch": str(torch.__version__),
        "onnxruntime": metadata.version("onnxruntime"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }


def write_report(
    folder: Path, title: str, rows: list[Row], findings: list[str], notes: list[str], facts: dict[str, Any]
) -> None:
    """Write report.md and report.json."""
    about = "\n".join(f"- {name}: {value}" for name, value in {**facts, **environment()}.items())
    lines = [f"# {title}", format_table(rows), *findings, "![accuracy against size and latency](report.png)"]
    text = "\n\n".join([*lines, "## How to read it", *notes, "## Run", about])
    with atomic(folder / "report.md") as temporary:
        temporary.write_text(text + "\n")
    content = {"stages": [asdict(row) for row in rows], **facts, "environment": environment()}
    with atomic(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_plot(path: Path, rows: list[Row], title: str) -> None:
    """Accuracy against file size and against latency, one point per row and runtime that has them."""
    import matplotlib

    matplotlib.use("Agg")  # a file is written, no window is opened
    import matplotlib.pyplot as plt

    figure, (sizes, times) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for index, row in enumerate(rows):
        style = {"color": f"C{index}", "marker": "osD^vP"[index], "markersize": 11, "linestyle": "", "alpha": 0.85}
        if row.bytes is not None:
            sizes.plot(row.bytes / 1024, row.accuracy, label=f"{row.stage} ({row.runtime})", **style)
        if row.onnx_ms is not None:
            times.plot(row.onnx_ms, row.accuracy, **style)
        if row.torch_ms is not None:
            times.plot(row.torch_ms, row.accuracy, fillstyle="none", markeredgewidth=1.8, **style)
    low, high = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
    sizes.set_ylim(low - 1, high + 1)  # wide enough that one image more or less looks like what it is
    sizes.set_ylabel("test accuracy, %")
    sizes.set_xlabel("file size, KiB")
    times.set_xlabel("latency of one image, one thread, ms\nfilled: ONNX Runtime, hollow: PyTorch")
    for axis in (sizes, times):
        axis.set_xscale("log")
        axis.grid(True, which="both", alpha=0.25)
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    figure.legend(*sizes.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
