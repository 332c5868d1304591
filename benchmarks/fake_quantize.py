"""Fake quantization beside torch's own, as ratios to the time of moving the bytes that must move.

One JSON line per row on stdout, a table on stderr. The limit of a row copies as many bytes as its inputs and outputs
have into memory that is already mapped: forward reads x and writes x_hat, backward reads and writes a gradient, so two
copies.

    python benchmarks/fake_quantize.py [--threads 2] [--repeats 21] [--quick] [--compile] [--process-time] [--rows 1M ...]

"goal" in a line of both passes is the ratio to the limit that the row is to stay below.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from timing import interleaved

import rarefy

ops = torch.ops.rarefy


def forward_backward(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        function(x).backward(grad)

    return run


def forward(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return function(x)

    return run


def copies(sources: list[torch.Tensor]) -> Callable[[], None]:
    """Copy every source into mapped memory of its own, as the operator reads and writes different tensors."""
    pairs = [(source.detach(), torch.zeros_like(source)) for source in sources]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run


def plain_formula(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Straight-through fake quantization written with torch's operators."""
    scaled = (x / scale + zero_point).clamp(qmin, qmax)
    rounded = scaled + (scaled.round() - scaled).detach()
    return (rounded - zero_point) * scale


def observed(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Moving-average observer and per-tensor fake quantization to uint8."""
    low, high = torch.tensor([float("inf")]), torch.tensor([-float("inf")])
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    skipped = torch.zeros(1, dtype=torch.int64)
    on = torch.ones(1)
    theirs = (
        torch.tensor([float("inf")]),
        torch.tensor([-float("inf")]),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int32),
    )
    plain = {"low": torch.zeros(1), "high": torch.ones(1)}

    def formula(x: torch.Tensor) -> torch.Tensor:
        batch_low, batch_high = torch.aminmax(x.detach())
        plain["low"].mul_(0.99).add_(0.01 * batch_low)
        plain["high"].mul_(0.99).add_(0.01 * batch_high)
        step = (plain["high"].clamp(min=0) - plain["low"].clamp(max=0)) / 255
        return plain_formula(x, step, (-plain["low"].clamp(max=0) / step).round(), 0, 255)

    functions = {
        "rarefy": lambda x: ops.observe_fake_quantize(
            x, low, high, scale, zero_point, skipped, None, 0.01, 0, 255, False
        ),
        "torch fused_moving_avg_obs": lambda x: torch.fused_moving_avg_obs_fake_quant(
            x, on, on, *theirs, 0.01, 0, 255, -1
        ),
    }
    if with_compile:
        functions["torch.compile"] = torch.compile(formula, dynamic=False)
    return functions


def per_tensor(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    scale, zero_point = torch.tensor([0.02]), torch.tensor([128], dtype=torch.int32)
    functions = {
        "rarefy": lambda x: ops.fake_quantize(x, scale, zero_point, None, 0, 255),
        "torch per_tensor_affine": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 128, 0, 255),
    }
    if with_compile:
        functions["torch.compile"] = torch.compile(lambda x: plain_formula(x, scale, zero_point, 0, 255), dynamic=False)
    return functions


def per_channel(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    scale = x.detach().abs().amax(dim=(1, 2, 3)) / 127
    zero_point = torch.zeros(len(x), dtype=torch.int32)
    functions = {
        "rarefy": lambda x: ops.fake_quantize(x, scale, zero_point, 0, -128, 127),
        "torch per_channel_affine": lambda x: torch.fake_quantize_per_channel_affine(
            x, scale, zero_point, 0, -128, 127
        ),
    }
    if with_compile:
        view = [-1, 1, 1, 1]
        functions["torch.compile"] = torch.compile(
            lambda x: plain_formula(x, scale.view(view), zero_point.view(view), -128, 127), dynamic=False
        )
    return functions


def learned(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """A scale that is learned (LSQ), per tensor, to int8; the gradient of the scale is part of both passes."""
    factor = (x.numel() * 127) ** -0.5
    scale, zero_point = torch.tensor([0.02], requires_grad=True), torch.zeros(1, dtype=torch.int32)
    theirs, their_zero = torch.tensor([0.02], requires_grad=True), torch.zeros(1)
    plain = torch.tensor([0.02], requires_grad=True)

    def formula(x: torch.Tensor) -> torch.Tensor:
        step = (plain - plain * factor).detach() + plain * factor
        return plain_formula(x, step, zero_point, -128, 127)

    functions = {
        "rarefy": lambda x: ops.fake_quantize_learned(x, scale, zero_point, None, -128, 127, factor),
        "torch learnable_per_tensor": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
            x, theirs, their_zero, -128, 127, factor
        ),
    }
    if with_compile:
        functions["torch.compile"] = torch.compile(formula, dynamic=False)
    return functions


def minifloat(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """E4M3 with a scale for the tensor; torch's is a cast there and back without a gradient that is clipped."""
    scale = torch.tensor([0.01])

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    functions = {
        "rarefy": lambda x: ops.cast_minifloat(x, scale, None, [], 4, 3, 7, "nan"),
        "torch.float8_e4m3fn": theirs,
    }
    if with_compile:
        functions["torch.compile"] = torch.compile(theirs, dynamic=False)
    return functions


def blocks(name: str, *arguments: object) -> Callable[..., dict[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """An operator that finds its scales itself, in one pass; beside it the scales and the cast by torch's operators."""

    def build(x: torch.Tensor, with_compile: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        def formula(x: torch.Tensor) -> torch.Tensor:
            parts = x.view(-1, 32)
            scale = torch.exp2(torch.floor(torch.log2(parts.detach().abs().amax(-1, keepdim=True))) - 8)
            return ((parts / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale).view_as(x)

        functions = {"rarefy": lambda x: getattr(ops, name)(x, *arguments)}
        if arguments == ("e4m3",):
            functions["torch formula"] = formula
            if with_compile:
                functions["torch.compile"] = torch.compile(formula, dynamic=False)
        return functions

    return build


# Shape, functions and the goal for both passes.
ROWS = {
    "observe + fake quantize, 1M": ((1 << 20,), observed, 2.0),
    "observe + fake quantize, 64M": ((1 << 26,), observed, 2.0),
    "fake quantize, 1M": ((1 << 20,), per_tensor, None),
    "fake quantize, 64M": ((1 << 26,), per_tensor, None),
    "learned scale (LSQ), 1M": ((1 << 20,), learned, 3.0),
    "learned scale (LSQ), 64M": ((1 << 26,), learned, 3.0),
    "per-channel weights 512x512x3x3": ((512, 512, 3, 3), per_channel, 2.5),
    "per-channel weights 512x1x3x3": ((512, 1, 3, 3), per_channel, None),
    "FP8 E4M3, 1M": ((1 << 10, 1 << 10), minifloat, 3.0),
    "FP8 E4M3, 64M": ((1 << 13, 1 << 13), minifloat, 3.0),
    "MXFP8 blocks of 32, 1M": ((1 << 10, 1 << 10), blocks("fake_quantize_mx", "e4m3"), 3.0),
    "MXFP8 blocks of 32, 64M": ((1 << 13, 1 << 13), blocks("fake_quantize_mx", "e4m3"), 3.0),
    "MXFP4 blocks of 32, 64M": ((1 << 13, 1 << 13), blocks("fake_quantize_mx", "e2m1"), 3.0),
    "NVFP4 blocks of 16, 64M": ((1 << 13, 1 << 13), blocks("fake_quantize_nvfp4"), None),
    "NF4 blocks of 64, 16M": ((1 << 12, 1 << 12), blocks("fake_quantize_nf4"), None),
    "int8 per token, 64M": ((1 << 13, 1 << 13), blocks("fake_quantize_dynamic", -1, [-1], -128, 127, True), None),
    "int4 groups of 128, 64M": ((1 << 13, 1 << 13), blocks("fake_quantize_dynamic", -1, [128], -8, 7, True), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run, and roughly how fast")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain formula")
    parser.add_argument("--process-time", action="store_true", help="processor time in place of wall time")
    parser.add_argument("--rows", nargs="*", default=[""], help="only rows whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.process_time else time.perf_counter

    print(f"{'row':36} {'pass':9} {'function':28} {'ms':>9} {'/ limit':>8} {'goal':>6}", file=sys.stderr)
    for row, (shape, build, goal) in ROWS.items():
        if not any(wanted in row for wanted in arguments.rows):
            continue
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        grad = torch.randn(shape)
        functions = build(x, arguments.compile)
        forwards = {name: forward(function, x) for name, function in functions.items()}
        both = {name: forward_backward(function, x, grad) for name, function in functions.items()}
        for name_of_pass, candidates, moved in (("forward", forwards, [x]), ("both", both, [x, grad])):
            repeats = max(5, arguments.repeats // 4) if x.numel() >= 1 << 24 else arguments.repeats
            if arguments.quick:
                repeats = min(repeats, 5)
            medians = interleaved({"limit": copies(moved)} | candidates, repeats, clock=clock)
            for name, seconds in medians.items():
                ratio = seconds / medians["limit"]
                record = {
                    "benchmark": "fake_quantize",
                    "row": row,
                    "pass": name_of_pass,
                    "function": name,
                    "milliseconds": round(seconds * 1e3, 4),
                    "ratio_to_limit": round(ratio, 3),
                    "goal": goal if name_of_pass == "both" and name == "rarefy" else None,
                    "threads": arguments.threads,
                    "instruction_set": rarefy._core.instruction_set(),
                }
                print(json.dumps(record), flush=True)
                print(
                    f"{row:36} {name_of_pass:9} {name:28} {seconds * 1e3:9.3f} {ratio:8.2f} {record['goal'] or '':>6}",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
