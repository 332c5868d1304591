"""The removal of slices from a live model, as a transaction: tensors, gradients, optimizer state and attributes."""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rarefy import _core
from rarefy._core.pruning import Cut
from rarefy.nn import WeightedLayer
from rarefy.pruning.records import TensorRecord, record_of, set_record
from rarefy.pruning.resize import attributes_of, flatten

_PLAIN = (Tensor, nn.Parameter)
_MISSING = object()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, a tied one under each of its names."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def quantizer_cuts(model: nn.Module, tensors: Mapping[str, Tensor], cuts: Sequence[Cut]) -> list[Cut]:
    """Return the cuts of per-channel tensors of fake quantizers, by those of the weights that they belong to."""
    by_tensor: dict[int, list[Cut]] = defaultdict(list)
    for cut in cuts:
        if cut.tensor in tensors:
            by_tensor[id(tensors[cut.tensor])].append(cut)
    given = {(cut.tensor, cut.dim) for cut in cuts}
    result = []
    for path, module in model.named_modules():
        if not isinstance(module, WeightedLayer) or not module.prepared or module.quant.weight is None:
            continue
        quantizer = module.quant.weight
        for cut in by_tensor[id(module.weight)]:
            if cut.dim != quantizer.axis:
                continue
            own = (*quantizer.named_parameters(recurse=False), *quantizer.named_buffers(recurse=False))
            for name, tensor in own:
                key = f"{path}.quant.weight.{name}".lstrip(".")
                if tensor.shape == (module.weight.shape[cut.dim],) and (key, 0) not in given:
                    result.append(Cut(key, 0, cut.kept))
    return result


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, (list, tuple, set)) and any(_holds_tensor(item) for item in value)


class OptimizerState:
    """What optimizers keep about the parameters of a model."""

    def __init__(self, optimizers: Sequence[Any], names: Mapping[int, str]) -> None:
        self.tensors: list[tuple[str, str, Tensor]] = []  # parameter, name, value
        self.unclear: dict[str, str] = {}  # parameter to what cannot be cut
        self._optimizers, self._names = optimizers, names
        self._held: list[set[int]] = []
        for optimizer in optimizers:
            self._gather(optimizer)

    def _parameters(self, optimizer: Any) -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]} & set(self._names)

    def _gather(self, optimizer: Any) -> None:
        kind = type(optimizer).__name__
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
            raise TypeError(f"[Surgery] an optimizer must have param_groups and state, got {kind}")
        self._held.append(self._parameters(optimizer))
        if not self._held[-1]:
            raise ValueError(f"[Surgery] {kind} must hold parameters of the model, but holds none of them")
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise ValueError(
                "[Surgery] LBFGS must not have taken a step: its history is one vector over all parameters, make a new "
                "optimizer after pruning"
            )
        for parameter, entry in optimizer.state.items():
            name = self._names.get(id(parameter))
            if name is None or not isinstance(entry, Mapping):
                continue
            for key, value in entry.items():
                if type(value) in _PLAIN:
                    self.tensors.append((name, str(key), value))
                elif _holds_tensor(value):
                    self.unclear[name] = f"state '{key}' of {kind} is a {type(value).__name__}"

    def check(self) -> None:
        """Raise unless the optimizers hold the parameters that they held."""
        for optimizer, held in zip(self._optimizers, self._held, strict=True):
            if self._parameters(optimizer) != held:
                raise ValueError(
                    f"[Surgery.commit] {type(optimizer).__name__} must hold exactly the parameters of the model that it "
                    f"held before"
                )


class Surgery:
    """Removes slices of a model's tensors, and brings everything back unless ``commit`` is called.

        with Surgery(model, [optimizer]) as surgery:
            surgery.apply([Cut("conv1.weight", 0, kept), Cut("conv1.bias", 0, kept), Cut("conv2.weight", 1, kept)])
            check(model)  # an exception rolls back
            surgery.commit()

    Parameters, buffers and what optimizers keep about them stay the same objects with other data: new memory, in the order
    of the old. ``.grad`` is cut along. Attributes that repeat a shape follow (``out_channels``, ``groups``,
    ``normalized_shape``, ``hidden_size`` and so on, of ``torch.nn``, ``rarefy.nn`` and Hugging Face's ``Conv1D``); an
    ``nn.MultiheadAttention`` that loses heads becomes a ``rarefy.nn.MultiheadAttention``. The fake quantizers of a prepared
    layer follow its weight. Attributes of other modules: see ``set_attribute``.

    Args:
        model: changed in place.
        optimizers: those that hold its parameters, of any type with ``param_groups`` and ``state``; or one.

    Raises:
        ValueError: lazy parameters, an optimizer that holds none of the model's parameters, LBFGS that has taken a step.
        TypeError: something that is no optimizer.
    """

    def __init__(self, model: nn.Module, optimizers: Any = ()) -> None:
        self._model = model
        self._tensors = named_tensors(model)
        for name, tensor in self._tensors.items():
            if is_lazy(tensor):
                raise ValueError(f"[Surgery] {name} must have its shape: run a batch through the model first")
        names: dict[int, str] = {}
        for name, tensor in self._tensors.items():
            names.setdefault(id(tensor), name)
        given = optimizers if isinstance(optimizers, Iterable) else (optimizers,)
        self._state = OptimizerState(list(given), names)
        self._names = names
        state = self._state.tensors
        self._core = _core.pruning.Surgery(
            list(self._tensors),
            list(self._tensors.values()),
            [parameter for parameter, _, _ in state],
            [name for _, name, _ in state],
            [value for _, _, value in state],
        )
        self._begin()

    def _begin(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._changed: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def apply(self, cuts: Iterable[Cut]) -> None:
        """Cut the tensors, and let the attributes of their modules follow.

        Raises:
            ValueError: an unknown tensor; indices that are none, not ascending or out of range; a tied tensor with different
                cuts; optimizer state of an unknown shape or form; a layer that cannot have the shapes that are left (groups
                of different sizes). Everything is as it was then.
            IndexError: a dimension that the tensor does not have.
        """
        cuts = [cut for cut in cuts if not self._is_whole(cut)]
        cuts += quantizer_cuts(self._model, self._tensors, cuts)
        for cut in cuts:
            tensor = self._tensors.get(cut.tensor)
            if tensor is not None and type(tensor) not in _PLAIN:
                raise ValueError(f"[Surgery] {cut.tensor} must be a plain tensor, got {type(tensor).__name__}")
            unclear = tensor is not None and self._state.unclear.get(self._names[id(tensor)])
            if unclear:
                raise ValueError(f"[Surgery] what optimizers keep about {cut.tensor} must be tensors, but {unclear}")
        self._core.apply(cuts)
        try:
            for module in self._cut_modules():
                for name, value in attributes_of(module, self._core.kept).items():
                    self._set(module, name, value)
                flatten(module)
        except BaseException:
            self.rollback()
            raise

    def _is_whole(self, cut: Cut) -> bool:
        tensor = self._tensors.get(cut.tensor)
        valid = tensor is not None and 0 <= cut.dim < tensor.dim()
        return valid and len(cut) == tensor.shape[cut.dim] and list(cut.kept) == list(range(len(cut)))

    def _cut_modules(self) -> list[nn.Module]:
        """The modules with a tensor that was cut, and those above them: the innermost first."""
        modules: dict[int, tuple[int, nn.Module]] = {}
        for name, tensor in self._tensors.items():
            if self._core.is_cut(tensor):
                steps = name.split(".")[:-1]
                for depth in range(len(steps) + 1):
                    module = self._model.get_submodule(".".join(steps[:depth]))
                    modules[id(module)] = depth, module
        return [module for _, module in sorted(modules.values(), key=lambda item: -item[0])]

    @property
    def shapes_before(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors when the transaction began."""
        return self._shapes

    def add(self, name: str, delta: Tensor) -> None:
        """Add to a parameter or buffer, until it is rolled back.

        Args:
            name: of the tensor.
            delta: one element per index of the tensor's first dimension as it was before ``apply``.
        """
        tensor = self._tensors[name]
        kept = self._core.kept(tensor, 0)
        with torch.no_grad():
            if kept is not None:
                tensor.add_(delta[torch.tensor(kept, device=delta.device)])
            else:
                before = tensor.clone()
                self._undo.append(lambda: tensor.data.copy_(before))
                tensor.add_(delta)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute that code of the model reads a size from, until it is rolled back; saved by ``save_pruned``.

        Args:
            module: of the model.
            name: an attribute that the module has; with dots, of an object that it has: ``"config.hidden_size"``.
            value: what JSON knows: None, a bool, a number, a string, or a list or tuple of those.

        Raises:
            AttributeError: the module has no such attribute.
            TypeError: a value of another type.
        """
        json.dumps(value)
        operator.attrgetter(name)(module)
        self._set(module, name, value)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        owner: Any = module
        *path, last = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        before, state = getattr(owner, last, _MISSING), dict(vars(owner))

        def undo() -> None:
            vars(owner).clear()
            vars(owner).update(state)
            if getattr(owner, last, _MISSING) is not before:  # the type is not among the variables
                setattr(owner, last, before)

        self._undo.append(undo)
        setattr(owner, last, value)
        _, changed = self._changed.setdefault(id(module), (module, {}))
        changed[name] = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value

    def rollback(self) -> None:
        """Bring back what was there: the same memory, gradients, state and attributes."""
        while self._undo:
            self._undo.pop()()
        self._core.rollback()
        self._begin()

    def commit(self) -> None:
        """Keep what was done.

        Raises:
            ValueError: an optimizer does not hold the parameters that it held, or state that does not fit them; nothing is
                committed then.
        """
        self._state.check()
        records = [
            (path, {dim: kept for dim in range(tensor.dim()) if (kept := self._core.kept(tensor, dim))})
            for path, tensor in self._tensors.items()
            if self._core.is_cut(tensor)
        ]
        self._core.commit()
        for path, cuts in records:
            parent, _, name = path.rpartition(".")
            module = self._model.get_submodule(parent)
            record = record_of(module)
            of_tensor = record.tensors.get(name, TensorRecord(self._shapes[path]))
            for dim, kept in cuts.items():
                of_tensor = of_tensor.cut(dim, kept)
            set_record(module, replace(record, tensors={**record.tensors, name: of_tensor}))
        for module, attributes in self._changed.values():
            record = record_of(module)
            set_record(module, replace(record, attributes={**record.attributes, **attributes}))
        self._begin()

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *error: object) -> None:
        self.rollback()

    def __del__(self) -> None:
        if "_undo" in vars(self):  # not where the constructor raised
            self.rollback()

    def __repr__(self) -> str:
        cut = sum(self._core.is_cut(tensor) for tensor in self._tensors.values())
        return f"Surgery({type(self._model).__name__}, {len(self._tensors)} tensors, {cut} of them cut)"
