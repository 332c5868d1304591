"""How important the units of a dependency group are: criteria, statistics that some of them need, and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TypeAlias

import torch
from torch import nn

from rarefy import _core
from rarefy._core.pruning import (
    Activation,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    Group,
    GroupScore,
    Lamp,
    Magnitude,
    Random,
    Structure,
    Taylor,
)

__all__ = [
    "Activation",
    "ActivationStatistics",
    "BatchNormScale",
    "Criterion",
    "Fisher",
    "FisherAccumulator",
    "GeometricMedian",
    "GroupScore",
    "Importance",
    "Lamp",
    "Magnitude",
    "Random",
    "Taylor",
    "score",
]

Reduction: TypeAlias = Literal["mean", "sum", "max"]
Normalization: TypeAlias = Literal["none", "mean", "max", "sum", "min_max"]
Criterion: TypeAlias = Magnitude | BatchNormScale | Taylor | Fisher | GeometricMedian | Activation | Lamp | Random

_BY_NAME: dict[str, Criterion] = {
    "l1": Magnitude(1.0),
    "l2": Magnitude(2.0),
    "linf": Magnitude(math.inf),
    "batch_norm_scale": BatchNormScale(),
    "taylor": Taylor(),
    "fisher": Fisher(),
    "geometric_median": GeometricMedian(),
    "lamp": Lamp(),
    "random": Random(),
}


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


class FisherAccumulator:
    """The mean over backward passes of 1/2 (sum w * grad)² per unit (arXiv:1801.05787), as an importance.

    >>> fisher = rf.pruning.importance.FisherAccumulator(model, pruner.structure)
    >>> for inputs, labels in loader:
    ...     model.zero_grad()
    ...     loss_fn(model(inputs), labels).backward()
    ...     fisher.update()

    With batches of one sample the mean is the empirical Fisher information; larger ones approximate it.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model = model
        self._accumulator = _core.pruning.FisherAccumulator(structure)

    def update(self) -> None:
        """Add the gradients that the model has now.

        Raises:
            ValueError: a parameter of a group without a gradient, or values that are not finite; nothing is added then.
        """
        self._accumulator.update(_parameters(self._model))

    @property
    def batches(self) -> int:
        """How often ``update`` ran."""
        return self._accumulator.batches

    def scores(self, reduction: Reduction = "mean", normalize: Normalization = "mean") -> list[GroupScore]:
        """Return one score per group; ValueError before the first ``update``."""
        return self._accumulator.importance(reduction, normalize)

    def __repr__(self) -> str:
        return f"FisherAccumulator({self.batches} batches)"


#: The dimension of a layer's output that holds its channels, and of its weight that makes them.
_CHANNELS: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], int, int]] = [
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1, 1),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1, 0),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), 1, 0),
    (nn.Embedding, -1, 1),
    ((nn.Linear, nn.LayerNorm, nn.RMSNorm), -1, 0),
]


class ActivationStatistics:
    """The mean |activation| of every channel of a model's layers over a calibration set, as an importance.

    >>> with rf.pruning.importance.ActivationStatistics(model) as statistics:
    ...     for inputs, _ in loader:
    ...         model(inputs)
    >>> rf.pruning.StructuredPruner(model, example_inputs, channels=0.5, importance=statistics)

    Forward hooks on linear layers, convolutions, embeddings and normalizations with a weight see their outputs while
    the ``with`` block runs; a transposed convolution is seen when it has one group. Every output counts as often as it
    has positions, and is summed in float64. A group is scored by those of its layers that ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def __enter__(self) -> ActivationStatistics:
        for name, module in self._model.named_modules():
            for types, channel_dim, weight_dim in _CHANNELS:
                if not isinstance(module, types) or getattr(module, "weight", None) is None:
                    continue
                if weight_dim == 1 and getattr(module, "groups", 1) != 1:
                    continue  # the second dimension of its weight has the channels of one group
                key = (f"{name}.weight" if name else "weight", weight_dim)
                self._handles.append(module.register_forward_hook(self._hook(key, channel_dim)))
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, key: tuple[str, int], dim: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
        spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

        def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
            unbatched = dim == 1 and any(isinstance(module, t) and output.dim() == n + 1 for t, n in spatial.items())
            values = output.detach().abs().movedim(0 if unbatched else dim, 0).flatten(1)
            total = values.sum(1, dtype=torch.float64)
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            self._counts[key] = self._counts.get(key, 0) + values.shape[1]

        return add

    @property
    def statistics(self) -> dict[tuple[str, int], torch.Tensor]:
        """The mean |activation| per channel by weight and dimension."""
        return {key: total / max(self._counts[key], 1) for key, total in self._sums.items()}

    def scores(
        self, structure: Structure, reduction: Reduction = "mean", normalize: Normalization = "mean"
    ) -> list[GroupScore]:
        """Return one score per group; ValueError when no layer of any group ran."""
        return _core.pruning.importance(
            structure, _parameters(self._model), Activation(), reduction, normalize, self.statistics
        )

    def __repr__(self) -> str:
        return f"ActivationStatistics({len(self._sums)} layers)"


#: A criterion, its name, gathered statistics, or a callable that gives one value per unit of a group.
Importance: TypeAlias = Criterion | str | FisherAccumulator | ActivationStatistics | Callable[[Group], torch.Tensor]


def score(
    structure: Structure,
    model: nn.Module,
    importance: Importance = "l1",
    reduction: Reduction = "mean",
    normalize: Normalization = "mean",
) -> list[GroupScore]:
    """Score every unit of every group of a structure.

    Args:
        structure: of the model.
        model: supplies parameters, and gradients for ``Taylor`` and ``Fisher``.
        importance: a criterion, one of the names l1, l2, linf, batch_norm_scale, taylor, fisher, geometric_median,
            lamp and random, gathered statistics, or a callable that gives one value per unit of a group.
        reduction: how the values of a group's tensors are combined.
        normalize: what the scores of a group are divided by, so that groups compare.

    Returns:
        One score per group: float64 values, larger is more important, or ``None`` with a reason.

    Raises:
        ValueError: a parameter that is not finite, a gradient that is missing, an unknown name, or scores that do not
            fit a group.
    """
    if isinstance(importance, str):
        if importance not in _BY_NAME:
            raise ValueError(f"[importance] must be one of {', '.join(_BY_NAME)}, got {importance!r}")
        importance = _BY_NAME[importance]
    if isinstance(importance, FisherAccumulator):
        return importance.scores(reduction, normalize)
    if isinstance(importance, ActivationStatistics):
        return importance.scores(structure, reduction, normalize)
    if isinstance(importance, Criterion):
        return _core.pruning.importance(structure, _parameters(model), importance, reduction, normalize)
    if not callable(importance):
        raise TypeError(f"[importance] must be a criterion, a name or a callable, got {type(importance).__name__}")
    return _core.pruning.custom_importance(structure, importance, normalize)
