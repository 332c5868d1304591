"""Time a step of the distillation trainer beside the loop one would write by hand.

Both train a student on the same batches with the same loss and optimizer, in turn. The goal is a ratio of at most 1.02.
Prints one JSON line per model on stdout and a table on stderr.

    python benchmarks/distillation_trainer.py [--threads N] [--repeats R] [--quick]
"""

import argparse
import json
import sys

import torch
from models import ResNet20, mlp
from timing import interleaved
from torch import nn

import rarefy as rf

GOAL = 1.02


def problems() -> dict[str, tuple[nn.Module, nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Return student, teacher and batches of each case, from a step of a millisecond upwards."""
    torch.manual_seed(0)

    def batches(shape: tuple[int, ...], classes: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(shape), torch.randint(0, classes, shape[:1])) for _ in range(count)]

    return {
        "mlp": (mlp(), mlp(), batches((64, 784), 10, 100)),
        "resnet20": (ResNet20(), ResNet20(), batches((32, 3, 32, 32), 10, 8)),
    }


def measure(name: str, repeats: int, amount: float) -> dict:
    """Return one row of the table."""
    student, teacher, batches = problems()[name]
    batches = batches[: max(1, int(len(batches) * amount))]
    loss_fn = rf.distillation.DistillationLoss(temperature=4.0, alpha=0.7)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
    trainer = rf.distillation.DistillationTrainer(student, teacher, optimizer, loss_fn)

    def ours() -> None:
        trainer.fit(batches, trainer.epoch + 1, progress=False)

    def by_hand() -> None:
        teacher.eval()
        student.train()
        total = 0.0
        for inputs, labels in batches:
            with torch.no_grad():
                target = teacher(inputs)
            loss = loss_fn(student(inputs), target, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    seconds = interleaved({"trainer": ours, "by_hand": by_hand}, repeats=repeats)
    return {
        "benchmark": "distillation_trainer",
        "model": name,
        "threads": torch.get_num_threads(),
        "milliseconds_per_step": {key: round(value * 1e3 / len(batches), 3) for key, value in seconds.items()},
        "trainer_over_loop": round(seconds["trainer"] / seconds["by_hand"], 3),
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds of few batches")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'model':>10} {'trainer ms':>11} {'loop ms':>9} {'ratio':>7} {'goal':>6}", file=sys.stderr)
    for name in problems():
        row = measure(name, 3 if arguments.quick else arguments.repeats, 0.2 if arguments.quick else 1.0)
        times = row["milliseconds_per_step"]
        print(f"{name:>10} {times['trainer']:>11} {times['by_hand']:>9} {row['trainer_over_loop']:>7} {GOAL:>6}",
              file=sys.stderr)  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
