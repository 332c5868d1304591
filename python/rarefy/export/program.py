"""The lowered model as a `torch.export` program whose quantizers stand where integer kernels look for them.

ExecuTorch, LiteRT and Core ML read such a program. Each pass keeps every value that the program computes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rarefy.export.runtime import Example, quiet

_aten, _quantized = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = _quantized.quantize_per_tensor.default
DEQUANTIZE = _quantized.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _quantized.dequantize_per_channel.default

_RELU = frozenset({_aten.relu.default, _aten.relu_.default})

#: Operators that give back elements of their first input, so that quantizing before or after them is the same.
_MOVES_VALUES = frozenset(
    {
        _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default, _aten.flatten.using_ints,
        _aten.reshape.default, _aten.view.default, _aten.permute.default, _aten.transpose.int, _aten.squeeze.default,
        _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default, _aten.contiguous.default, _aten.clone.default,
        _aten.dropout.default, _aten.select.int, _aten.slice.Tensor,
    }
)  # fmt: skip

#: Products of an activation (first) and a weight (second).
_PRODUCTS = frozenset(
    {
        _aten.linear.default, _aten.matmul.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
        _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding, _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input, _aten.conv_transpose3d.input,
    }
)  # fmt: skip


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]


def export_program(function: str, lowered: nn.Module, example: Example) -> ExportedProgram:
    """The program of a lowered model: it takes the example's tensors by name and returns a list of tensors.

    Raises:
        RuntimeError: torch.export cannot follow the model.
    """
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in example.names]
    if example.by_name:
        result = graph.call_module("model", (), {**dict(zip(example.names, inputs, strict=True)), **example.constants})
    else:
        result = graph.call_module("model", tuple(inputs))
    graph.output(graph.call_function(_tensors, (result,)))
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(fx.GraphModule({"model": lowered}, graph), (), kwargs=example.named())
    except Exception as error:
        cause = error.__cause__ or error
        raise RuntimeError(
            f"[{function}] torch.export cannot translate the model: {type(cause).__name__}: {cause}"
        ) from error
    place_quantizers(program)
    return program


def place_quantizers(program: ExportedProgram) -> None:
    """All passes, in the order in which they feed each other."""
    graph = program.graph_module.graph
    drop_idle_relus(graph)
    keep_axes_of_means(graph)
    while hoist_quantizers(graph):
        pass
    merge_quantizers(graph)
    separate_dequantizers(graph)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()


def module_path(node: fx.Node) -> str:
    """The path of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    paths = [path for path, _ in stack.values()] if stack else []
    # Exporters differ in whether they call the attribute or how it is reached: model.fc, L['self'].model.fc
    return paths[-1].partition("model")[2].lstrip(".") if paths else ""


def behind_relu(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, or the ReLU of it where nothing else reads it."""
    users = list(node.users)
    return list(users[0].users) if len(users) == 1 and users[0].target in _RELU else users


def float_products(program: ExportedProgram) -> Iterator[fx.Node]:
    """Products of quantized weights whose result no quantizer reads: a runtime of integers has no grid for it."""
    for node in program.graph_module.graph.nodes:
        if node.target in _PRODUCTS:
            readers = behind_relu(node)
            quantized_input = isinstance(node.args[0], fx.Node) and node.args[0].target is DEQUANTIZE
            if not quantized_input or not readers or any(reader.target is not QUANTIZE for reader in readers):
                yield node


def store_float_weight(program: ExportedProgram, node: fx.Node) -> None:
    """Replaces the integers of a product's weight and their dequantize operator by the float values."""
    dequantize = node.args[1]
    if not isinstance(dequantize, fx.Node) or dequantize.target not in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
        return
    integers = dequantize.args[0]
    if len(dequantize.users) != 1 or not isinstance(integers, fx.Node) or len(integers.users) != 1:
        return  # tied: others read the integers
    names = program.graph_signature.inputs_to_buffers
    values = [program.state_dict[names[x.name]] if isinstance(x, fx.Node) else x for x in dequantize.args]
    dequantized = dequantize.target(*values)
    program.state_dict[names[integers.name]] = dequantized
    integers.meta["val"] = dequantize.meta["val"]
    dequantize.replace_all_uses_with(integers)
    program.graph_module.graph.erase_node(dequantize)


def detach_from_quantizer(program: ExportedProgram, node: fx.Node) -> None:
    """Puts a clamp to the range of the grid, which changes no value, between a product and the dequantized input."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is DEQUANTIZE:
        _, scale, zero_point, low, high, _ = source.args
        graph = program.graph_module.graph
        with graph.inserting_before(node):
            # A little further: the product with the scale may round up.
            limits = ((low - zero_point - 0.5) * scale, (high - zero_point + 0.5) * scale)
            node.replace_input_with(source, _insert(graph, _aten.clamp.default, (source, *limits), node))


# ---- the passes -----------------------------------------------------------------------------------------------------


def _never_negative(node: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target in _RELU:
        return True
    if node.target is DEQUANTIZE:
        if node.args[2] == node.args[3]:  # the zero point is the smallest integer
            return True
        source = node.args[0]
        # What was not negative before it was quantized is not negative afterwards: 0 is on the grid.
        return source.target is QUANTIZE and source.args[1:] == node.args[1:] and _never_negative(source.args[0])
    return node.target in _MOVES_VALUES and _never_negative(node.args[0])


def drop_idle_relus(graph: fx.Graph) -> None:
    """Removes a ReLU whose input cannot be negative: the model's own one behind a module that has applied it."""
    for node in list(graph.nodes):
        if node.target in _RELU and _never_negative(node.args[0]):
            if any(user.op == "output" for user in node.users):
                continue  # the program's signature holds its name
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def keep_axes_of_means(graph: fx.Graph) -> None:
    """Writes a mean that drops its axes and is quantized as one that keeps them, and a reshape: XNNPACK has only those."""
    for node in list(graph.nodes):
        if node.target is not _aten.mean.dim or len(node.args) != 2 or node.kwargs:
            continue
        if not node.users or any(user.target is not QUANTIZE for user in node.users):
            continue
        with graph.inserting_before(node):
            kept = _insert(graph, _aten.mean.dim, (*node.args, True), node)
            reshaped = _insert(graph, _aten.reshape.default, (kept, list(node.meta["val"].shape)), node)
        node.replace_all_uses_with(reshaped)
        graph.erase_node(node)


def hoist_quantizers(graph: fx.Graph) -> int:
    """Quantizes before an operator that only moves values where all its readers quantize alike; returns how often.

    The pair behind the operator stays: between equal parameters the operator runs on integers.
    """
    hoisted = 0
    for node in reversed(list(graph.nodes)):
        if node.target not in _MOVES_VALUES or not node.users or any(u.target is not QUANTIZE for u in node.users):
            continue
        source, (parameters, *others) = node.args[0], {user.args[1:] for user in node.users}
        if others or source.op == "placeholder" or source.target is DEQUANTIZE:
            continue
        with graph.inserting_before(node):
            quantized = _insert(graph, QUANTIZE, (source, *parameters), node)
            node.replace_input_with(source, _insert(graph, DEQUANTIZE, (quantized, *parameters), node))
        hoisted += 1
    return hoisted


def _insert(graph: fx.Graph, target: torch._ops.OpOverload, arguments: tuple, near: fx.Node) -> fx.Node:
    node = graph.call_function(target, arguments)
    example = arguments[0].meta["val"]
    with example.fake_mode:
        node.meta["val"] = target(example, *arguments[1:])
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in near.meta:
            node.meta[key] = near.meta[key]
    return node


def merge_quantizers(graph: fx.Graph) -> None:
    """Makes one of the quantizers that read one tensor with equal parameters."""
    first: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            other = first.setdefault((node.args[0], node.args[1:]), node)
            if other is not node:
                node.replace_all_uses_with(other)
                graph.erase_node(node)


def separate_dequantizers(graph: fx.Graph) -> None:
    """Gives every reader of a dequantized activation a dequantize operator of its own, as partitioners expect."""
    for node in list(graph.nodes):
        if node.target is not DEQUANTIZE or node.args[0].op == "placeholder":
            continue
        for user in list(node.users)[1:]:
            if user.op == "output":
                continue
            with graph.inserting_before(user):
                user.replace_input_with(node, _insert(graph, DEQUANTIZE, node.args, node))
