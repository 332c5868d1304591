"""What masks cost and what zeros gain, each figure beside its goal. Prints JSON lines.

threshold   global threshold and masks of 25 M weights / reading the weights once; numpy, torch.kthvalue, torch's pruning
two_of_four 2:4 mask of a 4096 x 4096 weight / the time to read it and write the mask
step        training step of ResNet-18 (32 x 3 x 64 x 64, SGD) with masks / without, and bytes saved for the backward pass
sparsegpt   SparseGPT of a 4096 x 4096 layer / a blocked reference in PyTorch
disk        file of a model that is 90 % zero / its dense file
linear      sparse linear layers beside dense ones: the sparsity from which they are faster, by size, batch and block

python benchmarks/sparsity.py [--only NAME ...] [--threads 2] [--repeats 11] [--processor-time] [--quick]

With --processor-time, steps and files are timed by the processor time of the process, which other work on the machine disturbs
less; with one thread it is the time of a machine with nothing else to do.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import models
import sparsity_masks
import torch
from qat_step import Trainer
from timing import interleaved
from torch import Tensor, nn
from torch.nn.utils import prune

import rarefy as rf
from rarefy import _core

Record = dict[str, object]
SPARSITY = 0.9
GOALS = {"threshold": 4.0, "two_of_four": 1.5, "step": 1.01, "saved": 1.0, "sparsegpt": 0.5, "disk": 0.16}


class _Clock:
    """What steps and files are timed by."""

    now = staticmethod(time.perf_counter)


CLOCK = _Clock()


def record(what: str, value: float, goal: float | None = None, **more: object) -> Record:
    out: Record = {"benchmark": "sparsity", "what": what, "ratio": round(value, 4), "goal": goal}
    if goal is not None:
        out["reached"] = round(value, 4) <= goal
    return out | more


# --- Masks -----------------------------------------------------------------------------------------------------------


def threshold(quick: bool, repeats: int) -> Iterator[Record]:
    """Selection of the global threshold, and the masks."""
    elements = 1_000_000 if quick else 25_000_000
    for row in sparsity_masks.global_threshold(elements, SPARSITY, repeats, slow=not quick):
        if row["name"] != "limit":
            yield record(
                "threshold and masks of 25 M weights / reading them once", row["ratio_to_limit"],
                GOALS["threshold"] if row["name"] == "rarefy" else None, name=row["name"], elements=elements,
                milliseconds=row["milliseconds"],
            )  # fmt: skip


def two_of_four(quick: bool, repeats: int) -> Iterator[Record]:
    """The masks of one weight."""
    side = 512 if quick else 4096
    for row in sparsity_masks.nm_masks(side, repeats):
        if row["name"] != "limit":
            yield record(
                f"{row['benchmark']} of {side} x {side} / the limit", row["ratio_to_limit"],
                GOALS["two_of_four"] if "goal" in row else None, name=row["name"], milliseconds=row["milliseconds"],
            )  # fmt: skip


# --- Training --------------------------------------------------------------------------------------------------------


class MaskedTrainer(Trainer):
    """Training with a pruner whose masks hold, called after the optimizer or attached to it."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, attached: bool) -> None:
        super().__init__(model, x, labels)
        self.pruner = rf.pruning.MagnitudePruner(model, SPARSITY)
        self.pruner.step()
        self.attached = attached
        if attached:
            self.pruner.attach(self.optimizer)

    def update(self) -> None:
        """Everything but forward and backward pass."""
        self.optimizer.step()
        if not self.attached:
            self.pruner.step()

    def step(self) -> None:
        self.loss().backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)


def torch_pruned(model: nn.Module) -> nn.Module:
    layers = [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
    return model


def step(quick: bool, repeats: int) -> Iterator[Record]:
    """The step in turn with the dense one; what masks add to the optimizer's part also by itself, as a part of the dense step:
    the noise of whole steps hides it."""
    torch.manual_seed(0)
    model = models.mlp() if quick else models.ResNet18()
    shape, classes = ((128, 784), 10) if quick else ((32, 3, 64, 64), 1000)
    x, labels = torch.randn(shape), torch.randint(classes, shape[:1])
    dense = Trainer(copy.deepcopy(model), x, labels)
    masked = {
        "rarefy, called": MaskedTrainer(copy.deepcopy(model), x, labels, attached=False),
        "rarefy, attached": MaskedTrainer(copy.deepcopy(model), x, labels, attached=True),
    }
    trainers = {
        "dense": dense, **masked, "torch.nn.utils.prune": Trainer(torch_pruned(copy.deepcopy(model)), x, labels)
    }  # fmt: skip
    seconds = interleaved({name: trainer.step for name, trainer in trainers.items()}, repeats, clock=CLOCK.now)
    saved = {name: trainer.saved_bytes()[1] for name, trainer in trainers.items()}
    for trainer in (dense, *masked.values()):
        trainer.loss().backward()  # gradients that stay, for the parts
    parts = {name: trainer.update for name, trainer in masked.items()} | {"dense": dense.optimizer.step}
    updates = interleaved(parts, 10 * repeats, clock=CLOCK.now)
    for name in (*masked, "torch.nn.utils.prune"):
        goal = GOALS["step"] if name in masked else None
        yield record(
            "training step with masks / dense", seconds[name] / seconds["dense"], goal, name=name,
            milliseconds=round(1e3 * seconds[name], 2),
        )  # fmt: skip
    for name in masked:
        added = updates[name] - updates["dense"]
        yield record(
            "(dense step + what masks add to the update) / dense step", 1 + added / seconds["dense"], GOALS["step"],
            name=name, milliseconds=round(1e3 * added, 3),
        )  # fmt: skip
    for name in (*masked, "torch.nn.utils.prune"):
        goal = GOALS["saved"] if name in masked else None
        yield record("bytes saved for the backward pass / dense", saved[name] / saved["dense"], goal, name=name)


def sparsegpt(quick: bool, repeats: int) -> Iterator[Record]:
    """From the Hessian to the pruned weights, and the errors that both leave."""
    import sparsity_calibrated

    rows = list(sparsity_calibrated.sparse_gpt_time(256 if quick else 4096, min(repeats, 3)))
    for row in rows:
        if row["name"] == "rarefy":
            reference = next(r for r in rows if r["pattern"] == row["pattern"] and r["name"] != "rarefy")
            yield record(
                "SparseGPT of one layer / blocked PyTorch reference", row["ratio_to_reference"], GOALS["sparsegpt"],
                pattern=row["pattern"], shape=row["shape"], seconds=row["seconds"], error=row["error"],
                reference_error=reference["error"],
            )  # fmt: skip


# --- What zeros gain -------------------------------------------------------------------------------------------------


def disk(quick: bool, repeats: int) -> Iterator[Record]:
    """Bytes of the file, and how long it takes to write and read it."""
    torch.manual_seed(0)
    model = models.mlp() if quick else models.ResNet18()
    pruner = rf.pruning.MagnitudePruner(model, SPARSITY)
    pruner.step()
    pruner.finalize()
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            file, dense = Path(folder) / "sparse.safetensors", Path(folder) / "dense.safetensors"
            torch.save(model.state_dict(), dense)
            report = rf.pruning.save_sparse(model, file)
            functions = {
                "save_sparse": lambda to=file, model=model: rf.pruning.save_sparse(model, to),
                "load_sparse": lambda of=file: rf.pruning.load_sparse(of),
                "torch.save": lambda to=dense, model=model: torch.save(model.state_dict(), to),
            }
            seconds = interleaved(functions, repeats, clock=CLOCK.now)
            yield record(
                "bytes of the file at 90 % / dense", file.stat().st_size / report.dense_bytes,
                GOALS["disk"] if dtype == torch.float32 else None, dtype=str(dtype).removeprefix("torch."),
                bytes=file.stat().st_size, dense_bytes=report.dense_bytes, torch_save_bytes=dense.stat().st_size,
                milliseconds={name: round(1e3 * value, 2) for name, value in seconds.items()},
            )  # fmt: skip


def block_sparse(out: int, width: int, sparsity: float, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    height, across = block
    kept = torch.rand(out // height, width // across) >= sparsity
    return (torch.randn(out, width) * kept.repeat_interleave(height, 0).repeat_interleave(across, 1)).to(dtype)


def linear(quick: bool, repeats: int) -> Iterator[Record]:
    """Dense time / sparse time at each sparsity; above 1 sparse is faster."""
    torch.manual_seed(0)
    sizes = [(256, 256)] if quick else [(1024, 1024), (4096, 1024)]
    sparsities = [0.5, 0.9] if quick else [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
    batches = [1, 32] if quick else [1, 8, 32, 128]
    for dtype in (torch.float32, torch.bfloat16):
        for out, width in sizes:
            for block in ((1, 1), (4, 4), (16, 1), (1, 16)):
                for batch in batches:
                    x = torch.randn(batch, width).to(dtype)
                    gains = {}
                    for sparsity in sparsities:
                        weight = block_sparse(out, width, sparsity, block, dtype)
                        parts = _core.pruning.to_sparse_weight(weight, *block)
                        dense, sparse = _core.pruning.compare_times(
                            lambda x=x, weight=weight: torch.nn.functional.linear(x, weight),
                            lambda x=x, parts=parts: torch.ops.rarefy.sparse_linear(x, *parts),
                            0.01 if quick else 0.15,
                        )
                        gains[sparsity] = round(dense / sparse, 2)
                    faster = [sparsity for sparsity in sparsities if gains[sparsity] > 1]
                    yield {
                        "benchmark": "sparsity", "what": "dense time / sparse time of a linear layer",
                        "dtype": str(dtype).removeprefix("torch."), "out": out, "in": width, "batch": batch,
                        "block": "x".join(map(str, block)), "gains": gains, "faster_from": min(faster, default=None),
                    }  # fmt: skip


PARTS = {
    "threshold": threshold, "two_of_four": two_of_four, "step": step, "sparsegpt": sparsegpt, "disk": disk,
    "linear": linear,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--processor-time", action="store_true", help="for steps and files, on a busy machine")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.processor_time:
        CLOCK.now = time.process_time
    for name in arguments.only:
        for line in PARTS[name](arguments.quick, 3 if arguments.quick else arguments.repeats):
            print(json.dumps(line | {"threads": arguments.threads}), flush=True)


if __name__ == "__main__":
    main()
