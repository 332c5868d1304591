"""Holds every quantized tensor of an ONNX file against the model, one piece of the network at a time.

An end-to-end comparison of a deep network says little: one value on the other side of a rounding edge moves everything
behind it. So the file is run with all its quantized activations exposed, and the model is run again with each of its
quantizers handing on the *file's* integers. Every quantizer then computes from what the file itself computed up to the
quantizers before it, differences do not add up, and the first piece that computes something else is the one that is
wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.export.lowering import QuantizeDequantize
from rarefy.export.report import NodeCheck

if TYPE_CHECKING:
    import onnx

#: Operators behind which the one that computed their values is looked for, to name it.
_PASSED = frozenset(
    {"Sum", "Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Cast"}
    | {"QuantizeLinear", "DequantizeLinear"}
)

# Float sums in another order move a quotient x / scale by less than this many steps, so that it may only round to the
# other side when a tie lies that near. The second is for grids with many integers: units in the last place of x / scale.
_EDGE, _EDGE_ULPS = 0.01, 64 * 2.0**-24


@dataclass(frozen=True)
class Tolerance:
    """What a runtime may do to the integers of one tensor.

    Attributes:
        edges_only: values may differ by one step, and only where the quotient lies next to a tie.
        one_step: fraction of the values that may be at most one step away.
        steps: largest difference.
    """

    edges_only: bool
    one_step: float = 1.0
    steps: int = 1


#: Plain operators, which compute what ONNX says: float sums may have another order, nothing else.
EXACT = Tolerance(edges_only=True)
#: Fused integer kernels, which round biases to the grid of the products and requantize with a float multiplier.
FUSED = Tolerance(edges_only=False, one_step=0.999, steps=2)


@dataclass(frozen=True)
class Activation:
    """A quantized activation of a file, read by a DequantizeLinear."""

    tensor: str
    dequantizer: str  #: name of the node
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None


class QuantizedGraph:
    """Where a file's quantized activations are, and what computes them.

    Args:
        model: the file; only its graph is read.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        from onnx import TensorProto, numpy_helper

        graph = model.graph
        self._producers = {name: node for node in graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.activations: dict[str, Activation] = {}  # by the name of the node that reads them
        base = os.fspath(folder) if folder else ""
        supported = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}
        for node in graph.node:
            if node.op_type != "DequantizeLinear" or node.input[0] in self._constants:
                continue
            names = [*node.input, ""]
            if node.input[1] not in self._constants or names[2] not in self._constants:
                continue  # computed while the file runs: no quantizer of ours
            if self._constants[names[2]].data_type not in supported:
                continue
            scale, zero_point = (numpy_helper.to_array(self._constants[name], base) for name in names[1:3])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) if scale.ndim else None
            self.activations[node.name] = Activation(node.input[0], node.name, scale, zero_point, axis)

    @contextmanager
    def exposed(self, model: onnx.ModelProto) -> Iterator[list[str]]:
        """Lets the model return the integers of all activations too, after its own outputs; gives all names."""
        from onnx import helper

        outputs = model.graph.output
        count = len(outputs)
        names = [value.name for value in outputs]
        for activation in self.activations.values():
            if activation.tensor not in names:
                names.append(activation.tensor)
                kind = helper.np_dtype_to_tensor_dtype(activation.zero_point.dtype)
                outputs.append(helper.make_tensor_value_info(activation.tensor, kind, None))
        try:
            yield names
        finally:
            del outputs[count:]

    def maker(self, tensor: str, known: set[str]) -> tuple[str, str]:
        """Name and type of the operator that computed a quantized tensor from others in `known`."""
        found, start = None, tensor
        while True:
            node = self._producers.get(tensor)
            if node is None or (tensor in known and tensor != start):
                return found or (start, "QuantizeLinear")
            found = (node.name, node.op_type)
            if node.op_type not in _PASSED:
                return found
            sources = [name for name in node.input if name and name not in self._constants]
            if not sources:
                return found
            tensor = sources[0]


@dataclass
class _Found:
    """A comparison of integers."""

    ok: bool
    steps: int
    differing: float
    text: str = ""


def _compare(t: Tensor, expected: Tensor, got: Tensor, tolerance: Tolerance) -> _Found:
    """Compares integers from which the zero point is subtracted; t is the quotient x / scale that they round."""
    difference = got - expected
    wrong = difference != 0
    count = int(wrong.sum())
    if count == 0:
        return _Found(True, 0, 0.0)
    size = difference.abs()
    steps, differing = int(size.max()), count / wrong.numel()
    if tolerance.edges_only:
        tie = (got + expected).double() / 2
        near = (t.double() - tie).abs() <= _EDGE + _EDGE_ULPS * t.double().abs()
        bad = int((wrong & ~(near & (size == 1))).sum())
        text = f"{bad} of {wrong.numel()} values are not what their quotient rounds to"
        return _Found(bad == 0, steps, differing, text)
    far = int((size > 1).sum())
    ok = steps <= tolerance.steps and far <= max(1.0, (1 - tolerance.one_step) * wrong.numel())
    return _Found(ok, steps, differing, f"{far} of {wrong.numel()} values differ by more than one step")


class _Replay:
    """Hooks that compare what each quantizer of a lowered model computes with the file, and hand on what the file has."""

    def __init__(
        self, graph: QuantizedGraph, integers: Mapping[str, np.ndarray], runtime: str, tolerance: Tolerance
    ) -> None:
        self.graph, self.integers, self.runtime, self.tolerance = graph, integers, runtime, tolerance
        self.calls: dict[str, int] = {}
        self.known: set[str] = set()
        self.checks: list[NodeCheck] = []
        self.errors: list[str] = []
        self.unmatched: list[str] = []

    def _candidates(self, name: str) -> list[Activation]:
        base = f"{name}/DequantizeLinear"
        all_ = self.graph.activations
        return [a for key, a in all_.items() if key == base or key.startswith(f"{base}_")]

    def _integers(self, activation: Activation, like: Tensor) -> Tensor | None:
        values = self.integers[activation.tensor]
        if values.shape != tuple(like.shape):
            return None
        zero_point = activation.zero_point.astype(np.int32)
        if activation.axis is not None:
            zero_point = zero_point.reshape(
                [-1 if i == activation.axis % values.ndim else 1 for i in range(values.ndim)]
            )
        return torch.from_numpy(values.astype(np.int32) - zero_point)

    def __call__(self, name: str, module: QuantizeDequantize, x: Tensor) -> Tensor:
        x = x.detach().float()
        scale, zero_point = torch.as_tensor(module.scale, dtype=torch.float32), torch.as_tensor(module.zero_point)
        if module.axis is not None:
            shape = [1] * x.dim()
            shape[module.axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        t = x / scale
        expected = torch.clamp(torch.round(t), module.qmin - zero_point, module.qmax - zero_point).to(torch.int32)
        index = self.calls[name] = self.calls.get(name, 0) + 1
        named = self._candidates(name)
        direct = named[0] if len(named) == 1 and index == 1 else None
        best: tuple[Activation, Tensor, _Found] | None = None
        for activation in [direct] if direct else [*named, *self.graph.activations.values()]:
            if direct is None and not np.array_equal(activation.scale.reshape(-1), scale.reshape(-1).numpy()):
                continue
            got = self._integers(activation, x)
            if got is None:
                continue
            found = _compare(t, expected, got, self.tolerance)
            if best is None or found.differing < best[2].differing or found.ok > best[2].ok:
                best = (activation, got, found)
            if found.differing == 0:
                break
        if direct is not None:
            self._check_parameters(direct, scale, name)
        if best is None or (direct is None and not best[2].ok and not named):
            self.unmatched.append(name)
            return expected * scale
        activation, got, found = best
        maker, op_type = self.graph.maker(activation.tensor, self.known)
        if activation.tensor not in self.known:  # else another quantizer of the model that the file has merged with one
            self.known.add(activation.tensor)
            self.checks.append(
                NodeCheck(maker, op_type, activation.dequantizer, self.runtime, found.steps, found.differing, x.numel())
            )
        if not found.ok:
            self.errors.append(
                f"node {maker!r} ({op_type}), {self.runtime}: its integers, read by {activation.dequantizer!r}, differ from "
                f"the model's by up to {found.steps} steps in {found.differing:.2%} of the values ({found.text})"
            )
        return got * scale

    def _check_parameters(self, activation: Activation, scale: Tensor, name: str) -> None:
        mine, its = scale.reshape(-1).numpy(), activation.scale.reshape(-1)
        if not np.array_equal(mine, its):
            place = 0 if mine.shape != its.shape else int(np.argmax(mine != its))
            self.errors.append(
                f"node {activation.dequantizer!r} (DequantizeLinear), {self.runtime}: its scale is {its[place]:g} where the "
                f"model's quantizer {name!r} has {mine[place]:g}"
            )


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        checks: one per quantizer that the file has, in the order of execution.
        outputs: what the model returns when its quantizers hand on the file's integers.
        errors: a sentence per node that computes something else, the first first.
        unmatched: quantizers of the model that the file has merged with others; what they feed is checked with them.
    """

    checks: tuple[NodeCheck, ...]
    outputs: list[np.ndarray]
    errors: tuple[str, ...]
    unmatched: tuple[str, ...]


def replay(
    lowered: nn.Module,
    run: Callable[[], list[np.ndarray]],
    graph: QuantizedGraph,
    integers: Mapping[str, np.ndarray],
    runtime: str,
    tolerance: Tolerance,
) -> Replayed:
    """Runs the model with the integers of a file in the place of its own, and compares the two at each quantizer.

    Args:
        lowered: the model as `lower` returns it.
        run: runs it and returns its outputs.
        graph: of the file.
        integers: by tensor, from a run of the file on the same inputs.
        runtime: what ran it, for messages.
        tolerance: what it may do.
    """
    state = _Replay(graph, integers, runtime, tolerance)
    handles = [
        module.register_forward_hook(lambda m, args, _, name=name: state(name, m, args[0]))
        for name, module in lowered.named_modules()
        if isinstance(module, QuantizeDequantize)
    ]
    try:
        outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    return Replayed(tuple(state.checks), outputs, tuple(state.errors), tuple(state.unmatched))
