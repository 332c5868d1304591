"""What a model is quantized to."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from rarefy._core.quantization import (
    MX,
    NF4,
    NVFP4,
    Minifloat,
    PerChannel,
    PerGroup,
    PerToken,
    Scheme,
    TargetProfile,
    target_profile,
    validate_layer_config,
    why_not_integer,
)
from rarefy.quantization.fake_quantizer import Observer


@dataclass(frozen=True)
class QConfig:
    """What a model is quantized to: a default, and overrides by name, type or function.

    Attributes:
        weight: format of weights; None leaves everything in floating point. Integers per tensor or per output channel (axis 0)
            are symmetric and signed: integer kernels have no weight zero point.
        activation: format of the inputs of quantized layers, per tensor or dynamic; None quantizes weights only.
        observer: how activation ranges follow the data. None: ``MovingAverage(0.01)`` in ``prepare_qat``, ``MinMax()``
            in ``prepare``. Or a learned grid: ``LSQ()``, ``LSQPlus()``, ``PACT()``, ``TQT()`` or ``LearnedBits()``.
        weight_observer: how a weight's range is found: ``Latest()`` (the default: its own range), ``MSE()`` or
            ``HalfQuadratic()``. Or a learned grid: ``LSQ()``, ``TQT()`` or ``LearnedBits()``.
        overrides: from a name pattern (``*`` and ``?``, matched against the whole dotted name) or a module type to a
            ``QConfig``, or to None, which keeps the layer in FP32. A name counts before a type, and of several the last.
            Or a function ``(name, module)`` that gives the same, and ``NotImplemented`` where the default holds.
        first_last_fp32: keep the first and the last layer with a weight in FP32: in the order of the example run where
            there is one, of the modules otherwise. An override that matches one of them counts before this.
        execution: "integer" computes the forward pass on int8 kernels, "simulated" in floating point on values that lie on
            the grid; None is "integer" where the schemes allow it.
        gradient_dtype: type that gradients are computed in: ``torch.float32`` or ``torch.bfloat16``.
        target: runtime that the model is for: "onnxruntime", "openvino", "tensorrt" or "qnn". ``prepare`` and
            ``prepare_qat`` then refuse what it does not execute, and place quantizers as it wants them. None: none is
            chosen yet. Of overrides, None or the same.

    Raises:
        ValueError: a scheme that no layer can execute, an unknown execution, gradient_dtype or target, or an override for
            another target.
        TypeError: overrides are neither a mapping nor a function.
    """

    weight: Scheme | None = None
    activation: Scheme | None = None
    observer: Observer | None = None
    weight_observer: Observer | None = None
    overrides: Mapping[str | type[nn.Module], QConfig | None] | Callable[[str, nn.Module], object] = field(
        default_factory=dict
    )
    first_last_fp32: bool = False
    execution: Literal["integer", "simulated"] | None = None
    gradient_dtype: torch.dtype = torch.float32
    target: str | None = None

    def __post_init__(self) -> None:
        validate_layer_config(self.weight, self.activation, self.observer, self.weight_observer, self.gradient_dtype)
        if self.execution not in (None, "integer", "simulated"):
            raise ValueError(f"[QConfig] execution must be 'integer', 'simulated' or None, got {self.execution!r}")
        if not isinstance(self.overrides, Mapping) and not callable(self.overrides):
            raise TypeError(
                f"[QConfig] overrides must be a mapping or a function of name and module, got "
                f"{type(self.overrides).__name__}"
            )
        if self.target is not None:
            target_profile(self.target)
        if isinstance(self.overrides, Mapping):
            for key, value in self.overrides.items():
                self._check_target(str(key), value)

    def _check_target(self, key: str, value: object) -> None:
        if isinstance(value, QConfig) and value.target not in (None, self.target):
            raise ValueError(
                f"[QConfig] an override must be for the same target ({self.target!r}), got {value.target!r} for {key}"
            )

    @classmethod
    def int8(cls, *, target: str | None = None, reduce_range: bool = False, **changes: object) -> QConfig:
        """8 bits on both sides: what ONNX Runtime and oneDNN execute fastest on x86.

        int8 symmetric per output channel [-127, 127] for weights, uint8 asymmetric per tensor for activations; int8
        symmetric activations for a target without zero points ("tensorrt").

        Args:
            target: runtime that the model is for, as in the class.
            reduce_range: weights of 7 bits, [-63, 63], whose products processors without VNNI instructions add without
                overflow.
            **changes: replace fields.
        """
        symmetric = target is not None and not target_profile(target).zero_points
        fields: dict[str, object] = {
            "weight": Scheme(
                bits=7 if reduce_range else 8, symmetric=True, narrow_range=True, granularity=PerChannel(axis=0)
            ),
            "activation": Scheme(bits=8, symmetric=symmetric),
            "target": target,
        }
        return cls(**{**fields, **changes})  # type: ignore[arg-type]

    @classmethod
    def int8_dynamic(cls, **changes: object) -> QConfig:
        """8 bits on both sides, activations with a scale per token from the very tensor: no calibration. Simulated."""
        activation = Scheme(bits=8, symmetric=True, granularity=PerToken())
        return replace(cls.int8(), **{"activation": activation, **changes})  # type: ignore[arg-type]

    @classmethod
    def int4_weight_only(cls, group_size: int = 128, **changes: object) -> QConfig:
        """int4 weights in groups along the input features; activations stay in floating point. Packed after ``convert``."""
        return cls(**{"weight": Scheme(bits=4, granularity=PerGroup(group_size, axis=1)), **changes})  # type: ignore[arg-type]

    @classmethod
    def fp8(cls, **changes: object) -> QConfig:
        """E4M3 on both sides: weights per output channel, activations per tensor with an observed range. Simulated."""
        weight = Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0))
        return cls(**{"weight": weight, "activation": Scheme(format=Minifloat.e4m3()), **changes})  # type: ignore[arg-type]

    @classmethod
    def mxfp8(cls, **changes: object) -> QConfig:
        """MX blocks of 32 with E4M3 elements on both sides: no calibration. Simulated."""
        element = MX("e4m3")
        weight = Scheme(format=element, granularity=PerGroup(32, axis=1))
        return cls(**{"weight": weight, "activation": Scheme(format=element), **changes})  # type: ignore[arg-type]

    @classmethod
    def nvfp4(cls, **changes: object) -> QConfig:
        """NVFP4 on both sides, FP4 in blocks of 16: no calibration. Simulated."""
        weight = Scheme(format=NVFP4(), granularity=PerGroup(16, axis=1))
        return cls(**{"weight": weight, "activation": Scheme(format=NVFP4()), **changes})  # type: ignore[arg-type]

    @classmethod
    def nf4(cls, double_quantized: bool = True, **changes: object) -> QConfig:
        """NF4 weights in blocks of 64; activations stay in floating point. Packed after ``convert``.

        Args:
            double_quantized: the scales of the blocks are stored in 8 bits.
            **changes: replace fields.
        """
        weight = Scheme(format=NF4(double_quantized), granularity=PerGroup(64, axis=1))
        return cls(**{"weight": weight, **changes})  # type: ignore[arg-type]

    @property
    def profile(self) -> TargetProfile | None:
        """What the target executes, and where it wants quantizers; None when no target is chosen."""
        return None if self.target is None else target_profile(self.target)

    def why_not_integer(self) -> str | None:
        """Why a layer with these schemes cannot compute in integers while it trains; None when it can."""
        return why_not_integer(self.weight, self.activation, self.observer, self.weight_observer)

    def with_observer(self, observer: Observer) -> QConfig:
        """The same for one layer, with an observer where none was chosen."""
        return self if self.observer is not None else replace(self, observer=observer)

    def override(self, name: str, module: nn.Module) -> tuple[object, str] | None:
        """What the overrides say of the layer ``name``, and which one says it; None when they say nothing."""
        if not isinstance(self.overrides, Mapping):
            value = self.overrides(name, module)
            if value is NotImplemented:
                return None
            if value is not None and not isinstance(value, QConfig):
                raise TypeError(
                    f"[QConfig] overrides must give a QConfig, None or NotImplemented, got {type(value).__name__} for {name}"
                )
            self._check_target(name, value)
            return value, getattr(self.overrides, "__name__", "function")
        found: tuple[object, str] | None = None
        for key, value in self.overrides.items():
            if not isinstance(key, str) and isinstance(module, key):
                found = (value, key.__name__)
        for key, value in self.overrides.items():
            if isinstance(key, str) and fnmatch.fnmatchcase(name, key):
                found = (value, repr(key))
        return found

    def resolve(self, name: str, module: nn.Module) -> tuple[QConfig | None, str]:
        """The configuration of the layer ``name`` and, when it is None, why."""
        found = self.override(name, module)
        if found is None:
            return (self, "") if self.weight is not None else (None, "the configuration has no weight scheme")
        value, shown = found
        if not isinstance(value, QConfig) or value.weight is None:
            return None, f"kept in FP32 by the override {shown}"
        return value, ""
