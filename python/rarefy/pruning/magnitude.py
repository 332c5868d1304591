"""Gradual pruning by magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from rarefy.pruning.enforce import OnViolation
from rarefy.pruning.masks import Pattern
from rarefy.pruning.pruner import Pruner, Regrowth, Schedule, Scope


class MagnitudePruner(Pruner):
    """Holds the weights of smallest magnitude at zero while a model trains: a ``Pruner`` with that criterion.

    >>> pruner = rf.pruning.MagnitudePruner(
    ...     model, sparsity=0.9, schedule=rf.pruning.PolynomialSchedule(begin=0, end=1000, every=50)
    ... )
    >>> optimizer.step(); pruner.step()  # in the loop
    >>> pruner.finalize()  # at its end

    Args:
        model: acted on in place.
        sparsity: see ``Pruner``, as all the others.
        scope: ``"global"``, ``"local"`` or ``"erk"``.
        schedule: when masks are updated and how far; default: all at once, at the first step.
        pattern: what is pruned together.
        layers: own final sparsities.
        regrowth: how pruned weights come back.
        include: patterns of names to prune.
        exclude: patterns that are taken out again.
        on_violation: what saving a model does whose values left their masks.

    Raises:
        ValueError: as ``Pruner`` does; the model is then as it was.
    """

    _NAME: ClassVar[str] = "MagnitudePruner"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        scope: Scope = "global",
        schedule: Schedule | None = None,
        pattern: str | Pattern = "unstructured",
        *,
        layers: Mapping[str, float] | None = None,
        regrowth: Regrowth | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        on_violation: OnViolation = "error",
    ) -> None:
        super().__init__(
            model,
            sparsity,
            scope,
            schedule,
            pattern,
            layers=layers,
            regrowth=regrowth,
            include=include,
            exclude=exclude,
            on_violation=on_violation,
        )
