"""Compress an image classifier from start to end: teacher, distillation, pruning, quantization, ONNX.

    python examples/python/compress_cnn.py                          # scikit-learn's digits, minutes on two cores
    python examples/python/compress_cnn.py --data images.npz        # 32x32 colour images
    python examples/python/compress_cnn.py --quick                  # under a minute, to see that it works

A large ResNet is trained and teaches a small one. The small one is pruned while it trains, trained on with 8-bit
weights and activations, converted to integer kernels in PyTorch, and written as an ONNX file that ONNX Runtime runs.
One table shows what each stage costs and gains; report.md, report.json and report.png keep it. An interrupted run
continues where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _common import (
    Images,
    Row,
    RunFolder,
    TrainingBatches,
    accuracy,
    atomic,
    count_values,
    format_table,
    interleaved_medians,
    load_digits,
    load_npz,
    open_onnx,
    write_plot,
    write_report,
)
from torch import Tensor, nn
from tqdm import tqdm

import rarefy as rf

# ---- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and a way around them. ``rarefy.nn.Add`` is an addition that can be quantized."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add = rf.nn.Add()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.add(self.bn2(self.conv2(y)), self.shortcut(x)))


class ResNet(nn.Module):
    """A ResNet for small images: a stem, and three stages of ``blocks`` blocks with width, 2 and 4 times the width."""

    def __init__(self, channels: int, classes: int, width: int, blocks: int) -> None:
        super().__init__()
        stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        stages, inputs = [], width
        for stage in range(3):
            for block in range(blocks):
                outputs, stride = width << stage, 2 if stage > 0 and block == 0 else 1
                stages.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What differs between data sets: widths and blocks of the networks, and how long to train."""

    teacher: tuple[int, int]
    student: tuple[int, int]
    batch_size: int
    epochs: tuple[int, int, int, int]  #: teacher, distill, prune, QAT


DIGITS = Settings(teacher=(48, 2), student=(32, 1), batch_size=64, epochs=(15, 15, 12, 5))
COLOUR = Settings(teacher=(24, 2), student=(16, 1), batch_size=128, epochs=(8, 7, 6, 3))
QUICK = (3, 3, 3, 2)
LEARNING_RATES = (0.1, 0.1, 0.05, 0.01)  # one per stage, the peak of a one-cycle schedule


# ---- training -------------------------------------------------------------------------------------------------------


def one_cycle(model: nn.Module, rate: float, steps: int) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    """SGD whose learning rate rises to ``rate`` and falls to zero over all steps of a stage."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)


def train(run: RunFolder, stage: str, model: nn.Module, batches: TrainingBatches, epochs: int, rate: float) -> None:
    """Train on the labels."""
    optimizer, schedule = one_cycle(model, rate, epochs * len(batches))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    model.train()
    for epoch in range(run.restore(stage, parts), epochs):
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", unit="batch")
        for images, labels in bar:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        run.save(stage, parts, epoch + 1)


def distill(
    run: RunFolder,
    stage: str,
    student: nn.Module,
    teacher: nn.Module,
    batches: TrainingBatches,
    epochs: int,
    rate: float,
    pruner: rf.pruning.MagnitudePruner | None = None,
) -> None:
    """Train on the teacher's logits and the labels, and prune after each step where there is a pruner."""
    optimizer, schedule = one_cycle(student, rate, epochs * len(batches))

    def on_step(_step: int, _loss: float) -> None:
        if pruner is not None:
            pruner.step()
        schedule.step()

    def on_epoch_end(epoch: int, _metrics: rf.distillation.EpochMetrics) -> None:
        run.save(stage, parts, epoch)

    trainer = rf.distillation.DistillationTrainer(
        student,
        teacher,
        optimizer,
        rf.distillation.DistillationLoss(temperature=4.0, alpha=0.7),
        callbacks=rf.distillation.Callbacks(on_step, on_epoch_end),
    )
    parts = {"model": student, "optimizer": optimizer, "schedule": schedule, "trainer": trainer}
    run.restore(stage, parts)  # the masks of a pruner are buffers of the student
    trainer.fit(batches, epochs)


# ---- the job --------------------------------------------------------------------------------------------------------


def compress(data: Images, run: RunFolder, settings: Settings, seed: int, sparsity: float) -> dict[str, nn.Module]:
    """Train everything, and return the model of each stage."""
    example = data.test_images[:1]
    batches = TrainingBatches(data, settings.batch_size)
    stages = zip(settings.epochs, LEARNING_RATES, strict=True)
    models: dict[str, nn.Module] = {}

    def begin(stage: str) -> tuple[int, float]:
        epochs, rate = next(stages)
        tqdm.write(f"{stage}: {epochs} epochs, {run.epochs_done(stage)} of them done")
        torch.manual_seed(seed + len(models))
        return epochs, rate

    def finish(stage: str, model: nn.Module) -> None:
        models[stage] = model.eval()
        tqdm.write(f"{stage}: {accuracy(model, data):.2f} % of the test images are recognized")

    def network(width: int, blocks: int) -> nn.Module:
        model = ResNet(data.train_images.shape[1], data.classes, width, blocks)
        return model.to(memory_format=torch.channels_last)

    # 1. A teacher.
    schedule = begin("teacher")
    teacher = network(*settings.teacher)
    train(run, "teacher", teacher, batches, *schedule)
    finish("teacher", teacher)

    # 2. A small student that learns from it.
    schedule = begin("distilled")
    student = network(*settings.student)
    distill(run, "distilled", student, teacher, batches, *schedule)
    finish("distilled", student)

    # 3. Pruning while training goes on: the smallest weights go, more and more of them, until two thirds of the steps
    #    are done; the others make up for them in the rest.
    epochs, rate = begin("pruned")
    end = max(1, epochs * len(batches) * 2 // 3)
    pruning = rf.pruning.PolynomialSchedule(begin=0, end=end, every=max(1, len(batches) // 5))
    student = copy.deepcopy(student)
    pruner = rf.pruning.MagnitudePruner(student, sparsity, schedule=pruning)
    distill(run, "pruned", student, teacher, batches, epochs, rate, pruner)
    finish("pruned", student)

    # 4. Training with 8-bit weights and activations. The copy has the masks, its pruner holds them: zero stays zero.
    schedule = begin("qat")
    student = rf.quantization.prepare_qat(student, rf.quantization.QConfig.int8(), example)
    pruner = rf.pruning.MagnitudePruner(student, sparsity, schedule=pruning)
    distill(run, "qat", student, teacher, batches, *schedule, pruner)
    pruner.finalize()
    finish("qat", student)

    # 5. Integers: what PyTorch executes from here on.
    models["int8"] = rf.quantization.convert(student)
    return models


def export(data: Images, folder: Path, models: Mapping[str, nn.Module]) -> dict[str, Path]:
    """Write the ONNX files: the float ones for comparison, and the one in integers that QAT is for."""
    files = {"teacher": "teacher", "distilled": "student", "pruned": "student_pruned", "qat": "student_int8"}
    paths = {}
    for stage, name in tqdm(files.items(), desc="export", unit="file"):
        paths[stage] = folder / f"{name}.onnx"
        report = rf.export.to_onnx(models[stage], data.test_images[:2], paths[stage])
    tqdm.write(repr(report))
    return paths


def measure(
    data: Images, folder: Path, models: Mapping[str, nn.Module], files: Mapping[str, Path], seconds: float
) -> list[Row]:
    """Fill the table."""
    with atomic(folder / "student_int8.pt") as temporary:
        torch.save(models["int8"].state_dict(), temporary)
    image = data.test_images[:1]
    torch_runs = {stage: partial(model, image) for stage, model in models.items() if stage != "qat"}
    onnx_runs = {stage: partial(open_onnx(path, threads=1), image.contiguous()) for stage, path in files.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    named = {**{("torch", s): f for s, f in torch_runs.items()}, **{("onnx", s): f for s, f in onnx_runs.items()}}
    latency = interleaved_medians(named, seconds)
    torch.set_num_threads(threads)

    rows = []
    for stage, title in (("teacher", "teacher"), ("distilled", "student, distilled"), ("pruned", "student, pruned")):
        row = Row(title, "FP32", accuracy(models[stage], data), *count_values(models[stage])).with_file(files[stage])
        row.torch_ms, row.onnx_ms = latency["torch", stage], latency["onnx", stage]
        rows.append(row)
    rows.append(Row("student, pruned, QAT", "training", accuracy(models["qat"], data), *count_values(models["qat"])))
    counts = count_values(models["int8"])
    row = Row("student, pruned, int8", "PyTorch", accuracy(models["int8"], data), *counts)
    row.torch_ms = latency["torch", "int8"]
    rows.append(row.with_file(folder / "student_int8.pt"))
    row = Row("student, pruned, int8", "ONNX Runtime", accuracy(open_onnx(files["qat"]), data), *counts)
    row.onnx_ms = latency["onnx", "qat"]
    rows.append(row.with_file(files["qat"]))
    return rows


NOTES = (
    "- *accuracy*: of the test images. The FP32 and QAT rows are evaluated in PyTorch.",
    "- *parameters*, *non-zero*: weights and biases. Integer layers have no batch normalization: it is folded in.",
    "- *file*: the ONNX file; for PyTorch's int8 row the saved state dict. Pruned weights are stored as zeros, which "
    "take the room of other numbers; *zlib* is the file compressed, where they do not.",
    "- *torch ms*, *ORT ms*: one image on one thread, median of calls that take turns with all the others. The kernels "
    "are dense and compute with zeros too: pruning alone does not make them faster. PyTorch's int8 operators prepare "
    "themselves at each call, some 0.1 ms per layer: they gain with larger layers or batches.",
    "- *training*: the QAT model as it trains, forward in integers; nothing is deployed that way.",
)


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Compress an image classifier, from a teacher to an int8 ONNX file.")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="colour images (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("out/compress_cnn"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sparsity", type=float, default=0.75, help="part of the weights pruned (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, nargs=4, metavar=("TEACHER", "DISTILL", "PRUNE", "QAT"))
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that everything works")
    parser.add_argument("--fresh", action="store_true", help="start over instead of continuing an interrupted run")
    arguments = parser.parse_args()
    settings = DIGITS if arguments.data is None else COLOUR
    epochs = tuple(arguments.epochs or (QUICK if arguments.quick else settings.epochs))
    if min(epochs) < 1:
        parser.error(f"argument --epochs: must be positive, got {' '.join(map(str, epochs))}")
    if not 0 <= arguments.sparsity < 1:
        parser.error(f"argument --sparsity: must be in [0, 1), got {arguments.sparsity}")
    settings = dataclasses.replace(settings, epochs=epochs)
    options = {
        "data": str(arguments.data or "digits"),
        "seed": arguments.seed,
        "sparsity": arguments.sparsity,
        "epochs": list(epochs),
    }
    try:
        data = load_npz(arguments.data) if arguments.data else load_digits(arguments.seed)
        run = RunFolder(arguments.out, options, arguments.fresh)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    print(f"{data.name}: {len(data.train_labels)} images to train, {len(data.test_labels)} to test")
    models = compress(data, run, settings, arguments.seed, arguments.sparsity)
    files = export(data, run.path, models)
    rows = measure(data, run.path, models, files, seconds=2 if arguments.quick else 10)

    teacher, pruned, qat, int8 = rows[0], rows[2], rows[3], rows[5]
    summary = {
        "int8_minus_fp32_points": int8.accuracy - pruned.accuracy,
        "onnx_minus_qat_points": int8.accuracy - qat.accuracy,
        "size_ratio_to_teacher": int8.bytes / teacher.bytes,
        "latency_ratio_to_teacher": int8.onnx_ms / teacher.onnx_ms,
    }
    finding = (
        f"The int8 file recognizes {int8.accuracy:.2f} % in ONNX Runtime: {summary['int8_minus_fp32_points']:+.2f} "
        f"points from the pruned student in FP32, {summary['onnx_minus_qat_points']:+.2f} from the QAT model. Its size "
        f"is {summary['size_ratio_to_teacher']:.3f} of the teacher's, "
        f"its latency {summary['latency_ratio_to_teacher']:.2f}."
    )
    title = f"Compression of a ResNet on {data.name}"
    write_plot(run.path / "report.png", rows, title)
    write_report(run.path, title, rows, [finding], ["\n".join(NOTES)], {**options, "summary": summary})
    print(f"\n{format_table(rows)}\n\n{finding}\nReport: {run.path / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues where this one stopped")
