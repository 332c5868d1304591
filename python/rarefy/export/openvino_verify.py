"""Runs an ONNX file in OpenVINO: which operators it executes in integers, and whether it computes what the model computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rarefy.export.comparison import RELATIVE
from rarefy.export.node_check import QuantizedGraph, Tolerance
from rarefy.export.onnx_verify import (
    Case,
    Subject,
    check_nodes,
    compare_outputs,
    counted_operators,
    exposed_file,
)
from rarefy.export.report import Difference, NodeCheck, Operator

if TYPE_CHECKING:
    import onnx

#: OpenVINO requantizes sums by its own formula, in which every fourth value may round to the other side.
OPENVINO = Tolerance(edges_only=False, one_step=0.999, steps=2)

_RUNTIME = "OpenVINO"
#: Else it computes what is not quantized in bfloat16, where it can, and rounds the float inputs of INT4 weights by groups.
CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_INTEGER = frozenset({"u8", "i8", "u4", "i4"})


def require(function: str) -> None:
    """Raises ImportError with the name of the extra where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise ImportError(f"[{function}] needs openvino: pip install rarefy[openvino]")


def compile_file(function: str, path: Path) -> Any:
    """The file, compiled for the processor with float operators in float32.

    Raises:
        RuntimeError: OpenVINO cannot read or compile it.
    """
    require(function)
    import openvino

    try:
        return openvino.Core().compile_model(str(path), "CPU", CONFIG)
    except RuntimeError as error:
        raise RuntimeError(f"[{function}] OpenVINO cannot compile the file: {error}") from error


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].value if hasattr(info[key], "value") else info[key]) if key in info else ""


def executed_operators(compiled: Any, model: onnx.ModelProto) -> tuple[Operator, ...]:
    """What the executed graph runs in the place of every operator of the file that could run in integers."""
    executed: dict[str, list[tuple[str, str]]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        layer = (_info(node, "layerType"), _info(node, "runtimePrecision"))
        for name in [*_info(node, "originalLayersNames").split(","), node.get_friendly_name()]:
            # Steps of its own around an operator add to the name; before a result stands what was called like the result.
            name = name.split("/Dequantization")[0].removesuffix("/WithoutBiases").removesuffix("_original")
            if layer not in executed.setdefault(name, []):
                executed[name].append(layer)

    makers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:  # a result's name takes the place of the name of the operator that computes it
        node = makers.get(output.name)
        while node is not None and output.name in executed:
            executed.setdefault(node.name, executed[output.name])
            node = makers.get(node.input[0]) if node.op_type in ("Sum", "Add", "Relu") else None
    operators = []
    for node in counted_operators(model):
        made = [layer for layer in executed.get(node.name, []) if layer[0] not in ("Const", "Reorder", "Transpose")]
        text = " + ".join(f"{kind} {precision}" for kind, precision in made)
        integer = bool(made) and any(precision in _INTEGER for _, precision in made)
        operators.append(Operator(node.name, node.op_type, text or "fused", integer))
    return tuple(operators)


def _run(compiled: Any, inputs: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    results = compiled(inputs)
    return [np.array(results[compiled.output(name)]) for name in names]


def check_in_openvino(
    subject: Subject, graph: QuantizedGraph
) -> tuple[tuple[Operator, ...], tuple[NodeCheck, ...], tuple[Difference, ...]]:
    """Runs the file in OpenVINO: node by node on the example, and all cases end to end.

    Raises:
        ImportError: OpenVINO is missing.
        RuntimeError: it cannot run the file, or computes something else.
    """
    checks: tuple[NodeCheck, ...] = ()
    if graph.activations:
        with exposed_file(subject, graph) as (path, names):
            values = _run(compile_file("to_onnx", path), subject.feed(subject.cases[0]), names)
        checks = check_nodes(subject, graph, names, values, _RUNTIME, OPENVINO, RELATIVE).checks
    compiled = compile_file("to_onnx", subject.path)
    operators = executed_operators(compiled, subject.model)

    def run(case: Case) -> list[np.ndarray]:
        return _run(compiled, subject.feed(case), subject.outputs)

    return operators, checks, compare_outputs(subject, run, _RUNTIME, True)
