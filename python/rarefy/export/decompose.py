"""Leaves out the second trace of a program that consists of what the ONNX exporter translates.

torch.onnx.export has a program traced again to replace operators that it has no translation for, which takes longer than
everything else that it does. A lowered model rarely has any, but for the few below, which are replaced here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

_aten = torch.ops.aten


def _retarget(target: OpOverload) -> Callable[[fx.Node], bool]:
    def rewrite(node: fx.Node) -> bool:
        node.target = target
        return True

    return rewrite


def _mean_of_images(node: fx.Node) -> bool:
    """adaptive_avg_pool2d to one pixel."""
    x, size = node.args
    if node.kwargs or list(size) != [1, 1]:
        return False
    node.target, node.args = _aten.mean.dim, (x, [-1, -2], True)
    return True


def _out_of_place(target: OpOverload) -> Callable[[fx.Node], bool]:
    """Of an operator that overwrites its first argument, where nothing else can see that tensor."""

    def rewrite(node: fx.Node) -> bool:
        x = node.args[0]
        fresh = (
            x.op == "call_function"
            and isinstance(x.target, OpOverload)
            and all(result.alias_info is None for result in x.target._schema.returns)
            and list(x.users) == [node]
            and x.target is not _aten.dropout.default  # which hands its argument on, though its schema does not say so
        )
        if fresh:
            node.target = target
        return fresh

    return rewrite


def _copy_to(node: fx.Node) -> bool:
    """Tensor.to with a type; always a copy, as nothing in the program writes to a tensor."""
    position = {_aten.to.dtype: 1, _aten.to.device: 2}.get(node.target)
    dtype = node.kwargs.get("dtype") if position is None else node.args[position]
    if dtype is None:
        return False
    node.target, node.args, node.kwargs = _aten._to_copy.default, node.args[:1], {"dtype": dtype}
    return True


#: Exact equivalents: the same function of the same arguments.
_REWRITES: Mapping[OpOverload, Callable[[fx.Node], bool]] = {
    _aten.__and__.Tensor: _retarget(_aten.bitwise_and.Tensor),
    _aten.__or__.Tensor: _retarget(_aten.bitwise_or.Tensor),
    _aten.adaptive_avg_pool2d.default: _mean_of_images,
    _aten.relu_.default: _out_of_place(_aten.relu.default),
    _aten.to.dtype: _copy_to,
    _aten.to.dtype_layout: _copy_to,
    _aten.to.device: _copy_to,
    _aten.hardtanh_.default: _out_of_place(_aten.hardtanh.default),
}


#: Operators made of others that the exporter translates as they are. It expands all others, in the table or not.
_KEPT_WHOLE = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.contiguous.default,
        _aten.dropout.default,
        _aten.flatten.using_ints,
        _aten.layer_norm.default,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.max_pool2d.default,
        _aten.reshape.default,
        _aten.scaled_dot_product_attention.default,
        _aten.softmax.int,
        _aten.sym_size.int,
    }
)


def is_translatable(program: ExportedProgram, table: Mapping[Any, Any]) -> bool:
    """Whether nothing in the program has to be decomposed by the table, after the exact rewrites were made in place.

    No node may have an entry in the table, write to its arguments, or call another graph.
    """
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(node)
        op = node.target
        if getattr(op, "__module__", None) == "_operator":  # of sizes, and getitem
            continue
        if node.op != "call_function" or not isinstance(op, OpOverload):
            return False
        if op in table or op._schema.is_mutable:
            return False
        whole = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        if whole and op not in _KEPT_WHOLE:
            return False
    return True


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def decomposing_where_needed() -> Iterator[None]:
    """While it is active, a program without operators to decompose is its own decomposition.

    One thread at a time: it changes a class of torch.
    """
    with _ONE_AT_A_TIME:
        yield from _patched()


def _patched() -> Iterator[None]:
    original = ExportedProgram.run_decompositions

    @wraps(original)
    def run_decompositions(program: ExportedProgram, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        if decomp_table is not None and is_translatable(program, decomp_table):
            return program
        return original(program, decomp_table, **options)

    ExportedProgram.run_decompositions = run_decompositions
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = original
