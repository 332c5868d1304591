"""The terms of an objective, as the C++ loop calls them."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distillation.logits import DIST, DKD, NKD, LogitMSE
from rarefy.distillation.loss import DistillationLoss
from rarefy.distillation.objective import Term, read_terms, require_mean
from rarefy.distillation.outputs import Outputs
from rarefy.distillation.terms import entry

#: Losses of (student logits, teacher logits, labels), with a mask.
_OF_LOGITS = (DistillationLoss, DKD, NKD, DIST, LogitMSE)

#: name, weight, function, and what the function is a sum of
CoreTerm = tuple[str, float, Callable[..., Tensor], list[tuple[str, float, Callable[..., Tensor]]]]


class Objective:
    """One loss of logits, or terms by name, with the layers that they ask for."""

    def __init__(
        self,
        loss_fn: Any,
        mask_key: str | int | None = None,
        weight_key: str | int | None = None,
        owner: str = "DistillationTrainer",
    ) -> None:
        single = not isinstance(loss_fn, Mapping)
        self.terms = {"loss": (1.0, loss_fn)} if single else read_terms(owner, loss_fn)
        if single and not callable(loss_fn):
            raise TypeError(f"[{owner}] loss_fn must be callable, got {type(loss_fn).__name__}")
        require_mean(owner, loss_fn, "loss_fn")
        self._owner = owner
        losses = [term for _, term in self.terms.values()]
        self.ignore_index = next((loss.ignore_index for loss in losses if hasattr(loss, "ignore_index")), -100)
        self.shift = any(getattr(loss, "shift", False) for loss in losses)
        self._keys = (mask_key, weight_key)
        self._single = single

    def core_terms(self, labels_of: Callable[[Any], Tensor | None]) -> list[CoreTerm]:
        """Return the terms for the loop."""
        return [
            (name, weight, self._function(name, term, labels_of), self._parts(name, term, labels_of))
            for name, (weight, term) in self.terms.items()
        ]

    def row_weights(self) -> Callable[[Any], Tensor] | None:
        """Return a function of a batch to the weights of its rows; None where there are no masks and weights."""
        mask_key, weight_key = self._keys
        if mask_key is None and weight_key is None:
            return None

        def weights(batch: Any) -> Tensor:
            factors = [] if mask_key is None else [_mask(batch, mask_key).to(torch.float64)]
            factors += [] if weight_key is None else [_weights(batch, weight_key).to(torch.float64)]
            return functools.reduce(torch.mul, factors)

        return weights

    def modules(self) -> dict[str, nn.Module]:
        """Return the terms that are modules, by name: what has parameters or buffers to be kept."""
        return {name: term for name, (_, term) in self.terms.items() if isinstance(term, nn.Module)}

    def needs_logits(self) -> bool:
        """Return whether a term is a loss of logits: then models must return some."""
        return any(self._is_of_logits(term) for _, term in self.terms.values())

    def _is_of_logits(self, term: Any) -> bool:
        return isinstance(term, _OF_LOGITS) or (self._single and not hasattr(term, "student_layers"))

    def _function(self, name: str, term: Term, labels_of: Callable[[Any], Tensor | None]) -> Callable[..., Tensor]:
        of_logits, owner = self._is_of_logits(term), self._owner
        described = "loss_fn" if self._single else f"the term {name!r}"
        mask_key = self._keys[0] if isinstance(term, _OF_LOGITS) else None
        weight_key = self._keys[1] if isinstance(term, DistillationLoss) else None

        def function(student: Outputs, teacher: Outputs, batch: Any) -> Tensor:
            if of_logits:
                extra = {}
                if mask_key is not None:
                    extra["mask"] = _mask(batch, mask_key)
                if weight_key is not None:
                    extra["row_weights"] = _weights(batch, weight_key)
                value = term(student.logits, teacher.logits, labels_of(batch), **extra)
            else:
                value = term(student, teacher, batch)
            if not isinstance(value, Tensor):
                raise TypeError(f"[{owner}] {described} must return a tensor, got {type(value).__name__}")
            return value

        return function

    def _parts(
        self, name: str, term: Term, labels_of: Callable[[Any], Tensor | None]
    ) -> list[tuple[str, float, Callable[..., Tensor]]]:
        """The soft and the hard targets of a DistillationLoss, which the log tells apart."""
        if not isinstance(term, DistillationLoss) or not 0.0 < term.alpha < 1.0:
            return []
        return [
            ("soft", term.alpha, self._function(name, _with_alpha(term, 1.0), labels_of)),
            ("hard", 1.0 - term.alpha, self._function(name, _with_alpha(term, 0.0), labels_of)),
        ]


def _mask(batch: Any, key: str | int) -> Tensor:
    return entry(batch, "DistillationTrainer", "mask_key", key) != 0  # tokenizers give integers


def _weights(batch: Any, key: str | int) -> Tensor:
    return entry(batch, "DistillationTrainer", "weight_key", key)


def _with_alpha(loss: DistillationLoss, alpha: float) -> DistillationLoss:
    other = copy.copy(loss)  # of a module: its attributes are its own, its tensors shared
    other.alpha = alpha
    return other
