"""What a model is called with, of a batch that holds inputs by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rarefy.distillation.unwrap import unwrap


def accepted_names(model: Callable[..., Any]) -> set[str] | None:
    """Return the names of the parameters of a model's forward; None where it takes any keyword, or has no signature."""
    function = unwrap(model).forward if isinstance(model, nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, say
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def named_inputs(model: Callable[..., Any], batch: Mapping[str, Any], label_key: str) -> dict[str, Any]:
    """Return a batch without its labels, so that the model computes no loss of its own.

    Where a model of transformers makes ``decoder_input_ids`` of the labels, they are made.
    """
    inputs = {name: value for name, value in batch.items() if name != label_key}
    makes = (
        getattr(unwrap(model), "prepare_decoder_input_ids_from_labels", None) if isinstance(model, nn.Module) else None
    )
    if makes is not None and batch.get(label_key) is not None and inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = makes(labels=batch[label_key])
    return inputs
