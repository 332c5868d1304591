"""Half of the channels of ResNet-50 and ViT-base removed: time to do it beside Torch-Pruning, and what it gains.

A row of the first table is everything from the float model and its example inputs to the smaller model: record or trace,
find the groups, score, choose, cut. rarefy also compares what it cut with a masked model before it keeps it; Torch-Pruning
does not. Every call gets a fresh deep copy. The goal is about the ratio of the calls alone; the ratio with the copies
counted on both sides, one forward pass and one copy are printed beside it.

The second table times the cut model against the whole one, in eager mode and in ONNX Runtime, beside the ratio of the
multiply-accumulates.

    python benchmarks/structured_pruning.py [--model resnet50|vit|all] [--threads 1 2] [--repeats 9] [--peers]
                                            [--no-gain] [--quick] [--json]
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from timing import interleaved
from torch import Tensor, nn

import rarefy as rf

GOAL = 0.5  # of Torch-Pruning's time
RATIO = 0.5  # of the channels of each group, or of all
SHAPE = (1, 3, 224, 224)


@dataclass(frozen=True)
class Case:
    """A model, and the layer whose outputs are the classes."""

    build: Callable[[], nn.Module]
    classifier: str


CASES = {"resnet50": Case(models.ResNet50, "fc"), "vit": Case(models.VisionTransformer, "head")}


@dataclass(frozen=True)
class Row:
    """What is removed: by which norm of the weights, and compared within a group or over all."""

    importance: str
    scope: str

    def __str__(self) -> str:
        return f"{self.importance} {self.scope}"


ROWS = (Row("l1", "local"), Row("l1", "global"), Row("l2", "local"))


def with_rarefy(case: Case, model: nn.Module, x: Tensor, row: Row) -> None:
    pruner = rf.pruning.StructuredPruner(model, x, channels=RATIO, importance=row.importance, scope=row.scope)
    pruner.prune()


def with_torch_pruning(case: Case, model: nn.Module, x: Tensor, row: Row) -> None:
    import torch_pruning

    heads = {
        projection: layer.heads
        for layer in model.modules()
        if isinstance(layer, models.EncoderLayer)
        for projection in (layer.query, layer.key, layer.value)
    }
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=int(row.importance[1])),
        global_pruning=row.scope == "global",
        pruning_ratio=RATIO,
        ignored_layers=[model.get_submodule(case.classifier)],
        num_heads=heads,
        in_channel_groups={},  # its defaults are dictionaries that every pruner writes to
        out_channel_groups={},
    )
    pruner.step()


def missing_peer() -> str | None:
    """Why Torch-Pruning cannot be timed here."""
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        return f"Torch-Pruning is not installed ({error}): pip install --no-deps torch-pruning==1.6.1"
    return None


class Fresh:
    """A function of a fresh deep copy at each call; keeps the seconds of the call alone, and of the copy with it."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], object]) -> None:
        self.model, self.function = model, function
        self.alone: list[float] = []
        self.with_copy: list[float] = []

    def __call__(self) -> None:
        gc.collect()  # what the last call left behind is not this one's
        start = time.perf_counter()
        model = copy.deepcopy(self.model)
        copied = time.perf_counter()
        self.function(model)
        end = time.perf_counter()
        self.alone.append(end - copied)
        self.with_copy.append(end - start)


def measure(name: str, case: Case, threads: int, peers: bool, repeats: int, warmup: int) -> list[dict[str, object]]:
    """One record per row and side: milliseconds, and their ratios to Torch-Pruning's of the same row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = case.build().eval()
    x = torch.randn(SHAPE)
    sides = {"rarefy": with_rarefy}
    reason = missing_peer() if peers else None
    if peers and reason is None:
        sides["Torch-Pruning"] = with_torch_pruning
    functions = {
        (side, row): Fresh(model, lambda fresh, prune=prune, row=row: prune(case, fresh, x, row))
        for row in ROWS
        for side, prune in sides.items()
    }
    no_grad = torch.no_grad()

    def forward() -> None:
        with no_grad:
            model(x)

    references = {"forward": forward, "deepcopy": lambda: copy.deepcopy(model)}
    seconds = interleaved(
        {**references, **{str(key): function for key, function in functions.items()}}, repeats, warmup
    )
    base = {"benchmark": "structured_pruning", "model": name, "threads": threads}
    records: list[dict[str, object]] = [
        base | {"row": reference, "milliseconds": round(seconds[reference] * 1e3, 1)} for reference in references
    ]
    for (side, row), function in functions.items():
        alone = statistics.median(function.alone[warmup:])
        both = statistics.median(function.with_copy[warmup:])
        record = base | {"row": str(row), "side": side, "milliseconds": round(alone * 1e3, 1)}
        record |= {"milliseconds_with_copy": round(both * 1e3, 1), "forwards": round(alone / seconds["forward"], 2)}
        peer = functions.get(("Torch-Pruning", row))
        if side == "rarefy" and peer is not None:
            record["ratio"] = round(alone / statistics.median(peer.alone[warmup:]), 3)
            record["ratio_with_copy"] = round(both / statistics.median(peer.with_copy[warmup:]), 3)
            record["goal"] = GOAL
        records.append(record)
    if reason is not None:
        records += [base | {"row": str(row), "side": "Torch-Pruning", "unavailable": reason} for row in ROWS]
    return records


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products, counted by torch as it runs them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def onnx_session(model: nn.Module, x: Tensor, folder: Path, name: str, threads: int) -> Callable[[], object]:
    """The exported model as a function without arguments."""
    import onnxruntime

    file = folder / f"{name}.onnx"
    rf.export.to_onnx(model, x, file, dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def gain(name: str, case: Case, threads: int, repeats: int, warmup: int) -> list[dict[str, object]]:
    """One record per row and runtime: times of the whole and the cut model, and their ratio beside that of the MACs."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    whole = case.build().eval()
    x = torch.randn(SHAPE)
    no_grad = torch.no_grad()

    def eager(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with no_grad:
                model(x)

        return run

    cut = {}
    for row in ROWS[:2]:
        cut[str(row)] = copy.deepcopy(whole)
        with_rarefy(case, cut[str(row)], x, row)
    named = {"whole": whole, **cut}
    counted = {key: macs(model, x) for key, model in named.items()}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {"eager": {key: eager(model) for key, model in named.items()}}
        try:
            runtimes["ONNX Runtime"] = {
                key: onnx_session(model, x, Path(folder), key.replace(" ", "_"), threads)
                for key, model in named.items()
            }
        except ImportError as error:
            print(f"  {name} is not timed in ONNX Runtime: {error}", file=sys.stderr)
        for runtime, functions in runtimes.items():
            seconds = interleaved(functions, repeats, warmup)
            for key in cut:
                records.append(
                    {
                        "benchmark": "structured_pruning gain",
                        "model": name,
                        "threads": threads,
                        "row": key,
                        "runtime": runtime,
                        "milliseconds_before": round(seconds["whole"] * 1e3, 2),
                        "milliseconds": round(seconds[key] * 1e3, 2),
                        "speed_up": round(seconds["whole"] / seconds[key], 2),
                        "macs_ratio": round(counted["whole"] / counted[key], 2),
                    }
                )
    return records


def show(records: list[dict[str, object]]) -> None:
    def cell(record: dict[str, object], key: str) -> str:
        value = record.get(key)
        return "-" if value is None else f"{value:.2f}" if key.startswith("ratio") else str(value)

    print(f"\n{records[0]['model']}, {records[0]['threads']} thread(s)")
    print(f"{'':12} {'':14} {'ms':>8} {'with copy':>10} {'forwards':>9} {'ratio':>6} {'with copy':>10} {'goal':>5}")
    columns = {
        "milliseconds": 8,
        "milliseconds_with_copy": 10,
        "forwards": 9,
        "ratio": 6,
        "ratio_with_copy": 10,
        "goal": 5,
    }
    for record in records:
        side = record.get("side", "")
        if "unavailable" in record:
            print(f"{record['row']:12} {side:14} {record['unavailable']}")
            continue
        cells = " ".join(f"{cell(record, key):>{width}}" for key, width in columns.items())
        print(f"{record['row']:12} {side:14} {cells}")


def show_gain(records: list[dict[str, object]]) -> None:
    print(f"\n{'':12} {'':14} {'ms before':>10} {'ms':>8} {'speed-up':>9} {'MAC ratio':>10}")
    for r in records:
        print(
            f"{r['row']:12} {r['runtime']:14} {r['milliseconds_before']:>10} {r['milliseconds']:>8} "
            f"{r['speed_up']:>9} {r['macs_ratio']:>10}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", action="store_true", help="also Torch-Pruning, where installed")
    parser.add_argument("--no-gain", action="store_true", help="leave out the times of the cut model")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.*")  # Torch-Pruning's notes at each call, torch's about export

    repeats, warmup = (3, 1) if arguments.quick else (arguments.repeats, 2)
    for name, case in CASES.items():
        if arguments.model not in (name, "all"):
            continue
        for threads in arguments.threads:
            records = measure(name, case, threads, arguments.peers, repeats, warmup)
            gains = [] if arguments.no_gain else gain(name, case, threads, repeats, warmup)
            if arguments.json:
                for record in records + gains:
                    print(json.dumps(record), flush=True)
            else:
                show(records)
                if gains:
                    show_gain(gains)


if __name__ == "__main__":
    main()
