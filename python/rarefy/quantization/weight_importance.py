"""How much an element's error counts to weights with the observer ``MSE``: from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rarefy._batches import feed
from rarefy._core.quantization import MSE
from rarefy.nn._base import QuantizableLayer, WeightedLayer
from rarefy.quantization.fake_quantizer import FakeQuantizer


class _Watched:
    """A weight that is searched for, and what was summed up for it."""

    def __init__(self, name: str, layer: WeightedLayer, quantizer: FakeQuantizer) -> None:
        self.name, self.layer, self.quantizer = name, layer, quantizer
        self.sum: Tensor | None = None  # float64
        self.count = 0

    def add(self, values: Tensor, count: int) -> None:
        self.sum = values if self.sum is None else self.sum + values
        self.count += count


def collect_importance(
    model: nn.Module,
    loader: Iterable[object],
    *,
    forward: Callable[[nn.Module, object], object] | None = None,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
) -> nn.Module:
    """Fill ``importance`` of the weights with the observer ``MSE``, which their search for a range then reads.

    Without ``loss``: the mean squared input of each input channel, as an error e of a weight costs E[x^2] e^2 in the layer's
    output. With it: the mean over batches of the squared gradient of the loss with respect to each element that is rounded
    (the diagonal of the empirical Fisher matrix). For linear layers and convolutions, transposed ones included. In evaluation
    mode, in floating point; switches, modes and the gradients of parameters are afterwards as before. What was collected
    replaces what was there.

    Args:
        model: of ``prepare`` or ``prepare_qat`` with ``weight_observer=MSE()``.
        loader: batches, as ``calibrate`` takes them.
        forward: ``forward(model, batch)`` feeds other kinds of batches.
        loss: ``loss(model, batch)``, a number that the model's parameters have a part in.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model is not prepared, has no such layer, or one of these sees no data, or data that is not finite (they
            are listed); both ``forward`` and ``loss``; a loss that is no number. Nothing has changed then.
    """
    if forward is not None and loss is not None:
        raise ValueError("[collect_importance] one of forward and loss must be given at most, got both")
    watched = _watched(model)
    with _floating(model):
        if loss is None:
            _sum_inputs(model, loader, forward, watched)
        else:
            _sum_gradients(model, loader, loss, watched)
    _store(watched, by_input=loss is None)
    return model


def _watched(model: nn.Module) -> list[_Watched]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizableLayer) and m.prepared}
    if not layers:
        raise ValueError("[collect_importance] the model must have prepared layers; call prepare_qat or prepare first")
    watched = []
    for name, layer in layers.items():
        if not isinstance(layer, WeightedLayer) or layer.quant.weight is None or layer._input_axis(4) is None:
            continue
        if isinstance(layer.quant.weight.observer, MSE):
            watched.append(_Watched(f"{name}.quant.weight", layer, layer.quant.weight))
    if not watched:
        raise ValueError(
            "[collect_importance] the model must have a linear layer or convolution whose weight has the observer MSE, but has "
            "none"
        )
    return watched


@contextmanager
def _floating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    switches = [(q, q.observe, q.quantize) for q in model.modules() if isinstance(q, FakeQuantizer)]
    model.eval()
    for quantizer, _, _ in switches:
        quantizer.observe = quantizer.quantize = False
    try:
        yield
    finally:
        for quantizer, observe, quantize in switches:
            quantizer.observe, quantizer.quantize = observe, quantize
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _sum_inputs(
    model: nn.Module,
    loader: Iterable[object],
    forward: Callable[[nn.Module, object], object] | None,
    watched: list[_Watched],
) -> None:
    def hook(item: _Watched) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axis = item.layer._input_axis(inputs[0].dim())
            assert axis is not None
            channels = inputs[0].detach().movedim(axis, 0).flatten(1).double()
            item.add(channels.square().sum(1), channels.shape[1])

        return add

    handles = [item.layer.register_forward_pre_hook(hook(item)) for item in watched]
    try:
        for batch in loader:
            feed("collect_importance", model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def _sum_gradients(
    model: nn.Module,
    loader: Iterable[object],
    loss: Callable[[nn.Module, object], Tensor],
    watched: list[_Watched],
) -> None:
    # What quantizers are given: the weight itself, or with a batch normalization folded in.
    rounded: list[tuple[_Watched, Tensor]] = []

    def hook(item: _Watched) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Of a parameter itself, one gradient is that of all calls.
            weight = inputs[0]
            if weight.requires_grad and not any(other is item and known is weight for other, known in rounded):
                rounded.append((item, weight))

        return note

    handles = [item.quantizer.register_forward_pre_hook(hook(item)) for item in watched]
    try:
        for batch in loader:
            rounded.clear()
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"[collect_importance] loss must give one number as a tensor, got {got}")
            if not rounded:
                continue
            gradients = torch.autograd.grad(value.sum(), [weight for _, weight in rounded], allow_unused=True)
            totals: dict[_Watched, Tensor] = {}
            for (item, _), gradient in zip(rounded, gradients, strict=True):
                if gradient is not None:  # the sum, of a layer that is called twice
                    totals[item] = totals[item] + gradient if item in totals else gradient.double()
            for item, total in totals.items():
                item.add(total.square(), 1)
    finally:
        for handle in handles:
            handle.remove()


def _store(watched: list[_Watched], by_input: bool) -> None:
    missed = [item.name for item in watched if item.sum is None]
    if missed:
        raise ValueError(
            f"[collect_importance] every weight with an observer MSE must be reached, but none reached: {', '.join(missed)}"
        )
    bad = [item.name for item in watched if item.sum is not None and not bool(torch.isfinite(item.sum).all())]
    if bad:
        raise ValueError(
            f"[collect_importance] data must be finite, but NaN or infinite values reached: {', '.join(bad)}"
        )
    for item in watched:
        assert item.sum is not None
        mean = (item.sum / item.count).float()
        item.quantizer.importance = item.layer._by_input(mean) if by_input else mean
        item.quantizer._searched = None  # a range that was searched for before is not the one to be searched for now
