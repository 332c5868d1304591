"""Runs an ONNX file and holds it against the eager model: node by node, and from end to end."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from rarefy.export.comparison import (
    HALF,
    NOISE_FACTOR,
    RELATIVE,
    compare_integers,
    finite_values,
    largest,
    noise_of_rounding,
    rms,
)
from rarefy.export.node_check import EXACT, FUSED, QuantizedGraph, Replayed, Tolerance, replay
from rarefy.export.report import Difference, NodeCheck, Operator

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# Above these the reference evaluator, which is numpy, would take longer than the export.
_REFERENCE_MACS, _REFERENCE_BYTES, _REFERENCE_OPSET = 200_000_000, 32 << 20, 19

_ROUNDED = (2e-2, 5e-2)  # for MatMulNBits, which rounds its float input to 8 bits by blocks

#: The operators whose execution is worth a line in the report.
_COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool"})

#: Runtime operators that compute on integers, besides those whose names start with QLinear.
_INTEGER = frozenset({"QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "MatMulNBits"})


def _session(
    path: Path, optimized: bool, save_to: Path | None = None, function: str = "to_onnx"
) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # what a run needs is given back after it
    if save_to is not None:
        # The level at which integers are fused; the one above it only changes layouts, and drops names there.
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = os.fspath(save_to)
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        state = "on" if optimized else "off"
        raise RuntimeError(
            f"[{function}] ONNX Runtime cannot load the file with optimizations {state}: {error}"
        ) from error


def check_operators(path: Path, model: onnx.ModelProto, function: str = "to_onnx") -> tuple[Operator, ...]:
    """Which operators of the file ONNX Runtime runs in integers, read from its optimized graph."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        _session(path, optimized=True, save_to=optimized_path, function=function)
        optimized = onnx.load(optimized_path, load_external_data=False)
    runtime: dict[str, list[str]] = {}
    for node in optimized.graph.node:
        # What ONNX Runtime's layout and fusion steps put around the name of the node that they replace.
        name = re.sub(r"^fused |_token_\d+$|/\w+Fusion\w*$", "", node.name)
        runtime.setdefault(name, []).append(node.op_type)

    operators = []
    for node in counted_operators(model):
        made = runtime.get(node.name, [])
        integer = any(op.startswith("QLinear") or op in _INTEGER for op in made)
        operators.append(Operator(node.name, node.op_type, " + ".join(made) or "fused", integer))
    return tuple(operators)


def counted_operators(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The operators that a runtime could execute in integers; additions of constants are biases."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _COUNTED and not (node.op_type == "Add" and any(name in constants for name in node.input)):
            yield node


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
        differing, allowed = compare_integers(failed, got, expected, noise)
        difference = got.astype(np.float64) - expected.astype(np.float64)
        return largest(difference), rms(difference), allowed, None, differing

    half = HALF if expected.dtype == np.float16 else 0.0
    got, expected = finite_values(failed, got, expected)
    difference = got - expected
    seen, seen_max = rms(difference), largest(difference)
    allowed = NOISE_FACTOR * rms(noise) + (relative[0] + half) * rms(expected)
    allowed_max = NOISE_FACTOR * largest(noise) + (relative[1] + half) * largest(expected)
    if seen > allowed or seen_max > allowed_max:
        raise RuntimeError(
            f"{failed} differs from the model by {seen:.3g} rms and {seen_max:.3g} at most "
            f"(allowed {allowed:.3g} and {allowed_max:.3g}; rms of the output {rms(expected):.3g})"
        )
    edge = 0.5 * scale if scale else 1e-5 * largest(expected)
    differing = float(np.mean(np.abs(difference) > edge)) if difference.size else 0.0
    return seen_max, seen, allowed, seen_max / scale if scale else None, differing


@dataclass(frozen=True)
class Case:
    """One set of inputs, and what the model makes of them."""

    sizes: tuple[tuple[str, int], ...]  #: of the axes whose size is free, by name
    inputs: list[np.ndarray]
    expected: list[np.ndarray]


@dataclass(frozen=True)
class Subject:
    """What is verified: a file, and the model that it must equal.

    Attributes:
        path: the file.
        model: what is in it, with large tensors outside. Its outputs change while it is verified.
        lowered: the model in integers, as the file was made from it.
        run: runs `lowered` on the inputs of the first case.
        cases: inputs and the model's outputs; the first is the example.
        unrounded: the outputs for the first case with activations that are not rounded; how far they are from the
            quantized ones is the unit of the end-to-end tolerance.
        macs: multiply-adds of the first case.
    """

    path: Path
    model: onnx.ModelProto
    lowered: nn.Module
    run: Callable[[], list[np.ndarray]]
    cases: Sequence[Case]
    unrounded: list[np.ndarray]
    macs: int

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [value.name for value in self.model.graph.output]

    def feed(self, case: Case) -> dict[str, np.ndarray]:
        """The inputs of a case by name."""
        return dict(zip((value.name for value in self.model.graph.input), case.inputs, strict=True))


@contextmanager
def exposed_file(subject: Subject, graph: QuantizedGraph) -> Iterator[tuple[Path, list[str]]]:
    """A file beside the first that also returns the integers of all activations, and the names of its outputs."""
    import onnx

    path = subject.path.with_name(f"exposed-{subject.path.name}")
    try:
        with graph.exposed(subject.model) as names:
            onnx.save(subject.model, path)
            yield path, names
    finally:
        path.unlink(missing_ok=True)


def _raise(errors: Sequence[str]) -> None:
    if errors:
        more = f" (and {len(errors) - 1} more nodes behind it)" if len(errors) > 1 else ""
        raise RuntimeError(f"[to_onnx] verification failed: {errors[0]}{more}")


def check_nodes(
    subject: Subject,
    graph: QuantizedGraph,
    names: Sequence[str],
    values: Sequence[np.ndarray],
    runtime: str,
    tolerance: Tolerance,
    relative: tuple[float, float],
) -> Replayed:
    """Compares every quantized tensor of a run of the first case, and the outputs that follow from them.

    Raises:
        RuntimeError: one differs by more than the tolerance. Names the first.
    """
    arrays = dict(zip(names, values, strict=True))
    replayed = replay(subject.lowered, subject.run, graph, arrays, runtime, tolerance)
    _raise(replayed.errors)
    for name, want in zip(subject.outputs, replayed.outputs, strict=True):
        if np.issubdtype(want.dtype, np.floating):
            maker, op_type = graph.maker(name, {check.quantizer for check in replayed.checks})
            where = f"node {maker!r} ({op_type}), {runtime}: output {name!r}"
            _compare(where, arrays[name], want, np.zeros(0), relative, None)
    return replayed


def _skip_reference(subject: Subject, graph: QuantizedGraph, opset: int) -> str | None:
    size = sum(file.stat().st_size for file in subject.path.parent.glob(f"{subject.path.name}*"))
    if not graph.activations:
        return "no activation is quantized"
    if opset < _REFERENCE_OPSET:
        return f"opset {opset} is older than {_REFERENCE_OPSET}, from which on it has DequantizeLinear"
    if subject.macs > _REFERENCE_MACS:
        return f"{subject.macs / 1e6:.0f} M multiply-adds, more than {_REFERENCE_MACS / 1e6:.0f} M"
    if size > _REFERENCE_BYTES:
        return f"a file of {size / 2**20:.0f} MiB, more than {_REFERENCE_BYTES / 2**20:.0f}"
    return None


def check_by_reference(
    subject: Subject, graph: QuantizedGraph, opset: int
) -> tuple[tuple[NodeCheck, ...], tuple[str, ...]]:
    """Runs the file by ONNX's reference implementation and compares every quantized tensor; or says why not."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    reason = _skip_reference(subject, graph, opset)
    if reason is None:
        try:
            model = onnx.load(subject.path)
            with graph.exposed(model) as names:
                values = ReferenceEvaluator(model).run(names, subject.feed(subject.cases[0]))
        except (
            Exception
        ) as error:  # of the evaluator: it lacks operators and forms of them, which says nothing of the file
            reason = f"it cannot run the graph ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if reason is not None:
        return (), (f"reference evaluator: {reason}",)
    found = check_nodes(subject, graph, names, values, "reference evaluator", EXACT, RELATIVE)
    return found.checks, ()


def check_in_onnxruntime(
    subject: Subject, graph: QuantizedGraph, optimized: bool, rounds_itself: bool = False, reload: bool = True
) -> tuple[tuple[NodeCheck, ...], tuple[Difference, ...], tuple[str, ...]]:
    """Runs the file in ONNX Runtime at one optimization level: node by node on the example, and all cases end to end.

    Args:
        subject: file and model.
        graph: of the file.
        optimized: fused integer kernels, or plain operators.
        rounds_itself: the optimized graph has kernels that round activations which the model leaves in float.
        reload: load the file itself for the outputs, and not what was loaded to see the activations.
    """
    session = None
    runtime = f"ONNX Runtime with optimizations {'on' if optimized else 'off'}"
    rounded = optimized and rounds_itself
    relative = _ROUNDED if rounded else RELATIVE
    checks: tuple[NodeCheck, ...] = ()
    skipped: list[str] = []
    names, values = [], None
    if rounded:
        skipped.append(f"nodes in {runtime}: MatMulNBits rounds activations that the model leaves in float")
    elif graph.activations:
        with exposed_file(subject, graph) as (path, names):
            session = _session(path, optimized)
            values = session.run(names, subject.feed(subject.cases[0]))
    if session is None or reload:
        session = None  # before the next one takes its memory
        session = _session(subject.path, optimized)
    results = iter([session.run(subject.outputs, subject.feed(case)) for case in subject.cases])
    session = None
    if values is not None:
        replayed = check_nodes(subject, graph, names, values, runtime, FUSED if optimized else EXACT, relative)
        checks = replayed.checks
        if replayed.unmatched and not optimized:
            shown = ", ".join(replayed.unmatched[:4]) + (", ..." if len(replayed.unmatched) > 4 else "")
            skipped.append(f"{len(replayed.unmatched)} quantizers are checked with what they feed: {shown}")
    differences = compare_outputs(subject, lambda _: next(results), runtime, optimized, relative)
    return checks, differences, tuple(skipped)


def compare_outputs(
    subject: Subject,
    run: Callable[[Case], Sequence[np.ndarray]],
    runtime: str,
    optimized: bool,
    relative: tuple[float, float] = RELATIVE,
) -> tuple[Difference, ...]:
    """Compares every output of every case with the model's.

    Args:
        subject: file and model.
        run: gives the file's outputs for a case.
        runtime: what runs it.
        optimized: whether its graph optimizations are on.
        relative: rms and largest difference relative to the output's that are allowed besides the noise of rounding.

    Raises:
        RuntimeError: a difference is too large. Names the output, the runtime and both numbers.
    """
    scales = output_scales(subject.model)
    noise = list(map(noise_of_rounding, subject.unrounded, subject.cases[0].expected))
    differences = []
    for case in subject.cases:
        for name, got, want, unit in zip(subject.outputs, run(case), case.expected, noise, strict=True):
            where = f"output {name!r}, {runtime}" + "".join(f", {axis} {size}" for axis, size in case.sizes) + ","
            found = _compare(where, got, want, unit, relative, scales.get(name))
            differences.append(Difference(name, runtime, optimized, case.sizes, *found))
    return tuple(differences)


@dataclass(frozen=True)
class Verification:
    """What the checks of a file found."""

    operators: tuple[Operator, ...] = ()
    differences: tuple[Difference, ...] = ()
    nodes: tuple[NodeCheck, ...] = ()
    skipped: tuple[str, ...] = ()


def verify(subject: Subject, target: str, opset: int) -> Verification:
    """Runs the file by every means that there is for its target.

    Plain operators first (the reference evaluator, and ONNX Runtime with optimizations off), which say whether the file is
    right; then the target's fused kernels, which say whether it executes that.

    Raises:
        RuntimeError: the file does not compute what the model computes. Names the first node that does not.
    """
    graph = QuantizedGraph(subject.model, subject.path.parent)
    nodes, skipped = check_by_reference(subject, graph, opset)
    # Where nothing is fused, other outputs change nothing, and the file itself is loaded below.
    plain = check_in_onnxruntime(subject, graph, False, reload=target not in ("onnxruntime", "openvino"))
    nodes, differences, skipped = nodes + plain[0], plain[1], skipped + plain[2]
    operators: tuple[Operator, ...] = ()
    if target == "onnxruntime":
        operators = check_operators(subject.path, subject.model)
        rounds_itself = any("MatMulNBits" in operator.runtime for operator in operators)
        fused = check_in_onnxruntime(subject, graph, True, rounds_itself)
        nodes, differences, skipped = nodes + fused[0], differences + fused[1], skipped + fused[2]
    elif target == "openvino":
        from rarefy.export.openvino_verify import check_in_openvino

        operators, more_nodes, more = check_in_openvino(subject, graph)
        nodes, differences = nodes + more_nodes, differences + more
    else:
        from rarefy.export.lint import lint

        report = lint(subject.path, target)
        if report.errors:
            first = report.errors[0]
            count = f" (and {len(report.errors) - 1} more findings)" if len(report.errors) > 1 else ""
            raise RuntimeError(f"[to_onnx] verification failed: node {first.node!r}, rules of {target}: {first}{count}")
        skipped += (
            f"{target} does not run here: its rules were checked, {len(report.warnings)} warnings",
            *report.notes,
        )
    return Verification(operators, differences, nodes, skipped)
