"""Remove half of the work of an image classifier: channels that are really gone, in two steps with fine-tuning between.

    python examples/python/prune_structured.py                      # scikit-learn's digits, less than a minute on two cores
    python examples/python/prune_structured.py --data images.npz    # 32x32 colour images
    python examples/python/prune_structured.py --quick              # seconds, to see that it works

A small ResNet is trained. Half of its multiply-accumulates go, the least important channels first, while the same
optimizer trains on. One table shows what that costs and gains. The smaller model is saved, and loaded into the original
class by a fresh process, which gives the same outputs.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from _common import Images, TrainingBatches, accuracy, atomic, interleaved_medians, load_digits, load_npz, open_onnx
from compress_cnn import ResNet
from torch import nn
from tqdm import tqdm

import rarefy as rf

STEPS = 2
BATCH = 64  #: images of a training step, and of a timed run
TRAIN_RATE, TUNE_RATE = 0.1, 0.05  # the peaks of one-cycle schedules


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: TrainingBatches, epochs: int, rate: float, title: str
) -> None:
    """Train with a learning rate that rises to ``rate`` and falls to zero."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(batches), cycle_momentum=False
    )
    model.train()
    bar = tqdm(total=epochs * len(batches), desc=title, unit="batch")
    for _ in range(epochs):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    bar.close()
    model.eval()


def load(folder: Path) -> None:
    """What the fresh process does: make the original model, cut it to the file, compare what it gives."""
    check = torch.load(folder / "check.pt")
    model = ResNet(*check["model"]).to(memory_format=torch.channels_last)
    model = rf.pruning.load_pruned(model, folder / "pruned.safetensors").eval()
    with torch.no_grad():
        outputs = model(check["images"])
    if not torch.equal(outputs, check["outputs"]):
        sys.exit(f"the loaded model differs by {(outputs - check['outputs']).abs().max().item():.3g}")
    print(f"fresh process: {sum(p.numel() for p in model.parameters()):,} parameters loaded, equal outputs")


def table(
    data: Images, folder: Path, models: dict[str, nn.Module], macs: dict[str, float], seconds: float
) -> tuple[str, float]:
    """Compare models, and return the lines and how many times faster the last is than the first in PyTorch."""
    images = data.test_images[:BATCH]
    runs = {}
    for name, model in models.items():
        rf.export.to_onnx(model, data.test_images[:2], folder / f"{name}.onnx")
        runs["torch", name] = partial(model, images)
        runs["onnx", name] = partial(open_onnx(folder / f"{name}.onnx", threads=1), images.contiguous())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved_medians(runs, seconds)
    torch.set_num_threads(threads)
    lines = [
        "| model    | accuracy % | parameters |        MACs | torch ms | ORT ms |",
        "| -------- | ---------: | ---------: | ----------: | -------: | -----: |",
    ]
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        lines.append(
            f"| {name:8} | {accuracy(model, data):10.2f} | {parameters:10,} | {int(macs[name]):11,} "
            f"| {times['torch', name]:8.3f} | {times['onnx', name]:6.3f} |"
        )
    first, *_, last = models
    return "\n".join(lines), times["torch", first] / times["torch", last]


def main() -> None:
    """Run the job as the command line says."""
    parser = argparse.ArgumentParser(description="Prune channels of an image classifier, with fine-tuning between.")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="colour images (default: scikit-learn's digits)")
    parser.add_argument("--out", type=Path, default=Path("out/prune_structured"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--macs", type=float, default=0.5, help="part of the work to remove (default: %(default)s)")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("TRAIN", "TUNE"), help="at first, and after each step")
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that everything works")
    parser.add_argument("--load", action="store_true", help="only load the model that a run left in --out")
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.out)
        return
    epochs = arguments.epochs or ((2, 1) if arguments.quick else (6, 3))
    if min(epochs) < 1:
        parser.error(f"argument --epochs: must be positive, got {' '.join(map(str, epochs))}")
    if not 0 <= arguments.macs < 1:
        parser.error(f"argument --macs: must be in [0, 1), got {arguments.macs}")
    try:
        data = load_npz(arguments.data) if arguments.data else load_digits(arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{data.name}: {len(data.train_labels)} images to train, {len(data.test_labels)} to test")

    torch.manual_seed(arguments.seed)
    description = (data.train_images.shape[1], data.classes, 32 if arguments.data is None else 16, 1)
    model = ResNet(*description).to(memory_format=torch.channels_last)
    batches = TrainingBatches(data, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), TRAIN_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    train(model, optimizer, batches, epochs[0], TRAIN_RATE, "train")
    original = copy.deepcopy(model)

    # Look first: what the first step would remove, and what stays and why. Nothing changes. Widths that are multiples of
    # 8 suit the kernels of PyTorch and ONNX Runtime: others can take longer than the wider layer did.
    example = data.test_images[:2]
    pruner = rf.pruning.StructuredPruner(model, example, macs=arguments.macs, steps=STEPS, round_to=8)
    print(f"\n{pruner.preview()}\n")

    # Then remove. The optimizer keeps its parameters, and the momentum of what is left of them.
    for step in range(STEPS):
        report = pruner.prune(optimizers=[optimizer])
        before = accuracy(model.eval(), data)
        train(model, optimizer, batches, epochs[1], TUNE_RATE, f"tune {step + 1}/{STEPS}")
        left = report.after.macs / report.before.macs
        tqdm.write(
            f"step {step + 1}: {left:.3f} of the MACs are left; accuracy {before:.2f} %, tuned {accuracy(model, data):.2f} %"
        )
    print(f"\n{report}\n")

    models = {"original": original, "pruned": model}
    macs = {"original": report.before.macs, "pruned": report.after.macs}
    lines, speed_up = table(data, arguments.out, models, macs, seconds=1 if arguments.quick else 6)
    print(f"{lines}\n\n{BATCH} images on one thread, medians of runs that take turns: {speed_up:.2f} times as fast in "
          f"PyTorch with {macs['pruned'] / macs['original']:.2f} of the MACs\n")  # fmt: skip

    # A file for the original class: what is left of each tensor, and the values.
    rf.pruning.save_pruned(model, arguments.out / "pruned.safetensors")
    images = data.test_images[:BATCH]
    with torch.no_grad(), atomic(arguments.out / "check.pt") as temporary:
        torch.save({"model": description, "images": images, "outputs": model(images)}, temporary)
    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--load", "--out", arguments.out], check=True)
    print(f"files: {arguments.out}")


if __name__ == "__main__":
    main()
