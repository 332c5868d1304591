"""Time the distillation loss, forward and backward, beside torch's own operators and the time to move its bytes.

The limit reads both logits and writes the gradient once, into memory that is already mapped, with as many threads:
torch.add with an output. Prints one JSON line per shape on stdout and a table on stderr, and then a line for the loss with
both linear heads (linear_kd_loss.py, which says how it measures memory).

    python benchmarks/kd_loss.py [--shape ROWSxCLASSES ...] [--temperature T] [--quick] [--peers] [--linear ROWSxCLASSESxSIZE]

--peers adds torch.compile, and Liger's chunked loss to the linear heads (package liger_kernel on PYTHONPATH).
"""

import argparse
import json
import sys
from collections.abc import Callable

import linear_kd_loss
import torch
import torch.nn.functional as F
from timing import interleaved

import rarefy as rf

SHAPES = ["8192x1000", "512x32000", "2048x50257"]
GOAL_OVER_LIMIT = 2.0


def eager_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, alpha: float
) -> torch.Tensor:
    """Return the loss as it is written with torch's operators."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


def measure(
    rows: int, classes: int, dtype: torch.dtype, temperature: float, alpha: float, repeats: int, peers: bool
) -> dict:
    """Return one row of the table for logits of shape [rows, classes]."""
    torch.manual_seed(0)
    student = (torch.randn(rows, classes) * 3).to(dtype)
    teacher = (torch.randn(rows, classes) * 3).to(dtype)
    labels = torch.randint(0, classes, (rows,))
    mapped = torch.zeros_like(teacher)
    loss_fn = rf.distillation.DistillationLoss(temperature=temperature, alpha=alpha)

    # Each has logits of its own, so that none frees the gradient of another.
    logits = {name: student.detach().clone().requires_grad_() for name in ("rarefy", "eager", "compiled")}

    def forward_backward(name: str, loss: Callable[..., torch.Tensor]) -> torch.Tensor:
        logits[name].grad = None
        value = loss(logits[name])
        value.backward()
        return value.detach()

    def ours() -> torch.Tensor:
        return forward_backward("rarefy", lambda s: loss_fn(s, teacher, labels))

    def eager() -> torch.Tensor:
        return forward_backward("eager", lambda s: eager_loss(s, teacher, labels, temperature, alpha))

    def limit() -> None:
        torch.add(student, teacher, out=mapped)

    difference = abs(ours().item() - eager().item())
    if difference > 1e-2 * abs(eager().item()):
        raise AssertionError(f"the two losses differ by {difference}")
    functions = {"rarefy": ours, "eager": eager, "limit": limit}
    if peers:
        compiled_loss = torch.compile(eager_loss, fullgraph=True)
        functions["compiled"] = lambda: forward_backward(
            "compiled", lambda s: compiled_loss(s, teacher, labels, temperature, alpha)
        )
    seconds = interleaved(functions, repeats=repeats)
    return {
        "benchmark": "kd_loss",
        "shape": [rows, classes],
        "dtype": str(dtype).removeprefix("torch."),
        "temperature": temperature,
        "alpha": alpha,
        "threads": torch.get_num_threads(),
        "instruction_set": rf._core.instruction_set(),
        "milliseconds": {name: round(value * 1e3, 3) for name, value in seconds.items()},
        "rarefy_over_limit": round(seconds["rarefy"] / seconds["limit"], 2),
        "goal_over_limit": GOAL_OVER_LIMIT,
        "eager_over_limit": round(seconds["eager"] / seconds["limit"], 2),
        "eager_over_rarefy": round(seconds["eager"] / seconds["rarefy"], 2),
        **({"compiled_over_limit": round(seconds["compiled"] / seconds["limit"], 2)} if peers else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="RxC", help=f"default: {' and '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--linear", default="4096x32000x768", metavar="RxCxH", help="heads and loss; '' leaves it out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'shape':>12} {'rarefy ms':>10} {'eager ms':>10} {'limit ms':>10} {'rarefy/limit':>13} {'eager/limit':>12}",
          file=sys.stderr)  # fmt: skip
    for shape in arguments.shape or SHAPES:
        rows, classes = (int(size) for size in shape.split("x"))
        row = measure(
            rows,
            classes,
            getattr(torch, arguments.dtype),
            arguments.temperature,
            arguments.alpha,
            5 if arguments.quick else arguments.repeats,
            arguments.peers,
        )
        times = row["milliseconds"]
        print(f"{shape:>12} {times['rarefy']:>10} {times['eager']:>10} {times['limit']:>10} "
              f"{row['rarefy_over_limit']:>13} {row['eager_over_limit']:>12}", file=sys.stderr)  # fmt: skip
        print(json.dumps(row), flush=True)
    if arguments.linear:
        sizes = [int(size) for size in arguments.linear.split("x")]
        row = linear_kd_loss.measure(
            *sizes, arguments.dtype, arguments.threads, 2 if arguments.quick else 5, arguments.peers
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
