"""What a model is quantized to."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from rarefy._core.quantization import PerChannel, Scheme, validate_layer_config
from rarefy.quantization.fake_quantizer import Observer


@dataclass(frozen=True)
class QConfig:
    """What a model is quantized to: a default, and overrides by name or type.

    Attributes:
        weight: grid of weights; None leaves everything in floating point. Symmetric and signed, per tensor or per
            output channel (axis 0): integer kernels have no weight zero point.
        activation: grid of the inputs of quantized layers, per tensor; None quantizes weights only.
        observer: how activation ranges follow the data. None: ``MovingAverage(0.01)`` in ``prepare_qat``, ``MinMax()``
            in ``prepare``.
        overrides: from a name pattern (``*`` and ``?``, matched against the whole dotted name) or a module type to a
            ``QConfig``, or to None, which keeps the layer in FP32. A name counts before a type, and of several the last.

    Raises:
        ValueError: a scheme that no layer can execute.
    """

    weight: Scheme | None = None
    activation: Scheme | None = None
    observer: Observer | None = None
    overrides: Mapping[str | type[nn.Module], QConfig | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_layer_config(self.weight, self.activation, self.observer)

    @classmethod
    def int8(cls, **changes: object) -> QConfig:
        """8 bits on both sides: what ONNX Runtime and oneDNN execute fastest on x86.

        int8 symmetric per output channel [-127, 127] for weights, uint8 asymmetric per tensor for activations.
        Keyword arguments replace fields.
        """
        fields: dict[str, object] = {
            "weight": Scheme(bits=8, symmetric=True, narrow_range=True, granularity=PerChannel(axis=0)),
            "activation": Scheme(bits=8, symmetric=False),
        }
        return cls(**{**fields, **changes})  # type: ignore[arg-type]

    def resolve(self, name: str, module: nn.Module) -> tuple[QConfig | None, str]:
        """The configuration of the layer ``name`` and, when it is None, why."""
        found: tuple[str | type[nn.Module], QConfig | None] | None = None
        for key, value in self.overrides.items():
            if not isinstance(key, str) and isinstance(module, key):
                found = (key, value)
        for key, value in self.overrides.items():
            if isinstance(key, str) and fnmatch.fnmatchcase(name, key):
                found = (key, value)
        if found is None:
            return (self, "") if self.weight is not None else (None, "the configuration has no weight scheme")
        key, value = found
        if value is None or value.weight is None:
            shown = repr(key) if isinstance(key, str) else key.__name__
            return None, f"kept in FP32 by the override {shown}"
        return value, ""
