"""Fake quantizers: observe a range, round to the grid, in floating point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy._core.quantization import Latest, MinMax, MovingAverage, Scheme, averaging_constant

Observer = MinMax | MovingAverage | Latest


class FakeQuantizer(nn.Module):
    """Observes ranges and rounds to the grid, with the clipped straight-through gradient.

    Buffers, all of shape [1] or [channels]: ``scale`` (float32), ``zero_point`` (int32), ``min_val`` and ``max_val``
    (float32, +inf and -inf until something was observed). The same names and shapes as in C++.

    A weight (observer ``Latest``) is observed at every forward; an activation while training, and in calibration
    (``observe`` without ``quantize``) always.

    Args:
        scheme: the grid.
        observer: how the range follows the data.
        channels: number of channels for ``PerChannel``; ignored for ``PerTensor``.

    Raises:
        ValueError: channels < 1; in forward: nothing was observed yet, or the data is empty, NaN or infinite.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, scheme: Scheme, observer: Observer | None = None, channels: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"[FakeQuantizer] channels must be at least 1, got {channels}")
        self.scheme = scheme
        self.observer = MovingAverage() if observer is None else observer
        self.observe = True
        self.quantize = True
        # Plain Python values, so that forward reads no bound object and torch.compile sees constants.
        self.qmin, self.qmax, self.axis, self.dtype = scheme.qmin, scheme.qmax, scheme.axis, scheme.dtype
        self._symmetric = scheme.symmetric
        self._constant = averaging_constant(self.observer)
        self._always_observe = isinstance(self.observer, Latest)
        self._known_calibrated = False  # a host flag, so that forward reads no tensor back
        size = 1 if scheme.axis is None else channels
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("min_val", torch.full((size,), float("inf")))
        self.register_buffer("max_val", torch.full((size,), float("-inf")))

    @property
    def calibrated(self) -> bool:
        """True once something was observed."""
        return bool((self.min_val <= self.max_val).all())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid when ``quantize`` is set, ``x`` itself otherwise."""
        if self.observe and (self.training or not self.quantize or self._always_observe):
            state = (self.min_val, self.max_val, self.scale, self.zero_point)
            arguments = (self.axis, self._constant, self.qmin, self.qmax, self._symmetric)
            if self.quantize:
                x = torch.ops.rarefy.observe_fake_quantize(x, *state, *arguments)
            else:
                torch.ops.rarefy.observe(x.detach(), *state, *arguments)
            if not self._known_calibrated:
                self._known_calibrated = True
            return x
        if not self.quantize:
            return x
        if not self._known_calibrated:
            raise ValueError("[FakeQuantizer] must observe data before it quantizes: run a training step or calibrate")
        return torch.ops.rarefy.fake_quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def quantize_to_integer(self, x: Tensor) -> Tensor:
        """The integers of ``x``, int8 or uint8, with the parameters as they are."""
        return torch.ops.rarefy.quantize(x.detach(), self.scale, self.zero_point, self.axis, self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._known_calibrated = self.calibrated

    def extra_repr(self) -> str:
        """The grid, the observer and whether it has seen data."""
        state = "" if self.calibrated else ", not calibrated"
        return f"{self.scheme}, {self.observer}{state}"
