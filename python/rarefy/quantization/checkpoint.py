"""Gradient checkpointing: a forward that is run again in the backward pass must not observe again.

A forward inside of a backward pass is taken for such a recomputation. It uses the parameters that the quantizer has, which
are those of the forward pass unless the quantizer has observed another batch in between: because the layer is called
several times, or several forward passes come before the backward. ``checkpoint_context`` is exact there too.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.quantization.fake_quantizer import FakeQuantizer


class Tape:
    """The parameters that the quantizers used in one checkpointed forward, in the order of their calls."""

    def __init__(self) -> None:
        self._entries: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # by the quantizer's identity
        self._position: dict[int, int] = defaultdict(int)

    def record(self, quantizer: FakeQuantizer) -> None:
        """Keep what the quantizer has just used."""
        self._entries[id(quantizer)].append((quantizer.scale.clone(), quantizer.zero_point.clone()))

    def replay(self, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the quantizer's next call."""
        key = id(quantizer)
        entry = self._entries[key][self._position[key]]
        self._position[key] += 1
        return entry

    def rewind(self) -> None:
        """Begin at the first calls again."""
        self._position.clear()


class _Current(threading.local):
    tape: Tape | None = None


_current = _Current()


def is_recomputing() -> bool:
    """Whether this thread is inside of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def current_tape() -> Tape | None:
    """The tape of the checkpointed region that is running, if it has one."""
    return _current.tape


class _Using(AbstractContextManager[None]):
    """Makes a tape the current one. Can be entered again: a graph that is kept is recomputed at every backward."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._before: list[Tape | None] = []

    def __enter__(self) -> None:
        self._before.append(_current.tape)
        _current.tape = self._tape
        self._tape.rewind()

    def __exit__(self, *error: object) -> None:
        _current.tape = self._before.pop()


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: exact recomputation.

    The recomputation uses the scales and zero points of its own forward, also where a layer runs several times or several
    forward passes come before the backward. Without it, ranges are not observed twice either, but the parameters are the
    latest ones; they are the same where each quantizer runs once between the backward passes.

        checkpoint(block, x, use_reentrant=False, context_fn=rarefy.quantization.checkpoint_context)
    """
    tape = Tape()
    return _Using(tape), _Using(tape)
