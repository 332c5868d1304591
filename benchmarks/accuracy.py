"""Accuracy that quantization to int8 keeps, after training (PTQ) and with training (QAT); that pruning keeps; or that
distillation gains.

Images: ResNet-20 on the CIFAR-10 subset, or on scikit-learn's digits. Sentences: a small Transformer on SST-2, or on
docstrings of Python's standard library. PTQ and QAT begin at the same FP32 model and are evaluated after `convert`, that
is in integers. QAT continues for a few epochs at a low learning rate; "FP32 continued" does the same without
quantization, so that the extra epochs are not counted as a merit of QAT.

With --structured: half of the multiply-accumulates of ResNet-20 removed as channels, by the default importance, by L1 with
the same share of every layer ("uniform L1"), and at random, each fine-tuned with the same schedule and the same batches;
and a model that is pruned to a time in milliseconds, asked for beside measured.

With --sparsity: ResNet-20 with nine of ten weights at zero (at once, gradually, with RigL), and in 2:4; see
accuracy_sparsity.py.

With --ladder: 8 bits down to 2, rounded and with learned scales; see accuracy_ladder.py.

With --distillation: a small student trained on the labels, and the same student (the same first weights, batches and
schedule) distilled from a ResNet-20, or from the Transformer of the sentences, which is more than twice as large. The teacher
looks at each image and at its mirror image once; its logits are kept.

    python benchmarks/accuracy.py [--data DIR] [--task images|sentences|all]
                                  [--structured | --distillation | --sparsity | --ladder]
                                  [--seeds 0 1 2] [--cache DIR] [--threads 2] [--continued] [--quick] [--json]

Three seeds of both tasks with --data take about 25 minutes of processor time (images 400 s and sentences 80 s a seed), with
--sparsity 36 minutes a seed, with --ladder 15; the FP32 models, 8 minutes each, are shared with --cache.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import accuracy_ladder
import accuracy_sparsity
import datasets
import models
import torch
import torch.nn.functional as F
from accuracy_training import BATCH, Result, Task, accuracy, adamw, float_model, sgd, shift_and_flip, train
from timing import interleaved
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import QConfig

PRUNED = "half the MACs"  # the row of pruning that has a goal, and those that it is compared with
UNIFORM = "half the MACs, uniform L1"
RANDOM = "half the MACs, random"
PRUNED_GOAL = 1.5  # points that it may lose
LATENCY_SHARE = 0.6  # of the time before, asked for in milliseconds
LATENCY_BATCH = 32
ALONE = "student alone"
DISTILLED = "student distilled"
GAINED_GOAL, KEPT_GOAL = 1.0, 97.0  # points above the student alone (images), per cent of the teacher's (sentences)
STUDENT_WIDTH = 8
TEACHER_SEED = 100  # one teacher for all seeds


@dataclass(frozen=True)
class Teaching:
    """How a student is distilled, and trained alone."""

    build: Callable[[], nn.Module]
    teacher_epochs: int
    epochs: int  # over the images and their mirror images, or over the sentences
    temperature: float
    alpha: float


def make_task(name: str, data: Path | None, quick: bool) -> Task:
    if name == "images":
        split = datasets.images(data)
        if quick:
            split = split.first(512, 256)
        channels = split.train_x.shape[1]
        augment = shift_and_flip if data is not None else (lambda x: x)
        return Task(
            lambda: models.ResNet20(split.classes, channels).to(memory_format=torch.channels_last), split, augment, sgd,
            0.2, 0.005, 1 if quick else 8, 1, {"PTQ": 0.5, "QAT": 0.1, PRUNED: PRUNED_GOAL},
            0.1, 1 if quick else 2,
        )  # fmt: skip
    split, tokenizer = datasets.sentences(data)
    if quick:
        split = split.first(512, 256)
    return Task(
        lambda: models.SentenceClassifier(tokenizer.vocabulary, datasets.LENGTH, split.classes), split, lambda x: x, adamw,
        1e-3, 1e-4, 1 if quick else 5, 1, {"PTQ": 0.5, "QAT": 0.5},
    )  # fmt: skip


def make_teaching(task: Task, quick: bool) -> Teaching:
    """The student that learns a task: a ResNet-8, or a Transformer of half the width."""
    split = task.split
    if split.train_x.is_floating_point():
        channels = split.train_x.shape[1]
        return Teaching(
            lambda: models.ResNet20(split.classes, channels, STUDENT_WIDTH, blocks=1).to(memory_format=torch.channels_last),
            1 if quick else 12, 1 if quick else 4, 4.0, 0.9,
        )  # fmt: skip
    words = task.build().words.num_embeddings
    return Teaching(
        lambda: models.SentenceClassifier(words, datasets.LENGTH, split.classes, width=64),
        1 if quick else 5, 1 if quick else 5, 2.0, 0.7,
    )  # fmt: skip


def quantized(task: Task, seed: int, cache: Path | None, with_continued: bool) -> Iterator[Result]:
    """Each kind of quantized model."""
    split, config = task.split, QConfig.int8()
    example = split.train_x[:2]

    start = time.perf_counter()
    model = float_model(task, seed, cache)
    yield Result("FP32", accuracy(model, split), time.perf_counter() - start)

    if with_continued:
        start = time.perf_counter()
        torch.manual_seed(1000 + seed)
        continued = copy.deepcopy(model)
        train(continued, task, task.fine_rate, task.fine_epochs, warmup=0, autocast=True)
        yield Result("FP32 continued", accuracy(continued, split), time.perf_counter() - start)

    start = time.perf_counter()
    prepared = rf.quantization.prepare(model, config, example)
    rf.quantization.calibrate(prepared, split.train_x[: 8 * BATCH].split(BATCH))
    yield Result("PTQ", accuracy(rf.quantization.convert(prepared), split), time.perf_counter() - start)

    start = time.perf_counter()
    torch.manual_seed(1000 + seed)
    prepared = rf.quantization.prepare_qat(model, config, example)
    train(prepared, task, task.fine_rate, task.fine_epochs, warmup=0, autocast=False)
    yield Result("QAT", accuracy(rf.quantization.convert(prepared), split), time.perf_counter() - start)


def prune_and_tune(model: nn.Module, task: Task, seed: int, **options: object) -> tuple[nn.Module, dict[str, object]]:
    """A copy with half of the multiply-accumulates, fine-tuned; and its accuracy before that."""
    pruned = copy.deepcopy(model)
    before = rf.pruning.StructuredPruner(pruned, task.split.train_x[:2], macs=0.5, **options).prune()
    at_once = accuracy(pruned, task.split)
    torch.manual_seed(1000 + seed)  # the same batches for every kind
    train(pruned, task, task.prune_rate, task.prune_epochs, warmup=0.1, autocast=True)
    return pruned, {"before_fine_tuning": round(at_once, 3), "macs_removed": round(before.achieved, 4)}


def prune_to_latency(model: nn.Module, task: Task) -> tuple[nn.Module, dict[str, object]]:
    """A copy that is asked to take a share of the time, and what it takes when both are timed in turn."""
    x = task.split.test_x[:LATENCY_BATCH]
    pruned = copy.deepcopy(model).eval()
    whole = model.eval()
    no_grad = torch.no_grad()

    def forward(net: nn.Module) -> None:
        with no_grad:
            net(x)

    before = interleaved({"before": lambda: forward(whole)}, 31, 5)["before"]
    rf.pruning.StructuredPruner(pruned, x, latency_ms=LATENCY_SHARE * before * 1e3).prune()
    seconds = interleaved({"before": lambda: forward(whole), "after": lambda: forward(pruned)}, 31, 5)
    share = seconds["after"] / seconds["before"]
    return pruned, {
        "asked_milliseconds": round(LATENCY_SHARE * before * 1e3, 3),
        "milliseconds": round(seconds["after"] * 1e3, 3),
        "milliseconds_before": round(seconds["before"] * 1e3, 3),
        "measured_to_asked": round(share / LATENCY_SHARE, 3),
        "within_10_percent": abs(share / LATENCY_SHARE - 1) <= 0.1,
    }


def structured(task: Task, seed: int, cache: Path | None, with_continued: bool) -> Iterator[Result]:
    """Each kind of pruned model."""
    start = time.perf_counter()
    model = float_model(task, seed, cache)
    yield Result("FP32", accuracy(model, task.split), time.perf_counter() - start)

    if with_continued:
        start = time.perf_counter()
        torch.manual_seed(1000 + seed)
        continued = copy.deepcopy(model)
        train(continued, task, task.prune_rate, task.prune_epochs, warmup=0.1, autocast=True)
        yield Result("FP32 continued", accuracy(continued, task.split), time.perf_counter() - start)

    kinds: dict[str, dict[str, object]] = {
        PRUNED: {},
        UNIFORM: {"importance": "l1", "scope": "local"},
        RANDOM: {"importance": rf.pruning.importance.Random(seed)},
    }
    for kind, options in kinds.items():
        start = time.perf_counter()
        pruned, more = prune_and_tune(model, task, seed, **options)
        yield Result(kind, accuracy(pruned, task.split), time.perf_counter() - start, more)

    start = time.perf_counter()
    pruned, more = prune_to_latency(model, task)
    yield Result("latency, not fine-tuned", accuracy(pruned, task.split), time.perf_counter() - start, more)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What a teacher answers."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(part) for part in x.split(250)]).float()


def distillation(task: Task, seed: int, cache: Path | None, quick: bool) -> Iterator[Result]:
    """The teacher, and the student without and with it."""
    teaching, split = make_teaching(task, quick), task.split
    start = time.perf_counter()
    teacher = float_model(replace(task, epochs=teaching.teacher_epochs), TEACHER_SEED, cache)
    yield Result("teacher", accuracy(teacher, split), time.perf_counter() - start, {"parameters": count(teacher)})

    x, labels = split.train_x, split.train_y
    if task.augment is shift_and_flip:
        x, labels = torch.cat([x, x.flip(3)]).contiguous(memory_format=torch.channels_last), labels.repeat(2)
    answers = logits(teacher, x)
    both = replace(split, train_x=x, train_y=torch.arange(len(x)))  # a label is the number of its sample
    task = replace(task, split=both, augment=lambda x: x)
    criterion = rf.distillation.DistillationLoss(temperature=teaching.temperature, alpha=teaching.alpha)
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        ALONE: lambda y_hat, index: F.cross_entropy(y_hat, labels[index]),
        DISTILLED: lambda y_hat, index: criterion(y_hat, answers[index], labels[index]),
    }
    for kind, loss in kinds.items():
        start = time.perf_counter()
        torch.manual_seed(seed)
        student = teaching.build()
        train(student, task, task.rate, teaching.epochs, warmup=0.2, autocast=True, loss=loss)
        yield Result(kind, accuracy(student, split), time.perf_counter() - start, {"parameters": count(student)})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def distillation_summary(name: str, results: dict[str, list[float]], quick: bool) -> dict[str, object]:
    """What distillation gains over the student alone and keeps of the teacher; with goals where they are asked for."""
    gained = [a - b for a, b in zip(results[DISTILLED], results[ALONE], strict=True)]
    kept = [100 * a / b for a, b in zip(results[DISTILLED], results["teacher"], strict=True)]
    record: dict[str, object] = {"benchmark": "accuracy", "data": name, "seeds": len(gained)}
    record |= {"points_gained": round(statistics.fmean(gained), 3), "points_gained_each": [round(x, 3) for x in gained]}
    record |= {"percent_kept": round(statistics.fmean(kept), 3), "percent_kept_each": [round(x, 3) for x in kept]}
    if name == "CIFAR-10 subset":
        record |= {"points_gained_goal": GAINED_GOAL, "reached": record["points_gained"] >= GAINED_GOAL}
    elif name == "sentences":
        record |= {"percent_kept_goal": KEPT_GOAL, "reached": record["percent_kept"] >= KEPT_GOAL}
    if quick:
        record.pop("reached", None)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10_subset.npz and sst2/*.tsv")
    parser.add_argument("--task", choices=["images", "sentences", "all"], default="all")
    parser.add_argument("--structured", action="store_true", help="structured pruning instead of quantization; images")
    parser.add_argument("--distillation", action="store_true", help="distillation instead of quantization")
    parser.add_argument("--sparsity", action="store_true", help="masks instead of quantization; images")
    parser.add_argument("--ladder", action="store_true", help="8 bits down to 2, learned scales; images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, help="folder that keeps the FP32 models, so that a rerun only quantizes")
    parser.add_argument("--continued", action="store_true", help="also continue FP32 as long as QAT does")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, few samples: does it run")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    if arguments.structured + arguments.distillation + arguments.sparsity + arguments.ladder > 1:
        parser.error("--structured, --distillation, --sparsity and --ladder are different benchmarks")
    run, option = (structured if arguments.structured else quantized), arguments.continued
    if arguments.distillation:
        run, option = distillation, arguments.quick
    own = accuracy_sparsity if arguments.sparsity else accuracy_ladder if arguments.ladder else None
    if own is not None:
        run = own.results
    images_alone = arguments.structured or own is not None
    if images_alone and arguments.task == "sentences":
        parser.error("--structured, --sparsity and --ladder take the network of the images")
    names = ["images", "sentences"] if arguments.task == "all" else [arguments.task]
    for name in names[:1] if images_alone else names:
        task = make_task(name, arguments.data, arguments.quick)
        if own is not None:
            task = own.task_of(task, arguments.quick)
        results: dict[str, list[float]] = {}
        for seed in seeds:
            for result in run(task, seed, arguments.cache, option):
                results.setdefault(result.kind, []).append(result.percent)
                record = {"benchmark": "accuracy", "data": task.split.name, "seed": seed, "kind": result.kind}
                record |= {"accuracy": round(result.percent, 3), "seconds": round(result.seconds, 1)} | result.more
                if arguments.json:
                    print(json.dumps(record), flush=True)
                else:
                    more = "".join(f"  {key} {value}" for key, value in result.more.items())
                    print(
                        f"{task.split.name}, seed {seed}: {result.kind:26} {result.percent:7.2f} %  "
                        f"{result.seconds:7.1f} s{more}",
                        flush=True,
                    )
        if arguments.distillation:
            record = distillation_summary(task.split.name, results, arguments.quick)
            print(
                json.dumps(record) if arguments.json else "  ".join(f"{key} {value}" for key, value in record.items())
            )
            continue
        if own is not None:
            for record in own.summary(task.split.name, results, arguments.quick):
                print(json.dumps(record) if arguments.json else "  ".join(f"{k} {v}" for k, v in record.items()))
            continue
        mean = {kind: statistics.fmean(values) for kind, values in results.items()}
        for kind in results:
            lost, goal = mean["FP32"] - mean[kind], task.goals.get(kind)
            record = {"benchmark": "accuracy", "data": task.split.name, "kind": kind, "seeds": len(seeds)}
            record |= {"mean": round(mean[kind], 3), "each": [round(v, 3) for v in results[kind]]}
            record |= {"points_lost": round(lost, 3), "goal": goal}
            if goal is not None and not arguments.quick:
                record["reached"] = lost <= goal
            if kind == PRUNED and not arguments.quick:
                record |= {"above_random": round(mean[PRUNED] - mean[RANDOM], 3)}
                record |= {"above_uniform_l1": round(mean[PRUNED] - mean[UNIFORM], 3)}
            if arguments.json:
                print(json.dumps(record), flush=True)
            else:
                wanted = "" if goal is None else f"  (goal: at most {goal})"
                print(
                    f"{task.split.name}, mean of {len(seeds)}: {kind:26} {mean[kind]:7.2f} %  lost {lost:+.2f}{wanted}"
                )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
