"""What layers keep while nothing that they were made from changes: a calibration's weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.nn._base import QuantizableLayer

#: Convolutions with fewer output positions than this are faster on contiguous tensors, others on channels-last ones.
_FEWEST_POSITIONS = 32

_T = TypeVar("_T")

_Versions = list[tuple[weakref.ref[Tensor], int] | None]


class Kept:
    """Results by name, each of which holds until a tensor that it was made from is written to or replaced.

    Args:
        channels_last: whether convolutions may choose the layout of what they compute with.
    """

    def __init__(self, channels_last: bool = False) -> None:
        self.channels_last = channels_last
        self._results: dict[object, tuple[_Versions, object]] = {}

    def get(self, name: object, sources: tuple[Tensor | None, ...], make: Callable[[], _T]) -> _T:
        """The result of this name: ``make()`` where there is none yet, or a source has changed since."""
        known = self._results.get(name)
        if known is not None and _unchanged(known[0], sources):
            return known[1]  # type: ignore[return-value]
        result = make()
        if not any(source is not None and source.is_inference() for source in sources):  # those count no writes
            versions = [None if s is None else (weakref.ref(s), s._version) for s in sources]
            self._results[name] = versions, result
        return result

    def layout(self, x: Tensor, stride: tuple[int, ...]) -> torch.memory_format | None:
        """The layout in which a convolution of ``x`` [N, C, H, W] is fastest; None where it is not to be chosen."""
        if not self.channels_last or x.dim() != 4 or x.device.type != "cpu":
            return None
        positions = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
        return torch.channels_last if positions >= _FEWEST_POSITIONS else torch.contiguous_format


def _unchanged(versions: _Versions, sources: tuple[Tensor | None, ...]) -> bool:
    for known, source in zip(versions, sources, strict=True):
        if (known is None) != (source is None):
            return False
        if known is not None and source is not None and (known[0]() is not source or known[1] != source._version):
            return False
    return True


@contextmanager
def keeping(layers: list[QuantizableLayer], channels_last: bool = False) -> Iterator[None]:
    """Layers fold, observe and round their weights once, as long as these stay as they are, and not at every forward.

    For evaluation without gradients: results have none.

    Args:
        layers: prepared.
        channels_last: let 2-d convolutions compute in the layout that is faster at their size. The order in which they sum
            then differs from that of contiguous tensors, and so may the last bit of their results.
    """
    for layer in layers:
        layer._kept = Kept(channels_last)
    try:
        yield
    finally:
        for layer in layers:
            layer._kept = None
