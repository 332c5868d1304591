"""Fake quantizers: observe a range, round to the grid, in floating point."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy._core.quantization import (
    MSE,
    SQNR,
    HalfQuadratic,
    Histogram,
    Integer,
    Latest,
    MeanNoOutliers,
    MinMax,
    MovingAverage,
    Percentile,
    Scheme,
    averaging_constant,
    follows_latest,
    why_not_observed,
)
from rarefy.quantization import checkpoint, formats, learned
from rarefy.quantization.distributed import RangeSync
from rarefy.quantization.observed_once import ObservedOnce
from rarefy.quantization.range_statistics import RangeStatistics, keeps_statistics

Observer = (
    MinMax
    | MovingAverage
    | Latest
    | Histogram
    | Percentile
    | SQNR
    | MeanNoOutliers
    | MSE
    | HalfQuadratic
    | learned.Learned
)


class FakeQuantizer(nn.Module):
    """Observes ranges and rounds to the grid, with the clipped straight-through gradient.

    Buffers of shape [1] or [channels]: ``scale`` (float32), ``zero_point`` (int32), ``min_val`` and ``max_val``
    (float32, +inf and -inf until something was observed). ``skipped`` (int64 [1]) counts the batches that held a NaN or an
    infinity: their range is left out, and they are rounded to the grid so far (that of [0, 0], scale 1, while there is
    none). The same names and shapes as in C++.

    A scheme that is not plain (``Scheme.is_plain``) is simulated: its ``scale``, ``zero_point``, ``min_val`` and ``max_val``
    have the shape of ``scheme.scale_shape(shape)`` for a weight; with a dynamic scheme they stay as they are and nothing is
    observed. A codebook is a buffer ``codebook``, made by k-means at the first forward and kept; stochastic rounding has
    the buffer ``draws`` (int64 [2]: seed, number of forwards).

    Observers that choose their range from statistics (``Histogram``, ``Percentile``, ``SQNR``, ``MeanNoOutliers``) keep these
    in the module ``statistics``, which is None for the others. The range is chosen at the first use after something was
    observed: once, at the end of a calibration; at every step of training. Schemes that are not plain can have every observer
    that finds scales for them; what cannot be is refused by name.

    A scheme with noise (``Noise``) has it while the module is in training mode and ``quantize`` is set.

    A learned grid (``LSQ``, ``LSQPlus``, ``PACT``, ``TQT``, ``LearnedBits``) has parameters: ``scale``; ``scale`` and
    ``offset``; ``alpha``; ``log2_threshold``; ``bits`` and ``bound``. Its ``min_val`` and ``max_val`` are the range that
    training began with. It starts from the first batch that is rounded in training, from all batches of a
    calibration (the mean of their ranges), or from the weight, and is the same in all processes. From then on
    ``observe`` does not matter: a parameter that does not require a gradient is frozen. A sign that a step of the
    optimizer gives to a scale, alpha or bound does not count.

    A weight (observer ``Latest``, ``MSE`` or ``HalfQuadratic``, or a learned grid with a ``shape``) is observed at every
    forward; an activation while training, and in calibration (``observe`` without ``quantize``) always, but not inside of a
    backward pass: such a forward recomputes activations (gradient checkpointing, see ``checkpoint_context``).

    Args:
        scheme: the grid.
        observer: how the range follows the data.
        channels: number of channels for ``PerChannel``; ignored for ``PerTensor``.
        shape: shape of the weight, from which those of scales per group or block and of codebooks follow; None for
            activations.

    Attributes:
        importance: how much an element's error counts to ``MSE``: of a shape that broadcasts to the weight's, not negative;
            None for 1. Mean squared inputs, say. No buffer.

    Raises:
        ValueError: channels < 1, or an observer that does not serve the scheme; in forward: nothing was observed yet, the
            data is empty, or a weight is NaN or infinite (told on the CPU outside of compiled graphs; elsewhere it is counted
            in ``skipped``).
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor
    skipped: Tensor
    codebook: Tensor  # of codebooks alone
    draws: Tensor  # of stochastic rounding alone
    offset: nn.Parameter  # of LSQPlus
    alpha: nn.Parameter  # of PACT
    log2_threshold: nn.Parameter  # of TQT
    bits: nn.Parameter  # of LearnedBits
    bound: nn.Parameter  # of LearnedBits

    def __init__(
        self,
        scheme: Scheme,
        observer: Observer | None = None,
        channels: int = 1,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"[FakeQuantizer] channels must be at least 1, got {channels}")
        self.scheme = scheme
        self.observer = MovingAverage() if observer is None else observer
        is_weight = follows_latest(self.observer) or shape is not None
        self.learning = learned.plan_of(self.observer, scheme, is_weight)
        refused = why_not_observed(scheme, self.observer)
        if refused is not None:
            raise ValueError(f"[FakeQuantizer] {self.observer} does not serve {scheme}: {refused}")
        self.observe = True
        self.quantize = True
        self.name = ""  # "fc1.quant.input", say; for messages
        self.sync: RangeSync | None = None  # shares ranges between processes
        self.observed_once: ObservedOnce | None = None  # while a calibration runs
        # Plain Python values, so that forward reads no bound object and torch.compile sees constants.
        self.qmin, self.qmax = scheme.observed_range  # of a format without integers: what its observer computes with
        self.axis, self.dtype = scheme.axis, scheme.dtype if isinstance(scheme.format, Integer) else None
        self.is_plain, self.plan = scheme.is_plain, formats.plan_of(scheme)
        self._symmetric = scheme.symmetric
        self._constant = averaging_constant(self.observer)
        self._is_weight = is_weight if self.learning is not None else follows_latest(self.observer)
        self._batches = 0  # whose mean range a learned grid has started from
        self._searches = isinstance(self.observer, (MSE, HalfQuadratic))
        self._mse, self._half_quadratic = _search_arguments(self.observer)
        self.importance: Tensor | None = None
        # What a weight's range was searched on, so that a search is made once for the same values.
        self._searched: tuple[weakref.ref[Tensor], int] | None = None
        self._pending = False  # observed since the range was last chosen
        # Host flags, so that forward reads no tensor back: has observed something, maybe not finite; surely calibrated;
        # has warned of a skipped batch.
        self._has_observed = False
        self._known_calibrated = False
        self._told = False
        size = [1 if scheme.axis is None else channels]
        if scheme.block and not scheme.dynamic and shape is not None:
            size = scheme.scale_shape(list(shape))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("min_val", torch.full(size, float("inf")))
        self.register_buffer("max_val", torch.full(size, float("-inf")))
        self.register_buffer("skipped", torch.zeros(1, dtype=torch.int64))
        formats.register_buffers(self, self.plan, scheme.seed)
        if self.learning is not None:
            learned.register_parameters(self, self.learning)
        self.statistics = RangeStatistics(self.observer, size[0]) if keeps_statistics(self.observer) else None

    @property
    def is_weight(self) -> bool:
        """Whether it belongs to a weight: the observer follows the latest tensor, or it is learned for a tensor of a shape."""
        return self._is_weight

    @property
    def calibrated(self) -> bool:
        """True once something was observed; always, where nothing has to be."""
        self.settle()
        return self.plan.dynamic or bool((self.min_val <= self.max_val).all())

    def settle(self) -> None:
        """Choose the range from the statistics, where something was observed since that was last done; make scale and zero
        point those of a learned grid's parameters."""
        if self.learning is not None:
            learned.settle(self, self.learning)
        if self._pending:
            self._choose()
            self._pending = False

    @torch.no_grad()
    def _choose(self) -> None:
        assert self.statistics is not None
        if self.is_plain:
            self._take(*self.statistics.choose(self.qmin, self.qmax, self._symmetric))
        else:
            self._take(*self.statistics.choose_for(self.plan.json))

    def _take(self, low: Tensor, high: Tensor) -> None:
        # Ends that are not finite leave the range as it is.
        counted_already = torch.zeros_like(self.skipped)
        arguments = (None if self.axis is None else 1, 1.0, self.qmin, self.qmax, self._symmetric)
        torch.ops.rarefy.observe(torch.stack([low, high]), *self._state[:4], counted_already, *arguments)
        if not self.is_plain:
            formats.derive_scale(self)

    @torch.no_grad()
    def take_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Take over ``min_val``, ``max_val``, ``skipped`` and statistics by name, and choose the range."""
        self.skipped.copy_(values["skipped"])
        if self.learning is not None:
            low, high = (values[name].to(self.scale.device) for name in ("min_val", "max_val"))
            learned.start_from(self, self.learning, low, high)
            self._has_observed, self._batches = True, 1
            return
        self._take(values["min_val"].to(self.scale.device), values["max_val"].to(self.scale.device))
        if self.statistics is not None:
            for name, tensor in self.statistics.named_buffers():
                tensor.copy_(values[name])
            self._pending = True
        self._has_observed = self._known_calibrated = self.calibrated

    def drop_statistics(self) -> None:
        """Forget the statistics and keep the range: the observer becomes ``MinMax``, or ``Latest`` where it follows the latest
        tensor; the scheme loses its noise. What conversion does."""
        self.settle()
        if self.learning is not None:
            learned.freeze(self, self.learning)
        elif self.statistics is not None:
            self.statistics, self.observer = None, MinMax()
        elif self._is_weight:
            self.observer = Latest()
        self._searches, self._searched, self.importance = False, None, None
        self._constant = averaging_constant(self.observer)
        self.scheme = self.scheme.with_noise(None)
        self.plan = formats.plan_of(self.scheme)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.min_val, self.max_val, self.scale, self.zero_point, self.skipped

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid when ``quantize`` is set, with the scheme's noise in training; ``x`` itself otherwise."""
        rounded = self._round(x)
        if self.plan.noise and self.training and self.quantize:
            return torch.ops.rarefy.quantization_noise(x, rounded, self.scale, self.plan.json)
        return rounded

    def _round(self, x: Tensor) -> Tensor:
        if not self.is_plain:
            return formats.forward(self, x)
        if self.learning is not None:
            return learned.forward(self, x)
        if self.observe and (self.training or not self.quantize or self._is_weight):
            return self._observe(x)
        if not self.quantize:
            return x
        self._require_calibrated()
        return torch.ops.rarefy.fake_quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def grid(self, x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scale and zero point with which ``forward`` would round ``x``, after observing it where that is due.

        Args:
            x: as in ``forward``. Nothing is rounded here: integer execution does that itself.
            factor: what is observed is ``x * factor``, one value per index of axis 0 (a batch normalization's factor).

        Raises:
            ValueError: as ``forward``.
        """
        if self.learning is not None:
            raise ValueError(
                f"[FakeQuantizer] {self.name or 'the quantizer'} must have an observer of ranges to compute in integers, got "
                f"{self.observer}"
            )
        if not (self.observe and (self.training or not self.quantize or self._is_weight)):
            self._require_calibrated()
            return self.scale, self.zero_point
        if not self._is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing():
            tape = checkpoint.current_tape()
            return (self.scale, self.zero_point) if tape is None else tape.replay(self)
        seen, axis = x.detach(), self.axis
        if factor is not None and self._searches:  # a search needs the values
            seen = seen * factor.detach().reshape(-1, *[1] * (x.dim() - 1))
        elif factor is not None:
            seen, axis = self._scaled_ends(x, factor), None if self.axis is None else 1
        if self.sync is not None and not self._is_weight and self.sync.is_active():
            self._observe_over_processes(x)
        else:
            self._observe_alone(x if factor is None else seen, axis)
            if self._is_weight:
                self._refuse_not_finite(x)
        self._note_observed()
        return self.scale, self.zero_point

    @torch.no_grad()
    def _scaled_ends(self, x: Tensor, factor: Tensor) -> Tensor:
        """The ends of each channel's range of ``x * factor``, [2, channels]. Rounding is monotonic: no product is needed
        but theirs."""
        low, high = (x.new_full((x.shape[0],), end, dtype=torch.float32) for end in (torch.inf, -torch.inf))
        unused = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)
        limits = (self.qmin, self.qmax, self._symmetric)
        torch.ops.rarefy.observe(x.detach(), low, high, *unused, torch.zeros_like(self.skipped), 0, None, *limits)
        return torch.stack([low * factor.detach(), high * factor.detach()])

    def _require_calibrated(self) -> None:
        self.settle()
        if not self._known_calibrated:
            # Reads the range back once. A graph cannot: there, that something was observed must do.
            ready = self._has_observed if torch.compiler.is_compiling() else self.calibrated
            if not ready:
                raise ValueError(
                    f"[FakeQuantizer] {self.name or 'the quantizer'} must observe data before it quantizes: run a training "
                    f"step or calibrate"
                )
            self._known_calibrated = True

    def _observe(self, x: Tensor) -> Tensor:
        if not self._is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing():
            return self._recompute(x, checkpoint.current_tape())
        if self.sync is not None and not self._is_weight and self.sync.is_active():
            self._observe_over_processes(x)
            if self.quantize:
                x = torch.ops.rarefy.fake_quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)
        else:
            if self.quantize and self.statistics is None and not self._searches:
                arguments = (self.axis, self._constant, self.qmin, self.qmax, self._symmetric)
                y = torch.ops.rarefy.observe_fake_quantize(x, *self._state, *arguments)
            else:
                self._observe_alone(x, self.axis)
                y = x
                if self.quantize:
                    y = torch.ops.rarefy.fake_quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)
            if self._is_weight:
                self._refuse_not_finite(x)
            x = y
        self._note_observed()
        return x

    def _observe_range(self, x: Tensor) -> None:
        """Takes the range of ``x`` in, of all processes."""
        if self.sync is not None and self.sync.is_active():
            self._observe_over_processes(x)
        else:
            self._observe_alone(x, self.axis)

    def _observe_alone(self, x: Tensor, axis: int | None) -> None:
        once = None if torch.compiler.is_compiling() else self.observed_once  # it tells tensors by identity
        if once is not None and once.take_over(self, x):
            return
        if self.statistics is not None:
            self.statistics.observe(x, axis, self.skipped)
            self._chosen_after_observing()
        elif self._searches:
            self._search(x, axis)
        else:
            arguments = (axis, self._constant, self.qmin, self.qmax, self._symmetric)
            torch.ops.rarefy.observe(x.detach(), *self._state, *arguments)
        if once is not None:
            once.observed(self, x)

    def _observe_over_processes(self, x: Tensor) -> None:
        assert self.sync is not None
        if self.statistics is None:
            self.sync.observe(x, self._state, self.axis, self._constant, (self.qmin, self.qmax), self._symmetric)
        else:
            with torch.no_grad():
                self.statistics.observe_over_processes(x, self.axis, self.skipped, self.sync)
            self._chosen_after_observing()

    def _chosen_after_observing(self) -> None:
        # While it quantizes, the batch is rounded with what it has added to.
        if self.quantize:
            self._choose()
        elif not self._pending:
            self._pending = True

    def _was_searched(self, weight: Tensor) -> bool:
        """Whether the range is that of a search on this tensor as it is."""
        if self._searched is None or torch.compiler.is_compiling() or weight.is_inference():
            return False
        last, version = self._searched
        return last() is weight and version == weight._version

    def _note_searched(self, weight: Tensor) -> None:
        if not torch.compiler.is_compiling() and not weight.is_inference():
            self._searched = weakref.ref(weight), weight._version

    @torch.no_grad()
    def _search(self, weight: Tensor, axis: int | None) -> None:
        if self._was_searched(weight):
            return
        x, limits = weight.detach(), (self.qmin, self.qmax, self._symmetric)
        # The range first: it finds and counts values that are not finite.
        before = self._skipped_on_host()
        torch.ops.rarefy.observe(x, *self._state, axis, 1.0, *limits)
        if self._skipped_on_host() != before:
            return
        if self._mse is not None:
            self._take(*torch.ops.rarefy.mse_range(x, axis, *limits, *self._mse, self.importance))
        else:
            scale, zero_point = torch.ops.rarefy.half_quadratic_qparams(x, axis, *limits, *self._half_quadratic)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
            self.min_val.copy_((self.qmin - zero_point) * scale)
            self.max_val.copy_((self.qmax - zero_point) * scale)
        self._note_searched(weight)

    def _note_observed(self) -> None:
        if not self._has_observed:
            self._has_observed = True
        if not self._told:
            self._tell_skipped()
        if not self._is_weight and not torch.compiler.is_compiling():
            tape = checkpoint.current_tape()
            if tape is not None:
                tape.record(self)

    def _recompute(self, x: Tensor, tape: checkpoint.Tape | None) -> Tensor:
        """What the forward pass gave: the batch was observed there."""
        if not self.quantize:
            return x
        scale, zero_point = (self.scale, self.zero_point) if tape is None else tape.replay(self)
        return torch.ops.rarefy.fake_quantize(x, scale, zero_point, self.axis, self.qmin, self.qmax)

    def _skipped_on_host(self) -> int:
        """The count where reading it waits for no device and breaks no graph; 0 elsewhere."""
        if torch.compiler.is_compiling() or type(self.skipped) is not Tensor or self.skipped.device.type != "cpu":
            return 0
        return int(self.skipped)

    def _tell_skipped(self) -> None:
        if self._skipped_on_host():
            self._told = True
            warnings.warn(
                f"[FakeQuantizer] {self.name or 'a quantizer'} met a batch with NaN or infinite values and leaves such "
                f"batches out of its range; report() and the buffer 'skipped' count them",
                stacklevel=4,
            )

    def _refuse_not_finite(self, weight: Tensor) -> None:
        if self._skipped_on_host():
            self.skipped.zero_()
            bad = weight.numel() - int(torch.isfinite(weight.detach().float()).sum())
            raise ValueError(
                f"[FakeQuantizer] the weight of {self.name or 'a layer'} must be finite, got {bad} NaN or infinite values "
                f"of {weight.numel()}"
            )

    def quantize_to_integer(self, x: Tensor) -> Tensor:
        """The integers of ``x``, int8 or uint8, with the parameters as they are."""
        self.settle()
        return torch.ops.rarefy.quantize(x.detach(), self.scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._has_observed = self._known_calibrated = False  # found out when it matters
        self._searched = None
        if not self.scale.is_meta:
            # A checkpoint of a calibration that had not come to its end has statistics and no range. They are loaded next.
            has_range = bool((self.min_val <= self.max_val).all())
            self._pending = self.statistics is not None and not has_range
            self._known_calibrated = has_range
            self._has_observed = has_range or self._pending
            self._batches = int(has_range)
            self._told = bool(self.skipped.item())

    def extra_repr(self) -> str:
        """The grid, the observer and whether it has seen data."""
        state = "" if self.scale.is_meta or self.calibrated else ", not calibrated"
        return f"{self.scheme}, {self.observer}{state}"

    def __getstate__(self) -> dict[str, object]:
        # Of tensors of this process, and of this quantizer's own.
        return {**self.__dict__, "_searched": None, "observed_once": None}


def _search_arguments(
    observer: Observer,
) -> tuple[tuple[float, int, int] | None, tuple[float, float, float, int] | None]:
    """What ``mse_range`` and ``half_quadratic_qparams`` take, as plain values."""
    if isinstance(observer, MSE):
        return (observer.norm, observer.steps, observer.bins), None
    if isinstance(observer, HalfQuadratic):
        return None, (observer.norm, observer.beta, observer.kappa, observer.iterations)
    return None, None
