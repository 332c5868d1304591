"""Which layers a configuration quantizes, and what ``strict`` demands of the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from rarefy._core.quantization import TargetProfile
from rarefy.quantization.flow import Flow
from rarefy.quantization.qconfig import QConfig


def unmatched_overrides(config: QConfig, layers: Mapping[str, nn.Module]) -> list[str]:
    """The overrides, as messages show them, that match none of the layers. A function always matches."""
    if not isinstance(config.overrides, Mapping):
        return []
    missing = []
    for key in config.overrides:
        if isinstance(key, str):
            if not any(fnmatch.fnmatchcase(name, key) for name in layers):
                missing.append(repr(key))
        elif not any(isinstance(module, key) for module in layers.values()):
            missing.append(key.__name__)
    return missing


def output_projections(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The output projections of floating-point attentions, each with the name of its attention, which computes with it: it
    has the configuration of the attention where no override names it, and stays in floating point where that does."""
    owners = (name for name, module in layers.items() if isinstance(module, nn.MultiheadAttention))
    projections = {f"{owner}.out_proj": owner for owner in owners}
    return {name: owner for name, owner in projections.items() if name in layers}


def first_and_last(config: QConfig, weighted: Mapping[str, nn.Module], flow: Flow | None) -> dict[str, str]:
    """The layers that ``first_last_fp32`` keeps, with the reason. ``weighted``: candidates in module order."""
    if not config.first_last_fp32:
        return {}
    names = list(weighted)
    if flow is not None:
        names = [e.module for e in flow.events if e.module in weighted] or names
    kept = {}
    for name, place in ((names[-1], "last"), (names[0], "first")) if names else ():
        if config.override(name, weighted[name]) is None:
            kept[name] = f"kept in FP32 as the {place} layer (first_last_fp32)"
    return kept


def check_strict(function: str, unmatched: Iterable[str], layers: Iterable[str], left: Mapping[str, str]) -> None:
    """Raise when an override matched nothing, or a layer is left in FP32 that nobody excluded.

    Args:
        function: for the message.
        unmatched: of ``unmatched_overrides``.
        layers: names that overrides could have matched.
        left: layers that cannot be quantized and were not excluded, with the reason.
    """
    for shown in unmatched:
        raise ValueError(
            f"[{function}] override {shown} must match a layer that can be quantized, but matches none of: "
            f"{', '.join(layers) or '(no such layer)'}"
        )
    if left:
        listed = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        raise ValueError(
            f"[{function}] every layer must be quantized or excluded by an override to None (or strict=False), but these "
            f"are not: {listed}"
        )


def for_target(function: str, name: str, kind: str, config: QConfig, profile: TargetProfile) -> QConfig:
    """The configuration of a layer of the target: with one scale for the weight where it knows none per channel.

    Raises:
        ValueError: the target does not execute the layer's schemes.
    """
    reason = profile.why_not(config.weight, config.activation, kind)
    if reason is not None:
        raise ValueError(f"[{function}] layer {name} must have schemes that the target executes, but {reason}")
    assert config.weight is not None
    return replace(config, weight=profile.adapt(config.weight, kind), target=profile.name)


def check_execution(function: str, name: str, config: QConfig) -> None:
    """Raise when a layer shall execute in integers and its schemes do not allow it."""
    reason = config.why_not_integer()
    if config.execution == "integer" and reason is not None:
        raise ValueError(f"[{function}] layer {name} cannot execute in integers: {reason}")
