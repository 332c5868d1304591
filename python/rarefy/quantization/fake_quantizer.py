"""Fake quantizers: observe a range, round to the grid, in floating point."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rarefy._core.quantization import Integer, Latest, MinMax, MovingAverage, Scheme, averaging_constant
from rarefy.quantization import checkpoint, formats
from rarefy.quantization.distributed import RangeSync

Observer = MinMax | MovingAverage | Latest


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

    A weight (observer ``Latest``) is observed at every forward; an activation while training, and in calibration
    (``observe`` without ``quantize``) always, but not inside of a backward pass: such a forward recomputes activations
    (gradient checkpointing, see ``checkpoint_context``).

    Args:
        scheme: the grid.
        observer: how the range follows the data.
        channels: number of channels for ``PerChannel``; ignored for ``PerTensor``.
        shape: shape of the weight, from which those of scales per group or block and of codebooks follow; None for
            activations.

    Raises:
        ValueError: channels < 1; in forward: nothing was observed yet, the data is empty, or a weight is NaN or infinite
            (told on the CPU outside of compiled graphs; elsewhere it is counted in ``skipped``).
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor
    skipped: Tensor
    codebook: Tensor  # of codebooks alone
    draws: Tensor  # of stochastic rounding alone

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
        self.observe = True
        self.quantize = True
        self.name = ""  # "fc1.quant.input", say; for messages
        self.sync: RangeSync | None = None  # shares ranges between processes
        # Plain Python values, so that forward reads no bound object and torch.compile sees constants.
        self.qmin, self.qmax = scheme.observed_range  # of a format without integers: what its observer computes with
        self.axis, self.dtype = scheme.axis, scheme.dtype if isinstance(scheme.format, Integer) else None
        self.is_plain, self.plan = scheme.is_plain, formats.plan_of(scheme)
        self._symmetric = scheme.symmetric
        self._constant = averaging_constant(self.observer)
        self._is_weight = isinstance(self.observer, Latest)
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

    @property
    def calibrated(self) -> bool:
        """True once something was observed; always, where nothing has to be."""
        return self.plan.dynamic or bool((self.min_val <= self.max_val).all())

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.min_val, self.max_val, self.scale, self.zero_point, self.skipped

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid when ``quantize`` is set, ``x`` itself otherwise."""
        if not self.is_plain:
            return formats.forward(self, x)
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
        if not (self.observe and (self.training or not self.quantize or self._is_weight)):
            self._require_calibrated()
            return self.scale, self.zero_point
        if not self._is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing():
            tape = checkpoint.current_tape()
            return (self.scale, self.zero_point) if tape is None else tape.replay(self)
        arguments = (self.axis, self._constant, self.qmin, self.qmax, self._symmetric)
        seen = x.detach()
        if factor is not None:
            seen, arguments = self._scaled_ends(x, factor), (None if self.axis is None else 1, *arguments[1:])
        if self.sync is not None and not self._is_weight and self.sync.is_active():
            self.sync.observe(x, self._state, self.axis, self._constant, (self.qmin, self.qmax), self._symmetric)
        else:
            torch.ops.rarefy.observe(seen, *self._state, *arguments)
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
            self.sync.observe(x, self._state, self.axis, self._constant, (self.qmin, self.qmax), self._symmetric)
            if self.quantize:
                x = torch.ops.rarefy.fake_quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)
        else:
            arguments = (self.axis, self._constant, self.qmin, self.qmax, self._symmetric)
            if self.quantize:
                y = torch.ops.rarefy.observe_fake_quantize(x, *self._state, *arguments)
            else:
                torch.ops.rarefy.observe(x.detach(), *self._state, *arguments)
                y = x
            if self._is_weight:
                self._refuse_not_finite(x)
            x = y
        self._note_observed()
        return x

    def _observe_range(self, x: Tensor) -> None:
        """Takes the range of ``x`` in, of all processes."""
        if self.sync is not None and self.sync.is_active():
            self.sync.observe(x, self._state, self.axis, self._constant, (self.qmin, self.qmax), self._symmetric)
        else:
            arguments = (self.axis, self._constant, self.qmin, self.qmax, self._symmetric)
            torch.ops.rarefy.observe(x.detach(), *self._state, *arguments)

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
        return torch.ops.rarefy.quantize(x.detach(), self.scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._has_observed = self._known_calibrated = False  # found out when it matters
        if not self.scale.is_meta:
            self._has_observed = self._known_calibrated = self.calibrated
            self._told = bool(self.skipped.item())

    def extra_repr(self) -> str:
        """The grid, the observer and whether it has seen data."""
        state = "" if self.scale.is_meta or self.calibrated else ", not calibrated"
        return f"{self.scheme}, {self.observer}{state}"
