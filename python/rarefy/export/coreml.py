"""Core ML packages (.mlpackage) for Apple's devices. They are converted here, and run only there."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.export import runtime
from rarefy.export.program import export_program
from rarefy.export.report import ExportReport
from rarefy.export.runtime import ExampleInputs

if TYPE_CHECKING:
    import coremltools

_FUNCTION = "to_coreml"


@runtime.without_autocast()
def to_coreml(
    model: nn.Module, example_inputs: ExampleInputs, path: str | os.PathLike[str], *, float16: bool = False
) -> ExportReport:
    """Writes the model as a Core ML program (iOS 17, macOS 14) with int8 weights and its quantizers as operators.

    Weights are the trained integers behind `constexpr_affine_dequantize`; activations pass through `quantize` and
    `dequantize`, from which the device's compiler chooses integer kernels. Core ML runs on Apple's systems only: the
    package is checked for holding these integers and **not run**, and the report says so.

    The model is evaluated in evaluation mode on a copy; it is not changed, whatever happens.

    Args:
        model: any module; parts that are not quantized are exported in float.
        example_inputs: what the model is called with: a tensor, a sequence of tensors, or tensors by argument name
            (with plain values, which are fixed). The package takes inputs of exactly these shapes.
        path: the package to write, a folder ending in .mlpackage. It gets its name when it is complete.
        float16: compute in float16 between the quantizers, as the Neural Engine does. Scales and biases are then rounded
            to float16, so that a value next to a tie may go to the other integer.

    Returns:
        What is in the package.

    Raises:
        ImportError: the packages of `rarefy[coreml]` are missing.
        TypeError, ValueError: an argument; quantizers that cannot be written, or activations of other than 8 bits;
            with `float16`, scales that it cannot hold.
        OSError: the path cannot be written.
        RuntimeError: the model cannot be translated, or the package does not hold its integers.
            In every case nothing is left, and a package that had the name before is as it was.
    """
    start = time.perf_counter()
    runtime.require(_FUNCTION, "coreml", "coremltools")
    prepared = runtime.prepare_model(_FUNCTION, model, example_inputs)
    if float16:
        _check_scales(prepared.lowered)
    with runtime.pending(_FUNCTION, path, ".mlpackage", folder=True) as temporary:
        program = export_program(_FUNCTION, prepared.lowered, prepared.example)
        package = _convert(program, float16)
        nodes = Counter(operation.type for operation in _operations(package))
        stored, trained = nodes["constexpr_affine_dequantize"], _quantized_weights(program)
        if stored != trained:
            raise RuntimeError(f"[{_FUNCTION}] the package must hold {trained} int8 weights, got {stored}")
        package.save(os.fspath(temporary))
        size = runtime.size_of(temporary)
    del nodes["const"]
    return ExportReport(
        path=Path(path),
        bytes=size,
        target="coreml",
        opset=None,
        nodes=dict(nodes.most_common()),
        seconds=time.perf_counter() - start,
        notes=(f"converted, not run: Core ML runs on Apple's systems only; {stored} weights are int8",),
    )


def _convert(program: torch.export.ExportedProgram, float16: bool) -> coremltools.models.MLModel:
    with runtime.quiet("coremltools"):
        import coremltools

        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
                precision = coremltools.precision.FLOAT16 if float16 else coremltools.precision.FLOAT32
                return coremltools.convert(
                    program.run_decompositions({}),
                    minimum_deployment_target=coremltools.target.iOS17,
                    compute_precision=precision,
                    skip_model_load=True,
                )
        except Exception as error:
            raise RuntimeError(
                f"[{_FUNCTION}] coremltools cannot translate the model: {type(error).__name__}: {error}"
            ) from error


def _check_scales(lowered: nn.Module) -> None:
    smallest, largest = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    for name, module in lowered.named_modules():
        scale = torch.as_tensor(getattr(module, "scale", 1.0))
        if not (float(scale.min()) >= smallest and float(scale.max()) <= largest):
            raise ValueError(
                f"[{_FUNCTION}] scales must be between {smallest:g} and {largest:g} for float16=True, got "
                f"{float(scale.min()):g} to {float(scale.max()):g} at {name or 'the root'}"
            )


def _operations(package: coremltools.models.MLModel) -> Iterator[Any]:
    for function in package.get_spec().mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def _quantized_weights(program: torch.export.ExportedProgram) -> int:
    """The number of dequantize operators that read a constant."""
    graph = program.graph_module.graph
    return sum(
        node.op == "call_function" and "dequantize_per_" in str(node.target) and node.args[0].op == "placeholder"
        for node in graph.nodes
    )
