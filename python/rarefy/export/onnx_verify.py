"""Runs an ONNX file in ONNX Runtime and holds it against the eager model."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rarefy.export.report import Difference, Operator

if TYPE_CHECKING:
    import onnx

# An end-to-end difference cannot be bounded by a constant: one value that rounds to the other side of a tie (float sums
# have no fixed order) moves a deep network's outputs about as much as quantizing its activations does. So that effect,
# measured on the same inputs, is the unit. On untrained ResNets of 2 to 8 bits the differences were at most 1.3 (rms) and
# 1.7 (largest) of it; a dropped activation is 10 and more.
_NOISE_FACTOR = 4.0
_RELATIVE_RMS, _RELATIVE_MAX = 1e-4, 1e-3  # for float networks: sums in another order

#: The operators whose execution is worth a line in the report.
_COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool"})

#: Runtime operators that compute on integers, besides those whose names start with QLinear.
_INTEGER = frozenset({"QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "QAttention"})


def _session(path: Path, optimized: bool, save_to: Path | None = None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if save_to is not None:
        options.optimized_model_filepath = os.fspath(save_to)
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        state = "on" if optimized else "off"
        raise RuntimeError(f"[to_onnx] ONNX Runtime cannot load the file with optimizations {state}: {error}") from error


def check_operators(path: Path, model: onnx.ModelProto) -> tuple[Operator, ...]:
    """Which operators of the file ONNX Runtime runs in integers, read from its optimized graph."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        _session(path, optimized=True, save_to=optimized_path)
        optimized = onnx.load(optimized_path, load_external_data=False)
    runtime: dict[str, list[str]] = {}
    for node in optimized.graph.node:
        # Suffixes that ONNX Runtime's layout and fusion steps append to the name of the node that they replace.
        name = re.sub(r"_token_\d+$|/\w+Fusion\w*$", "", node.name)
        runtime.setdefault(name, []).append(node.op_type)

    constants = {tensor.name for tensor in model.graph.initializer}
    operators = []
    for node in model.graph.node:
        if node.op_type not in _COUNTED or (node.op_type == "Add" and any(name in constants for name in node.input)):
            continue
        made = runtime.get(node.name, [])
        integer = any(op.startswith("QLinear") or op in _INTEGER for op in made)
        operators.append(Operator(node.name, node.op_type, " + ".join(made) or "fused", integer))
    return tuple(operators)


def output_scales(model: onnx.ModelProto) -> dict[str, float]:
    """The scale of each graph output that a DequantizeLinear writes."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    scales = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in outputs and node.input[1] in constants:
            scale = numpy_helper.to_array(constants[node.input[1]])
            if scale.size == 1:
                scales[node.output[0]] = float(scale.reshape(()))
    return scales


def _compare(
    name: str, optimized: bool, batch: int | None, got: np.ndarray, expected: np.ndarray, unquantized: np.ndarray,
    scale: float | None,
) -> Difference:
    state = f"output {name!r} with optimizations {'on' if optimized else 'off'}" + (f", batch {batch}" if batch else "")
    if got.shape != expected.shape:
        raise RuntimeError(f"[to_onnx] verification failed: {state} has shape {got.shape}, the model gives {expected.shape}")
    if not np.issubdtype(expected.dtype, np.floating):
        differing = float(np.mean(got != expected)) if got.size else 0.0
        allowed = 0.05 + 1.0 / max(got.size, 1)  # an index or a truth value flips where two scores are close
        if differing > allowed:
            raise RuntimeError(f"[to_onnx] verification failed: {state} differs from the model in {differing:.1%} of its values")
        return Difference(name, optimized, batch, 0.0 if differing == 0 else float("nan"), 0.0, allowed, None, differing)
    if not np.array_equal(np.isfinite(got), np.isfinite(expected)):
        raise RuntimeError(f"[to_onnx] verification failed: {state} is not finite where the model is, or the reverse")

    finite = np.isfinite(expected)
    got, expected, unquantized = (a[finite].astype(np.float64) for a in (got, expected, unquantized))

    def rms(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean(values**2))) if values.size else 0.0

    def largest(values: np.ndarray) -> float:
        return float(np.abs(values).max()) if values.size else 0.0

    difference, noise = got - expected, unquantized - expected
    noise = noise[np.isfinite(noise)]
    allowed = _NOISE_FACTOR * rms(noise) + _RELATIVE_RMS * rms(expected)
    allowed_max = _NOISE_FACTOR * largest(noise) + _RELATIVE_MAX * largest(expected)
    seen, seen_max = rms(difference), largest(difference)
    if seen > allowed or seen_max > allowed_max:
        raise RuntimeError(
            f"[to_onnx] verification failed: {state} differs from the model by {seen:.3g} rms and {seen_max:.3g} at most "
            f"(allowed {allowed:.3g} and {allowed_max:.3g}; rms of the output {rms(expected):.3g})"
        )
    edge = 0.5 * scale if scale else 1e-5 * largest(expected)
    differing = float(np.mean(np.abs(difference) > edge)) if difference.size else 0.0
    return Difference(name, optimized, batch, seen_max, seen, allowed, seen_max / scale if scale else None, differing)


def compare_outputs(
    path: Path,
    model: onnx.ModelProto,
    cases: Sequence[tuple[int | None, list[np.ndarray], list[np.ndarray], list[np.ndarray]]],
) -> tuple[Difference, ...]:
    """Runs the file with optimizations off and on, and compares every output with the model's.

    Args:
        cases: per batch size: the size (None where it is fixed), the inputs, the model's outputs, and its outputs with
            activations left unquantized, which set the unit of the tolerance.

    Throws RuntimeError naming the output, the optimization level and both numbers when a difference is too large.
    """
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    scales = output_scales(model)
    differences = []
    for optimized in (False, True):
        session = _session(path, optimized)
        for batch, arrays, expected, unquantized in cases:
            results = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
            for name, got, want, free in zip(outputs, results, expected, unquantized, strict=True):
                differences.append(_compare(name, optimized, batch, got, want, free, scales.get(name)))
    return tuple(differences)
