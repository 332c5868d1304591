"""Recording a model's forward pass."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from rarefy import _core
from rarefy._core.graph import Graph
from rarefy.quantization.simulation import simulation

_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def call(model: Callable[..., object], inputs: object) -> object:
    """Call a model with a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_of(values: object) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without torch's fused inference paths, which hide the operators inside of them."""
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training


def eager() -> AbstractContextManager[object]:
    """Compiled modules run as they are written: what a compiler makes of them calls no operators."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Location:
    """Which module runs, and the line of the model's code."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[tuple[nn.Module | None, str]] = [(None, "")]
        self.thread = threading.get_ident()

    def __call__(self) -> tuple[str, str]:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        source = "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        return self.stack[-1][1], source

    @contextmanager
    def attached(self) -> Iterator[None]:
        def before(module: nn.Module, args: object) -> None:
            if threading.get_ident() == self.thread:
                self.stack.append((module, self.names.get(module, self.stack[-1][1])))

        def after(module: nn.Module, args: object, out: object) -> None:
            # A module whose hooks raise may end without having begun.
            if threading.get_ident() == self.thread and self.stack[-1][0] is module:
                self.stack.pop()

        handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def record(
    model: nn.Module,
    example_inputs: object,
    forward: Callable[[nn.Module, object], object] | None = None,
    partial: Graph | None = None,
    shapes_only: bool = False,
) -> Graph:
    """Run the model once, in evaluation mode and without gradients, and record every operator.

    Modules of ``torch.compile`` run as they are written. Under autocast, operators have the tensors that the model gives
    them. What other threads run is not recorded.

    Args:
        model: any module; its training mode is restored.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        forward: ``forward(model, example_inputs)`` for what ``model(*example_inputs)`` does not say.
        partial: holds what had been recorded when the model raises.
        shapes_only: leave out the work of convolutions and matrix products, which give zeros: operators, shapes and
            constants are what they are, unless the model's code looks at values.

    Raises:
        ValueError: a parameter that is not dense; a recording runs already on this thread.
    """
    run = forward or call
    tensors = [
        *(_core.graph.NamedTensor(name, value, "parameter") for name, value in model.named_parameters()),
        *(_core.graph.NamedTensor(name, value, "buffer") for name, value in model.named_buffers()),
        *(_core.graph.NamedTensor(f"input.{i}", value, "input") for i, value in enumerate(tensors_of(example_inputs))),
    ]
    location = _Location(model)
    with evaluation(model), simulation(model), location.attached():
        return _core.graph.record(
            lambda: tensors_of(run(model, example_inputs)), tensors, location, partial, shapes_only
        )
