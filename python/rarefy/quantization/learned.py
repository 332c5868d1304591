"""What a fake quantizer does whose grid is learned: LSQ, LSQ+, PACT, TQT, a learned bit width."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rarefy._core.quantization import (
    LSQ,
    PACT,
    TQT,
    Latest,
    LearnedBits,
    LSQPlus,
    MinMax,
    PerChannel,
    PerTensor,
    Scheme,
    check_learned_scheme,
    learned_kind,
    learned_names,
)
from rarefy.quantization import checkpoint

if TYPE_CHECKING:
    from rarefy.quantization.distributed import RangeSync
    from rarefy.quantization.fake_quantizer import FakeQuantizer, Observer

Learned = LSQ | LSQPlus | PACT | TQT | LearnedBits


class LearnedPlan(NamedTuple):
    """A learned grid as plain Python values, so that forward reads no bound object and torch.compile sees constants."""

    kind: str  #: as torch.ops.rarefy.learned_fake_quantize takes it
    names: tuple[str, ...]  #: of the parameters, in the order in which it takes them
    gradient_scale: float | None
    limits: tuple[int, int, bool]  #: qmin, qmax and symmetric, of the greatest width
    bits: tuple[int, int] | None  #: least and greatest width, where it is learned
    from_zero: bool  #: the grid begins at 0


def plan_of(observer: Observer, scheme: Scheme, is_weight: bool) -> LearnedPlan | None:
    """What forward needs of a learned grid; None for an observer of ranges.

    Raises:
        ValueError: the scheme is none that the learned grid can have.
    """
    kind = learned_kind(observer)
    if not kind:
        return None
    check_learned_scheme(observer, scheme, is_weight)
    bits = (observer.lowest, scheme.bits) if isinstance(observer, LearnedBits) else None
    return LearnedPlan(
        kind,
        tuple(learned_names(kind)),
        observer.gradient_scale if isinstance(observer, (LSQ, LSQPlus)) else None,
        (scheme.qmin, scheme.qmax, scheme.symmetric),
        bits,
        kind == "pact" or (kind == "bits" and not scheme.symmetric),
    )


def register_parameters(quantizer: FakeQuantizer, plan: LearnedPlan) -> None:
    """The parameters, for a grid of scale 1 until it starts from data; ``scale`` may be one of them."""
    qmin, qmax, symmetric = plan.limits
    levels = qmax + (-(qmin + qmax) // 2) if symmetric else qmax - qmin
    high = torch.full_like(quantizer.scale, levels)
    low = -high if symmetric else torch.zeros_like(high)
    *values, zero_point = torch.ops.rarefy.learned_start(low, high, plan.kind, *plan.limits)
    for name, value in zip(plan.names, values, strict=True):
        if name in quantizer._buffers:
            del quantizer._buffers[name]
        quantizer.register_parameter(name, nn.Parameter(value.clone()))
    quantizer.zero_point.copy_(zero_point)


def parameters_of(quantizer: FakeQuantizer, plan: LearnedPlan) -> list[Tensor]:
    """The parameters in the order of ``plan.names``."""
    return [quantizer._parameters[name] for name in plan.names]  # type: ignore[misc]


def _reads_values(quantizer: FakeQuantizer) -> bool:
    """Whether values can be looked at here: not in a graph, not where there are none."""
    return not torch.compiler.is_compiling() and type(quantizer.skipped) is Tensor and not quantizer.skipped.is_meta


def forward(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """``FakeQuantizer.forward`` for a learned grid."""
    plan, is_weight = quantizer.learning, quantizer._is_weight
    assert plan is not None
    if not quantizer.quantize:
        recomputing = not is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing()
        if quantizer.observe and not recomputing:
            _start(quantizer, plan, x)
        return x
    if not quantizer._known_calibrated and not (torch.compiler.is_compiling() and quantizer._has_observed):
        if _reads_values(quantizer) and quantizer.calibrated:
            quantizer._known_calibrated = True
        elif quantizer.observe and (quantizer.training or is_weight):
            _start(quantizer, plan, x)
        else:
            quantizer._require_calibrated()
    if plan.bits is not None and quantizer.training:
        with torch.no_grad():
            quantizer.bits.clamp_(*plan.bits)
    return torch.ops.rarefy.learned_fake_quantize(
        x,
        parameters_of(quantizer, plan),
        quantizer.zero_point,
        plan.kind,
        plan.gradient_scale,
        is_weight,
        quantizer.axis,
        *plan.limits,
    )


@torch.no_grad()
def _start(quantizer: FakeQuantizer, plan: LearnedPlan, x: Tensor) -> None:
    """Start from a batch, or from the mean of the ranges of all batches so far. One that is not finite is left out."""
    if x.numel() == 0:
        return
    seen = x.detach()
    arguments = (plan.kind, quantizer.axis, *plan.limits)
    finite = torch.isfinite(seen.float()).all()
    sync = quantizer.sync
    shared = sync is not None and not quantizer._is_weight and quantizer.quantize and sync.is_active()
    if not _reads_values(quantizer):
        # A graph decides by values, on the device: it starts once, and a later one goes without this part.
        low, high = torch.ops.rarefy.learned_range(torch.nan_to_num(seen, 0.0, 0.0, 0.0), *arguments)
        if shared:
            assert sync is not None
            low, high = (torch.where(finite, end, torch.inf) for end in (low, high))
            low, high = mean_range(sync, low, high, every=True)
            finite = torch.isfinite(low).all()
            low, high = (torch.where(finite, end, 0.0) for end in (low, high))
        takes = finite & (quantizer.min_val > quantizer.max_val).all()
        *values, zero_point = torch.ops.rarefy.learned_start(low, high, plan.kind, *plan.limits)
        targets = [*parameters_of(quantizer, plan), quantizer.zero_point, quantizer.min_val, quantizer.max_val]
        for target, value in zip(targets, [*values, zero_point, low, high], strict=True):
            target.copy_(torch.where(takes, value, target))
        quantizer.skipped.add_(~finite)
        quantizer._has_observed = True
        return
    low, high = torch.full_like(quantizer.min_val, torch.inf), torch.full_like(quantizer.max_val, -torch.inf)
    if bool(finite):
        low, high = torch.ops.rarefy.learned_range(seen, *arguments)
    if shared:
        assert sync is not None
        low, high = mean_range(sync, low, high, every=True)
    if not bool((low <= high).all()):
        quantizer.skipped.add_(1)
        if quantizer._is_weight:
            quantizer._refuse_not_finite(x)
        if not quantizer._told:
            quantizer._tell_skipped()
        return
    if plan.from_zero and float(low.min()) < 0.0:
        raise ValueError(
            f"[{quantizer.observer}] {quantizer.name or 'the quantizer'} must have values that are not negative, as after a "
            f"ReLU (LSQPlus has an offset), got {float(low.min())}"
        )
    quantizer._batches += 1
    if quantizer._batches > 1:
        low = quantizer.min_val + (low - quantizer.min_val) / quantizer._batches
        high = quantizer.max_val + (high - quantizer.max_val) / quantizer._batches
    start_from(quantizer, plan, low, high)
    quantizer._has_observed = True
    if quantizer.quantize:
        quantizer._known_calibrated = True


@torch.no_grad()
def start_from(quantizer: FakeQuantizer, plan: LearnedPlan, low: Tensor, high: Tensor) -> None:
    """Make the range and the parameters those that the range [low, high] gives."""
    *values, zero_point = torch.ops.rarefy.learned_start(low, high, plan.kind, *plan.limits)
    for parameter, value in zip(parameters_of(quantizer, plan), values, strict=True):
        parameter.copy_(value)
    quantizer.zero_point.copy_(zero_point)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_(high)
    settle(quantizer, plan)


def mean_range(sync: RangeSync, low: Tensor, high: Tensor, *, every: bool) -> tuple[Tensor, Tensor]:
    """The mean of the processes' ranges; (inf, -inf) when none has one, or, with ``every``, when one has none."""
    rows = torch.stack(sync.gather(torch.cat([low, high])))
    fine = torch.isfinite(rows).all(1)
    count = fine.sum()
    known = (count == len(rows)) if every else (count > 0)
    mean = torch.where(fine.unsqueeze(1), rows, 0.0).sum(0) / count.clamp_min(1)
    low, high = mean.chunk(2)
    return torch.where(known, low, torch.inf), torch.where(known, high, -torch.inf)


@torch.no_grad()
def merge(quantizer: FakeQuantizer, plan: LearnedPlan, sync: RangeSync) -> None:
    """Start from the mean of what the processes have started from."""
    low, high = mean_range(sync, quantizer.min_val, quantizer.max_val, every=False)
    if bool((low <= high).all()):
        start_from(quantizer, plan, low, high)
    count = quantizer.skipped.float()
    sync.max(count)
    quantizer.skipped.copy_(count)


@torch.no_grad()
def settle(quantizer: FakeQuantizer, plan: LearnedPlan) -> None:
    """Scale, zero point and, where the width is learned, the scheme of the parameters as they are."""
    if not _reads_values(quantizer):
        return
    if plan.bits is not None:
        quantizer.bits.clamp_(*plan.bits)
    scale, zero_point = torch.ops.rarefy.learned_qparams(
        parameters_of(quantizer, plan), quantizer.zero_point, plan.kind, *plan.limits
    )
    # A backward pass that is still to come may have saved the parameter: it is written to only where it must be.
    if not torch.equal(quantizer.scale, scale):
        quantizer.scale.copy_(scale)
    if not torch.equal(quantizer.zero_point, zero_point):
        quantizer.zero_point.copy_(zero_point)
    if plan.bits is not None:
        symmetric = plan.limits[2]
        quantizer.scheme = Scheme(
            bits=round(float(quantizer.bits)),
            symmetric=symmetric,
            signed=symmetric,
            narrow_range=symmetric,
            granularity=PerTensor() if quantizer.axis is None else PerChannel(quantizer.axis),
        )
        quantizer.qmin, quantizer.qmax = quantizer.scheme.qmin, quantizer.scheme.qmax


@torch.no_grad()
def freeze(quantizer: FakeQuantizer, plan: LearnedPlan) -> None:
    """Make the grid a constant: ``scale`` and ``zero_point`` are buffers, and the other parameters gone."""
    settle(quantizer, plan)
    scale = quantizer.scale.detach().clone()
    for name in plan.names:
        del quantizer._parameters[name]
    quantizer.register_buffer("scale", scale)
    quantizer.min_val.copy_((quantizer.qmin - quantizer.zero_point) * scale)
    quantizer.max_val.copy_((quantizer.qmax - quantizer.zero_point) * scale)
    quantizer.observer = Latest() if quantizer._is_weight else MinMax()
    quantizer.learning = None
