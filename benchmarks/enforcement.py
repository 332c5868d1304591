"""What masks cost in a training step of ResNet-18, beside torch.nn.utils.prune and the step without masks.

Prints one JSON line per optimizer: processor time of a step with attached masks over one without, alone and as part of the
step (the hooks timed by themselves, which is more exact than a difference of two long times), and bytes saved for backward.

    python benchmarks/enforcement.py [--batch N] [--size S] [--repeats R] [--sparsity S]
"""

import argparse
import copy
import json
import time
from functools import partial

import torch
from models import ResNet18
from timing import interleaved
from torch import nn
from torch.nn.utils import prune

import rarefy as rf
from rarefy.pruning.enforce import OptimizerHook, enforce, masked_parameters

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "AdamW (torch's sqrt is slow for zeros)": lambda p: torch.optim.AdamW(p, 1e-3),
    "Adamax (written at each step)": lambda p: torch.optim.Adamax(p, 1e-3),
}


def masked_model(model: nn.Module, sparsity: float) -> nn.Module:
    pruner = rf.pruning.MagnitudePruner(model, sparsity)
    pruner.step()
    return model


def torch_pruned(model: nn.Module, sparsity: float) -> nn.Module:
    layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for module, name in layers:
        prune.l1_unstructured(module, name, sparsity)
    return model


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor):
    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def write_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    enforce(masked_parameters(model), optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sparsity", type=float, default=0.9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    y = torch.randint(0, 10, (arguments.batch,))
    dense = ResNet18(10)
    makers = {"dense": lambda m, _: m, "masks": masked_model, "torch": torch_pruned}
    saved = {key: saved_bytes(make(copy.deepcopy(dense), arguments.sparsity), x) for key, make in makers.items()}
    for name, make in OPTIMIZERS.items():
        # New ones each time: what torch has pruned cannot be copied once it ran.
        models = {key: build(copy.deepcopy(dense), arguments.sparsity) for key, build in makers.items()}
        optimizers = {key: make(model.parameters()) for key, model in models.items()}
        optimizer, model = optimizers["masks"], models["masks"]
        hook = OptimizerHook(optimizer, partial(masked_parameters, model))
        steps = {key: step_of(model, optimizers[key], x, y) for key, model in models.items()}
        seconds = interleaved(steps, arguments.repeats, clock=time.process_time)
        hooks = {
            "pre": partial(hook._pre, optimizer, (optimizer,), {}),
            "post": partial(hook._post, optimizer, (optimizer,), {}),
        }
        alone = interleaved(hooks, 8 * arguments.repeats, clock=time.process_time)
        alone |= interleaved({"all written": partial(write_all, model, optimizer)}, clock=time.process_time)
        print(
            json.dumps(
                {
                    "optimizer": name,
                    "step_ms": {key: round(1e3 * value, 1) for key, value in seconds.items()},
                    "ratio": {key: round(seconds[key] / seconds["dense"], 4) for key in ("masks", "torch")},
                    "hooks_ms": {key: round(1e3 * value, 2) for key, value in alone.items()},
                    "1 + hooks / dense step": round(1 + (alone["pre"] + alone["post"]) / seconds["dense"], 4),
                    "saved_mb": {key: round(value / 2**20, 2) for key, value in saved.items()},
                }
            )
        )
        hook.remove()


if __name__ == "__main__":
    main()
