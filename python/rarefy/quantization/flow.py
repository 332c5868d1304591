"""Which layer feeds which: one eager run of the model, recorded.

``prepare`` needs three facts that module names do not tell: which batch normalization follows which convolution, which
results go into a ReLU and nothing else, and which results reach an operation that stays in floating point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Operations that hand values on unchanged: a tensor on a grid stays on it. ReLU is one: zero is on every grid.
_PASS_THROUGH = {
    "relu", "relu_", "max_pool2d", "boolean_dispatch", "flatten", "reshape", "view", "permute", "transpose", "contiguous",
    "squeeze", "unsqueeze", "dropout", "clone", "detach",
}  # fmt: skip
_RELU = {"relu", "relu_"}
# Reading a tensor's facts is not computing with it.
_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_NO_USE = {"size", "dim", "numel", "__get__", "is_floating_point", "is_inference", "stride", "__len__", "is_contiguous"}

Key = tuple[int, int]  # identity of a tensor and its version, as in-place operations make a new value


def tensors_of(values: object) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, item.name) for item in fields(leaf)])


def call(model: nn.Module, example_inputs: object) -> object:
    """What the model gives: a tuple or list holds positional arguments, a dict arguments by name."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@dataclass(frozen=True)
class Event:
    """One call: of the layer ``module`` (by name), or of a function called ``kind``."""

    kind: str
    module: str | None
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    by_name: bool = False  # tensors were passed by name, so that ``inputs`` are not in the order of the parameters


@dataclass
class Flow:
    """A recorded run."""

    events: list[Event] = field(default_factory=list)
    results: set[Key] = field(default_factory=set)  # what the model returned
    typed: set[Key] = field(default_factory=set)  # whose type of number the model asked for
    called: set[str] = field(default_factory=set)  # watched layers that ran, also inside of another one
    _kept: list[Tensor] = field(default_factory=list)  # alive, so that no identity is used twice

    def __post_init__(self) -> None:
        self._consumers: dict[Key, list[Event]] = defaultdict(list)
        self._calls: dict[str, list[Event]] = defaultdict(list)
        self._producers: dict[Key, Event] = {}

    def add(self, event: Event) -> None:
        """Append a call."""
        self.events.append(event)
        for key in dict.fromkeys(event.inputs):
            self._consumers[key].append(event)
        for key in event.outputs:
            if key not in event.inputs:
                self._producers[key] = event
        if event.module is not None:
            self._calls[event.module].append(event)

    def producer(self, key: Key) -> Event | None:
        """The call that made a value; None for the model's inputs and parameters."""
        return self._producers.get(key)

    def consumers(self, key: Key) -> list[Event]:
        """The calls that use a value."""
        return self._consumers[key]

    def only_call(self, module: str) -> Event | None:
        """The one call of a layer; None when it ran not at all or several times."""
        calls = self._calls[module]
        return calls[0] if len(calls) == 1 else None

    def sole_consumer(self, event: Event) -> Event | None:
        """The one call that uses a call's one result, unless the model returns it too."""
        if len(event.outputs) != 1 or event.outputs[0] in self.results:
            return None
        consumers = self._consumers[event.outputs[0]]
        return consumers[0] if len(consumers) == 1 else None

    def final_consumers(self, event: Event) -> tuple[list[Event], bool]:
        """The calls that compute with a call's result, looking through what only hands it on; and whether the model
        returns it."""
        consumers: list[Event] = []
        returned = False
        todo, seen = list(event.outputs), set()
        while todo:
            key = todo.pop()
            if key in seen:
                continue
            seen.add(key)
            returned = returned or key in self.results
            for consumer in self._consumers[key]:
                if consumer.kind in _PASS_THROUGH:
                    todo.extend(consumer.outputs)
                else:
                    consumers.append(consumer)
        return consumers, returned

    def is_relu(self, event: Event | None) -> bool:
        """True for a ReLU, as a function or a module."""
        return event is not None and event.kind in _RELU


class _Recorder(TorchFunctionMode):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.inside = 0  # depth of watched layers: what they do inside is theirs

    def keys(self, values: object) -> tuple[Key, ...]:
        tensors = list(tensors_of(values))
        self.flow._kept.extend(tensors)
        # Inference tensors count no versions: whoever writes to one is then a reader of it like any other.
        return tuple((id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        inputs = self.keys((args, kwargs))
        self.inside += 1
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside -= 1
        name = getattr(func, "__name__", str(func))
        if name == "dropout" and kwargs.get("training", args[2] if len(args) > 2 else True):
            name = "random dropout"
        if name == "is_floating_point" or func == _DTYPE:
            self.flow.typed.update(inputs)
        if name not in _NO_USE or (name == "__get__" and isinstance(out, Tensor)):  # x.T, x.data
            self.flow.add(Event(name, None, inputs, self.keys(out)))
        return out


def record(model: nn.Module, example_inputs: object, watched: Callable[[nn.Module], bool]) -> Flow:
    """Run the model once in evaluation mode, without gradients, and record calls of ``watched`` layers and functions.

    Args:
        model: any module; its training mode is restored.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        watched: whether the calls of a module count as one event each.
    """
    flow = Flow()
    recorder = _Recorder(flow)
    handles = []
    pending: list[tuple[str, tuple[Key, ...], bool]] = []

    def before(name: str):
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            flow.called.add(name)
            by_name = any(isinstance(leaf, Tensor) for leaf in tree_leaves(kwargs))
            pending.append((name, recorder.keys((args, kwargs)) if not recorder.inside else (), by_name))
            recorder.inside += 1

        return hook

    def after(kind: str):
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
            recorder.inside -= 1
            name, inputs, by_name = pending.pop()
            if not recorder.inside:
                flow.add(Event(kind, name, inputs, recorder.keys(out), by_name))

        return hook

    modes = {module: module.training for module in model.modules()}
    try:
        for name, module in model.named_modules():
            if watched(module):
                kind = "relu" if isinstance(module, nn.ReLU) else type(module).__name__
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(kind), with_kwargs=True))
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), recorder:
            out = call(model, example_inputs)
        # What modules keep for later leaves the model too.
        kept = [value for module in model.modules() for name, value in vars(module).items() if not name.startswith("_")]
        flow.results = set(recorder.keys((out, kept)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return flow
