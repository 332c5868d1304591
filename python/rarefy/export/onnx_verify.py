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
    import onnxruntime

# An end-to-end difference cannot be bounded by a constant: one value that rounds to the other side of a tie (float sums
# have no fixed order) moves a deep network's outputs about as much as rounding all its activations does. So that
# effect, measured on the same inputs, is the unit. On untrained networks of 9 and 21 layers, 2 to 8 bits, the
# differences were at most 1.3 (rms) and 1.8 (largest) of it.
_NOISE_FACTOR = 4.0
_RELATIVE_RMS, _RELATIVE_MAX = 1e-4, 1e-3  # for float networks: sums in another order
_ROUNDED_RMS, _ROUNDED_MAX = 2e-2, 5e-2  # for MatMulNBits, which rounds its float input to 8 bits by blocks

#: The operators whose execution is worth a line in the report.
_COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool"})

#: Runtime operators that compute on integers, besides those whose names start with QLinear.
_INTEGER = frozenset({"QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "MatMulNBits"})


def _session(path: Path, optimized: bool, save_to: Path | None = None) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if save_to is not None:
        # The level at which integers are fused; the one above it only changes layouts, and drops names there.
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = os.fspath(save_to)
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        state = "on" if optimized else "off"
        raise RuntimeError(
            f"[to_onnx] ONNX Runtime cannot load the file with optimizations {state}: {error}"
        ) from error


def check_operators(path: Path, model: onnx.ModelProto) -> tuple[Operator, ...]:
    """Which operators of the file ONNX Runtime runs in integers, read from its optimized graph."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        _session(path, optimized=True, save_to=optimized_path)
        optimized = onnx.load(optimized_path, load_external_data=False)
    runtime: dict[str, list[str]] = {}
    for node in optimized.graph.node:
        # What ONNX Runtime's layout and fusion steps put around the name of the node that they replace.
        name = re.sub(r"^fused |_token_\d+$|/\w+Fusion\w*$", "", node.name)
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


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _compare(
    where: str,
    got: np.ndarray,
    expected: np.ndarray,
    noise: np.ndarray,
    relative: tuple[float, float],
    scale: float | None,
) -> tuple[float, float, float, float | None, float]:
    """max_abs, rms, allowed, steps and differing of a Difference; throws where they are too large."""
    failed = f"[to_onnx] verification failed: {where}"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise RuntimeError(
            f"{failed} is {got.dtype} {got.shape}, but the model gives {expected.dtype} {expected.shape}"
        )
    if not np.issubdtype(expected.dtype, np.floating):
        differing = float(np.mean(got != expected)) if got.size else 0.0
        allowed = 0.05 + 1.0 / max(got.size, 1)  # an index or a truth value flips where two scores are close
        if differing > allowed:
            raise RuntimeError(f"{failed} differs from the model in {differing:.1%} of its values")
        difference = got.astype(np.float64) - expected.astype(np.float64)
        return _largest(difference), _rms(difference), allowed, None, differing

    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(got), finite):
        raise RuntimeError(f"{failed} is not finite where the model is, or the reverse")
    got, expected = got[finite].astype(np.float64), expected[finite].astype(np.float64)
    difference, noise = got - expected, noise[np.isfinite(noise)]
    seen, seen_max = _rms(difference), _largest(difference)
    allowed = _NOISE_FACTOR * _rms(noise) + relative[0] * _rms(expected)
    allowed_max = _NOISE_FACTOR * _largest(noise) + relative[1] * _largest(expected)
    if seen > allowed or seen_max > allowed_max:
        raise RuntimeError(
            f"{failed} differs from the model by {seen:.3g} rms and {seen_max:.3g} at most "
            f"(allowed {allowed:.3g} and {allowed_max:.3g}; rms of the output {_rms(expected):.3g})"
        )
    edge = 0.5 * scale if scale else 1e-5 * _largest(expected)
    differing = float(np.mean(np.abs(difference) > edge)) if difference.size else 0.0
    return seen_max, seen, allowed, seen_max / scale if scale else None, differing


def compare_outputs(
    path: Path,
    model: onnx.ModelProto,
    cases: Sequence[tuple[int | None, list[np.ndarray], list[np.ndarray]]],
    unrounded: list[np.ndarray],
    rounds_itself: bool,
) -> tuple[Difference, ...]:
    """Runs the file with optimizations off and on, and compares every output with the model's.

    Args:
        path: the file.
        model: what is in it.
        cases: per batch size: the size (None where it is fixed), the inputs, and the model's outputs.
        unrounded: the model's outputs for the first case with activations that are not rounded; how far they are from
            the quantized ones is the unit of the tolerance.
        rounds_itself: the optimized graph has kernels that round activations which the model leaves in float.

    Raises:
        RuntimeError: a difference is too large. Names the output, the optimization level and both numbers.
    """
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    scales = output_scales(model)
    noise = [
        free.astype(np.float64) - want if np.issubdtype(want.dtype, np.floating) else np.zeros(0)
        for free, want in zip(unrounded, cases[0][2], strict=True)
    ]
    differences = []
    for optimized in (False, True):
        relative = (_ROUNDED_RMS, _ROUNDED_MAX) if optimized and rounds_itself else (_RELATIVE_RMS, _RELATIVE_MAX)
        session = _session(path, optimized)
        for batch, arrays, expected in cases:
            results = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
            for name, got, want, unit in zip(outputs, results, expected, noise, strict=True):
                where = f"output {name!r}, optimizations {'on' if optimized else 'off'}"
                where += "" if batch is None else f", batch {batch},"
                found = _compare(where, got, want, unit, relative, scales.get(name))
                differences.append(Difference(name, optimized, batch, *found))
    return tuple(differences)
