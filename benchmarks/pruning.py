"""Global magnitude threshold and masks of 25 million weights, beside the time to read them once.

Prints one JSON line per implementation; `limit` is reading every weight once.

    python benchmarks/pruning.py [--elements N] [--sparsity S] [--repeats R] [--slow]
"""

import argparse
import json

import numpy as np
import torch
from timing import interleaved
from torch import nn
from torch.nn.utils import prune

import rarefy as rf


def make_weights(elements: int) -> list[torch.Tensor]:
    """The shapes of a residual network: many tensors of very different sizes."""
    torch.manual_seed(0)
    sizes = [elements // 2, elements // 4, elements // 8, 1000, 64]
    sizes.append(elements - sum(sizes))
    return [torch.randn(n) * scale for n, scale in zip(sizes, (0.02, 0.03, 0.05, 0.1, 1.0, 0.04), strict=True)]


def partition(weights: list[torch.Tensor], count: int) -> list[np.ndarray]:
    magnitudes = [np.abs(w.numpy()) for w in weights]
    threshold = np.partition(np.concatenate(magnitudes), count)[count]
    return [m >= threshold for m in magnitudes]


def kthvalue(weights: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    magnitudes = [w.abs() for w in weights]
    threshold = torch.cat(magnitudes).kthvalue(count + 1).values
    return [m >= threshold for m in magnitudes]


def global_unstructured(weights: list[torch.Tensor], count: int) -> None:
    modules = []
    for weight in weights:
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        modules.append(module)
    prune.global_unstructured([(m, "weight") for m in modules], prune.L1Unstructured, amount=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--slow", action="store_true", help="also time torch.kthvalue and global_unstructured, three times"
    )
    arguments = parser.parse_args()

    weights = make_weights(arguments.elements)
    count = round(arguments.sparsity * arguments.elements)
    masks = torch.ops.rarefy.magnitude_mask(weights, arguments.sparsity)
    pruned = arguments.elements - int(sum(np.unpackbits(mask.numpy()).sum() for mask in masks))
    assert pruned == count, f"asked for {count} zeros, got {pruned}"
    half = torch.ops.rarefy.magnitude_mask(weights, arguments.sparsity / 2)
    fresh = [w.clone() for w in weights]
    flat = torch.cat(weights)

    functions = {
        "limit": lambda: flat.amax(),
        "rarefy": lambda: torch.ops.rarefy.magnitude_mask(weights, arguments.sparsity),
        "rarefy, growing masks": lambda: torch.ops.rarefy.magnitude_mask(weights, arguments.sparsity, half),
        "rarefy apply_mask_": lambda: [torch.ops.rarefy.apply_mask_(w, m) for w, m in zip(fresh, masks, strict=True)],
    }
    seconds = interleaved(functions, arguments.repeats)
    slow = {"numpy.partition": lambda: partition(weights, count)}
    if arguments.slow:
        slow["torch.kthvalue"] = lambda: kthvalue(weights, count)
        slow["torch global_unstructured"] = lambda: global_unstructured(weights, count)
    seconds |= {k: v for k, v in interleaved(functions | slow, 3, warmup=0).items() if k in slow}
    for name, value in seconds.items():
        print(
            json.dumps(
                {
                    "benchmark": "global magnitude threshold and masks",
                    "elements": arguments.elements,
                    "sparsity": arguments.sparsity,
                    "threads": torch.get_num_threads(),
                    "instruction_set": rf._core.instruction_set(),
                    "name": name,
                    "milliseconds": round(value * 1e3, 3),
                    "ratio_to_limit": round(value / seconds["limit"], 2),
                }
            )
        )


if __name__ == "__main__":
    main()
