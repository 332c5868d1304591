"""Measure the distillation loss of two linear heads, forward and backward: time and peak extra memory.

Peak extra memory is the growth of the process's peak resident memory over one step, gradients of hidden states and head
included. Each variant has a process of its own: after a first step (which compiles and warms up) its results are freed and
given back to the system, and the peak is counted anew (Linux: /proc/self/clear_refs). Times are medians of rounds in which
all variants take turns, each in its process. Prints one JSON line.

    python benchmarks/linear_kd_loss.py [--rows N] [--classes C] [--size H] [--peers] [--repeats R]

--peers adds torch.compile of the naive loss and Liger's chunked loss, plain and compiled; the latter needs the
package liger_kernel on PYTHONPATH (its folder chunked_loss is enough).
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rarefy as rf

TEMPERATURE, ALPHA = 2.0, 0.5


def naive_loss(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the loss as it is written with torch's operators."""
    student = hidden @ weight.t()
    with torch.no_grad():
        target = F.softmax(teacher @ head.t() / TEMPERATURE, dim=-1)
    soft = F.kl_div(F.log_softmax(student / TEMPERATURE, dim=-1), target, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


def make_loss(variant: str) -> Callable[..., torch.Tensor]:
    """Return loss(hidden, weight, teacher hidden, teacher weight, labels)."""
    if variant == "rarefy":
        return rf.distillation.LinearDistillationLoss(temperature=TEMPERATURE, alpha=ALPHA)
    if variant == "naive":
        return naive_loss
    if variant == "compiled":
        return torch.compile(naive_loss, fullgraph=True)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta 0 is KL(teacher || student); it has no T^2, which costs no time.
    return LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA,
        weight_soft_loss=ALPHA,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=variant == "liger compiled",
    )


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def work(arguments: argparse.Namespace) -> None:
    """Be the process of one variant: print the peak and the loss, then the seconds of a step for every line read."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    rows, classes, size = arguments.rows, arguments.classes, arguments.size
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = (torch.randn(classes, size) * size**-0.5).to(dtype).requires_grad_()
    teacher, head = torch.randn(rows, size).to(dtype), (torch.randn(classes, size) * size**-0.5).to(dtype)
    labels = torch.randint(0, classes, (rows,))
    loss_fn = make_loss(arguments.variant)

    def step() -> float:
        hidden.grad = weight.grad = None
        loss = loss_fn(hidden, weight, teacher, head, labels)
        loss.backward()
        return loss.item()

    loss = step()
    hidden.grad = weight.grad = None
    rf._core.release_cached_memory()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = memory("VmRSS")
    step()
    print(json.dumps({"peak": memory("VmHWM") - before, "loss": loss}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure(
    rows: int, classes: int, size: int, dtype: str = "float32", threads: int = 2, repeats: int = 5, peers: bool = False
) -> dict:
    """Return the figures of all variants, with the goals beside them."""
    processes: dict[str, subprocess.Popen] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    names = ["rarefy", "naive", *(["compiled", "liger", "liger compiled"] if peers else [])]
    try:
        for name in names:
            command = [sys.executable, __file__, "--variant", name, "--dtype", dtype]
            for option, value in (("rows", rows), ("classes", classes), ("size", size), ("threads", threads)):
                command += [f"--{option}", str(value)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name] = process
            line = process.stdout.readline()
            if not line:
                print(f"{name}: could not run", file=sys.stderr)
                del processes[name]
                continue
            first = json.loads(line)
            peaks[name], losses[name], seconds[name] = first["peak"], first["loss"], []
        for round_number in range(repeats):
            order = list(processes)
            shift = round_number % len(order)
            for name in order[shift:] + order[:shift]:
                processes[name].stdin.write("\n")
                processes[name].stdin.flush()
                seconds[name].append(float(processes[name].stdout.readline()))
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    if abs(losses["rarefy"] - losses["naive"]) > 1e-2 * abs(losses["naive"]):
        raise AssertionError(f"the losses differ: {losses}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    row = {
        "benchmark": "linear_kd_loss",
        "shape": [rows, classes, size],
        "dtype": dtype,
        "threads": threads,
        "milliseconds": {name: round(value * 1e3, 1) for name, value in medians.items()},
        "peak_extra_mib": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "rarefy_over_naive_memory": round(peaks["rarefy"] / peaks["naive"], 4),
        "goal_memory": round(1 / 12, 4),
        "rarefy_over_naive_time": round(medians["rarefy"] / medians["naive"], 3),
        "goal_time": 1.0,
    }
    if "liger compiled" in peaks:
        row["rarefy_over_liger_compiled_memory"] = round(peaks["rarefy"] / peaks["liger compiled"], 3)
        row["goal_liger_compiled_memory"] = 1.0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant is not None:
        work(arguments)
        return
    options = {name: value for name, value in vars(arguments).items() if name != "variant"}
    print(json.dumps(measure(**options)), flush=True)


if __name__ == "__main__":
    main()
