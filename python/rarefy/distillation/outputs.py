"""What a model returned, as the terms of an objective see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rarefy.distillation.top_k import TopKLogits


@dataclass(frozen=True)
class Outputs:
    """What one model returned for one batch.

    Attributes:
        logits: as `to_logits` found them, the top-k logits of a cache, or None where nothing asked for logits.
        features: outputs of layers by path, as `LayerCapture` has them.
        raw: what the model returned.
    """

    logits: Any = None
    features: Mapping[str, Any] = field(default_factory=dict)
    raw: Any = None

    def __repr__(self) -> str:
        features = ", ".join(f"{path!r}: {_describe(value)}" for path, value in self.features.items())
        return f"Outputs(logits={_describe(self.logits)}, features={{{features}}}, raw={_describe(self.raw)})"


def to_logits(raw: Any, extract: Callable[[Any], Tensor] | None = None) -> Tensor | TopKLogits:
    """Return the logits in what a model returned.

    Args:
        raw: one of the forms below.
        extract: a function of `raw` that returns the logits instead.

    ======================================  ==========================================================
    `raw`                                   logits
    ======================================  ==========================================================
    a tensor, a `TopKLogits`                itself
    a dict, an output of transformers       the entry or attribute ``logits``
    a tuple or list                         its first element; its second where the first is a scalar
                                            (models that were given labels put their loss first)
    ======================================  ==========================================================

    Raises:
        TypeError: there are no logits to be found, or `extract` returned no tensor.

    >>> to_logits({"logits": torch.zeros(2, 3), "hidden_states": None}).shape
    torch.Size([2, 3])
    """
    if extract is not None:
        logits = extract(raw)
        if not isinstance(logits, Tensor):
            raise TypeError(f"[to_logits] extract must return a tensor, got {type(logits).__name__}")
        return logits
    if isinstance(raw, TopKLogits):
        return raw
    logits = raw
    if isinstance(raw, Mapping):
        logits = raw.get("logits")
    elif not isinstance(raw, Tensor) and hasattr(raw, "logits"):
        logits = raw.logits
    elif isinstance(raw, tuple | list):
        candidates = [value for value in raw[:2] if isinstance(value, Tensor)]
        if len(candidates) == 2 and candidates[0].dim() == 0:
            del candidates[0]
        logits = candidates[0] if candidates and isinstance(raw[0], Tensor) else None
    if not isinstance(logits, Tensor):
        raise TypeError(
            "[to_logits] a model must return logits as a tensor, a tuple that starts with them, or under the name "
            f"'logits' (or give a function that extracts them), got {_describe(raw)}"
        )
    return logits


def find_logits(raw: Any, extract: Callable[[Any], Tensor] | None, required: bool) -> Tensor | TopKLogits | None:
    """Return what `to_logits` finds; None where there is nothing and it is not required."""
    try:
        return to_logits(raw, extract)
    except TypeError:
        if required or extract is not None:
            raise
        return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return f"{type(value).__name__} of ({', '.join(type(element).__name__ for element in value)})"
    return "None" if value is None else type(value).__name__
