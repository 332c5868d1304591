"""Prune nine of ten weights of an image classifier while it trains, and see what that is worth: file, arithmetic, time.

    python examples/python/prune_weights.py                      # scikit-learn's digits, less than a minute on two cores
    python examples/python/prune_weights.py --data images.npz    # 32x32 colour images
    python examples/python/prune_weights.py --quick              # seconds, to see that it works

A small network is trained, then pruned gradually while the same optimizer trains on (AGP), and written to a compressed
file. A fresh process reads that into the original class. Then its linear layers run sparse where this machine is faster so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from _common import Images, TrainingBatches, accuracy, atomic, load_digits, load_npz
from torch import Tensor, nn
from tqdm import tqdm

import rarefy as rf

BATCH = 64  #: images of a training step
TRAIN_RATE, TUNE_RATE = 0.05, 0.03  # the peaks of one-cycle schedules


class Net(nn.Module):
    """Two convolutions and a wide classifier, where most of the weights are."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        wide = 64 * ((size + 1) // 2) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(wide, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, channels, size, size] to logits [N, classes]."""
        return self.classifier(self.features(x))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    epochs: int,
    rate: float,
    title: str,
    pruner: rf.pruning.MagnitudePruner | None = None,
) -> list[float]:
    """Train with a learning rate that rises and falls; return the sparsity after each step."""
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    sparsity = []
    model.train()
    bar = tqdm(total=steps, desc=title, unit="batch")
    for _ in range(epochs):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()  # the one line that pruning adds
                sparsity.append(pruner.sparsity)
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    bar.close()
    model.eval()
    return sparsity


def load(folder: Path) -> None:
    """What the fresh process does: make the model, read the compressed file into it, compare what it gives."""
    check = torch.load(folder / "check.pt")
    model = rf.pruning.load_sparse(folder / "pruned.safetensors", Net(*check["model"])).eval()
    with torch.no_grad():
        outputs = model(check["images"])
    if not torch.equal(outputs, check["outputs"]):
        sys.exit(f"the loaded model differs by {(outputs - check['outputs']).abs().max().item():.3g}")
    size = (folder / "pruned.safetensors").stat().st_size
    print(f"fresh process: {size:,} bytes read, equal outputs")


def plot(path: Path, sparsity: list[float], report: rf.pruning.SparseReport) -> None:
    """The schedule, and what is left of each cost."""
    import matplotlib

    matplotlib.use("Agg")  # a file is written, no window is opened
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(range(1, len(sparsity) + 1), [100 * value for value in sparsity])
    left.set(xlabel="step", ylabel="weights at zero, %", title="while it trains", ylim=(0, 100))
    names = ["bytes on disk", "MACs", "milliseconds"]
    shares = [
        report.file.ratio,
        report.effective_macs / report.macs,
        report.sparse_milliseconds / report.dense_milliseconds,
    ]
    bars = right.barh(names[::-1], [100 * share for share in shares[::-1]])
    right.bar_label(bars, fmt="%.1f %%", padding=3)
    right.set(xlim=(0, 115), xlabel="of the dense model, %", title="what is left")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def table(data: Images, models: dict[str, nn.Module], report: rf.pruning.SparseReport) -> str:
    """Accuracy, weights, bytes and time of each model."""
    lines = [
        "| model  | accuracy % |   weights |      bytes | ms a batch |",
        "| ------ | ---------: | --------: | ---------: | ---------: |",
    ]
    sizes = {"dense": report.file.dense_bytes, "pruned": report.file.bytes, "sparse": report.file.bytes}
    times = {
        "dense": report.dense_milliseconds,
        "pruned": report.dense_milliseconds,
        "sparse": report.sparse_milliseconds,
    }
    for name, model in models.items():
        weights = sum(
            int(value.count_nonzero()) for value in models["dense" if name == "dense" else "pruned"].parameters()
        )
        lines.append(
            f"| {name:6} | {accuracy(model, data):10.2f} | {weights:9,} | {sizes[name]:10,} | {times[name]:10.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Prune weights of an image classifier while it trains.")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="colour images (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("out/prune_weights"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sparsity", type=float, default=0.9, help="part of the weights to remove (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images of a timed run (default: %(default)s)")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("TRAIN", "PRUNE"), help="before and while pruning")
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that everything works")
    parser.add_argument("--load", action="store_true", help="only load the model that a run left in --out")
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.out)
        return
    epochs = arguments.epochs or ((1, 2) if arguments.quick else (4, 6))
    if min(epochs) < 1:
        parser.error(f"argument --epochs: must be positive, got {' '.join(map(str, epochs))}")
    if not 0 <= arguments.sparsity < 1:
        parser.error(f"argument --sparsity: must be in [0, 1), got {arguments.sparsity}")
    if arguments.batch < 1:
        parser.error(f"argument --batch: must be positive, got {arguments.batch}")
    try:
        data = load_npz(arguments.data) if arguments.data else load_digits(arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{data.name}: {len(data.train_labels)} images to train, {len(data.test_labels)} to test")

    torch.manual_seed(arguments.seed)
    description = (data.train_images.shape[1], data.train_images.shape[2], data.classes)
    model = Net(*description)
    batches = TrainingBatches(data, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), TRAIN_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    train(model, optimizer, batches, epochs[0], TRAIN_RATE, "train")
    dense = Net(*description).eval()
    dense.load_state_dict(model.state_dict())

    # Weights go along a cubic over the first two thirds of the steps; the rest lets those that are left recover.
    end = max(2, 2 * epochs[1] * len(batches) // 3)
    schedule = rf.pruning.PolynomialSchedule(begin=1, end=end, every=min(10, end - 1))
    pruner = rf.pruning.MagnitudePruner(model, arguments.sparsity, schedule=schedule)
    sparsity = train(model, optimizer, batches, epochs[1], TUNE_RATE, "prune", pruner)
    pruner.finalize()
    print(f"\n{pruner.report()}\n")

    # A file without the zeros, for the original class.
    file = rf.pruning.save_sparse(model, arguments.out / "pruned.safetensors")
    print(f"{file}\n")
    images = data.test_images[:BATCH]
    with torch.no_grad(), atomic(arguments.out / "check.pt") as temporary:
        torch.save({"model": description, "images": images, "outputs": model(images)}, temporary)

    # Linear layers run sparse where that is faster here, with batches of this size; the report says which and why.
    example = data.test_images[: arguments.batch]
    seconds = 0.2 if arguments.quick else 2.0
    report = rf.pruning.measure(model, example, seconds=seconds)
    fast, _ = rf.pruning.sparsify(model, example)
    print(f"{report}\n")
    print(f"{table(data, {'dense': dense, 'pruned': model, 'sparse': fast}, report)}\n")
    plot(arguments.out / "report.png", sparsity, report)

    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--load", "--out", arguments.out], check=True)
    print(f"files: {arguments.out}")


if __name__ == "__main__":
    main()
