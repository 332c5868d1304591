"""Masks: a global threshold over 25 million weights, and 2:4 of a 4096 x 4096 weight, beside reading them once.

Prints one JSON line per implementation; `limit` reads every weight once (for 2:4 it writes the packed bits too).

    python benchmarks/sparsity_masks.py [--elements N] [--sparsity S] [--side N] [--repeats R] [--threads N] [--slow]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from timing import interleaved
from torch import nn
from torch.nn.utils import prune

import rarefy as rf

ops = torch.ops.rarefy
GLOBAL_GOAL = 4.0  # times the limit
NM_GOAL = 1.5


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


def topk_2_4(weight: torch.Tensor) -> torch.Tensor:
    """2:4 as it is written in torch: the two largest of every four."""
    groups = weight.abs().view(-1, 4)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)


def rows(
    benchmark: str, seconds: dict[str, float], goals: dict[str, float] | None = None, **facts: Any
) -> list[dict[str, Any]]:
    """One row per implementation, against `limit`."""
    out = []
    for name, value in seconds.items():
        row = {
            "benchmark": benchmark,
            **facts,
            "threads": torch.get_num_threads(),
            "instruction_set": rf._core.instruction_set(),
            "name": name,
            "milliseconds": round(value * 1e3, 3),
            "ratio_to_limit": round(value / seconds["limit"], 2),
        }
        if name in (goals or {}):
            row["goal"] = goals[name]
        out.append(row)
    return out


def global_threshold(
    elements: int = 25_000_000, sparsity: float = 0.9, repeats: int = 11, slow: bool = False
) -> list[dict[str, Any]]:
    """Global magnitude threshold and masks. `slow` also times torch.kthvalue and torch.nn.utils.prune."""
    weights = make_weights(elements)
    count = round(sparsity * elements)
    masks = ops.magnitude_mask(weights, sparsity)
    pruned = elements - int(sum(np.unpackbits(mask.numpy()).sum() for mask in masks))
    assert pruned == count, f"asked for {count} zeros, got {pruned}"
    half = ops.magnitude_mask(weights, sparsity / 2)
    fresh = [w.clone() for w in weights]
    flat = torch.cat(weights)
    functions = {
        "limit": lambda: flat.amax(),
        "rarefy": lambda: ops.magnitude_mask(weights, sparsity),
        "rarefy, signed scores": lambda: ops.score_mask(weights, sparsity),
        "rarefy, growing masks": lambda: ops.magnitude_mask(weights, sparsity, half),
        "rarefy apply_mask_": lambda: [ops.apply_mask_(w, m) for w, m in zip(fresh, masks, strict=True)],
    }
    seconds = interleaved(functions, repeats)
    others = {"numpy.partition": lambda: partition(weights, count)}
    if slow:
        others["torch.kthvalue"] = lambda: kthvalue(weights, count)
        others["torch global_unstructured"] = lambda: global_unstructured(weights, count)
    seconds |= {k: v for k, v in interleaved(functions | others, 3, warmup=0).items() if k in others}
    name = "global magnitude threshold and masks"
    return rows(name, seconds, {"rarefy": GLOBAL_GOAL}, elements=elements, sparsity=sparsity)


def nm_masks(side: int = 4096, repeats: int = 11) -> list[dict[str, Any]]:
    """2:4 and 1:4 masks of a side x side weight, of each element type with a vector kernel."""
    torch.manual_seed(0)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(side, side).to(dtype)
        bits = torch.empty(side * side // 8, dtype=torch.uint8)
        # The bits of 16-bit floats are read as integers: torch's amax of those types converts one by one.
        words = weight.view(torch.int32) if dtype != torch.float32 else weight
        expected = topk_2_4(weight)
        kept = ops.unpack_mask(ops.nm_mask(weight, 2, 4), [side * side // 4, 4])
        assert int((kept != expected).any(1).sum()) == 0 or dtype != torch.float32, "not the two largest"
        functions = {
            "limit": lambda words=words, bits=bits: (words.amax(), bits.fill_(1)),
            "rarefy 2:4": lambda weight=weight: ops.nm_mask(weight, 2, 4),
            "rarefy 1:4": lambda weight=weight: ops.nm_mask(weight, 1, 4),
        }
        seconds = interleaved(functions, repeats)
        other = {"torch topk and scatter": lambda weight=weight: topk_2_4(weight)}
        seconds |= {k: v for k, v in interleaved(functions | other, 3, warmup=0).items() if k in other}
        goals = {"rarefy 2:4": NM_GOAL} if dtype == torch.float32 else {}
        out += rows(f"N:M mask, {dtype}".replace("torch.", ""), seconds, goals, side=side)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--slow", action="store_true", help="also time torch.kthvalue and global_unstructured, three times"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for row in [
        *global_threshold(arguments.elements, arguments.sparsity, arguments.repeats, arguments.slow),
        *nm_masks(arguments.side, arguments.repeats),
    ]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
