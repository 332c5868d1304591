"""ExecuTorch programs (.pte) for phones and small devices, on the integer kernels of XNNPACK."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx, nn

from rarefy.export import runtime
from rarefy.export.program import (
    DEQUANTIZE_CHANNELS,
    detach_from_quantizer,
    export_program,
    float_products,
    module_path,
    store_float_weight,
)
from rarefy.export.report import ExportReport, Operator
from rarefy.export.runtime import ExampleInputs, Prepared

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

_FUNCTION = "to_executorch"

# XNNPACK has no 1-d convolutions: a pass makes them 2-d, and moves the dequantize operator of a float one's input into it.
_CONV1D = (torch.ops.aten.conv1d.default, torch.ops.aten.conv1d.padding)

#: Operators of the edge dialect that are worth a line in the report, under the names that the report gives them.
_COUNTED = {
    "aten.convolution.default": "convolution", "aten.linear.default": "linear", "aten.addmm.default": "linear",
    "aten.mm.default": "linear", "aten.bmm.default": "matmul", "aten.add.Tensor": "add", "aten.mul.Tensor": "mul",
    "aten.mean.dim": "mean", "aten.avg_pool2d.default": "avg_pool2d", "aten.embedding.default": "embedding",
    "quantized_decomposed.embedding_byte.default": "embedding",
}  # fmt: skip


@runtime.without_autocast()
def to_executorch(
    model: nn.Module, example_inputs: ExampleInputs, path: str | os.PathLike[str], *, verify: bool = True
) -> ExportReport:
    """Writes the model as an ExecuTorch program whose quantized parts run on XNNPACK's integer kernels.

    Weights are stored as the trained integers. XNNPACK computes an operator in integers where its inputs and its result
    are quantized, in int8: uint8 activations are relabelled (zero point z becomes z - 128), which changes no value. A
    layer whose result is not quantized runs in float, with a float weight in the file; the report names it.

    The model is evaluated in evaluation mode on a copy; it is not changed, whatever happens.

    Args:
        model: any module; parts that are not quantized are exported in float.
        example_inputs: what the model is called with: a tensor, a sequence of tensors, or tensors by argument name
            (with plain values, which are fixed). The file takes inputs of exactly these shapes.
        path: the file to write, ending in .pte. It gets its name when all checks passed.
        verify: run the file and compare its outputs with the model's.

    Returns:
        What is in the file, which operators run in integers, and how far the outputs are from the model's.

    Raises:
        ImportError: the packages of `rarefy[executorch]` are missing.
        TypeError, ValueError: an argument; quantizers that cannot be written, or activations of other than 8 bits.
        OSError: the path cannot be written.
        RuntimeError: the model cannot be translated, or the file does not compute what the model computes.
            In every case no file is left, and one that had the name before is as it was.
    """
    start = time.perf_counter()
    runtime.require(_FUNCTION, "executorch", "executorch")
    prepared = runtime.prepare_model(_FUNCTION, model, example_inputs)
    with runtime.pending(_FUNCTION, path, ".pte") as temporary:
        program = export_program(_FUNCTION, prepared.lowered, prepared.example)
        for node in list(float_products(program)):
            store_float_weight(program, node)
            if node.target in _CONV1D:
                detach_from_quantizer(program, node)
        _look_up_integers(program)
        edge = _to_edge(program)
        operators = tuple(_operators(edge))
        nodes = Counter(operator.op_type for operator in operators)
        with runtime.quiet("executorch"), open(temporary, "wb") as file:
            edge.to_executorch().write_to_file(file)
        size = temporary.stat().st_size
        differences = ()
        if verify:
            differences = runtime.compare(_FUNCTION, _run(temporary, prepared), prepared, _output_scales(program))
    return ExportReport(
        path=Path(path),
        bytes=size,
        target="executorch",
        opset=None,
        nodes=dict(nodes.most_common()),
        operators=operators,
        differences=differences,
        seconds=time.perf_counter() - start,
    )


def _to_edge(program: torch.export.ExportedProgram) -> EdgeProgramManager:
    with runtime.quiet("executorch", "torchao"):
        import executorch.kernels.quantized  # noqa: F401  (kernels outside of XNNPACK)
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        except Exception as error:
            raise RuntimeError(
                f"[{_FUNCTION}] ExecuTorch cannot translate the model: {type(error).__name__}: {error}"
            ) from error


def _look_up_integers(program: torch.export.ExportedProgram) -> None:
    """Looks rows up in the table of integers and dequantizes those, instead of the whole table at every run."""
    with runtime.quiet("executorch"):
        from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (registers embedding_byte)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        table = node.args[0] if node.target is torch.ops.aten.embedding.default else None
        if not isinstance(table, fx.Node) or table.target is not DEQUANTIZE_CHANNELS or table.args[3] != 0:
            continue
        integers, scale, _, _, low, high, _ = table.args  # weights have no zero point
        with graph.inserting_before(node):
            arguments = (integers, scale, None, low, high, node.args[1])
            row = graph.call_function(torch.ops.quantized_decomposed.embedding_byte.default, arguments)
        row.meta.update(node.meta)
        node.replace_all_uses_with(row)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _operators(edge: EdgeProgramManager) -> list[Operator]:
    outside = edge.exported_program().graph_module
    operators = []
    for node in outside.graph.nodes:
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            inside = getattr(outside, node.args[0].target).original_module.graph_module
            operators += [_operator(inner, "XNNPACK") for inner in inside.graph.nodes if _kind(inner) in _COUNTED]
        elif _kind(node) in _COUNTED:
            operators.append(_operator(node, "portable kernel"))
    return operators


def _kind(node: fx.Node) -> str:
    return str(getattr(node.target, "_op", node.target)) if node.op == "call_function" else ""


def _operator(node: fx.Node, where: str) -> Operator:
    kind = _COUNTED[_kind(node)]
    factors = node.args[1:] if _kind(node) == "aten.addmm.default" else node.args[:2]
    inputs = [x for x in factors if isinstance(x, fx.Node)]
    readers = list(node.users)
    if len(readers) == 1 and _kind(readers[0]) in ("aten.relu.default", "aten.hardtanh.default"):
        readers = list(readers[0].users)
    integer = all("dequantize_per" in _kind(x) for x in inputs) and all(".quantize_per" in _kind(x) for x in readers)
    if kind == "embedding":
        integer = "embedding_byte" in _kind(node)
    path = module_path(node)
    return Operator(
        f"{path}/{kind}" if path else kind, kind, where, integer and (where == "XNNPACK" or kind == "embedding")
    )


def _output_scales(program: torch.export.ExportedProgram) -> list[float | None]:
    outputs = next(node for node in program.graph_module.graph.nodes if node.op == "output").args[0]
    return [node.args[1] if "dequantize_per_tensor" in str(node.target) else None for node in outputs]


def _run(path: Path, prepared: Prepared) -> list[np.ndarray]:
    from executorch.runtime import Runtime, Verification

    try:
        program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
        outputs = program.load_method("forward").execute(list(prepared.example.tensors))
    except RuntimeError as error:
        raise RuntimeError(f"[{_FUNCTION}] ExecuTorch cannot run the file: {error}") from error
    return [output.numpy().copy() for output in outputs]
