"""What an observer that chooses its range at the end keeps of a stream: histograms, ranges of batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rarefy._core.quantization import SQNR, Histogram, MeanNoOutliers, Percentile, histogram_bins

if TYPE_CHECKING:
    from rarefy.quantization.distributed import RangeSync
    from rarefy.quantization.fake_quantizer import Observer


def keeps_statistics(observer: Observer) -> bool:
    """Whether statistics come first and the range later, from all of them."""
    return isinstance(observer, (Histogram, Percentile, SQNR, MeanNoOutliers))


class RangeStatistics(nn.Module):
    """Statistics of a stream, in memory that does not grow.

    Buffers: ``hist`` (int64 [rows, bins]), ``hist_min`` and ``hist_max`` (float32 [rows]), the range of the histogram; or
    ``batch_min`` and ``batch_max`` (float32 [batches, rows]) and ``batches`` (int64 [3]: seen, kept, every which one). The
    same names and shapes as in C++.

    Args:
        observer: ``Histogram``, ``Percentile``, ``SQNR`` or ``MeanNoOutliers``.
        rows: one per index of the grid's axis, or 1.
    """

    hist: Tensor
    hist_min: Tensor
    hist_max: Tensor
    batch_min: Tensor
    batch_max: Tensor
    batches: Tensor

    def __init__(self, observer: Observer, rows: int) -> None:
        super().__init__()
        if not keeps_statistics(observer):
            raise ValueError(f"[RangeStatistics] observer must be one that keeps statistics, got {observer}")
        self.observer = observer
        # Plain Python values, so that torch.compile sees constants.
        self._bins = histogram_bins(observer)
        self._method, self._parameter, self._sigma, self._quantile = "minmax", 0.0, None, None
        if isinstance(observer, Histogram) and observer.search is not None:
            self._method, self._parameter = observer.search, observer.norm
        elif isinstance(observer, Percentile):
            self._method, self._parameter = "percentile", observer.percentile
        elif isinstance(observer, SQNR):
            self._method, self._parameter = "sqnr", observer.clip_weight
        elif isinstance(observer, MeanNoOutliers):
            self._quantile = observer.quantile
            self._sigma = None if observer.quantile is not None else observer.sigma or 3.0
        if isinstance(observer, MeanNoOutliers):
            self.register_buffer("batch_min", torch.full((observer.batches, rows), torch.inf))
            self.register_buffer("batch_max", torch.full((observer.batches, rows), -torch.inf))
            self.register_buffer("batches", torch.zeros(3, dtype=torch.int64))
        else:
            assert self._bins is not None
            self.register_buffer("hist", torch.zeros(rows, self._bins, dtype=torch.int64))
            self.register_buffer("hist_min", torch.full((rows,), torch.inf))
            self.register_buffer("hist_max", torch.full((rows,), -torch.inf))

    def observe(self, x: Tensor, axis: int | None, skipped: Tensor) -> None:
        """Count a batch; one that is not finite goes to ``skipped`` alone."""
        if self._bins is not None:
            torch.ops.rarefy.histogram_observe(x.detach(), self.hist, self.hist_min, self.hist_max, skipped, axis)
        else:
            self._record(*self._ends(x, axis, skipped))

    def choose(self, qmin: int, qmax: int, symmetric: bool, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
        """The range of each row, (inf, -inf) where nothing was seen."""
        if self._bins is None:
            return torch.ops.rarefy.mean_range(self.batch_min, self.batch_max, self._sigma, self._quantile)
        state = self.hist, self.hist_min, self.hist_max
        grid = qmin, qmax, symmetric, power_of_two
        return torch.ops.rarefy.choose_range_from_histogram(*state, self._method, self._parameter, *grid)

    def choose_for(self, scheme: str) -> tuple[Tensor, Tensor]:
        """The same for any scheme that has a range, given as JSON."""
        if self._bins is None:
            return torch.ops.rarefy.mean_range(self.batch_min, self.batch_max, self._sigma, self._quantile)
        state = self.hist, self.hist_min, self.hist_max
        return torch.ops.rarefy.scheme_range_from_histogram(*state, scheme, self._method, self._parameter)

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, themselves."""
        return dict(self.named_buffers())

    def clear(self) -> None:
        """As if nothing had been observed."""
        for name, tensor in self.named_buffers():
            tensor.fill_(0 if not tensor.is_floating_point() else torch.inf if name.endswith("_min") else -torch.inf)

    def add(self, other: Mapping[str, Tensor]) -> None:
        """Add what another one with the same observer has seen."""
        if self._bins is not None:
            state = self.hist, self.hist_min, self.hist_max
            torch.ops.rarefy.histogram_add(*state, other["hist"], other["hist_min"], other["hist_max"])
        else:
            self._record(other["batch_min"], other["batch_max"])

    def observe_over_processes(self, x: Tensor, axis: int | None, skipped: Tensor, sync: RangeSync) -> None:
        """Count the batches of all processes as one. One that is not finite adds nothing, and to every ``skipped``."""
        bad = torch.zeros_like(skipped)
        if self._bins is not None:
            batch = RangeStatistics(self.observer, len(self.hist)).to(self.hist.device)
            batch.observe(x, axis, bad)
            batch._add_over_processes(sync)
            self.add(batch.tensors())
        else:
            self._record(*sync.united(*self._ends(x, axis, bad)))
        count = bad.float()
        sync.max(count)
        skipped += count.long()

    def merge_over_processes(self, sync: RangeSync) -> None:
        """Become the statistics of all processes together."""
        if self._bins is not None:
            self._add_over_processes(sync)
            return
        lows, highs = sync.gather(self.batch_min), sync.gather(self.batch_max)
        self.clear()
        for low, high in zip(lows, highs, strict=True):
            self._record(low, high)

    def _add_over_processes(self, sync: RangeSync) -> None:
        # The processes agree on the range, move their counts to its bins, and add them up.
        low, high = sync.united(self.hist_min, self.hist_max)
        total = torch.zeros_like(self.hist)
        torch.ops.rarefy.histogram_add(total, low, high, self.hist, self.hist_min, self.hist_max)
        sync.add(total)
        self.hist.copy_(total)
        self.hist_min.copy_(low)
        self.hist_max.copy_(high)

    def _ends(self, x: Tensor, axis: int | None, skipped: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.batch_min.shape[1]
        low, high = (self.batch_min.new_full((rows,), end) for end in (torch.inf, -torch.inf))
        unused = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)
        torch.ops.rarefy.observe(x.detach(), low, high, *unused, skipped, axis, None, 0, 255, False)
        return low, high

    def _record(self, low: Tensor, high: Tensor) -> None:
        torch.ops.rarefy.record_ranges(self.batch_min, self.batch_max, self.batches, low, high)

    def extra_repr(self) -> str:
        """The observer."""
        return str(self.observer)
