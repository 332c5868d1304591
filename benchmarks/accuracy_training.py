"""Training and evaluation that the parts of accuracy.py share."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 128


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    build: Callable[[], nn.Module]
    split: datasets.Split
    augment: Callable[[Tensor], Tensor]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float  # highest learning rate of the FP32 training
    fine_rate: float  # learning rate at which QAT begins
    epochs: int
    fine_epochs: int
    goals: dict[str, float]  # points that each kind may lose
    prune_rate: float = 0.0  # highest learning rate after pruning
    prune_epochs: int = 0


@dataclass(frozen=True)
class Result:
    """One kind of model: per cent of right answers, seconds to make it, and what else there is to say."""

    kind: str
    percent: float
    seconds: float
    more: dict[str, object] = field(default_factory=dict)


def shift_and_flip(x: Tensor) -> Tensor:
    """Each image moved by up to 4 pixels, with zeros at the border, and mirrored half of the time."""
    size = x.shape[-1]
    padded = F.pad(x, (4, 4, 4, 4))
    rows = torch.randint(9, (len(x), 1)) + torch.arange(size)
    columns = torch.randint(9, (len(x), 1)) + torch.arange(size)
    columns = torch.where(torch.rand(len(x), 1) < 0.5, columns.flip(1), columns)
    moved = padded[torch.arange(len(x)).view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2)  # channels last in memory, in which convolutions are faster


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)


def batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(task.split.train_y))
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        yield task.augment(task.split.train_x[chosen]), task.split.train_y[chosen]


def steps_of_epoch(task: Task) -> int:
    return len(task.split.train_y) // BATCH


def train(
    model: nn.Module,
    task: Task,
    rate: float,
    epochs: int,
    warmup: float,
    autocast: bool,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    attach: Callable[[torch.optim.Optimizer], None] | None = None,
) -> None:
    """Epochs over the data; the rate rises over the share ``warmup`` of the steps, and falls to zero by a cosine.

    ``attach`` is given the optimizer before the first step.
    """
    steps = epochs * steps_of_epoch(task)
    optimizer = task.optimizer(model, rate)
    if attach is not None:
        attach(optimizer)
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(epochs):
        for x, y in batches(task):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y_hat = model(x)
            loss(y_hat.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, split: datasets.Split) -> float:
    """Per cent of right answers."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(split.test_x.split(250), split.test_y.split(250), strict=True)
    )
    return 100.0 * right / len(split.test_y)


def float_model(task: Task, seed: int, cache: Path | None, autocast: bool = True) -> nn.Module:
    """The trained FP32 model of a seed, read from the cache where it is there."""
    torch.manual_seed(seed)
    model = task.build()
    file = None
    if cache is not None:
        name = task.split.name.replace(" ", "-")
        kind = "" if autocast else "-float32"
        file = cache / f"{name}-{len(task.split.train_y)}-epochs{task.epochs}-rate{task.rate}{kind}-seed{seed}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
    train(model, task, task.rate, task.epochs, warmup=0.2, autocast=autocast)
    if file is not None:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        torch.save(model.state_dict(), temporary)
        temporary.replace(file)
    return model
