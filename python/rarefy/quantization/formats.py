"""What a fake quantizer does for schemes that are no plain grid of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rarefy._core.quantization import Codebook, PerChannel, PerTensor, Scheme
from rarefy.quantization import checkpoint

if TYPE_CHECKING:
    from rarefy.quantization.fake_quantizer import FakeQuantizer


class FormatPlan(NamedTuple):
    """A scheme as plain Python values, so that forward reads no bound object and torch.compile sees constants."""

    json: str  #: as torch.ops.rarefy.simulate takes it
    range_json: str  #: the same for ends [2, channels] or [2, 1] of the tensor, "" where no range is observed
    dynamic: bool
    where: tuple[int | None, list[int]]  #: axis and block
    entries: int  #: of a codebook; 0 for other formats
    stochastic: bool
    noise: bool


def plan_of(scheme: Scheme) -> FormatPlan:
    """What forward needs of a scheme."""
    return FormatPlan(
        scheme.to_json(),
        scheme.with_granularity(PerTensor() if scheme.axis is None else PerChannel(1)).to_json()
        if scheme.needs_range
        else "",
        scheme.dynamic,
        (scheme.block_axis, list(scheme.block)),
        scheme.format.entries if isinstance(scheme.format, Codebook) else 0,
        scheme.rounding == "stochastic",
        scheme.noise is not None,
    )


def register_buffers(quantizer: FakeQuantizer, plan: FormatPlan, seed: int) -> None:
    """The buffers that only some schemes have: ``codebook`` and ``draws``."""
    if plan.entries:
        shape = () if plan.where[0] is None else tuple(quantizer.scale.shape)
        quantizer.register_buffer("codebook", torch.zeros(*shape, plan.entries))
    if plan.stochastic:
        quantizer.register_buffer("draws", torch.tensor([seed, 0]))


@torch.no_grad()
def _observe_weight(quantizer: FakeQuantizer, weight: Tensor) -> None:
    plan, searches = quantizer.plan, quantizer._searches
    if searches and quantizer._was_searched(weight):
        return
    # As in the plain path: where reading values waits for no device and breaks no graph.
    on_host = not torch.compiler.is_compiling() and type(quantizer.skipped) is Tensor and weight.device.type == "cpu"
    if on_host and not bool(torch.isfinite(weight).all()):
        quantizer.skipped.fill_(1)
        quantizer._refuse_not_finite(weight)
    if plan.dynamic:
        return
    if plan.entries:
        if not quantizer._known_calibrated and not quantizer.calibrated:
            quantizer.codebook.copy_(torch.ops.rarefy.kmeans_codebook(weight, plan.entries, *plan.where))
    elif searches:
        _search(quantizer, weight)
        return
    else:
        scale, zero_point = torch.ops.rarefy.scheme_qparams(weight, plan.json)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)
    low, high = torch.ops.rarefy.block_range(weight, *plan.where)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_(high)


def _search(quantizer: FakeQuantizer, weight: Tensor) -> None:
    if quantizer._mse is not None:
        arguments: tuple[object, ...] = ("mse", [float(p) for p in quantizer._mse], quantizer.importance)
    else:
        assert quantizer._half_quadratic is not None
        arguments = ("half_quadratic", [float(p) for p in quantizer._half_quadratic])
    found = torch.ops.rarefy.search_scheme(weight.detach(), quantizer.plan.json, *arguments)
    for state, values in zip(
        (quantizer.scale, quantizer.zero_point, quantizer.min_val, quantizer.max_val), found, strict=True
    ):
        state.copy_(values)
    quantizer._note_searched(weight)


@torch.no_grad()
def derive_scale(quantizer: FakeQuantizer) -> None:
    """The scale of the range that the observer has by now; 1 while there is none."""
    ends = torch.stack([quantizer.min_val, quantizer.max_val])
    scale, zero_point = torch.ops.rarefy.scheme_qparams(ends, quantizer.plan.range_json)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)


def forward(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """``FakeQuantizer.forward`` for such a scheme."""
    plan, is_weight = quantizer.plan, quantizer._is_weight
    observes = quantizer.observe and (quantizer.training or not quantizer.quantize or is_weight)
    recomputing = not is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing()
    if observes and not recomputing and x.numel() > 0:
        if is_weight:
            _observe_weight(quantizer, x)
        elif not plan.dynamic:
            quantizer._observe_range(x)
            if quantizer.statistics is None:  # their range is chosen later
                derive_scale(quantizer)
        quantizer._note_observed()
    if not quantizer.quantize:
        return x
    if not plan.dynamic:
        quantizer._require_calibrated()
    seed = None
    if plan.stochastic:
        seed = quantizer.draws.clone()
        if quantizer.training:
            quantizer.draws[1] += 1
    scale = quantizer.codebook if plan.entries else quantizer.scale
    return torch.ops.rarefy.simulate(x, scale, quantizer.zero_point, plan.json, seed)
