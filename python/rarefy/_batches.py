"""How a model is called with a batch of a loader, where all that matters is what its layers see."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def feed(function: str, model: nn.Module, batch: object, forward: Callable[[nn.Module, object], object] | None) -> None:
    """One batch through a model; ``function`` is whose error it is when the batch is of no known kind."""
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        model(batch[0])
    else:
        raise TypeError(
            f"[{function}] a batch must be a tensor, a tuple or list that begins with one, or a dict of keyword arguments, "
            f"got {type(batch).__name__}; pass forward= for other kinds"
        )
