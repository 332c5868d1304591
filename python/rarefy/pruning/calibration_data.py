"""How calibration data reaches the layers of a Python model: which layers, in which stages, seen by which hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy import _core
from rarefy._batches import feed
from rarefy._core.pruning import CalibratedLayer, LayerShape, LeftAlone

Forward = Callable[[nn.Module, object], object]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Stop(BaseException):
    """Ends a run once its stage has seen everything. Not an Exception, so that no model's own handler takes it."""


def layer_shape(module: nn.Module) -> LayerShape | None:
    """How a module's weight meets its inputs; None for a module whose inputs are not known to be multiplied with it."""
    if isinstance(module, nn.Linear):
        return LayerShape(list(module.weight.shape))
    if isinstance(module, _CONVOLUTIONS):
        own = isinstance(module.padding, str) or module.padding_mode != "zeros"  # padded by the hook
        padding = [0] * len(module.kernel_size) if own else list(module.padding)
        return LayerShape(list(module.weight.shape), list(module.stride), padding, list(module.dilation), module.groups)
    return None


def layer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a call, padded where LayerShape cannot say how."""
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, _CONVOLUTIONS) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return x


@dataclass
class Layer:
    """A weight, and the modules that multiply their inputs with it."""

    name: str
    weight: nn.Parameter
    shape: LayerShape
    modules: list[nn.Module] = field(default_factory=list)


def find_layers(
    function: str, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[Layer], list[LeftAlone]]:
    """Choose the weights to prune among those of linear layers and convolutions.

    Raises:
        TypeError: include or exclude is a string.
        ValueError: a name that is not in the model, or no weight to prune.
    """
    for option, names in (("include", include), ("exclude", exclude)):
        if isinstance(names, str):
            raise TypeError(f"[{function}] {option} must be a list of names, got the string {names!r}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen, left_alone = _core.pruning.choose_parameters(
        list(parameters), list(parameters.values()), None if include is None else list(include), list(exclude)
    )
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    names = list(parameters)
    layers = []
    for i in chosen:
        weight = parameters[names[i]]
        modules = users[id(weight)]
        shapes = [layer_shape(module) if getattr(module, "weight", None) is weight else None for module in modules]
        if any(shape is None for shape in shapes):
            kinds = ", ".join(sorted({type(m).__name__ for m, s in zip(modules, shapes, strict=True) if s is None}))
            reason = f"not the weight of a linear layer or convolution alone: {kinds}"
            left_alone.append(_core.pruning.left_alone(names[i], weight.numel(), reason))
            continue
        layers.append(Layer(names[i], weight, shapes[0], modules))
    if not layers:
        raise ValueError(
            f"[{function}] needs at least one weight of a linear layer or convolution, got none among "
            f"{len(parameters)} parameters"
        )
    return layers, left_alone


def as_batches(function: str, loader: Iterable[object]) -> Iterable[object]:
    """The loader itself when it can be gone through again, else its batches in a list. ValueError when there are none."""
    batches = list(loader) if iter(loader) is loader else loader
    for _ in batches:
        return batches
    raise ValueError(f"[{function}] loader must yield at least one batch, got none")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class _Call:
    """The last call of a block in a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: object = None


def _first(output: object) -> object:
    return output[0] if isinstance(output, tuple) and output else output


def _is_plain(value: object) -> bool:
    """Whether a call can be made again with this value: no caches or other objects with a state."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _is_link(before: _Call, after: _Call) -> bool:
    """Whether a block is called with the output of the one before, and otherwise with the very same values."""
    if not before.args or not after.args or after.args[0] is not _first(before.output):
        return False
    rest = [(*call.args[1:], *call.kwargs.values()) for call in (before, after)]
    return (
        isinstance(after.args[0], Tensor)
        and before.kwargs.keys() == after.kwargs.keys()
        and len(rest[0]) == len(rest[1])
        and all(_is_plain(value) for value in rest[0])
        and all(a is b or (type(a) in (bool, int, float, str) and a == b) for a, b in zip(*rest, strict=True))
    )


@dataclass
class Trace:
    """What the first batch calls: modules in the order of first calls with their numbers of calls, and blocks' calls."""

    counts: dict[nn.Module, int]
    blocks: dict[nn.Module, _Call]

    def is_link(self, before: nn.Module, after: nn.Module) -> bool:
        """Whether two blocks run once each, the second on the first one's output."""
        once = self.counts.get(before) == 1 and self.counts.get(after) == 1
        return once and _is_link(self.blocks[before], self.blocks[after])


class Data:
    """Runs calibration batches through a model and hands the inputs of chosen layers over."""

    def __init__(self, function: str, model: nn.Module, batches: Iterable[object], forward: Forward | None) -> None:
        self._function, self._model, self._batches, self._forward = function, model, batches, forward

    def trace(self, modules: Iterable[nn.Module], blocks: Iterable[nn.Module]) -> Trace:
        """Look at the first batch. Modules that it does not call are missing."""
        trace = Trace({}, {})

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.counts[module] = trace.counts.get(module, 0) + 1
            if module in of_interest:
                trace.blocks[module] = _Call(args, kwargs)

        def end(module: nn.Module, _: object, output: object) -> None:
            trace.blocks[module].output = output

        of_interest = set(blocks)
        handles = [m.register_forward_pre_hook(begin, with_kwargs=True) for m in {*modules, *of_interest}]
        handles += [m.register_forward_hook(end) for m in of_interest]
        try:
            with evaluating(self._model):
                feed(self._function, self._model, next(iter(self._batches)), self._forward)
        finally:
            for handle in handles:
                handle.remove()
        return trace

    @contextmanager
    def watching(self, layers: Sequence[Layer], sink: Callable[[int, Tensor], None]) -> Iterator[None]:
        """While it is open, sink(i, x) is called for every input x of layers[i]."""

        def see(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                sink(index, layer_input(module, args, kwargs))

            return hook

        handles = [
            module.register_forward_pre_hook(see(i), with_kwargs=True)
            for i, layer in enumerate(layers)
            for module in layer.modules
        ]
        try:
            with evaluating(self._model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self,
        layers: Sequence[Layer],
        last: nn.Module | None,
        sink: Callable[[int, Tensor], None],
        on_last: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        """All batches. The model stops behind `last` where it is given; on_last gets the arguments of its calls."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> None:
            if on_last is not None:
                on_last(args, kwargs)
            raise _Stop

        handle = None if last is None else last.register_forward_hook(stop, with_kwargs=True)
        try:
            with self.watching(layers, sink):
                for batch in self._batches:
                    with suppress(_Stop):
                        feed(self._function, self._model, batch, self._forward)
        finally:
            if handle is not None:
                handle.remove()


class Chain:
    """Blocks of which each is called with the output of the one before: the inputs of one block are kept.

    So a stage runs its block and the one before it, where running the model up to there would run all blocks again.
    """

    def __init__(self, data: Data, blocks: list[nn.Module]) -> None:
        self._data, self._blocks = data, blocks
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def run(self, position: int, layers: Sequence[Layer], sink: Callable[[int, Tensor], None]) -> None:
        """All batches, for the layers of the block at this position; positions come in order."""
        block = self._blocks[position]
        if position == 0:
            self._calls = []
            self._data.run(layers, block, sink, lambda args, kwargs: self._calls.append((args, kwargs)))
        else:
            before = self._blocks[position - 1]
            with self._data.watching(layers, sink):
                for i, (args, kwargs) in enumerate(self._calls):
                    args = (_first(before(*args, **kwargs)), *args[1:])
                    self._calls[i] = (args, kwargs)
                    block(*args, **kwargs)
        if position + 1 == len(self._blocks):
            self._calls = []


def block_names(function: str, model: nn.Module, blocks: Sequence[str] | None) -> list[str]:
    """The modules whose layers are pruned together: those named, or the entries of outermost ModuleLists."""
    modules = dict(model.named_modules())
    if blocks is not None:
        for name in blocks:
            if name not in modules:
                raise ValueError(f"[{function}] every name in blocks must be that of a module, got {name!r}")
        return list(blocks)
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{child}" for name in outer for child, _ in modules[name].named_children()]


Sink: TypeAlias = Callable[[int, Tensor], None]
Stage: TypeAlias = tuple[list[CalibratedLayer], Callable[[Sink], None]]


def _stage(layers: Sequence[Layer], run: Callable[[Sink], None]) -> Stage:
    return [CalibratedLayer(layer.name, layer.weight, layer.shape) for layer in layers], run


def make_stages(
    function: str,
    model: nn.Module,
    layers: Sequence[Layer],
    data: Data,
    propagate: bool,
    blocks: Sequence[str] | None,
) -> list[Stage]:
    """Stages in the order in which the model runs them; one stage of all layers without propagation."""
    modules = dict(model.named_modules())
    names = block_names(function, model, blocks)
    block_of: dict[int, nn.Module] = {}  # of each module: the first block around it
    blocks_around: dict[int, int] = {}
    for name in names:
        for module in modules[name].modules():
            block_of.setdefault(id(module), modules[name])
            blocks_around[id(module)] = blocks_around.get(id(module), 0) + 1
    trace = data.trace((m for layer in layers for m in layer.modules), (modules[name] for name in names))
    order = {module: i for i, module in enumerate(trace.counts)}
    stages: dict[int, tuple[nn.Module, list[Layer]]] = {}
    for layer in layers:
        anchor = block_of.get(id(layer.modules[0]), layer.modules[0])
        stages.setdefault(id(anchor), (anchor, []))[1].append(layer)

    def first_call(stage: tuple[nn.Module, list[Layer]]) -> int:
        # What the first batch does not call comes last: another batch may.
        calls = [stage[0], *(module for layer in stage[1] for module in layer.modules)]
        return min(order.get(module, len(order)) for module in calls)

    ordered = sorted(stages.values(), key=first_call)
    if not propagate:
        members = [layer for _, members in ordered for layer in members]
        return [_stage(members, lambda sink: data.run(members, None, sink))]

    out = []
    chain: list[nn.Module] = []
    for anchor, members in ordered:
        # A model can end early behind a module that runs once and has every use of the stage's weights inside.
        inside = {id(module) for module in anchor.modules() if blocks_around.get(id(module), 1) == 1}
        ends = trace.counts.get(anchor) == 1 and all(id(m) in inside for layer in members for m in layer.modules)
        if ends and anchor in trace.blocks:
            if not (chain and trace.is_link(chain[-1], anchor)):
                chain = []
                own = Chain(data, chain)
            run = partial(own.run, len(chain), members)
            chain.append(anchor)
        else:
            chain = []
            run = partial(data.run, members, anchor if ends else None)
        out.append(_stage(members, run))
    return out
