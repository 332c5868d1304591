"""Structured pruning: channels, heads and hidden units that are removed for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from rarefy import _core
from rarefy._core.graph import Graph
from rarefy._core.pruning import (
    Channels,
    ChoiceOptions,
    Group,
    GroupScore,
    Macs,
    Parameters,
    Plan,
    Structure,
    StructuredOptions,
    StructuredReport,
    StructuredTransaction,
)
from rarefy.graph.record import call, evaluation, record
from rarefy.pruning.follow import Follower
from rarefy.pruning.importance import Importance, Normalization, Reduction, score
from rarefy.pruning.surgery import Surgery


class StructuredPruner:
    """Removes whole channels, attention heads and hidden units from a model, in a transaction that is verified.

    >>> pruner = rf.pruning.StructuredPruner(model, example_inputs, macs=0.5)
    >>> pruner.preview()  # what would be removed, and what stays and why
    >>> report = pruner.prune(optimizers=[optimizer])

    One forward pass is recorded, and channels that can only go together are read off it. ``prune`` chooses the least
    important, computes what the model gives without them, cuts, runs the smaller model, compares, and keeps the cut or
    brings everything back. Parameters stay the same objects, so that optimizers go on; they keep what they know about what
    is left. Attributes follow (``out_channels``, ``num_heads``, ``normalized_shape``, sizes of Hugging Face
    configurations). An operator that cannot follow, such as a view with a number in the code, keeps its channels, and the
    report names it.

    Args:
        model: acted on in place, by ``prune`` alone.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        channels: fraction of all units to remove, in [0, 1). Exactly one of the four targets is given.
        parameters: fraction of the model's parameters to remove, in [0, 1).
        macs: fraction of the multiply-accumulates of the example run to remove, in [0, 1).
        latency_ms: milliseconds that one run of the example inputs may take on this machine, measured.
        importance: what is kept: a criterion of ``rf.pruning.importance`` or its name, gathered statistics, or a callable
            that gives one value per unit of a group.
        reduction: how the scores of a group's tensors are combined.
        normalize: what the scores of a group are divided by, so that groups compare.
        scope: ``"global"`` compares all groups, ``"local"`` takes the same fraction of each, ``"isomorphic"`` of each class
            of groups of equal structure.
        ignore: names, patterns (``*`` and ``?``) or types of modules, or names of parameters, that keep their shape.
        limits: the largest fraction to remove of layers that a pattern names.
        round_to: widths that are left are multiples of it.
        min_width: units that every group keeps at least.
        steps: calls of ``prune`` until the target is met, with fine-tuning between them.
        fold_constants: add what removed channels contribute as constants (bias, shift of a norm) to the biases of their
            consumers, where that is exact.
        strict: raise when the target is missed by more than one unit.
        tolerance: largest difference of outputs from the masked model's, over the largest output; default: 1e-9 for
            float64, 1e-4 for float32, 0.05 for 16 bits.
        forward: ``forward(model, example_inputs)`` where ``model(*example_inputs)`` will not do.

    Raises:
        ValueError: an option out of range, none or several targets, a name that is not in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        channels: float | None = None,
        parameters: float | None = None,
        macs: float | None = None,
        latency_ms: float | None = None,
        importance: Importance = "l1",
        reduction: Reduction = "mean",
        normalize: Normalization = "mean",
        scope: Literal["global", "local", "isomorphic"] = "global",
        ignore: Iterable[str | type[nn.Module]] = (),
        limits: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_width: int = 1,
        steps: int = 1,
        fold_constants: bool = True,
        strict: bool = False,
        tolerance: float | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        given = {
            name: value
            for name, value in (
                ("channels", channels), ("parameters", parameters), ("macs", macs), ("latency_ms", latency_ms),
            )
            if value is not None
        }  # fmt: skip
        if len(given) != 1:
            raise ValueError(
                "[StructuredPruner] exactly one of channels=, parameters=, macs= and latency_ms= must be given, got "
                + (", ".join(given) or "none")
            )
        if isinstance(ignore, (str, type)):
            raise TypeError(f"[StructuredPruner] ignore must be a list of names or types, got {ignore!r}")
        kinds = {"channels": Channels, "parameters": Parameters, "macs": Macs}
        ((kind, value),) = given.items()
        self._model, self._inputs, self._forward = model, example_inputs, forward or call
        self._importance, self._reduction, self._normalize = importance, reduction, normalize
        self._optimizers: Sequence[Any] = ()
        self._surgery: Surgery | None = None
        self._report: StructuredReport | None = None
        options = StructuredOptions(
            ChoiceOptions(
                kinds[kind](value) if kind in kinds else Channels(0.0), scope, round_to, min_width,
                list((limits or {}).items()), strict,
            ),
            latency_ms,
            self._names(ignore),
            steps,
            fold_constants,
            tolerance or 0.0,
        )  # fmt: skip
        self._core = StructuredTransaction(
            self._record, self._tensors, self._score, self._apply, self._rollback, self._commit, self._run, options
        )
        self._label = f"{kind}={value:g}, scope={scope!r}"

    def _names(self, ignore: Iterable[str | type[nn.Module]]) -> list[str]:
        names = []
        for item in ignore:
            if isinstance(item, str):
                names.append(item)
                continue
            if not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise TypeError(f"[StructuredPruner] ignore must hold names or types of modules, got {item!r}")
            found = [
                path
                for path, module in self._model.named_modules()
                if isinstance(module, item)
                and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))
            ]
            if not found:
                raise ValueError(
                    f"[StructuredPruner] ignore: no module of type {item.__name__} with parameters in the model"
                )
            names += found
        return names

    # --- what the transaction calls ---

    def _record(self, shapes_only: bool) -> tuple[Graph, str]:
        partial = Graph()
        try:
            graph = record(self._model, self._inputs, self._forward, partial, shapes_only)
        except Exception as error:  # of the model's own code: the transaction reports it or tries another way
            return partial, f"{type(error).__name__}: {error}".strip()
        return graph, ""

    def _tensors(self) -> list[_core.graph.NamedTensor]:
        return [
            *(_core.graph.NamedTensor(name, value, "parameter") for name, value in self._model.named_parameters()),
            *(_core.graph.NamedTensor(name, value, "buffer") for name, value in self._model.named_buffers()),
        ]

    def _score(self, structure: Structure) -> list[GroupScore]:
        return score(structure, self._model, self._importance, self._reduction, self._normalize)

    def _apply(self, plan: Plan) -> None:
        surgery = Surgery(self._model, self._optimizers)
        surgery.apply(plan.cuts)
        try:
            for fold in plan.folds:
                surgery.add(fold.tensor, fold.delta)
            Follower(self._model, surgery, plan).follow()
        except BaseException:
            surgery.rollback()
            raise
        self._surgery = surgery

    def _rollback(self) -> None:
        if self._surgery is not None:
            self._surgery.rollback()
            self._surgery = None

    def _commit(self) -> None:
        self._surgery.commit()
        self._surgery = None

    def _run(self) -> None:
        with evaluation(self._model), torch.no_grad():
            self._forward(self._model, self._inputs)

    # --- what users call ---

    @property
    def structure(self) -> Structure:
        """The dependency groups of the model, what is pinned and why, and the cost of each operator."""
        return self._core.structure()

    @property
    def groups(self) -> tuple[Group, ...]:
        """Channels that can only be removed together."""
        return tuple(self.structure.groups)

    def preview(self) -> StructuredReport:
        """Return what the next ``prune`` would remove, without changing or verifying anything."""
        return self._core.preview()

    def prune(self, optimizers: Sequence[Any] | Any = ()) -> StructuredReport:
        """Remove units until the target of this step is met, and return what was done.

        Args:
            optimizers: those that hold the model's parameters; what they keep about removed slices goes too.

        Raises:
            ValueError: a weight that is not finite, a target that cannot be met (``strict``), example inputs that the model
                does not take, an optimizer that cannot be cut.
            RuntimeError: the smaller model does not compute what the masked one does.

        After any exception, model, gradients and optimizers are as they were.
        """
        self._optimizers = optimizers if isinstance(optimizers, Sequence) else (optimizers,)
        try:
            self._report = self._core.prune()
        finally:
            self._rollback()
            self._optimizers = ()
        return self._report

    def report(self) -> StructuredReport:
        """Return the report of the last ``prune``, or a preview before the first."""
        return self._report if self._report is not None else self.preview()

    def __repr__(self) -> str:
        return f"StructuredPruner({type(self._model).__name__}, {self._label}, {self._core.steps_done} steps done)"
