"""Bytes between converted layers: which layer may give its result as the bytes that its readers take.

A layer is linked when everything that reads its result, on every way through operations that only move values, is an
integer layer, all of them on one grid. It then rounds to that grid itself, as its readers would have done: no number of the
model changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.nn._base import ByteGrid
from rarefy.nn.attention import PARTS
from rarefy.nn.max_pool import MaxPool2d
from rarefy.nn.quantized import IntegerLayer, QuantizedConv, QuantizedLinear, QuantizedTable
from rarefy.nn.quantized_attention import QuantizedMultiheadAttention
from rarefy.nn.quantized_conv_transpose import QuantizedConvTranspose
from rarefy.nn.quantized_operations import QuantizedAdd, QuantizedCat
from rarefy.nn.quantized_recurrent import QuantizedRecurrent
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.flow import Event, Flow, Key, call, record, tensors_of

# Operations that do with the bytes of a grid what they do with its values: they move them.
_MOVES_BYTES = {
    "flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze",
    "unsqueeze", "dropout", "clone", "detach", "chunk", "split",
}  # fmt: skip


class NotLinked(Exception):
    """Why a layer gives floats."""


def link(model: nn.Module, example_inputs: object) -> dict[str, str]:
    """Link the converted layers of a model, in place, and fuse the ReLUs that follow them.

    Args:
        model: converted, none of its layers linked.
        example_inputs: as ``prepare_qat`` takes them; the model runs once.

    Returns:
        Why a layer gives floats, for each integer layer that does.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    pools = {name for name, module in model.named_modules() if isinstance(module, MaxPool2d)}
    flow = _record_channels_last(model, example_inputs)
    expected = _outputs(model, example_inputs)
    with_relu = [layer for name, layer in layers.items() if _takes_relu(layer, flow.only_call(name), flow)]
    for layer in with_relu:
        layer.relu = True
    reasons: dict[str, str] = {}
    grids: dict[str, ByteGrid] = {}
    for name, layer in layers.items():
        try:
            grids[name] = _grid_of_readers(layer, flow.only_call(name), flow, layers, pools)
        except NotLinked as reason:
            reasons[name] = str(reason)
    for name, grid in grids.items():
        layers[name].quant.set_next(grid)
    try:
        same = _is_equal(_outputs(model, example_inputs), expected)
    except (RuntimeError, TypeError, ValueError):  # an operation that knows no bytes
        same = False
    if not same:  # something reads a result that no recording sees: a scripted function, say
        for layer in with_relu:
            layer.relu = False
        for name in grids:
            layers[name].quant.set_next(None)
            reasons[name] = "the example run gives other results with links: something unseen reads one of them"
    return reasons


def _outputs(model: nn.Module, example_inputs: object) -> list[Tensor]:
    """What the model gives in evaluation mode, always with the same random numbers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return list(tensors_of(call(model, example_inputs)))
    finally:
        for module, training in modes.items():
            module.training = training


def _is_equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(got, expected, strict=True)
    )


def _record_channels_last(model: nn.Module, example_inputs: object) -> Flow:
    """The example run, with channels-last weights, which no integer convolution has to copy its input for, when the model
    runs with them: ``Tensor.view``, say, may refuse."""
    before: list[tuple[QuantizedConv, Tensor]] = []
    changed: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, QuantizedConv) and module.integer_weight.dim() == 4:
            weight = module.integer_weight
            before.append((module, weight))
            new = changed.setdefault(id(weight), weight.contiguous(memory_format=torch.channels_last))
            module.weight = new
    try:
        return record(model, example_inputs, _is_watched)
    except RuntimeError:
        for module, weight in before:
            module.weight = weight
        return record(model, example_inputs, _is_watched)  # raises if the layout was not the cause


def _is_watched(module: nn.Module) -> bool:
    return isinstance(module, (IntegerLayer, MaxPool2d, nn.ReLU))


def _takes_relu(layer: IntegerLayer, event: Event | None, flow: Flow) -> bool:
    """Whether a ReLU, and nothing else, reads a result that is not rounded before."""
    return (
        isinstance(layer, (QuantizedLinear, QuantizedConv, QuantizedConvTranspose, QuantizedAdd))
        and not layer.relu
        and layer.quant.output is None
        and event is not None
        and flow.is_relu(flow.sole_consumer(event))
    )


def _grid_of_readers(
    layer: IntegerLayer, event: Event | None, flow: Flow, layers: dict[str, IntegerLayer], pools: set[str]
) -> ByteGrid:
    """The one grid on which all readers of a layer's result take it."""
    if isinstance(layer, QuantizedTable):
        raise NotLinked("a table's rows lie on grids of their own")
    if isinstance(layer, QuantizedRecurrent):
        raise NotLinked("a recurrent layer gives its states in floating point")
    if isinstance(layer, QuantizedMultiheadAttention):
        raise NotLinked("its output projection gives floats")
    if not isinstance(layer, QuantizedCat) and layer.quant.input is None and layer.quant.input0 is None:
        raise NotLinked("its input is floating point")
    if layer.quant.output is not None:
        raise NotLinked("its result is rounded for what reads it in floating point")
    if event is None:
        raise NotLinked("the example inputs call it not once")
    quantizers: list[FakeQuantizer] = []
    todo, seen = list(event.outputs), set()
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        if key in flow.results:
            raise NotLinked("the model returns its result")
        if key in flow.typed:
            raise NotLinked("the model asks for the dtype of its result")
        for reader in flow.consumers(key):
            if reader.module in layers:
                quantizers += _quantizers_of(layers[reader.module], reader, key)
            elif (
                reader.kind in _MOVES_BYTES or reader.module in pools or (flow.is_relu(reader) and layer.relu)
            ):  # nothing is below zero
                todo.extend(reader.outputs)
            else:
                raise NotLinked(f"{reader.kind} reads its result in floating point")
    if not quantizers:
        raise NotLinked("nothing reads its result")
    first, *others = quantizers
    if any(not _is_same_grid(first, other) for other in others):
        raise NotLinked("its readers have different grids")
    return ByteGrid(first.qmin, first.qmax, first.scale, first.zero_point)


def _quantizers_of(reader: IntegerLayer, event: Event, key: Key) -> list[FakeQuantizer]:
    """The quantizers with which a layer reads a value."""
    if event.by_name and len(event.inputs) > 1:
        raise NotLinked(f"{event.module} takes its inputs by name")
    if isinstance(reader, QuantizedAdd):
        given = zip((reader.quant.input0, reader.quant.input1), event.inputs, strict=True)
        found = [quantizer for quantizer, value in given if value == key]
    elif isinstance(reader, QuantizedRecurrent):
        if event.inputs[0] != key:
            raise NotLinked(f"{event.module} reads its state in floating point")
        found = [reader.quant.find(f"input{reader.sizes.layers()[0][0].layer}")]
    elif isinstance(reader, QuantizedMultiheadAttention):
        if key in event.inputs[3:]:
            raise NotLinked(f"{event.module} reads a mask in floating point")
        given = zip(PARTS, event.inputs, strict=False)  # query, key, value, masks
        found = [reader.quant.find(f"input_{part}") for part, value in given if value == key]
    else:
        found = [reader.quant.input]
    if isinstance(reader, QuantizedConv) and reader.geometry.mode != "constant":
        raise NotLinked(f"{event.module} pads its input with values")
    quantizers = [quantizer for quantizer in found if quantizer is not None]
    if len(quantizers) != len(found):
        raise NotLinked(f"{event.module} reads its result in floating point")
    return quantizers


def _is_same_grid(a: FakeQuantizer, b: FakeQuantizer) -> bool:
    same = (a.qmin, a.qmax) == (b.qmin, b.qmax)
    return same and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
