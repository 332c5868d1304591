"""Ranges that are shared between processes, so that quantizers stay equal in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.quantization import learned
from rarefy.quantization.formats import derive_scale

if TYPE_CHECKING:
    from rarefy.quantization.fake_quantizer import FakeQuantizer


class RangeSync:
    """Observes each batch together with those of the other processes of a group.

    One object serves all quantizers of a model. A copy of the model shares it; a pickled one comes back with the default
    group, since a process group belongs to its process.

    Args:
        group: None: the default group, if ``torch.distributed`` is initialized when a forward runs.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> RangeSync:
        return self

    def __reduce__(self) -> tuple[type[RangeSync], tuple[()]]:
        return RangeSync, ()

    def is_active(self) -> bool:
        """Whether there are other processes."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def observe(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        axis: int | None,
        constant: float | None,
        limits: tuple[int, int],
        symmetric: bool,
    ) -> None:
        """``torch.ops.rarefy.observe`` of all processes' batches as if they were one, by one all-reduce.

        A batch that is not finite in some process adds nothing to the range, and is counted in all of them.
        """
        with torch.no_grad():
            minimum, maximum, scale, zero_point, skipped = state
            local = [torch.full_like(minimum, torch.inf), torch.full_like(maximum, -torch.inf)]
            bad = torch.zeros_like(skipped)
            unused = torch.empty_like(scale), torch.empty_like(zero_point)
            torch.ops.rarefy.observe(x.detach(), *local, *unused, bad, axis, None, *limits, symmetric)
            merged = self._merge(*local, bad)
            _take(merged, state, axis, constant, limits, symmetric)
            skipped += merged[-1:].long()

    def merge(self, quantizers: Iterable[FakeQuantizer]) -> None:
        """Make ranges, statistics and counts those of all processes: smallest minimum, greatest maximum, greatest count, the
        sum of histograms."""
        with torch.no_grad():
            for q in quantizers:
                if q.learning is not None:
                    learned.merge(q, q.learning, self)
                    continue
                if q.statistics is not None:
                    q.statistics.merge_over_processes(self)
                    count = q.skipped.float()
                    self.max(count)
                    q.skipped.copy_(count)
                    q._pending = True
                    continue
                merged = self._merge(q.min_val, q.max_val, q.skipped)
                _take(merged, q._state, q.axis, None, (q.qmin, q.qmax), q.scheme.symmetric)
                if q.plan.range_json and not q.is_plain:
                    derive_scale(q)
                q.skipped.copy_(merged[-1:])

    def sum(self, count: int, device: torch.device) -> int:
        """The sum of a number over the processes."""
        total = torch.tensor([count], device=device)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def max(self, values: Tensor) -> None:
        """The element-wise maximum over the processes, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def add(self, values: Tensor) -> None:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.group)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape."""
        all_values = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(all_values, values, group=self.group)
        return all_values

    def united(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest minimum and the greatest maximum; a process that has seen nothing gives (inf, -inf)."""
        packed = torch.cat([-minimum, maximum])
        self.max(packed)
        low, high = packed.chunk(2)
        return -low + 0.0, high.contiguous()  # without -0

    def _merge(self, minimum: Tensor, maximum: Tensor, count: Tensor) -> Tensor:
        # One maximum for all; a process that has seen nothing gives -inf.
        merged = torch.cat([-minimum, maximum, count.float()])
        dist.all_reduce(merged, dist.ReduceOp.MAX, group=self.group)
        return merged


def _take(
    merged: Tensor,
    state: tuple[Tensor, ...],
    axis: int | None,
    constant: float | None,
    limits: tuple[int, int],
    symmetric: bool,
) -> None:
    """Observe the two ends of a merged range."""
    channels = state[0].numel()
    ends = torch.stack([-merged[:channels], merged[channels : 2 * channels]])
    counted_already = torch.zeros_like(state[4])
    axis = None if axis is None else 1
    torch.ops.rarefy.observe(ends, *state[:4], counted_already, axis, constant, *limits, symmetric)
