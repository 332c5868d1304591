"""Weighted terms of an objective, outside of rarefy's trainer: for the trainers of other libraries."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distillation.capture import LayerCapture
from rarefy.distillation.inputs import accepted_names
from rarefy.distillation.outputs import Outputs, find_logits

Term = Callable[[Outputs, Outputs, Any], Tensor]


def read_terms(function: str, objective: Mapping[str, Term | tuple[float, Term]]) -> dict[str, tuple[float, Term]]:
    """Return the terms with their weights, a weight of 1 where none is given.

    Raises:
        ValueError, TypeError: there is no term, a weight is not a finite number, or a term cannot be called.
    """
    if not objective:
        raise ValueError(f"[{function}] objective must have at least one term, got none")
    terms = {}
    for name, value in objective.items():
        weight, term = value if isinstance(value, tuple) else (1.0, value)
        if not isinstance(weight, int | float) or not torch.isfinite(torch.tensor(float(weight))):
            raise ValueError(f"[{function}] the weight of a term must be a finite number, got {weight!r} for {name!r}")
        if not callable(term):
            raise TypeError(f"[{function}] a term must be callable, got {type(term).__name__} for {name!r}")
        require_mean(function, term, f"the term {name!r}")
        terms[name] = (float(weight), term)
    return terms


def require_mean(function: str, loss: Any, name: str) -> None:
    """Raise ValueError unless a loss is a mean over its rows: accumulated batches are weighed by their valid rows."""
    reduction = getattr(loss, "reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"[{function}] {name} must have the reduction 'mean', got {reduction!r}")


def run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Iterable[str] = (),
    extract: Callable[[Any], Tensor] | None = None,
    *,
    required: bool = True,
) -> Outputs:
    """Run a model on keyword inputs; return its logits, the outputs of `layers` by path, and what it returned.

    Logits that are not `required` are None where there are none.
    """
    layers = tuple(dict.fromkeys(layers))
    with ExitStack() as stack:
        capture = stack.enter_context(LayerCapture(model, layers)) if layers else None
        raw = model(**inputs)
        return Outputs(find_logits(raw, extract, required), {} if capture is None else capture.features, raw)


def layers_of(terms: Mapping[str, tuple[float, Term]], side: str) -> list[str]:
    """Return the paths that terms ask for: those of ``student_layers`` or ``teacher_layers``."""
    paths: list[str] = []
    for _, term in terms.values():
        asked = getattr(term, f"{side}_layers", None) or ()
        paths += [asked] if isinstance(asked, str) else list(asked)
    return paths


def accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that the model's forward has a parameter for; all of them where it takes any keyword."""
    names = accepted_names(model)
    return {name: value for name, value in inputs.items() if names is None or name in names}
