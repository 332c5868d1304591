"""What accuracy.py --sparsity trains: ResNet-20 with nine of ten weights at zero, and in 2:4.

One dense model of a seed is pruned in each way, and each is fine-tuned with the same steps, batches and learning rates:

- at once: the smallest weights over all layers go before the first step;
- AGP: they go along a cubic (Zhu & Gupta, 2017, arXiv:1710.01878) over the first part of the steps;
- RigL: AGP's number of zeros at every step, while weights with large gradients come back for kept ones that are small (Evci et
  al., 2020, arXiv:1911.11134), so that one step costs what one of AGP costs;
- 2:4: two of each four weights along the input channels go before the first step, but in the first and the last layer; it is
  tuned for half of the epochs.

"dense continued" is the dense model after the same steps, so that the extra training is not counted as a merit of pruning.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from accuracy_training import Result, Task, accuracy, float_model, steps_of_epoch, train
from torch import nn

import rarefy as rf

DENSE, CONTINUED, AT_ONCE, AGP, RIGL, TWO_OF_FOUR = (
    "FP32",
    "dense continued",
    "90 % at once",
    "90 % AGP",
    "90 % RigL",
    "2:4",
)
SPARSITY = 0.9
LOST_GOALS = {AGP: 1.0, TWO_OF_FOUR: 0.5}  # points below the dense model
GRADUAL = 0.4  # part of the steps in which weights go
EXCHANGE = 0.4  # part of the steps in which RigL exchanges weights: AGP's, so that both recover as long
EVERY, EXCHANGE_EVERY, FRACTION = 10, 50, 0.1
TWO_OF_FOUR_SHARE = 0.5  # of the epochs: it has recovered by then


def task_of(task: Task, quick: bool) -> Task:
    """The images, with the lengths of training that suit this benchmark."""
    if quick:
        return task
    # An epoch of the digits is 9 steps, one of the CIFAR-10 subset 156. After 4 epochs there AGP was no better than at once.
    epochs, prune_epochs = (40, 30) if task.split.name == "digits" else (8, 8)
    return replace(task, epochs=epochs, prune_epochs=prune_epochs, prune_rate=0.1)


def pruner_of(kind: str, model: nn.Module, steps: int) -> rf.pruning.MagnitudePruner:
    end = max(2, round(GRADUAL * steps))
    gradual = rf.pruning.PolynomialSchedule(begin=1, end=end, every=min(EVERY, end - 1))
    if kind == AT_ONCE:
        return rf.pruning.MagnitudePruner(model, SPARSITY)
    if kind == AGP:
        return rf.pruning.MagnitudePruner(model, SPARSITY, schedule=gradual)
    if kind == RIGL:
        last = max(2, round(EXCHANGE * steps))
        regrowth = rf.pruning.RigL(begin=1, end=last, every=min(EXCHANGE_EVERY, last - 1), fraction=FRACTION)
        return rf.pruning.MagnitudePruner(model, SPARSITY, schedule=gradual, regrowth=regrowth)
    return rf.pruning.MagnitudePruner(model, pattern="2:4", exclude=["conv1", "fc"])


def results(task: Task, seed: int, cache: Path | None, with_continued: bool) -> Iterator[Result]:
    """Each kind of sparse model of a seed."""
    start = time.perf_counter()
    model = float_model(task, seed, cache, autocast=False)
    yield Result(DENSE, accuracy(model, task.split), time.perf_counter() - start)
    steps = task.prune_epochs * steps_of_epoch(task)
    for kind in ([CONTINUED] if with_continued else []) + [AT_ONCE, AGP, RIGL, TWO_OF_FOUR]:
        start = time.perf_counter()
        sparse = copy.deepcopy(model)
        torch.manual_seed(1000 + seed)  # the same batches for every kind
        pruner = None if kind == CONTINUED else pruner_of(kind, sparse, steps)
        if kind in (AT_ONCE, TWO_OF_FOUR):
            pruner.step()
        attach = None if pruner is None else pruner.attach
        epochs = max(1, round(task.prune_epochs * (TWO_OF_FOUR_SHARE if kind == TWO_OF_FOUR else 1)))
        train(sparse, task, task.prune_rate, epochs, warmup=0.1, autocast=False, attach=attach)
        more: dict[str, object] = {}
        if pruner is not None:
            pruner.finalize()
            more = {"sparsity": round(pruner.sparsity, 4)}
            more |= {"file_to_dense": round(rf.pruning.sparse_size(sparse).ratio, 4)}
        yield Result(kind, accuracy(sparse, task.split), time.perf_counter() - start, more)


def summary(name: str, results: dict[str, list[float]], quick: bool) -> Iterator[dict[str, object]]:
    """Means over the seeds beside the goals."""
    mean = {kind: fmean(values) for kind, values in results.items()}
    for kind, values in results.items():
        record: dict[str, object] = {"benchmark": "accuracy", "data": name, "kind": kind, "seeds": len(values)}
        record |= {"mean": round(mean[kind], 3), "each": [round(value, 3) for value in values]}
        record |= {"points_lost": round(mean[DENSE] - mean[kind], 3)}
        goal = LOST_GOALS.get(kind)
        if goal is not None:
            record |= {"goal": goal} | ({} if quick else {"reached": mean[DENSE] - mean[kind] <= goal})
        yield record
    for better, worse, strictly in ((AGP, AT_ONCE, True), (RIGL, AGP, False)):
        points = [a - b for a, b in zip(results[better], results[worse], strict=True)]
        record = {"benchmark": "accuracy", "data": name, "kind": f"{better} - {worse}", "seeds": len(points)}
        record |= {"points": round(fmean(points), 3), "each": [round(value, 3) for value in points]}
        if not quick:
            record |= {"goal": "above 0" if strictly else "at least 0"}
            record |= {"reached": fmean(points) > 0 or (not strictly and fmean(points) == 0)}
        yield record
