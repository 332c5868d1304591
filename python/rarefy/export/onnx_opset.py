"""Operator sets: which one a file gets, and files for runtimes that are older than the exporter, which begins at 18.

Between 13 and 18 few operators changed. What the exporter writes of them is rewritten here, with the same function; what the
older set cannot say is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rarefy._core.quantization import TargetProfile
from rarefy.export.onnx_edit import add_node, bypass, constant, initializer, nodes_of, remove_unused

#: The oldest operator set that torch's exporter writes.
EXPORTER_OPSET = 18

#: Version of the file format that came with each operator set.
_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}

#: Operators that came with a set, or whose form there has no equal before, and the exporter may write.
_SINCE = {
    "Trilu": 14,
    "HardSwish": 14,
    "GridSample": 16,
    "LayerNormalization": 17,
    "DFT": 17,
    "BitwiseAnd": 18,
    "BitwiseNot": 18,
    "BitwiseOr": 18,
    "BitwiseXor": 18,
    "CenterCropPad": 18,
    "Col2Im": 18,
    "GroupNormalization": 18,
    "Mish": 18,
}

_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
               "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip


def choose_opset(
    function: str, opset: int | None, profile: TargetProfile, newest: int, needed: tuple[str, int] | None
) -> int:
    """The operator set of the file: the one asked for, or the target's own.

    Args:
        function: for the message.
        opset: asked for, or None.
        profile: of the target.
        newest: what the installed onnx knows.
        needed: what in the model needs a newer operator set ("uint16 activations of fc1", say), and which; or None.

    Raises:
        TypeError: not an integer.
        ValueError: older than the target's oldest, newer than the newest, or too old for what the model holds.
    """
    if opset is None:
        return profile.default_opset if needed is None else max(profile.default_opset, needed[1])
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"[{function}] opset must be an integer, got {opset!r}")
    if not profile.oldest_opset <= opset <= newest:
        raise ValueError(
            f"[{function}] opset must be between {profile.oldest_opset} and {newest} (the newest that the installed onnx "
            f"knows), got {opset}"
        )
    if needed is not None and opset < needed[1]:
        raise ValueError(f"[{function}] opset must be {needed[1]} or more for {needed[0]}, got {opset}")
    return opset


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrites a model of operator set 18 for an older one, 13 or more, and gives a file the format's version that came
    with its set, so that runtimes which know the one take the other.

    Raises:
        ValueError: a node that the older set cannot say.
    """
    model.ir_version = _IR_VERSIONS.get(opset, model.ir_version)
    if opset >= EXPORTER_OPSET:
        return
    graph = model.graph
    passes: list[tuple[int, Callable[[ir.Graph], None]]] = [
        (18, _reductions_with_attributes),
        (18, _splits_with_sizes),
        (18, _pads_of_all_axes),
        (18, _resizes_without_options),
        (17, _layer_norms_in_parts),
        (15, _shapes_in_parts),
        (14, _hard_swish_in_parts),
        (14, _batch_norms_without_modes),
        (14, _reshapes_without_zeros),
    ]
    for version, rewrite in passes:
        if opset < version:
            rewrite(graph)
    remove_unused(graph)
    for node in graph.all_nodes():
        if opset < _SINCE.get(node.op_type, 0):
            raise _unsayable(node, opset, f"has {node.op_type} ({_SINCE[node.op_type]})")
        if (
            node.op_type.startswith("Scatter")
            and node.attributes.get_string("reduction", "none") != "none"
            and opset < 16
        ):
            raise _unsayable(node, opset, "has scattering with a reduction (16)")
    model.opset_imports[""] = graph.opset_imports[""] = opset
    for node in graph.all_nodes():
        node.version = None


def _unsayable(node: ir.Node, opset: int, what: str) -> ValueError:
    return ValueError(f"[to_onnx] opset must be one that {what}, got {opset}, for node {node.name}")


def _ints(value: ir.Value | None, node: ir.Node, opset: int, what: str) -> list[int]:
    array = constant(value)
    if array is None:
        raise _unsayable(node, opset, f"takes {what} that the graph computes (18)")
    return [int(x) for x in array.reshape(-1)]


def _reductions_with_attributes(graph: ir.Graph) -> None:
    for node in nodes_of(graph, *_REDUCTIONS):
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.add(ir.AttrInt64s("axes", _ints(node.inputs[1], node, 17, "axes")))
        elif node.attributes.get_int("noop_with_empty_axes", 0):
            bypass(node, node.inputs[0])
            continue
        node.resize_inputs(1)
        node.attributes.pop("noop_with_empty_axes", None)


def _splits_with_sizes(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "Split"):
        if "num_outputs" not in node.attributes:
            continue
        if any(value.shape is None for value in node.outputs):
            raise _unsayable(node, 17, "splits into parts of unknown size (18)")
        axis = node.attributes.get_int("axis", 0)
        sizes = [value.shape[axis] for value in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            raise _unsayable(node, 17, "splits into parts of unknown size (18)")
        node.attributes.pop("num_outputs")
        node.resize_inputs(2)
        node.replace_input_with(1, initializer(graph, f"{node.name}_sizes", np.array(sizes, np.int64)))


def _pads_of_all_axes(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "Pad"):
        if len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        axes, given = _ints(node.inputs[3], node, 17, "axes"), _ints(node.inputs[1], node, 17, "pads")
        if node.inputs[0].shape is None:
            raise _unsayable(node, 17, "pads an input of unknown rank (18)")
        rank = len(node.inputs[0].shape)
        pads = np.zeros((2, rank), np.int64)
        pads[:, [axis % rank for axis in axes]] = np.array(given).reshape(2, -1)
        node.replace_input_with(1, initializer(graph, f"{node.name}_pads", pads.reshape(-1)))
        node.resize_inputs(3)


#: Attributes of Resize that came with 18, and what they are when they ask for nothing new.
_RESIZE_DEFAULTS = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}


def _resizes_without_options(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "Resize"):
        for name, default in _RESIZE_DEFAULTS.items():
            attribute = node.attributes.pop(name, None)
            if attribute is not None and attribute.value != default:
                raise _unsayable(node, 17, f"resizes with {name} (18)")
        if "axes" in node.attributes:
            raise _unsayable(node, 17, "resizes some axes (18)")


def _batch_norms_without_modes(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "BatchNormalization"):
        if node.attributes.get_int("training_mode", 0):
            raise _unsayable(node, 13, "normalizes batches in training (14)")
        node.attributes.pop("training_mode", None)


def _layer_norms_in_parts(graph: ir.Graph) -> None:
    """d = x - mean(x); y = d / sqrt(mean(d * d) + epsilon) * scale + bias."""
    for node in nodes_of(graph, "LayerNormalization"):
        x, y = node.inputs[0], node.outputs[0]
        if any(value.uses() for value in node.outputs[1:]) or x.shape is None:
            raise _unsayable(node, 16, "normalizes layers and gives their statistics (17)")
        rank = len(x.shape)
        first = node.attributes.get_int("axis", -1) % rank
        axes = list(range(first - rank, 0))
        kept = ir.Shape([*x.shape[:first], *([1] * (rank - first))])
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        stem = node.name.rpartition("/")[0]

        def part(
            op_type: str, inputs: list[ir.Value], attributes=None, shape=None, node=node, stem=stem, y=y
        ) -> ir.Value:
            value = add_node(node, True, op_type, inputs, y, y.dtype, f"{stem}/{op_type}", attributes)
            value.shape = y.shape if shape is None else shape
            return value

        def mean(value: ir.Value, part=part, axes=axes, kept=kept) -> ir.Value:
            return part("ReduceMean", [value], {"axes": axes, "keepdims": 1}, kept)

        d = part("Sub", [x, mean(x)])
        small = initializer(graph, f"{node.name}_epsilon", np.array(epsilon, np.float32))
        variance = part("Add", [mean(part("Mul", [d, d])), small], shape=kept)
        result = part("Mul", [part("Div", [d, part("Sqrt", [variance], shape=kept)]), node.inputs[1]])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = part("Add", [result, node.inputs[2]])
        bypass(node, result)


def _shapes_in_parts(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "Shape"):
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        node.attributes.pop("start", None)
        node.attributes.pop("end", None)
        if (start, end) == (0, None):
            continue
        output, stem = node.outputs[0], node.name.rpartition("/")[0]
        readers = list(output.uses())
        limits = [
            initializer(graph, f"{node.name}_{side}", np.array([limit], np.int64))
            for side, limit in (("start", start), ("end", np.iinfo(np.int64).max if end is None else end))
        ]
        cut = add_node(node, False, "Slice", [output, *limits], output, output.dtype, f"{stem}/Slice")
        rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
        output.shape = None if rank is None else ir.Shape([rank])
        for reader, index in readers:
            reader.replace_input_with(index, cut)


def _hard_swish_in_parts(graph: ir.Graph) -> None:
    for node in nodes_of(graph, "HardSwish"):
        x, y, stem = node.inputs[0], node.outputs[0], node.name.rpartition("/")[0]
        factor = add_node(
            node, True, "HardSigmoid", [x], y, y.dtype, f"{stem}/HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5}
        )
        bypass(node, add_node(node, True, "Mul", [x, factor], y, y.dtype, f"{stem}/Mul"))


def _reshapes_without_zeros(graph: ir.Graph) -> None:
    """allowzero says that a size of 0 is meant; without it, 0 copies the input's size there. Only empty tensors differ."""
    for node in nodes_of(graph, "Reshape"):
        shape = constant(node.inputs[1])
        if node.attributes.get_int("allowzero", 0) and shape is not None and (shape == 0).any():
            raise _unsayable(node, 13, "reshapes to a size of 0 (14)")
        node.attributes.pop("allowzero", None)
