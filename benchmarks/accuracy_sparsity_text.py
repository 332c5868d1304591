"""Perplexity of a small GPT at 50 % without any training after it: magnitude, Wanda, SparseGPT, and with refit.

The model of examples/python/_gpt.py learns characters of Python's documentation (or of a folder with train.tsv and
dev.tsv) on the spot, and every method prunes a copy of it with the same calibration text. Prints JSON lines.

    python benchmarks/accuracy_sparsity_text.py [--data DIR] [--seeds 0 1 2] [--pattern unstructured 2:4] [--steps N] [--quick]
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import rarefy as rf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "python"))
from _gpt import Gpt, calibration, load_text, perplexity, train
from prune_gpt import BATCH, CALIBRATION, RATE, prune_by_magnitude

ORDER = ("magnitude", "wanda", "sparse_gpt", "refit")  #: each should be better than the one before


def text_sparsity(
    data: Path | None = None,
    seed: int = 0,
    patterns: Sequence[str] = ("unstructured",),
    steps: int = 800,
    quick: bool = False,
) -> Iterator[dict]:
    """One line per pattern and method, and one that says whether perplexities fall in the order of ORDER."""
    text = load_text(data, seed)
    torch.manual_seed(seed)
    dense = Gpt(len(text.alphabet), **({"length": 64, "width": 64, "layers": 2} if quick else {}))
    start = time.perf_counter()
    train(dense, text, steps, BATCH, RATE, seed, f"train, seed {seed}")
    batches = calibration(text, dense.length, 4 if quick else CALIBRATION, BATCH, seed + 1)
    common = {"benchmark": "perplexity at 50 %", "text": text.name, "seed": seed}
    yield common | {"name": "dense", "perplexity": perplexity(dense, text.test), "seconds": time.perf_counter() - start}
    for pattern in patterns:
        options = {"pattern": pattern, "exclude": ["head"]}
        methods = {
            "magnitude": partial(prune_by_magnitude, sparsity=None, pattern=pattern),
            "wanda": partial(rf.pruning.wanda, loader=batches, **options),
            "sparse_gpt": partial(rf.pruning.sparse_gpt, loader=batches, **options),
            "refit": partial(rf.pruning.sparse_gpt, loader=batches, refit=True, **options),
        }
        values = []
        for name in ORDER:
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            methods[name](model)
            seconds = time.perf_counter() - start
            values.append(perplexity(model, text.test))
            yield common | {"pattern": pattern, "name": name, "perplexity": values[-1], "seconds": seconds}
        yield common | {"pattern": pattern, "name": "order", "falls": all(a > b for a, b in pairwise(values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pattern", nargs="+", default=["unstructured"])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for line in text_sparsity(arguments.data, seed, arguments.pattern, arguments.steps, arguments.quick):
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


if __name__ == "__main__":
    main()
