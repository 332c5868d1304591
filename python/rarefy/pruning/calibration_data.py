"""How calibration data reaches the layers of a Python model: which layers, in which stages, seen by which hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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


class Data:
    """Runs calibration batches through a model and hands the inputs of chosen layers over."""

    def __init__(self, function: str, model: nn.Module, batches: Iterable[object], forward: Forward | None) -> None:
        self._function, self._model, self._batches, self._forward = function, model, batches, forward

    def calls(self, modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
        """How often the first batch calls each module, in the order of first calls. Modules not called are missing."""
        counts: dict[nn.Module, int] = {}

        def count(module: nn.Module, _: object) -> None:
            counts[module] = counts.get(module, 0) + 1

        handles = [module.register_forward_pre_hook(count) for module in modules]
        try:
            with evaluating(self._model):
                feed(self._function, self._model, next(iter(self._batches)), self._forward)
        finally:
            for handle in handles:
                handle.remove()
        return counts

    def run(self, layers: Sequence[Layer], last: nn.Module | None, sink: Callable[[int, Tensor], None]) -> None:
        """All batches: sink(i, x) for every input x of layers[i]. The model stops behind `last` where it is given."""

        def see(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                sink(index, layer_input(module, args, kwargs))

            return hook

        def stop(*_: object) -> None:
            raise _Stop

        handles = [
            module.register_forward_pre_hook(see(i), with_kwargs=True)
            for i, layer in enumerate(layers)
            for module in layer.modules
        ]
        if last is not None:
            handles.append(last.register_forward_hook(stop))
        try:
            with evaluating(self._model):
                for batch in self._batches:
                    try:
                        feed(self._function, self._model, batch, self._forward)
                    except _Stop:
                        pass
        finally:
            for handle in handles:
                handle.remove()


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


def make_stages(
    function: str,
    model: nn.Module,
    layers: Sequence[Layer],
    data: Data,
    propagate: bool,
    blocks: Sequence[str] | None,
) -> list[tuple[list[CalibratedLayer], Callable[[Callable[[int, Tensor], None]], None]]]:
    """Stages in the order in which the model runs them; one stage of all layers without propagation."""
    modules = dict(model.named_modules())
    names = block_names(function, model, blocks)
    block_of: dict[int, nn.Module] = {}  # of each layer's module: the block around it
    for name in names:
        for module in modules[name].modules():
            block_of.setdefault(id(module), modules[name])
    counts = data.calls([*(m for layer in layers for m in layer.modules), *(modules[name] for name in names)])
    order = {module: i for i, module in enumerate(counts)}
    stages: dict[int, tuple[nn.Module, list[Layer]]] = {}
    for layer in layers:
        anchor = block_of.get(id(layer.modules[0]), layer.modules[0])
        stages.setdefault(id(anchor), (anchor, []))[1].append(layer)
    # What the first batch does not call comes last: another batch may.
    ordered = sorted(stages.values(), key=lambda stage: order.get(stage[0], len(order)))
    if not propagate:
        ordered = [(model, [layer for _, members in ordered for layer in members])]

    def make(anchor: nn.Module, members: list[Layer]):
        # A model can end early behind a module that runs once and has every use of the stage's weights inside.
        inside = {id(module) for module in anchor.modules()}
        ends = counts.get(anchor) == 1 and all(id(m) in inside for layer in members for m in layer.modules)
        last = anchor if ends and anchor is not model else None
        return (
            [CalibratedLayer(layer.name, layer.weight, layer.shape) for layer in members],
            lambda sink: data.run(members, last, sink),
        )

    return [make(anchor, members) for anchor, members in ordered]
