"""Take half of a language model's weights away without training: magnitude, Wanda, SparseGPT, and the exact refit.

    python examples/python/prune_gpt.py                  # Python's own documentation, some minutes on two cores
    python examples/python/prune_gpt.py --data sst2      # a folder with train.tsv and dev.tsv: sentence, tab, label
    python examples/python/prune_gpt.py --pattern 2:4    # two of four, which sparse tensor cores multiply
    python examples/python/prune_gpt.py --quick          # seconds, to see that it works

A small GPT of characters is trained. Four copies lose the same number of weights in every layer, by four methods, all with
the same calibration text where they need any. One table compares their perplexity on text that nothing has seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from _common import atomic
from _gpt import Gpt, calibration, continued, load_text, perplexity, train

import rarefy as rf

BATCH, RATE = 16, 3e-3
CALIBRATION = 16  #: batches of the same size


def prune_by_magnitude(model: Gpt, sparsity: float | None, pattern: str) -> None:
    """The smallest weights of every layer."""
    weights = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    if sparsity is None:
        kind = rf.pruning.parse_pattern(pattern)
        sparsity = 1 - kind.n / kind.m if isinstance(kind, rf.pruning.NM) else 0.5
    masks = rf.pruning.choose_masks(weights, sparsity, scope="local", pattern=pattern)
    for name, mask in masks.items():
        torch.ops.rarefy.apply_mask_(weights[name].detach(), mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--sparsity", type=float, help="fraction of zeros in every layer of the blocks; default 0.5")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or n:m such as 2:4")
    parser.add_argument("--steps", type=int, default=800, help="training batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/prune_gpt"), help="folder for the report")
    parser.add_argument("--quick", action="store_true", help="a trial of seconds")
    arguments = parser.parse_args()
    try:
        if arguments.sparsity is not None and not 0 <= arguments.sparsity < 1:
            raise ValueError(f"--sparsity: must be in [0, 1), got {arguments.sparsity:g}")
        rf.pruning.parse_pattern(arguments.pattern)
        text = load_text(arguments.data, arguments.seed)
    except ValueError as error:
        parser.error(str(error))

    torch.manual_seed(arguments.seed)
    size = {"length": 32, "width": 32, "layers": 2} if arguments.quick else {}
    dense = Gpt(len(text.alphabet), **size)
    test = text.test[:20_000] if arguments.quick else text.test
    train(dense, text, 30 if arguments.quick else arguments.steps, BATCH, RATE, arguments.seed, "train")

    batches = calibration(text, dense.length, 2 if arguments.quick else CALIBRATION, BATCH, arguments.seed + 1)
    options = {"sparsity": arguments.sparsity, "pattern": arguments.pattern, "exclude": ["head"], "progress": True}
    methods = {
        "magnitude": lambda model: prune_by_magnitude(model, arguments.sparsity, arguments.pattern),
        "Wanda": lambda model: rf.pruning.wanda(model, batches, **options),
        "SparseGPT": lambda model: rf.pruning.sparse_gpt(model, batches, **options),
        "SparseGPT, refit": lambda model: rf.pruning.sparse_gpt(model, batches, refit=True, **options),
    }
    rows = [{"method": "dense", "zeros": 0.0, "perplexity": perplexity(dense, test), "seconds": 0.0}]
    try:
        for name, method in methods.items():
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            result = method(model)
            seconds = time.perf_counter() - start
            weights = [p for key, p in model.named_parameters() if key.startswith("blocks.") and p.dim() == 2]
            zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
            rows.append({"method": name, "zeros": zeros, "perplexity": perplexity(model, test), "seconds": seconds})
    except ValueError as error:
        parser.error(str(error))

    print(f"\n{result}\n")  # of the last method, layer by layer
    print(f"{'method':<18} {'zeros':>7} {'perplexity':>11} {'seconds':>8}")
    for row in rows:
        print(f"{row['method']:<18} {row['zeros']:>7.4f} {row['perplexity']:>11.4f} {row['seconds']:>8.1f}")
    generator = torch.Generator().manual_seed(arguments.seed)
    prompt = "".join(text.alphabet[i] for i in text.test[:12])
    print(f"\nThe last one writes: {continued(model, text, prompt, 120, generator)!r}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with atomic(arguments.out / "report.json") as temporary:
        content = {"text": text.name, "pattern": arguments.pattern, "seed": arguments.seed, "methods": rows}
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{arguments.out / 'report.json'}")


if __name__ == "__main__":
    main()
