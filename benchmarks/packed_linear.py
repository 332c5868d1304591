"""Memory and time of a linear layer with a packed weight, beside the same layer in FP32.

    python benchmarks/packed_linear.py --size 4096 --rows 1 32 --threads 1

Times are medians of interleaved calls: wall time, or processor time with --processor (for machines that others use).
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from timing import interleaved
from torch import nn

from rarefy.quantization import QConfig, calibrate, convert, prepare, save_quantized

PRESETS = {
    "int4, groups of 128": QConfig.int4_weight_only(),
    "NF4, double-quantized": QConfig.nf4(),
    "FP8 weights": QConfig(weight=QConfig.fp8().weight),
    "MXFP8 weights": QConfig(weight=QConfig.mxfp8().weight),
    "NVFP4 weights": QConfig(weight=QConfig.nvfp4().weight),
}


def folder_bytes(model: nn.Module) -> int:
    """What the model takes on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(model, Path(folder) / "model")
        return sum(file.stat().st_size for file in (Path(folder) / "model").iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--processor", action="store_true", help="processor time instead of wall time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(arguments.size, arguments.size, bias=False)).eval()
    simulated, packed = {}, {}
    for name, config in PRESETS.items():
        prepared = prepare(model, config).eval()
        if config.activation is not None:
            calibrate(prepared, [torch.randn(1, arguments.size)])
        simulated[name], packed[name] = prepared, convert(prepared)
    floats = model[0].weight.numel() * 4
    print(f"weight of {arguments.size} x {arguments.size}: {floats / 1e6:.1f} MB in FP32")
    for name, layer in packed.items():
        print(
            f"{name:24} {layer[0].weight_bytes / 1e6:6.2f} MB, {layer[0].bits_per_value:.2f} bits per value, "
            f"1/{floats / layer[0].weight_bytes:.1f}; folder {folder_bytes(layer) / 1e6:.2f} MB"
        )
    clock = time.process_time if arguments.processor else time.perf_counter
    for rows in arguments.rows:
        x = torch.randn(rows, arguments.size)
        with torch.inference_mode():
            equal = {name: torch.equal(packed[name](x), simulated[name](x)) for name in PRESETS}
            functions = {"FP32": lambda x=x: model(x)}
            functions |= {name: lambda x=x, layer=layer: layer(x) for name, layer in packed.items()}
            seconds = interleaved(functions, arguments.repeats, clock=clock)
        print(f"{rows} rows: FP32 {1e3 * seconds['FP32']:.2f} ms")
        for name in PRESETS:
            ratio = seconds[name] / seconds["FP32"]
            same = "to the bit" if equal[name] else "up to the order of sums"
            print(f"  {name:24} {1e3 * seconds[name]:7.2f} ms, {ratio:.2f} of FP32; equals the simulated layer {same}")


if __name__ == "__main__":
    main()
