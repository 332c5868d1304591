"""The verbs: prepare_qat, prepare, calibrate, convert, set_state, report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from rarefy import nn as rnn
from rarefy._batches import feed
from rarefy._core.quantization import MinMax, MovingAverage, TargetProfile
from rarefy.masks import check_masks, remove_masks
from rarefy.nn.kept import keeping
from rarefy.nn.packed import share_packed
from rarefy.nn.registry import Fold, Row, converted_type, is_layer, is_prepared, row_of, unsupported
from rarefy.quantization.distributed import RangeSync
from rarefy.quantization.fake_quantizer import FakeQuantizer, Observer
from rarefy.quantization.fast_path import leave_fast_path
from rarefy.quantization.flow import Event, Flow, record
from rarefy.quantization.link import link
from rarefy.quantization.memory_format import ChannelsLast
from rarefy.quantization.observed_once import ObservedOnce
from rarefy.quantization.qconfig import QConfig
from rarefy.quantization.report import QuantizationReport, report
from rarefy.quantization.selection import (
    check_execution,
    check_strict,
    first_and_last,
    for_target,
    output_projections,
    unmatched_overrides,
)
from rarefy.quantization.tied import share_integers, tied_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass
class _Step:
    """One layer to swap: decided before the first is."""

    name: str
    module: nn.Module
    row: Row
    config: QConfig
    bn: str | None = None  # name of the batch normalization to fold in
    relu: bool = False
    quantize_output: bool = False
    inputs: tuple[str, ...] | None = None  # of an operation on two tensors: those to quantize; None: both


def _layers(model: nn.Module, config: QConfig, function: str) -> dict[str, nn.Module]:
    """The layers that the configuration is about, none of them prepared but those that it leaves alone."""
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    for name, module in layers.items():
        if is_prepared(module) and config.resolve(name, module)[0] is not None:
            raise ValueError(f"[{function}] layer {name} must be floating point, but is already prepared")
    return layers


def _plan(
    layers: dict[str, nn.Module], config: QConfig, function: str, flow: Flow | None, strict: bool
) -> tuple[dict[str, _Step], dict[str, str], list[str]]:
    """What to swap, why other layers are left alone, and overrides that matched nothing. Changes nothing."""
    owners = output_projections(layers)
    weighted = {n: m for n, m in layers.items() if (row := row_of(m)) is not None and row.layer.has_weight}
    ends = first_and_last(config, {n: m for n, m in weighted.items() if n not in owners}, flow)
    steps: dict[str, _Step] = {}
    skipped: dict[str, str] = dict(ends)
    left: dict[str, str] = {}  # of what is skipped: what nobody excluded
    for name, module in layers.items():
        if name in ends:
            continue
        owner = owners.get(name)
        if owner is not None and owner not in steps:
            skipped[name] = f"{owner}, to which it belongs, stays in FP32"
            continue
        if owner is not None and config.override(name, module) is None:
            resolved, reason = steps[owner].config, ""
        else:
            resolved, reason = config.resolve(name, module)
        if resolved is None:
            skipped[name] = reason
            continue
        why, row = unsupported(module), row_of(module)
        if why is not None or row is None:
            skipped[name] = left[name] = why or ""
            continue
        if not row.layer.has_weight and resolved.activation is None:
            skipped[name] = "the configuration quantizes weights only"
            continue
        if row.layer.has_weight:
            check_execution(function, name, resolved)
        if config.profile is not None:
            kind = row.layer.__name__
            if not config.profile.executes(kind) and config.override(name, module) is None:
                skipped[name] = f"kept in FP32: {config.target} does not run it in integers"
                continue
            resolved = for_target(function, name, kind, resolved, config.profile)
        steps[name] = _Step(name, module, row, resolved)
    if flow is not None:
        # torch's attention reads the weight of its output projection and does not call it.
        called = flow.called | {name for name, owner in owners.items() if owner in flow.called}
        for name in _never_called(steps, config, called):
            del steps[name]
            skipped[name] = "not called by the example inputs"
        for name in [name for name, owner in owners.items() if name in steps and owner not in steps]:
            del steps[name]
            skipped[name] = f"{owners[name]}, to which it belongs, stays in FP32"
    unmatched = unmatched_overrides(config, layers)
    if strict:
        check_strict(function, unmatched, layers, left)
    if not steps:
        raise ValueError(
            f"[{function}] the model must have a layer that the configuration quantizes "
            f"(Linear, Conv1d, Conv2d, Conv3d, LSTM, rarefy.nn.Add, ...)"
            f"{' and that the example inputs reach' if flow is not None else ''}, but has none"
        )
    return steps, skipped, unmatched


def _never_called(steps: dict[str, _Step], config: QConfig, names: set[str]) -> list[str]:
    """The layers that the example run did not call and that nothing else asks to quantize: no override does, and it is no
    second name for the table of a layer that was called (T5's ``shared``), whose float weight would then stay beside it."""
    called = {
        id(getattr(step.module, "weight", step.module))
        for step in steps.values()
        if step.row.layer.has_weight and step.name in names
    }
    return [
        step.name
        for step in steps.values()
        if step.name not in names
        and config.override(step.name, step.module) is None
        and not (step.row.layer is rnn.Embedding and id(step.module.weight) in called)
    ]


def _read_flow(model: nn.Module, steps: dict[str, _Step], flow: Flow, profile: TargetProfile | None) -> None:
    modules = dict(model.named_modules())
    weighted = {name for name, step in steps.items() if step.row.layer.has_weight}
    for step in steps.values():
        event = flow.only_call(step.name)
        if event is None:
            continue
        consumer = flow.sole_consumer(event)
        fold = step.row.fold
        if fold is not None and consumer is not None and consumer.module is not None:
            bn = modules[consumer.module]
            if _foldable(bn, step.module, fold) and flow.only_call(consumer.module) is not None:
                step.bn = consumer.module
                event = consumer
                consumer = flow.sole_consumer(event)
        step.relu = step.row.layer.fuses_relu and flow.is_relu(consumer)
        if step.row.layer is rnn.Add and profile is not None and profile.residual == "identity":
            step.inputs = _identity_inputs(flow, flow.only_call(step.name), modules, weighted)
        if not step.row.layer.quantizes_output or (profile is not None and not profile.quantizes_outputs):
            continue
        consumers, returned = flow.final_consumers(event)
        takes_float = [not (c.module in steps and steps[c.module].config.activation is not None) for c in consumers]
        step.quantize_output = bool(consumers) and not returned and all(takes_float)


def _identity_inputs(
    flow: Flow, add: Event | None, modules: dict[str, nn.Module], weighted: set[str]
) -> tuple[str, ...]:
    """The inputs of a residual addition to quantize where the layer before it adds in its epilogue: not that layer's."""
    if add is None or len(add.inputs) != 2:
        return ("input1",)
    from_layer = []
    for key in add.inputs:
        made_by = flow.producer(key)
        while made_by is not None and (
            made_by.kind == "dropout"
            or (made_by.module is not None and isinstance(modules[made_by.module], _BATCH_NORM))
        ):
            made_by = flow.producer(made_by.inputs[0])
        readers = [call for call in flow.consumers(key) if key not in call.outputs]
        from_layer.append(made_by is not None and made_by.module in weighted and len(readers) == 1)
    if not any(from_layer):
        return ("input0", "input1")
    return ("input1",) if from_layer[0] else ("input0",)


def _foldable(bn: nn.Module, layer: nn.Module, fold: Fold) -> bool:
    return (
        type(bn) is fold.batch_norm
        and bn.affine
        and bn.track_running_stats
        and bn.momentum is not None
        and bn.num_features == layer.out_channels
    )


def _is_watched(module: nn.Module) -> bool:
    return is_layer(module) or isinstance(module, (_BATCH_NORM, nn.ReLU))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _prepare(
    function: str,
    model: nn.Module,
    config: QConfig,
    example_inputs: object | None,
    inplace: bool,
    default_observer: Observer,
    training: bool,
    strict: bool,
    sync: RangeSync | None,
) -> nn.Module:
    if not isinstance(config, QConfig):
        raise TypeError(f"[{function}] config must be a QConfig, got {type(config).__name__}")
    if row_of(model) is not None:
        raise ValueError(
            f"[{function}] model must contain its layers, got a single {type(model).__name__}; wrap it in nn.Sequential"
        )
    if not inplace:
        model = copy.deepcopy(model)
    layout = ChannelsLast(model)
    try:
        return _swap(function, model, config, example_inputs, default_observer, training, strict, sync, layout)
    except BaseException:
        layout.undo()
        raise


def _swap(
    function: str,
    model: nn.Module,
    config: QConfig,
    example_inputs: object | None,
    default_observer: Observer,
    training: bool,
    strict: bool,
    sync: RangeSync | None,
    layout: ChannelsLast,
) -> nn.Module:
    layers = _layers(model, config, function)
    flow, runs_channels_last = None, False
    if example_inputs is not None:
        integer = training and config.activation is not None and config.execution != "simulated"
        run = partial(record, model) if config.activation is None or (training and not integer) else layout.record
        flow = run(example_inputs, _is_watched)
        runs_channels_last = layout.in_use
        if not training:
            layout.undo()  # a calibration chooses the layout of each convolution
    steps, skipped, unmatched = _plan(layers, config, function, flow, strict)
    if flow is not None:
        _read_flow(model, steps, flow, config.profile)
    # Build every layer first: the model is touched only when nothing can fail any more.
    swaps: list[tuple[str, nn.Module]] = []
    for step in steps.values():
        layer_config = step.config.with_observer(default_observer)
        options: dict[str, Any] = {"relu": step.relu, "quantize_output": step.quantize_output}
        if issubclass(step.row.layer, rnn.Add):
            identity = config.profile is not None and config.profile.residual == "identity"
            options["inputs"] = step.inputs or (("input1",) if identity else ("input0", "input1"))
        if step.bn is not None:
            fold = step.row.fold
            assert fold is not None
            bn = fold.folded.from_float(model.get_submodule(step.bn))
            swaps.append((step.bn, bn))
            swaps.append((step.name, fold.layer.from_float(step.module, layer_config, bn=bn, **options)))
        else:
            swaps.append((step.name, step.row.layer.from_float(step.module, layer_config, **options)))
    if training:
        swaps += [(name, rnn.ReLU.from_float(m)) for name, m in model.named_modules() if name and type(m) is nn.ReLU]
    # One new layer for each module, also where the model holds it under several names.
    replacement = {id(model.get_submodule(name)): layer for name, layer in swaps}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacement:
            _replace(model, name, replacement[id(module)])
    leave_fast_path(model, {id(layer) for layer in replacement.values()})
    model._rarefy_skipped, model._rarefy_unmatched = skipped, unmatched  # read by report()
    model._rarefy_contiguous = layout.reason if training else ""
    model._rarefy_runs_channels_last = runs_channels_last  # read by calibrate()
    for name, quantizer in _quantizers(model):
        quantizer.name, quantizer.sync = name, sync
    return model


def prepare_qat(
    model: nn.Module,
    config: QConfig,
    example_inputs: object | None = None,
    *,
    inplace: bool = False,
    strict: bool = True,
    sync_observers: bool = True,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """A model that trains with quantization: its linear and convolution layers, ``rarefy.nn.Add`` and so on
    compute on integer grids.

    Every quantized layer quantizes its own input and weight, so that no tracing is needed. With ``example_inputs`` the
    model is run once, and what the run shows is used: a batch normalization that alone follows a convolution is folded
    into it, a ReLU that alone follows a layer is fused into it, and a result that flows only into operations that stay in
    floating point (a pooling, say) is quantized where it is made, as integer runtimes want it. Weights of 2-d convolutions
    are laid out channels-last, and with them the activations, if the model runs so (one that calls ``view`` on them may
    not): integer kernels read that without a copy. A layer that the run never calls (a head for another task; one whose
    weight the model reads and computes with itself) stays in FP32, as it would never be calibrated, unless an override
    gives it a configuration: ``report`` names it, also with ``strict``.

    Args:
        model: any module with such layers. Parameter names and values stay.
        config: schemes, overrides, and the target. For one that adds a residual in the epilogue of the layer before it
            ("tensorrt"), only the identity branch of ``rarefy.nn.Add`` is quantized: the input that does not come straight
            from a layer with a weight in the example run, the second one without a run.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        inplace: swap the layers of ``model`` itself; Parameter objects stay the same, so an optimizer stays valid.
        strict: an override that matches no layer is an error, and so is a layer of a supported family that cannot be
            quantized (a subclass, say) and that no override excludes. With False, ``report`` names them.
        sync_observers: when ``torch.distributed`` is initialized, activation ranges are those of all processes (one small
            all-reduce for each quantizer and step), so that quantizers stay equal everywhere.
        process_group: the processes that share ranges; None: all.

    Returns:
        The prepared model; ``model`` itself is unchanged unless ``inplace``.

    Raises:
        ValueError: something is amiss with ``strict``, a layer cannot execute as the configuration demands, or its target
            does not execute the layer's schemes, nothing is left to quantize, or a layer is prepared already. The model is
            then as it was.
    """
    sync = RangeSync(process_group) if sync_observers else None
    return _prepare(
        "prepare_qat",
        model,
        config,
        example_inputs,
        inplace,
        MovingAverage(),
        training=True,
        strict=strict,
        sync=sync,
    )


def prepare(
    model: nn.Module,
    config: QConfig,
    example_inputs: object | None = None,
    *,
    inplace: bool = False,
    strict: bool = True,
    sync_observers: bool = True,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """A model that is ready for ``calibrate``: quantization after training, without training.

    Arguments, result and errors are those of ``prepare_qat``. Until ``calibrate`` has run, activations pass unchanged.
    """
    sync = RangeSync(process_group) if sync_observers else None
    model = _prepare(
        "prepare", model, config, example_inputs, inplace, MinMax(), training=False, strict=strict, sync=sync
    )
    for _, quantizer in _activation_quantizers(model):
        quantizer.observe = quantizer.quantize = False
    return model


def _quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            yield name, module


def _activation_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantizer]]:
    return [(name, q) for name, q in _quantizers(model) if not q.is_weight]


def _require_prepared(function: str, model: nn.Module) -> None:
    if next(_quantizers(model), None) is None:
        raise ValueError(f"[{function}] the model must have prepared layers; call prepare_qat or prepare first")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def calibrate(
    model: nn.Module,
    loader: Iterable[object],
    *,
    forward: Callable[[nn.Module, object], object] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Run the data through a prepared model so that its activation quantizers learn their ranges.

    In evaluation mode, without gradients; the training mode is restored. Statistics add up over several calls. Batches
    with NaN or infinite values are left out, and a warning says how many at which quantizer. Where ranges are shared
    between processes they are merged once, at the end, so that the processes may have different numbers of batches: all of
    them must call this.

    Weights are folded, observed, searched and rounded once, and a tensor that several quantizers see is observed once, with
    the result of doing it for every batch. A model that ``prepare`` has seen run channels-last computes its 2-d convolutions in
    the layout that is faster at their size; the weights stay as they are.

    Args:
        model: of ``prepare`` (or ``prepare_qat``).
        loader: batches. A tensor is the model's input; of a tuple or list the first element is; a dict is keyword
            arguments.
        forward: ``forward(model, batch)`` feeds other kinds of batches.
        progress: show a progress bar.

    Returns:
        ``model`` itself, with quantizing activations.

    Raises:
        ValueError: the model is not prepared, there is no batch, or some layer saw no data, or no finite batch (they are
            listed). The quantizers' switches, and their ranges, are then as they were.
    """
    _require_prepared("calibrate", model)
    quantizers = _activation_quantizers(model)
    before = [(q, q.observe, q.quantize, q.sync, q._told) for _, q in quantizers]
    pending = {name: q._pending for name, q in quantizers}
    states = {name: {k: v.clone() for k, v in q.state_dict().items()} for name, q in _quantizers(model)}
    try:
        batches = 0
        layers = [m for m in model.modules() if isinstance(m, rnn.QuantizableLayer) and m.prepared]
        channels_last = getattr(model, "_rarefy_runs_channels_last", False)
        once = ObservedOnce()
        with _evaluating(model), torch.no_grad(), keeping(layers, channels_last):
            for _, quantizer in quantizers:
                quantizer.observe, quantizer.quantize, quantizer.observed_once = True, False, once
                if quantizer.statistics is not None and quantizer.sync is not None and quantizer.sync.is_active():
                    quantizer.statistics.clear()  # those of before are of all processes already
                quantizer.sync, quantizer._told = None, True  # once, at the end
            for batch in tqdm(loader, desc="calibrate", disable=not progress):
                feed("calibrate", model, batch, forward)
                batches += 1
        for (name, quantizer), (_, _, _, sync, _) in zip(quantizers, before, strict=True):
            quantizer.sync = sync
            if sync is not None and sync.is_active():
                sync.merge([quantizer])
                if quantizer.statistics is not None:
                    prefix = "statistics."
                    quantizer.statistics.add(
                        {k.removeprefix(prefix): v for k, v in states[name].items() if k.startswith(prefix)}
                    )
                batches = sync.sum(batches, quantizer.scale.device) if quantizer is quantizers[0][1] else batches
        if batches == 0:
            raise ValueError("[calibrate] loader must yield at least one batch, got none")
        skipped = {name: int(q.skipped) - int(states[name]["skipped"]) for name, q in quantizers}
        empty = [name for name, quantizer in quantizers if not quantizer.calibrated]
        missed = [name for name in empty if not skipped[name]]
        if missed:
            raise ValueError(f"[calibrate] every quantizer must see data, but none reached: {', '.join(missed)}")
        if empty:
            raise ValueError(
                f"[calibrate] every quantizer must see a finite batch, but every batch held NaN or infinite values at: "
                f"{', '.join(empty)}"
            )
    except BaseException:
        for name, quantizer in _quantizers(model):
            quantizer.load_state_dict(states[name])
        for (name, quantizer), (_, observe, quantize, sync, _) in zip(quantizers, before, strict=True):
            quantizer.observe, quantizer.quantize, quantizer.sync = observe, quantize, sync
            quantizer._pending = pending[name]
        raise
    finally:
        for quantizer, *_, told in before:
            quantizer._told, quantizer.observed_once = told, None
    for _, quantizer in quantizers:
        quantizer.observe, quantizer.quantize = False, True
    counts = ", ".join(f"{name} ({count})" for name, count in skipped.items() if count)
    if counts:
        warnings.warn(f"[calibrate] batches with NaN or infinite values were left out at: {counts}", stacklevel=2)
    return model


def convert(model: nn.Module, example_inputs: object | None = None, *, inplace: bool = False) -> nn.Module:
    """A model whose prepared layers execute in integers: on LibTorch's oneDNN int8 kernels on the CPU, and with the same
    integers in float kernels elsewhere. For inference.

    A weight in a format without integer kernels (int4 groups, NF4, minifloats, MX, codebooks, ...) is kept as its codes and
    scales (``rarefy.nn.PackedLinear`` and its like), as small as the format is, and becomes numbers where it is multiplied:
    those of the prepared layer, bit for bit. Recurrent layers, the projections of attention and stochastic rounding stay
    simulated there.

    With example inputs the layers hand bytes on where they can: a layer whose result reaches integer layers alone, all on one
    grid, rounds it itself, so that no float tensor is written between them. Values stay the same. ``report`` says which
    layers give bytes, and why others do not.

    Zeros that a pruner holds are zeros among the integers, and final: the converted model has no masks.

    Layers over one Parameter hold one int8 tensor where their integers and scales are equal, as those of a table and a head
    with scales per row are; ``report`` says which do.

    Args:
        model: prepared, and trained or calibrated.
        example_inputs: as ``prepare_qat`` takes them; the converted model runs once with them. The links are those of this
            run: a model that takes another way through its layers for other inputs must go without.
        inplace: swap the layers of ``model`` itself.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: the model is not prepared, some quantizer has not been calibrated (they are listed), or weights are not
            zero where a pruner's mask prunes. The model is then as it was.
    """
    _require_prepared("convert", model)
    missed = [name for name, quantizer in _activation_quantizers(model) if not quantizer.calibrated]
    if missed:
        raise ValueError(
            f"[convert] every quantizer must be calibrated (train or calibrate first), but these are not: {', '.join(missed)}"
        )
    check_masks(model)
    if not inplace:
        model = copy.deepcopy(model)
    for _, quantizer in _quantizers(model):
        quantizer.settle()
    tied = tied_groups(model)
    swaps: dict[int, nn.Module] = {}
    for module in model.modules():
        if not isinstance(module, rnn.QuantizableLayer) or not module.prepared:
            continue
        kind = converted_type(module)
        if kind is not None:
            swaps[id(module)] = kind(module)
            if isinstance(module, rnn.ConvBnLayer):
                swaps[id(module.bn)] = rnn.SpentBatchNorm()
    if example_inputs is not None:
        swaps.update(
            {
                id(module): rnn.MaxPool2d.from_float(module)
                for module in model.modules()
                if type(module) is nn.MaxPool2d and not module.return_indices
            }
        )
    before = [item for item in model.named_modules(remove_duplicate=False) if id(item[1]) in swaps]
    for name, module in before:
        _replace(model, name, swaps[id(module)])
    try:
        unlinked = {} if example_inputs is None else link(model, example_inputs)
    except BaseException:
        for name, module in before:
            _replace(model, name, module)
        raise
    for _, quantizer in _quantizers(model):
        quantizer.drop_statistics()
    share_integers(model, tied)
    share_packed(model, tied)
    remove_masks(model)
    model._rarefy_unlinked = unlinked  # read by report()
    return model.eval()


def set_state(model: nn.Module, *, observe: bool | None = None, quantize: bool | None = None) -> None:
    """What every fake quantizer of a prepared model does from now on; None leaves a switch as it is.

    Args:
        model: prepared.
        observe: follow the data (False freezes scales and zero points).
        quantize: round to the grid (False trains in floating point).

    Raises:
        ValueError: the model is not prepared.
    """
    _require_prepared("set_state", model)
    for _, quantizer in _quantizers(model):
        quantizer.observe = quantizer.observe if observe is None else observe
        quantizer.quantize = quantizer.quantize if quantize is None else quantize


__all__ = ["QuantizationReport", "calibrate", "convert", "prepare", "prepare_qat", "report", "set_state"]
