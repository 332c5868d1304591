"""Quantization-aware training beside plain training: time of a step, and bytes saved for the backward pass.

A step is forward, loss, backward, SGD step and zero_grad(set_to_none=True). Every row is a ratio to the FP32 step of
the same model, timed in turn with it. Saved bytes are counted by torch.autograd.graph.saved_tensors_hooks, once per
storage: all of them, and without the parameters' own, which are memory that training has anyway. The goal is about all of
them, as figures of peers are.

    python benchmarks/qat_step.py [--model resnet18|mlp|encoder|all] [--threads 1 2] [--repeats 11] [--peers]
                                  [--quick] [--json] [--profile] [--only NAME ...]
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import models
import torch
import torch.nn.functional as F
from peers import PEERS
from timing import interleaved
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import QConfig


@dataclass(frozen=True)
class Case:
    """A model, its batch, and what is asked of rarefy on it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    goals: dict[str, float]  # from row to the highest ratio of time
    saved_goal: float | None = None


CASES = {
    "resnet18": Case(
        models.ResNet18, (32, 3, 64, 64), 1000, {"rarefy": 0.85, "rarefy, bfloat16 gradients": 0.55}, 0.65
    ),
    "mlp": Case(models.mlp, (128, 784), 10, {}),
    "encoder": Case(models.Encoder, (8, 64, 768), 10, {"rarefy": 0.6, "rarefy, bfloat16 gradients": 0.3}, 0.36),
}


class Unavailable(Exception):
    """A row that cannot be measured here, and why."""


class Trainer:
    """A model with its optimizer and batch."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, autocast: bool = False) -> None:
        self.model, self.x, self.labels, self.autocast = model, x, labels, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(self.x).float(), self.labels)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes that a forward pass keeps for the backward pass: without the parameters, and with them."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        sizes = {address: storage.nbytes() for address, storage in storages.items()}
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(sizes.values())
        return total - sum(sizes.get(address, 0) for address in parameters), total


def rarefy_config(**fields: object) -> QConfig:
    known = {field.name for field in dataclasses.fields(QConfig)}
    for name in fields:
        if name not in known:
            raise Unavailable(f"this rarefy's QConfig has no field {name}")
    return QConfig.int8(**fields)


def rarefy_model(model: nn.Module, x: Tensor, **fields: object) -> nn.Module:
    return rf.quantization.prepare_qat(model, rarefy_config(**fields), x)


ROWS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "FP32": lambda model, x: model,
    "BF16 autocast": lambda model, x: model,
    "rarefy": rarefy_model,
    "rarefy, bfloat16 gradients": lambda model, x: rarefy_model(model, x, gradient_dtype=torch.bfloat16),
    "rarefy, simulated": lambda model, x: rarefy_model(model, x, execution="simulated"),
}


def build_trainer(case: Case, name: str, x: Tensor, labels: Tensor) -> Trainer:
    torch.manual_seed(0)
    model = case.build().train()
    if name in ROWS:
        model = ROWS[name](model, x)
    else:
        try:
            model = PEERS[name](model, x)
        except ImportError as error:
            raise Unavailable(str(error)) from error
    trainer = Trainer(model, x, labels, autocast=name == "BF16 autocast")
    trainer.step()
    return trainer


def measure(name: str, case: Case, threads: int, rows: list[str], repeats: int, warmup: int) -> list[dict[str, object]]:
    """One record per row: milliseconds, saved bytes and their ratios to FP32, or the reason why there is none."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator)
    labels = torch.randint(case.classes, (case.shape[0],), generator=generator)
    trainers: dict[str, Trainer] = {}
    reasons: dict[str, str] = {}
    for row in rows:
        print(f"  building {name}: {row}", file=sys.stderr)
        try:
            trainers[row] = build_trainer(case, row, x, labels)
        except Unavailable as reason:
            reasons[row] = str(reason)
        except Exception as error:  # a peer that fails on this model is a result, rarefy that fails is an error
            if row not in PEERS:
                raise
            reasons[row] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    saved = {row: trainer.saved_bytes() for row, trainer in trainers.items()}
    seconds = interleaved({row: trainer.step for row, trainer in trainers.items()}, repeats, warmup)
    records = []
    for row in rows:
        record: dict[str, object] = {"benchmark": "qat_step", "model": name, "threads": threads, "row": row}
        if row in reasons:
            record["unavailable"] = reasons[row]
        else:
            activations, total = saved[row]
            record |= {
                "milliseconds": round(seconds[row] * 1e3, 3),
                "ratio": round(seconds[row] / seconds["FP32"], 3),
                "goal": case.goals.get(row),
                "saved_megabytes": round(total / 1e6, 3),
                "saved_ratio": round(total / saved["FP32"][1], 3),
                "saved_ratio_without_parameters": round(activations / saved["FP32"][0], 3),
                "saved_goal": case.saved_goal if row.startswith("rarefy") and row != "rarefy, simulated" else None,
            }
        records.append(record)
    return records


def show(records: list[dict[str, object]]) -> None:
    def cell(value: object, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print(f"\n{records[0]['model']}, {records[0]['threads']} thread(s); ratios to FP32")
    print(f"{'':28} {'ms':>9} {'time':>6} {'goal':>6} {'saved MB':>9} {'saved':>6} {'goal':>6} {'- parameters':>13}")
    for r in records:
        if "unavailable" in r:
            print(f"{r['row']:28} {r['unavailable']}")
            continue
        print(
            f"{r['row']:28} {cell(r['milliseconds'], 1):>9} {cell(r['ratio'], 2):>6} {cell(r['goal'], 2):>6} "
            f"{cell(r['saved_megabytes'], 1):>9} {cell(r['saved_ratio'], 2):>6} {cell(r['saved_goal'], 2):>6} "
            f"{cell(r['saved_ratio_without_parameters'], 2):>13}"
        )


def profile(name: str, case: Case, threads: int, row: str, repeats: int) -> None:
    """The operators of a step by their own time."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator)
    labels = torch.randint(case.classes, (case.shape[0],), generator=generator)
    trainer = build_trainer(case, row, x, labels)
    for _ in range(2):
        trainer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            trainer.step()
    print(f"\n{name}: {row}, {repeats} steps, {threads} thread(s)")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--peers", action="store_true", help="also torch.ao, torchao and brevitas, where installed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name contains one of these, beside FP32")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--profile", action="store_true", help="the operators of rarefy's step instead of ratios")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.*")  # torch.ao says at every call that it is deprecated

    rows = [*ROWS, *(PEERS if arguments.peers else {})]
    if arguments.only:
        rows = [r for r in rows if r == "FP32" or any(wanted.lower() in r.lower() for wanted in arguments.only)]
    repeats, warmup = (3, 1) if arguments.quick else (arguments.repeats, 2)
    for name, case in CASES.items():
        if arguments.model not in (name, "all"):
            continue
        for threads in arguments.threads:
            if arguments.profile:
                for row in [r for r in rows if arguments.only and r != "FP32"] or ["rarefy"]:
                    profile(name, case, threads, row, repeats)
                continue
            records = measure(name, case, threads, rows, repeats, warmup)
            if arguments.json:
                for record in records:
                    print(json.dumps(record), flush=True)
            else:
                show(records)


if __name__ == "__main__":
    main()
