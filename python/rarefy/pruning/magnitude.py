"""Gradual pruning by magnitude, driven from the training loop that exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from rarefy import _core
from rarefy._core.pruning import ConstantSchedule, PolynomialSchedule, PruningReport


class MagnitudePruner:
    """Holds the weights of smallest magnitude at zero while a model trains.

    >>> pruner = rf.pruning.MagnitudePruner(
    ...     model, sparsity=0.9, schedule=rf.pruning.PolynomialSchedule(begin=0, end=1000, every=50)
    ... )
    >>> optimizer.step(); pruner.step()  # in the loop
    >>> pruner.finalize()  # at its end

    Parameters keep their identity and names, so optimizers stay valid and a forward pass costs what it did. All state
    is in buffers of the model, so ``state_dict`` keeps it, and a fresh pruner on a model that is loaded afterwards goes
    on as if nothing had happened:

    - ``<module path>.<parameter>_mask_bits``: uint8, one bit per element in contiguous order, 1 = kept;
    - ``pruning_step``: int64, how often ``step`` ran.

    A model that has these buffers already, such as a deep copy, is continued. One pruner per model.

    Args:
        model: acted on in place.
        sparsity: final fraction of zeros over the pruned weights, in [0, 1); hit exactly, rounded half to even.
        scope: ``"global"`` compares all weights together, ``"local"`` gives each tensor the same sparsity.
        schedule: when masks are updated and how far; default: all at once, at the first step.
        include: patterns of parameter or module names (``*`` and ``?``) to prune; default: all parameters called
            ``weight`` with 2 or more dimensions. A full parameter name may have any shape.
        exclude: patterns that are taken out again.

    Raises:
        ValueError: an option out of range, a name that is not in the model, no parameter to prune, or a model with
            masks for other parameters; the model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        scope: Literal["global", "local"] = "global",
        schedule: ConstantSchedule | PolynomialSchedule | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        for option, names in (("include", include), ("exclude", exclude)):
            if isinstance(names, str):
                raise TypeError(f"[MagnitudePruner] {option} must be a list of names, got the string {names!r}")
        self._options = _core.pruning.MagnitudePrunerOptions(
            sparsity,
            scope,
            ConstantSchedule() if schedule is None else schedule,
            None if include is None else list(include),
            list(exclude or ()),
        )
        self._model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        chosen, self._left_alone = _core.pruning.select_parameters(
            list(parameters), list(parameters.values()), self._options
        )
        names = list(parameters)
        self._names = [names[i] for i in chosen]
        self._final_report: PruningReport | None = None

        step_key = _core.pruning.STEP_KEY
        existing = [
            name for name, _ in model.named_buffers() if name == step_key or name.endswith(_core.pruning.mask_key(""))
        ]
        if not _core.pruning.check_existing(existing, self._names):
            for name in self._names:
                module, parameter = self._place(name)
                module.register_buffer(_core.pruning.mask_key(parameter), _core.pruning.full_mask(parameters[name]))
            model.register_buffer(step_key, torch.zeros((), dtype=torch.int64))

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, parameter = name.rpartition(".")
        return self._model.get_submodule(path), parameter

    def _state(self) -> _core.pruning.PruningState:
        """Gather the tensors anew, since torch may replace buffers when it moves or loads a model."""
        places = [self._place(name) for name in self._names]
        return _core.pruning.PruningState(
            self._names,
            [getattr(module, parameter) for module, parameter in places],
            [getattr(module, _core.pruning.mask_key(parameter)) for module, parameter in places],
            getattr(self._model, _core.pruning.STEP_KEY),
        )

    def step(self) -> None:
        """Count one step, grow the masks when the schedule says so, and zero what they prune.

        Call it after ``optimizer.step()``. Acts on values and on gradients that are defined.

        Raises:
            ValueError: NaN in a weight when masks are made, or masks that do not fit (a checkpoint of another model);
                nothing has changed then.
            RuntimeError: after ``finalize``.
        """
        self._check_active("step")
        _core.pruning.advance(self._state(), self._options)

    def finalize(self) -> None:
        """Zero the pruned weights for good and remove the buffers from the model."""
        self._check_active("finalize")
        state = self._state()
        _core.pruning.apply_masks(state)
        self._final_report = _core.pruning.make_report(state, self._options, self._left_alone, True)
        for name in self._names:
            module, parameter = self._place(name)
            delattr(module, _core.pruning.mask_key(parameter))
        delattr(self._model, _core.pruning.STEP_KEY)

    def report(self) -> PruningReport:
        """Return elements, zeros and sparsity per tensor and in total, and what was left alone and why."""
        if self._final_report is not None:
            return self._final_report
        return _core.pruning.make_report(self._state(), self._options, self._left_alone, False)

    @property
    def sparsity(self) -> float:
        """The fraction of elements that the masks prune now."""
        if self._final_report is not None:
            return self._final_report.pruned / self._final_report.elements
        return _core.pruning.masked_fraction(self._state())

    @property
    def steps(self) -> int:
        """How often ``step`` ran, over all resumed runs."""
        if self._final_report is not None:
            return self._final_report.step
        return int(getattr(self._model, _core.pruning.STEP_KEY))

    def _check_active(self, function: str) -> None:
        if self._final_report is not None:
            raise RuntimeError(f"[MagnitudePruner.{function}] must not be called after finalize()")

    def __repr__(self) -> str:
        return (
            f"MagnitudePruner({len(self._names)} tensors, {self._options.scope}, sparsity {self.sparsity:.4f} of "
            f"{self._options.sparsity}, step {self.steps}, {self._options.schedule})"
        )
