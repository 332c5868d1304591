"""Calibrated pruning of one layer: errors of every method, and SparseGPT's time beside the paper's algorithm in PyTorch.

Prints JSON lines. Errors are ||(W - W') X||^2 / ||W X||^2 on inputs with correlated features (tests/python/correlated.py).

    python benchmarks/sparsity_calibrated.py [--size 4096] [--repeats R] [--threads N] [--processor-time] [--quick]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import interleaved

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "python"))
from correlated import correlated_layer

import rarefy as rf
from rarefy import _core

core = _core.pruning

#: What the errors should be at most, in the order magnitude, Wanda, SparseGPT, refit.
GOALS = {"unstructured": (0.070, 0.019, 0.0107, 0.0066), "2:4": (0.131, 0.049, 0.0285, 0.0174)}


def reference_sparse_gpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> torch.Tensor:
    """Algorithm 1 of arXiv:2301.00774 in PyTorch operators: one column at a time, lazy updates block by block."""
    w = weight.clone()
    columns = w.shape[1]
    h = hessian.clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        own, factor = w[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.zeros_like(own)
        diagonal = factor.diagonal()
        if nm is None:
            cost = own.square() / diagonal.square()
            threshold = cost.flatten().sort().values[int(cost.numel() * sparsity)]
            prune = cost < threshold
        else:
            prune = torch.zeros_like(own, dtype=torch.bool)
        for i in range(end - begin):
            if nm is not None and i % nm[1] == 0:
                group = slice(i, i + nm[1])
                cost = own[:, group].square() / diagonal[group].square()
                prune[:, group].scatter_(1, cost.topk(nm[1] - nm[0], dim=1, largest=False).indices, True)
            column = own[:, i]
            kept = column.masked_fill(prune[:, i], 0)
            error = (column - kept) / diagonal[i]
            own[:, i:] -= error.unsqueeze(1) * factor[i, i:].unsqueeze(0)
            own[:, i] = kept
            errors[:, i] = error
        w[:, begin:end] = own
        w[:, end:] -= errors @ upper[begin:end, end:]
    return w


def _options(pattern: str) -> object:
    return core.SparseGptOptions(None, core.parse_pattern(pattern), 128, 0.01, 1.0)


def layer_errors(rows: int = 512, features: int = 1024, seed: int = 0) -> Iterator[dict]:
    """The error of every method at 50 % and at 2:4, with the goal beside it."""
    weight, inputs = correlated_layer(rows, features, seed=seed)
    hessian = (inputs.double().t() @ inputs.double() / len(inputs)).float()
    for pattern, goals in GOALS.items():
        chosen = core.WandaOptions(None, core.parse_pattern(pattern))
        pruned, mask, *_ = core.sparse_gpt_weight(weight, hessian, _options(pattern))
        magnitude = rf.pruning.choose_masks({"fc": weight}, 0.5, pattern=pattern)
        weights = {
            "magnitude": weight * rf.pruning.unpack_mask(magnitude["fc"], weight.shape),
            "wanda": core.wanda_weight(weight, hessian.diagonal().sqrt(), chosen)[0],
            "sparse_gpt": pruned,
            "refit": core.refit_weight(weight, mask, hessian, core.RefitOptions())[0],
        }
        for (name, value), goal in zip(weights.items(), goals, strict=True):
            yield {
                "benchmark": "layer error, correlated inputs",
                "shape": [rows, features],
                "seed": seed,
                "pattern": pattern,
                "name": name,
                "error": round(core.relative_error(weight, value, hessian), 5),
                "goal": goal,
            }


def sparse_gpt_time(
    size: int = 4096, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict]:
    """Seconds of a square layer, from Hessian to pruned weights, and the error of both."""
    weight, inputs = correlated_layer(size, size, 2 * size, rank=size // 3)
    hessian = inputs.t() @ inputs / len(inputs)
    del inputs
    for pattern, nm in (("unstructured", None), ("2:4", (2, 4))):
        results = {}

        def reference(nm=nm, results=results):
            results["pytorch reference"] = reference_sparse_gpt(weight, hessian, nm=nm)

        def ours(pattern=pattern, results=results):
            results["rarefy"] = core.sparse_gpt_weight(weight, hessian, _options(pattern))[0]

        seconds = interleaved({"pytorch reference": reference, "rarefy": ours}, repeats, min(1, repeats - 1), clock)
        for name, value in seconds.items():
            yield {
                "benchmark": "SparseGPT of one layer",
                "shape": [size, size],
                "pattern": pattern,
                "threads": torch.get_num_threads(),
                "instruction_set": _core.instruction_set(),
                "name": name,
                "clock": clock.__name__,
                "seconds": round(value, 3),
                "ratio_to_reference": round(value / seconds["pytorch reference"], 3),
                "goal": 0.5,
                "error": round(core.relative_error(weight, results[name], hessian), 5),
                "sparsity": round(1 - results[name].count_nonzero().item() / weight.numel(), 6),
            }


def refit_time(size: int = 2048, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> Iterator[dict]:
    """Seconds of refitting a square layer at 50 %, beside choosing its mask."""
    weight, inputs = correlated_layer(size, size, 2 * size, rank=size // 3)
    hessian = inputs.t() @ inputs / len(inputs)
    _, mask, *_ = core.sparse_gpt_weight(weight, hessian, _options("unstructured"))
    functions = {
        "sparse_gpt": lambda: core.sparse_gpt_weight(weight, hessian, _options("unstructured")),
        "refit": lambda: core.refit_weight(weight, mask, hessian, core.RefitOptions()),
    }
    for name, value in interleaved(functions, repeats, 0, clock).items():
        yield {
            "benchmark": "refit of one layer",
            "shape": [size, size],
            "threads": torch.get_num_threads(),
            "clock": clock.__name__,
            "name": name,
            "seconds": round(value, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time", action="store_true", help="of the process, where others use the machine; one thread then"
    )
    parser.add_argument("--quick", action="store_true", help="a layer of 1024 x 1024, once")
    parser.add_argument("--only", choices=["errors", "time", "refit"], help="one part")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    size, repeats = (1024, 1) if arguments.quick else (arguments.size, arguments.repeats)
    parts = {
        "errors": lambda: layer_errors(),
        "time": lambda: sparse_gpt_time(size, repeats, clock),
        "refit": lambda: refit_time(min(size, 2048), clock=clock),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            for line in part():
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
