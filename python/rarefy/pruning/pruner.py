"""Gradual pruning, driven from the training loop that exists."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rarefy import _core
from rarefy._core.pruning import (
    ACDC,
    SET,
    Activation,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    Fisher,
    FixedSchedule,
    Iterative,
    Lamp,
    LinearSchedule,
    Magnitude,
    Movement,
    PolynomialSchedule,
    PrunerOptions,
    PruningCost,
    PruningReport,
    PruningState,
    Random,
    RigL,
    Snapshot,
    StepResult,
    StraightThrough,
    Taylor,
    parse_pattern,
)
from rarefy.pruning.enforce import OnViolation, OptimizerHook, enforce, guard, same_on_all_ranks, unguard
from rarefy.pruning.masks import Pattern
from rarefy.pruning.measure import measure

Scope: TypeAlias = Literal["global", "local", "erk"]
Schedule: TypeAlias = (
    ConstantSchedule
    | FixedSchedule
    | LinearSchedule
    | PolynomialSchedule
    | CosineSchedule
    | ExponentialSchedule
    | CyclicSchedule
    | ACDC
    | Iterative
    | CustomSchedule
)
ElementCriterion: TypeAlias = Magnitude | Random | Movement | Taylor | Fisher | Lamp | Activation
Regrowth: TypeAlias = SET | RigL | StraightThrough


def _tensor(module: nn.Module, name: str) -> Tensor:
    """``getattr(module, name)`` in a third of the time: that asks everything else first."""
    found = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


class Pruner:
    """Holds the weights of lowest score at zero while a model trains.

    >>> pruner = rf.pruning.Pruner(
    ...     model, sparsity=0.9, schedule=rf.pruning.PolynomialSchedule(begin=0, end=1000, every=50)
    ... )
    >>> optimizer.step(); pruner.step()  # in the loop; or once before it: pruner.attach(optimizer)
    >>> pruner.finalize()  # at its end

    Parameters keep their identity and names, so optimizers stay valid and a forward pass costs what it did. All state
    is in buffers of the model, so ``state_dict`` keeps it, and a fresh pruner on a model that is loaded afterwards goes
    on as if nothing had happened:

    - ``<module path>.<parameter>_mask_bits``: uint8, one bit per element in contiguous order, 1 = kept;
    - ``<module path>.<parameter>_mask_score``: for criteria of gradients, and for given scores;
    - ``<module path>.<parameter>_mask_latent``: for soft masks, the dense weights where they are pruned;
    - ``<module path>.<tensor>_mask_rewind``: for rewinding of weights, of all parameters and buffers;
    - ``pruning_step``: int64, how often ``step`` ran.

    A model that has these buffers already, such as a deep copy, is continued. One pruner per model.

    Args:
        model: acted on in place.
        sparsity: final fraction of zeros over the pruned weights, in [0, 1); hit exactly, rounded half to even. None: that
            of an N:M pattern, 1 - n / m.
        scope: ``"global"`` compares all weights together, ``"local"`` gives each tensor the same sparsity, ``"erk"``
            sparsities by the Erdos-Renyi-Kernel rule (arXiv:1911.11134).
        schedule: when masks are updated and how far; default: all at once, at the first step.
        pattern: what is pruned together: ``"unstructured"``, ``"2:4"``, ``"4x1"`` (blocks), ``"row"``, ``"column"``,
            ``"filter"``, ``"head:64"``, or one of the classes.
        criterion: what is kept, the largest scores; default: by magnitude. Or scores that were computed before, by
            parameter name.
        layers: own final sparsities, by patterns of parameter or module names.
        regrowth: how pruned weights come back: ``SET``, ``RigL`` or, for soft masks, ``StraightThrough``; default: they do
            not.
        include: patterns of parameter or module names (``*`` and ``?``) to prune; default: all parameters called
            ``weight`` with 2 or more dimensions. A full parameter name may have any shape.
        exclude: patterns that are taken out again.
        on_violation: what saving a model does whose values left their masks: ``"error"`` or ``"mask"``, which sets them to
            zero.

    Raises:
        ValueError: an option out of range, options that do not go together, a name that is not in the model, no parameter
            to prune, one that cannot have the pattern, or a model with masks for other parameters; the model is then as it
            was.
    """

    _NAME: ClassVar[str] = "Pruner"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        scope: Scope = "global",
        schedule: Schedule | None = None,
        pattern: str | Pattern = "unstructured",
        criterion: ElementCriterion | Mapping[str, Tensor] | None = None,
        *,
        layers: Mapping[str, float] | None = None,
        regrowth: Regrowth | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        on_violation: OnViolation = "error",
    ) -> None:
        if on_violation not in ("error", "mask"):
            raise ValueError(f"[{self._NAME}] on_violation must be 'error' or 'mask', got {on_violation!r}")
        for option, names in (("include", include), ("exclude", exclude)):
            if isinstance(names, str):
                raise TypeError(f"[{self._NAME}] {option} must be a list of names, got the string {names!r}")
        kind = parse_pattern(pattern)
        if sparsity is None:
            sparsity = _core.pruning.implied_sparsity(kind)
            if sparsity is None:
                raise ValueError(f"[{self._NAME}] sparsity must be given for the pattern {kind.name!r}, got None")
        scores = dict(criterion) if isinstance(criterion, Mapping) else None
        self._options = PrunerOptions(
            sparsity,
            scope,
            ConstantSchedule() if schedule is None else schedule,
            kind,
            Magnitude() if criterion is None or scores is not None else criterion,
            list((layers or {}).items()),
            regrowth,
            None if include is None else list(include),
            list(exclude or ()),
            scores,
        )
        self._model = model
        self._final_report: PruningReport | None = None
        self._hook: OptimizerHook | None = None
        self._optimizers: tuple[Any, ...] = ()
        self._growth: list[Tensor] = []  # RigL's gradients, between the two hooks of an optimizer
        self._accumulated = False
        self._rewound = False
        self._register()
        guard(model, on_violation)

    def _register(self) -> None:
        """Choose parameters and make their buffers, or find those that are there."""
        core, model = _core.pruning, self._model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        chosen, self._left_alone = core.select_parameters(list(parameters), list(parameters.values()), self._options)
        names = list(parameters)
        self._names = [names[i] for i in chosen]
        core.check_names(self._options, self._names)
        made = dict(item for name in self._names for item in core.new_buffers(self._options, name, parameters[name]))
        self._snapshot_names: list[str] = []
        if self._options.keeps_snapshots:
            kept = [*model.named_parameters(), *self._own_buffers()]
            self._snapshot_names = [name for name, _ in kept]
            made.update((core.rewind_key(name), tensor.detach().clone()) for name, tensor in kept)
        existing = [name for name, _ in model.named_buffers() if self._is_pruning_key(name)]
        masks = {core.mask_key(name) for name in self._names}
        if not core.check_existing(existing, self._names, [key for key in made if key not in masks]):
            for key, tensor in made.items():
                module, name = self._place(key)
                module.register_buffer(name, tensor)
            model.register_buffer(core.STEP_KEY, torch.zeros((), dtype=torch.int64))
        self._options.forget_scores()  # they are buffers now

    @staticmethod
    def _is_pruning_key(name: str) -> bool:
        last = name.rpartition(".")[2]
        return _core.pruning.is_pruning_key(last) and (last == name or last != _core.pruning.STEP_KEY)

    def _own_buffers(self) -> list[tuple[str, Tensor]]:
        """The buffers that are not of a pruner."""
        is_pruning = _core.pruning.is_pruning_key
        return [(name, b) for name, b in self._model.named_buffers() if not is_pruning(name.rpartition(".")[2])]

    @classmethod
    def from_masks(cls, model: nn.Module, masks: Mapping[str, Tensor]) -> Pruner:
        """Adopt masks that were made elsewhere, and hold them while the model trains.

        Args:
            model: without masks; its weights are masked at once.
            masks: by full parameter name: bool of the parameter's shape, True = kept, or packed.

        Raises:
            ValueError: a name that the model does not have, a mask of another shape, a model with masks; the model is then
                as it was.
            TypeError: a mask of another type.
        """
        if not masks:
            raise ValueError(f"[{cls._NAME}.from_masks] needs at least one mask, got none")
        existing = [name for name, _ in model.named_buffers() if cls._is_pruning_key(name)]
        if existing:
            raise ValueError(
                f"[{cls._NAME}.from_masks] the model must have no masks yet, got {existing[0]!r}; finalize() its pruner first"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in masks:
            if name not in parameters:
                raise ValueError(f"[{cls._NAME}.from_masks] every name must be that of a parameter, got {name!r}")
        names = sorted(masks)
        packed = _core.pruning.pack_masks(names, [parameters[name] for name in names], dict(masks))
        state = PruningState(names, [parameters[name] for name in names], packed, torch.zeros((), dtype=torch.int64))
        sparsity = _core.pruning.masked_fraction(state)
        if sparsity == 1.0:
            raise ValueError(f"[{cls._NAME}.from_masks] masks must keep something, got none kept")
        pruner = cls(model, sparsity, schedule=FixedSchedule(), include=names)
        for name in pruner._names:
            module, parameter = pruner._place(name)
            getattr(module, _core.pruning.mask_key(parameter)).copy_(packed[names.index(name)])
        _core.pruning.apply_masks(pruner._state())
        return pruner

    def _place(self, name: str) -> tuple[nn.Module, str]:
        *path, parameter = name.split(".")
        module: nn.Module | None = self._model
        for part in path:  # get_submodule takes ten times as long, and every step asks for every parameter
            module = None if module is None else module._modules.get(part)
        return self._model.get_submodule(".".join(path)) if module is None else module, parameter

    def _state(self) -> PruningState:
        """Gather the tensors anew, since torch may replace buffers when it moves or loads a model."""
        core, options = _core.pruning, self._options
        places = [self._place(name) for name in self._names]

        def kept(key: Any, needed: bool) -> list[Tensor]:
            return [_tensor(module, key(parameter)) for module, parameter in places] if needed else []

        snapshots = []
        for name in self._snapshot_names:
            module, tensor = self._place(name)
            snapshots.append(Snapshot(name, getattr(module, tensor), getattr(module, core.rewind_key(tensor))))
        return PruningState(
            self._names,
            [_tensor(module, parameter) for module, parameter in places],
            kept(core.mask_key, True),
            _tensor(self._model, core.STEP_KEY),
            kept(core.score_key, options.keeps_scores),
            kept(core.latent_key, options.keeps_latent),
            self._growth,
            snapshots,
        )

    # --- in the loop ---------------------------------------------------------------------------------------------------

    def accumulate(self) -> None:
        """Add this step's gradients to the scores of criteria that use them, and bring back dense weights of soft masks.

        Call it where ``needs_accumulate`` says so, once per step, after the last backward pass and before
        ``optimizer.step()``; ``attach`` does it.

        Raises:
            ValueError: no gradients, or some that are not finite (a step to skip); nothing has changed then.
            RuntimeError: a second call for the same step, or after ``finalize``.
        """
        self._check_active("accumulate")
        if self._accumulated:
            raise RuntimeError(
                f"[{self._NAME}.accumulate] must be called once per step(), after the last backward pass"
            )
        _core.pruning.accumulate_gradients(self._state(), self._options)
        self._accumulated = True

    @property
    def needs_accumulate(self) -> bool:
        """True when the step that comes next needs ``accumulate``."""
        return self._final_report is None and _core.pruning.needs_accumulate(self._state(), self._options)

    def step(self, *optimizers: Any) -> None:
        """Count one step, make masks when the schedule says so, and zero the values that they prune.

        Call it after ``optimizer.step()``. Gradients are spent by then, and are left alone, as moments are, unless the
        optimizers are given. (``attach`` does all of it by hooks, in less time.)

        Args:
            optimizers: those whose moments are to be masked too, with gradients, so that what comes back has no history;
                cleared when weights are rewound.

        Raises:
            ValueError: NaN in a weight when masks are made, or masks that do not fit (a checkpoint of another model);
                nothing has changed then.
            RuntimeError: without ``accumulate`` where it is needed, with an optimizer attached, after ``finalize``.
        """
        self._check_active("step")
        if self._hook is not None:
            raise RuntimeError(
                f"[{self._NAME}.step] must not be called while an optimizer is attached, whose step() does it; detach() first"
            )
        state = self._state()
        if not self._accumulated and _core.pruning.needs_accumulate(state, self._options):
            raise RuntimeError(
                f"[{self._NAME}.step] needs accumulate() between the backward pass and optimizer.step() for "
                f"{self._what_accumulates(state)}"
            )
        if optimizers:
            self._keep_growth(state)
            state = self._state()
        self._count(state, optimizers)
        self._growth = []
        if optimizers and not _core.pruning.is_soft(state, self._options):
            enforce(state, optimizers)
        else:
            _core.pruning.apply_values(state)

    def _count(self, state: PruningState, optimizers: Sequence[Any]) -> bool:
        """Count a step and make what masks are due; True when something was made anew. Values are not masked yet."""
        if optimizers and _core.pruning.may_regrow(state, self._options):
            enforce(state, optimizers)  # what comes back has no history
        result = self._update(state)
        if result.rewound and self._options.keeps_snapshots:
            for optimizer in optimizers:
                optimizer.state.clear()
        self._accumulated = False
        self._rewound = result.rewound
        return result.updated

    def _what_accumulates(self, state: PruningState) -> str:
        soft = _core.pruning.is_soft(state, self._options)
        return "soft masks" if soft else repr(self._options.criterion)

    def _update(self, state: PruningState) -> StepResult:
        """Count a step and make what masks are due, the same in all processes."""
        result = _core.pruning.update_masks(state, self._options)
        if result.updated:
            places = [self._place(name) for name in self._names]
            same_on_all_ranks([getattr(module, _core.pruning.mask_key(name)) for module, name in places])
        return result

    def attach(self, optimizer: Any, *others: Any) -> None:
        """Do all of this by hooks of the optimizer: no line after ``optimizer.step()`` is needed.

        Gradients and moments are masked too, so that what comes back starts without a history, and an optimizer's state
        is cleared when weights are rewound. Of several optimizers that train the model together, a step is counted after
        that of the last one given.

        Raises:
            TypeError: something without hooks for its steps.
            ValueError: an optimizer that holds none of the pruned parameters, or one that is attached.
            RuntimeError: attached already, or after ``finalize``.
        """
        self._check_active("attach")
        if self._hook is not None:
            raise RuntimeError(f"[{self._NAME}.attach] must not be called again before detach()")
        self._hook = OptimizerHook((optimizer, *others), self._state, self._before_optimizer, self._after_optimizer)
        self._optimizers = (optimizer, *others)

    def detach(self) -> None:
        """Take the hooks away; ``step`` is to be called again."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._optimizers, self._growth = None, (), []

    def _before_optimizer(self) -> tuple[PruningState, bool]:
        """The state of this step; True when the optimizer is about to work on dense weights, whose gradients must not be
        masked."""
        state = self._state()
        if _core.pruning.needs_accumulate(state, self._options) and not self._accumulated:
            self.accumulate()
        self._keep_growth(state)
        if self._growth:
            state = self._state()
        return state, _core.pruning.is_soft(state, self._options)

    def _keep_growth(self, state: PruningState) -> None:
        """Copy the gradients that RigL reads in this step, before they are masked."""
        self._growth = []
        if _core.pruning.needs_growth(state, self._options):
            parameters = [getattr(module, name) for module, name in map(self._place, self._names)]
            for name, parameter in zip(self._names, parameters, strict=True):
                if parameter.grad is None:
                    raise ValueError(f"[{self._NAME}] RigL needs the gradient of {name!r} at this step, got none")
            self._growth = [parameter.grad.detach().clone() for parameter in parameters]

    def _after_optimizer(self, state: PruningState) -> bool:
        """Count a step; True when masks or weights were made anew, and are to be masked."""
        changed = self._count(state, self._optimizers)
        self._growth = []
        return changed

    def finalize(self) -> None:
        """Zero the pruned weights for good, remove the buffers from the model and the hooks from optimizers."""
        self._check_active("finalize")
        state = self._state()
        _core.pruning.apply_masks(state)
        self._final_report = _core.pruning.make_report(state, self._options, self._left_alone, True)
        self.detach()
        unguard(self._model)
        for key in [name for name, _ in self._model.named_buffers() if self._is_pruning_key(name)]:
            module, name = self._place(key)
            delattr(module, name)

    # --- what it says --------------------------------------------------------------------------------------------------

    def report(self, example_inputs: object = None) -> PruningReport:
        """Return elements, zeros and sparsity per tensor and in total, and what was left alone and why.

        Args:
            example_inputs: of the size that the model will be used with: a tensor, a tuple or list of positional arguments,
                or a dict of keyword arguments. Adds what the zeros are worth, as ``measure`` finds it: bytes of a file,
                multiply-accumulates, and the time of a forward pass.
        """
        if self._final_report is None:
            report = _core.pruning.make_report(self._state(), self._options, self._left_alone, False)
        else:
            report = copy.copy(self._final_report)
        if example_inputs is not None:
            measured, cost = measure(self._model, example_inputs), PruningCost()
            cost.dense_bytes, cost.bytes = measured.file.dense_bytes, measured.file.bytes
            cost.dense_macs, cost.macs = measured.macs, measured.effective_macs
            cost.dense_seconds, cost.seconds = measured.dense_milliseconds / 1e3, measured.sparse_milliseconds / 1e3
            report.cost = cost
        return report

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

    @property
    def training_step(self) -> int:
        """Where training is in its own schedule: ``steps``, or behind it once ``Iterative`` has rewound.

        Set the learning rate by it: ``scheduler = LambdaLR(optimizer, lambda _: rate(pruner.training_step))``.
        """
        return self._options.training_step(self.steps)

    @property
    def rewound(self) -> bool:
        """True when the last step went back in the training schedule."""
        return self._rewound

    def _check_active(self, function: str) -> None:
        if self._final_report is not None:
            raise RuntimeError(f"[{self._NAME}.{function}] must not be called after finalize()")

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruner:
        """A pruner of a copy of the model, attached to no optimizer."""
        other = copy.copy(self)
        memo[id(self)] = other
        other._model = copy.deepcopy(self._model, memo)
        other._hook, other._optimizers, other._growth = None, (), []
        return other

    def __repr__(self) -> str:
        options = self._options
        criterion = "given scores" if options.has_scores else repr(options.criterion)
        regrowth = "" if options.regrowth is None else f", {options.regrowth!r}"
        return (
            f"{self._NAME}({len(self._names)} tensors, {criterion}, {options.pattern.name}, {options.scope}, sparsity "
            f"{self.sparsity:.4f} of {options.sparsity:.4g}, step {self.steps}, {options.schedule!r}{regrowth})"
        )
