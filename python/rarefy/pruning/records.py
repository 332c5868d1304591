"""What was removed from a model so far, kept on its modules, so that it moves, copies and pickles with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

_KEY = "_rarefy_pruned"


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its shape as constructed, and which of those indices are left."""

    shape: tuple[int, ...]
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  #: by dimension; absent where all are

    def cut(self, dim: int, kept: Sequence[int]) -> TensorRecord:
        """The record after another cut, whose indices count what is left now."""
        before = self.kept.get(dim)
        return replace(self, kept={**self.kept, dim: tuple(kept) if before is None else tuple(before[i] for i in kept)})

    @property
    def current_shape(self) -> tuple[int, ...]:
        """The shape that is left."""
        return tuple(len(self.kept.get(dim, range(size))) for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class ModuleRecord:
    """One module: its own tensors by name, and the attributes that were changed."""

    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)  #: JSON values; "__class__" is a type by its full name


def record_of(module: nn.Module) -> ModuleRecord:
    """The record of a module; an empty one where nothing was removed."""
    return vars(module).get(_KEY, ModuleRecord())


def set_record(module: nn.Module, record: ModuleRecord) -> None:
    """Put a record on a module. Records are values: they are replaced, not changed."""
    vars(module)[_KEY] = record
