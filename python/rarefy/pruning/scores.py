"""Scores of single weights, larger = kept: criteria by name, and scores of whole models before training or from data.

A pruner takes a criterion of this module, or the mapping from parameter names to scores that its functions return.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy import _core
from rarefy._core.pruning import (
    Activation,
    Fisher,
    HessianAccumulator,
    Lamp,
    Magnitude,
    Movement,
    Random,
    Taylor,
    accumulate,
    element_scores,
    needs_gradients,
    new_accumulator,
)
from rarefy.pruning.calibration_data import Data, Forward, Layer, as_batches, find_layers

__all__ = [
    "Activation",
    "ElementCriterion",
    "Fisher",
    "Lamp",
    "Magnitude",
    "Movement",
    "Random",
    "Taylor",
    "accumulate",
    "activation",
    "element_scores",
    "grasp",
    "needs_gradients",
    "new_accumulator",
    "snip",
    "synflow",
    "wanda",
]

ElementCriterion: TypeAlias = Magnitude | Random | Movement | Taylor | Fisher | Lamp | Activation
LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers keep their tensors and their values: those of batch normalizations move in training mode."""
    before = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(value)


def _chosen(
    function: str, model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> dict[str, nn.Parameter]:
    for option, names in (("include", include), ("exclude", exclude)):
        if isinstance(names, str):
            raise TypeError(f"[{function}] {option} must be a list of names, got the string {names!r}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = list(parameters)
    indices, _ = _core.pruning.choose_parameters(
        names, list(parameters.values()), None if include is None else list(include), list(exclude)
    )
    return {names[i]: parameters[names[i]] for i in indices}


def _losses(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> list[Callable[[], Tensor]]:
    return [lambda batch=batch: loss_fn(model, batch) for batch in batches]


def snip(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Connection sensitivity ``|w g| / sum |w g|`` (SNIP, arXiv:1810.02340), g being the gradient of the mean loss.

    >>> scores = rf.pruning.scores.snip(model, lambda model, batch: loss(model(batch[0]), batch[1]), batches)

    The model runs in the mode that it is in, and is left as it was: gradients, buffers, modes and requires_grad.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar.
        batches: one is usual; the loss is the mean over all.
        include, exclude: as of ``MagnitudePruner``.

    Returns:
        Float32 scores of the weight's shape by parameter name (float64 for float64); all together sum up to 1.

    Raises:
        ValueError: no batch, a loss that is not one finite number or does not depend on the weights, weights or gradients
            that are not finite, names that are not in the model.
    """
    chosen = _chosen("snip", model, include, exclude)
    with _buffers_kept(model):
        return _core.pruning.snip(list(chosen), list(chosen.values()), _losses(model, loss_fn, batches))


def grasp(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    temperature: float = 200.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """``w (H g)`` (GraSP, arXiv:2002.07376): how much of the gradient's norm a weight carries, by double backward.

    The paper's scores are the negative of these, and it removes the largest. Everything else is as in ``snip``.

    Args:
        batches: gone through twice; the loss is the mean over all.
        temperature: the model's output, a tensor, is divided by it; 200 in the paper, 1 leaves it alone.

    Raises:
        ValueError: as ``snip``, and a temperature that is not positive.
        TypeError: a temperature other than 1 for a model whose output is not a tensor.
    """
    if not temperature > 0:
        raise ValueError(f"[grasp] temperature must be positive, got {temperature}")

    def cool(_: nn.Module, __: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"[grasp] a temperature needs a model whose output is a tensor, got {type(output).__name__}; "
                "divide the logits in loss_fn, with temperature=1"
            )
        return output / temperature

    chosen = _chosen("grasp", model, include, exclude)
    handle = model.register_forward_hook(cool) if temperature != 1 else None
    try:
        with _buffers_kept(model):
            return _core.pruning.grasp(list(chosen), list(chosen.values()), _losses(model, loss_fn, batches))
    finally:
        if handle is not None:
            handle.remove()


def _ones(value: object) -> object:
    if isinstance(value, Tensor):
        return torch.ones_like(value, dtype=torch.float64 if value.is_floating_point() else value.dtype)
    return value


def synflow(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    sparsity: float = 0.9,
    rounds: int = 100,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Synaptic flow ``theta * dR/dtheta`` (SynFlow, arXiv:2006.05467): without data, in rounds, without layer collapse.

    R is the sum of the outputs for inputs of ones, computed in evaluation mode and float64 on copies: absolute values of
    all parameters, and running means of zero. After round k the smallest scores over all weights are pruned so that
    ``(1 - sparsity) ** (k / rounds)`` remain. Activations should be positive and nearly linear for positive inputs, as
    ReLU is; layer normalization takes the mean off and has little flow.

    Args:
        example_inputs: a tensor or a tuple of arguments; their shapes matter, and integers become ones too.
        sparsity: what the scores will be pruned to, in [0, 1), with global scope.
        rounds: 100 in the paper.

    Returns:
        Float64 scores of the last round by parameter name, 0 for what rounds before have pruned.

    Raises:
        ValueError: options out of range, weights or outputs that are not finite, names that are not in the model.
    """
    chosen = _chosen("synflow", model, include, exclude)
    inputs = tuple(_ones(x) for x in (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    copies: dict[str, Tensor] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        copy = tensor.detach().double().abs() if tensor.is_floating_point() else tensor.detach().clone()
        copies[name] = torch.zeros_like(copy) if name.endswith("running_mean") else copy
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    working = {name: copies[first[id(parameter)]].requires_grad_() for name, parameter in chosen.items()}
    modes = [(module, module.training) for module in model.modules()]

    def flow() -> Tensor:
        output = functional_call(model, copies, inputs)
        tensors = [t for t in _tensors(output) if t.is_floating_point()]
        if not tensors:
            raise TypeError(f"[synflow] the output must hold floating-point tensors, got {type(output).__name__}")
        return torch.stack([t.sum() for t in tensors])

    try:
        model.eval()
        return _core.pruning.synflow(list(working), list(working.values()), flow, sparsity, rounds)
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, (list, tuple)) else []


def _statistics(
    function: str,
    model: nn.Module,
    loader: Iterable[object],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    forward: Forward | None,
) -> list[tuple[Layer, HessianAccumulator]]:
    layers, _ = find_layers(function, model, include, exclude)
    statistics = [HessianAccumulator(layer.name, layer.shape, squares=True) for layer in layers]
    data = Data(function, model, as_batches(function, loader), forward)
    data.run(layers, None, lambda index, x: statistics[index].update(x))
    return list(zip(layers, statistics, strict=True))


def _spread(norms: Tensor, weight: Tensor) -> Tensor:
    """Norms [groups, features] as a tensor of the weight's shape."""
    groups, features = norms.shape
    rows = norms[:, None, :].expand(groups, weight.shape[0] // groups, features)
    return rows.reshape(weight.shape).to(weight.device)


def activation(
    model: nn.Module,
    loader: Iterable[object],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """The root mean square of the input feature that each weight multiplies, over the batches of a loader.

    Of linear layers and convolutions, in evaluation mode. Batches as of ``sparse_gpt``; those with NaN or infinity are
    left out.

    Returns:
        Float32 scores of the weight's shape by parameter name.

    Raises:
        ValueError: no batch, no linear layer or convolution, one that no finite batch reaches, unknown names.
    """
    return {
        layer.name: _spread(own.norms(), layer.weight)
        for layer, own in _statistics("activation", model, loader, include, exclude, forward)
    }


def wanda(
    model: nn.Module,
    loader: Iterable[object],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """``|w|`` times ``activation`` (Wanda, arXiv:2306.11695) as scores for a pruner, of the dense model.

    ``rf.pruning.wanda`` prunes by them within each output, as the paper does. Arguments and errors as of ``activation``.
    """
    return {
        layer.name: _spread(own.norms(), layer.weight) * layer.weight.detach().abs()
        for layer, own in _statistics("wanda", model, loader, include, exclude, forward)
    }
