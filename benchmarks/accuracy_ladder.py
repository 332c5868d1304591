"""What accuracy.py --ladder quantizes: a small network of the digits down to 2 bits, or ResNet-20 on CIFAR-10 to 4.

Every row begins at the FP32 model of its seed and is evaluated after `convert`, that is in integers. Weights have a scale per
output channel, activations one per tensor.

- W8A8 PTQ: calibrated, not trained;
- W4A4, W3A3, W2A2 rounded: the same with fewer bits, for comparison: what the training has to make up for;
- W4A4, W3A3, W2A2 LSQ: the scales of weights and activations are trained with the network (Esser et al., 2020,
  arXiv:1902.08153), beginning with the first batch.

As in that paper and most others, the first and the last layer have 8 bits in every row, trained scales in the LSQ rows.
"FP32 continued" is the FP32 model after the steps of the LSQ rows, so that the extra training is not counted as a merit of LSQ.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from accuracy_training import Result, Task, accuracy, float_model, train
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import LSQ, PerChannel, QConfig, Scheme

FP32, CONTINUED, PTQ = "FP32", "FP32 continued", "W8A8 PTQ"
# Points that a row may lose: the digits down to two bits, CIFAR-10 to four.
LOST_GOALS = {PTQ: 0.3, "W4A4 LSQ": 1.5, "W3A3 LSQ": 1.0, "W2A2 LSQ": 2.0}
CALIBRATION = 512  # images


class DigitsNet(nn.Module):
    """Three convolutions and a linear layer for images of 16 x 16: 25,000 parameters."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(4 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


def optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with weight decay for the network, and without for the scales."""
    groups = rf.quantization.parameter_groups(model)
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def task_of(task: Task, quick: bool) -> Task:
    """The images, with the network and the lengths of training that suit this benchmark."""
    split = task.split
    if split.name != "digits":
        return replace(task, optimizer=optimizer, fine_rate=0.01, fine_epochs=1 if quick else 2)
    return replace(
        task,
        build=lambda: DigitsNet(split.classes).to(memory_format=torch.channels_last),
        optimizer=optimizer,
        rate=0.05,
        epochs=1 if quick else 40,
        fine_rate=0.02,
        fine_epochs=1 if quick else 40,
    )


def config_of(bits: int, learned: bool, ends: tuple[str, ...]) -> QConfig:
    """The grids of a row, with 8 bits for the layers at the ends."""

    def of_width(width: int) -> QConfig:
        return QConfig(
            weight=Scheme(bits=width, symmetric=True, narrow_range=True, granularity=PerChannel(0)),
            activation=Scheme(bits=width, symmetric=False),
            observer=LSQ() if learned else None,
            weight_observer=LSQ() if learned else None,
        )

    return replace(of_width(bits), overrides=dict.fromkeys(ends, of_width(8)))


def results(task: Task, seed: int, cache: Path | None, with_continued: bool) -> Iterator[Result]:
    """Each row of a seed."""
    split = task.split
    ends = ("features.0", "fc") if split.name == "digits" else ("conv1", "fc")
    rows = (3, 2) if split.name == "digits" else (4,)
    start = time.perf_counter()
    model = float_model(task, seed, cache, autocast=False)
    yield Result(FP32, accuracy(model, split), time.perf_counter() - start)
    example = split.train_x[:2]
    model.eval()

    if with_continued:
        start = time.perf_counter()
        torch.manual_seed(1000 + seed)  # the same batches for every row
        continued = copy.deepcopy(model)
        train(continued, task, task.fine_rate, task.fine_epochs, warmup=0.1, autocast=False)
        yield Result(CONTINUED, accuracy(continued, split), time.perf_counter() - start)

    for kind, bits in [(PTQ, 8), *((f"W{bits}A{bits} rounded", bits) for bits in rows)]:
        start = time.perf_counter()
        prepared = rf.quantization.prepare(model, config_of(bits, False, ends), example)
        rf.quantization.calibrate(prepared, split.train_x[:CALIBRATION].split(128))
        yield Result(kind, accuracy(rf.quantization.convert(prepared), split), time.perf_counter() - start)

    for bits in rows:
        start = time.perf_counter()
        torch.manual_seed(1000 + seed)
        prepared = rf.quantization.prepare_qat(model, config_of(bits, True, ends), example)
        train(prepared, task, task.fine_rate, task.fine_epochs, warmup=0.1, autocast=False)
        percent = accuracy(rf.quantization.convert(prepared), split)
        yield Result(f"W{bits}A{bits} LSQ", percent, time.perf_counter() - start)


def summary(name: str, results: dict[str, list[float]], quick: bool) -> Iterator[dict[str, object]]:
    """Means over the seeds beside the goals."""
    mean = {kind: fmean(values) for kind, values in results.items()}
    for kind, values in results.items():
        lost = mean[FP32] - mean[kind]
        record: dict[str, object] = {"benchmark": "accuracy", "data": name, "kind": kind, "seeds": len(values)}
        record |= {"mean": round(mean[kind], 3), "each": [round(value, 3) for value in values]}
        record |= {"points_lost": round(lost, 3)}
        goal = LOST_GOALS.get(kind)
        if goal is not None:
            record |= {"goal": goal} | ({} if quick else {"reached": lost <= goal})
        yield record
