"""A calibration observes a tensor once, however many quantizers see it."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rarefy._core.quantization import MinMax, MovingAverage

if TYPE_CHECKING:
    from rarefy.quantization.fake_quantizer import FakeQuantizer

_REMEMBERED = 64  # layers that share an input are called one after the other


class _Seen(NamedTuple):
    x: weakref.ref[Tensor]
    version: int
    quantizer: FakeQuantizer
    before: int
    after: int


class ObservedOnce:
    """Spares a calibration the work of observing a tensor twice.

    Two quantizers of one scheme and observer that have seen the same tensors have the same state, so the second to see a
    tensor (an input shared by two layers) takes over the state of the first. One of these is shared by all quantizers of a
    calibration.
    """

    def __init__(self) -> None:
        # Equal for two quantizers that have seen the same; 0 for those that had seen nothing when they first came here.
        self._histories: dict[FakeQuantizer, int] = {}
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED)
        self._next = 1

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _history(self, quantizer: FakeQuantizer) -> int:
        known = self._histories.get(quantizer)
        if known is None:
            fresh = (
                not quantizer._pending
                and bool((quantizer.min_val > quantizer.max_val).all())
                and int(quantizer.skipped) == 0
            )
            known = self._histories[quantizer] = 0 if fresh else self._new()
        return known

    def take_over(self, quantizer: FakeQuantizer, x: Tensor) -> bool:
        """Take over the state of a quantizer that had seen what this one has, and just now ``x``; whether there was one."""
        if not _has_plain_state(quantizer) or x.is_inference():
            return False
        history = self._history(quantizer)
        for seen in self._seen:
            if seen.before == history and seen.x() is x and self._is_like(quantizer, seen, x._version):
                with torch.no_grad():
                    _copy_state(seen.quantizer, quantizer)
                self._histories[quantizer] = seen.after
                return True
        return False

    def _is_like(self, quantizer: FakeQuantizer, seen: _Seen, version: int) -> bool:
        other = seen.quantizer
        return (
            seen.version == version
            and self._histories[other] == seen.after
            and other.scheme == quantizer.scheme
            and other.observer == quantizer.observer
            and other.scale.device == quantizer.scale.device
            and other.scale.shape == quantizer.scale.shape
        )

    def observed(self, quantizer: FakeQuantizer, x: Tensor) -> None:
        """To be told when a quantizer has observed ``x`` itself."""
        if _has_plain_state(quantizer):
            before, after = self._history(quantizer), self._new()
            self._histories[quantizer] = after
            if not x.is_inference():
                self._seen.append(_Seen(weakref.ref(x), x._version, quantizer, before, after))


def _has_plain_state(quantizer: FakeQuantizer) -> bool:
    """Whether the state is in the buffers that are copied."""
    return quantizer.statistics is not None or isinstance(quantizer.observer, (MinMax, MovingAverage))


def _copy_state(source: FakeQuantizer, target: FakeQuantizer) -> None:
    for ours, theirs in zip(target._state, source._state, strict=True):
        ours.copy_(theirs)
    if target.statistics is not None:
        assert source.statistics is not None
        theirs = source.statistics.tensors()
        for name, tensor in target.statistics.tensors().items():
            tensor.copy_(theirs[name])
    target._pending = source._pending
