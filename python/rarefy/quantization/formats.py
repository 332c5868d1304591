"""What a fake quantizer does for schemes that are no plain grid of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy._core.quantization import Codebook, Latest, PerTensor, Scheme
from rarefy.quantization import checkpoint

if TYPE_CHECKING:
    from rarefy.quantization.fake_quantizer import FakeQuantizer


def register_buffers(quantizer: FakeQuantizer, scheme: Scheme) -> None:
    """The buffers that only some schemes have: ``codebook`` and ``draws``."""
    if isinstance(scheme.format, Codebook):
        shape = () if scheme.block_axis is None else tuple(quantizer.scale.shape)
        quantizer.register_buffer("codebook", torch.zeros(*shape, scheme.format.entries))
    if scheme.rounding == "stochastic":
        quantizer.register_buffer("draws", torch.tensor([scheme.seed, 0]))


@torch.no_grad()
def _observe_weight(quantizer: FakeQuantizer, weight: Tensor) -> None:
    scheme = quantizer.scheme
    # As in the plain path: where reading values waits for no device and breaks no graph.
    on_host = not torch.compiler.is_compiling() and type(quantizer.skipped) is Tensor and weight.device.type == "cpu"
    if on_host and not bool(torch.isfinite(weight).all()):
        quantizer.skipped.fill_(1)
        quantizer._refuse_not_finite(weight)
    if scheme.dynamic:
        return
    where = (scheme.block_axis, scheme.block)
    if isinstance(scheme.format, Codebook):
        if not quantizer.calibrated:
            quantizer.codebook.copy_(torch.ops.rarefy.kmeans_codebook(weight, scheme.format.entries, *where))
    else:
        scale, zero_point = torch.ops.rarefy.scheme_qparams(weight, quantizer.scheme_json)
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)
    low, high = torch.ops.rarefy.block_range(weight, *where)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_(high)


@torch.no_grad()
def derive_scale(quantizer: FakeQuantizer) -> None:
    """The scale of the range that the observer has by now."""
    ends = torch.stack([quantizer.min_val, quantizer.max_val])
    scale, zero_point = torch.ops.rarefy.scheme_qparams(ends, quantizer.scheme.with_granularity(PerTensor()).to_json())
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)


def forward(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """``FakeQuantizer.forward`` for such a scheme."""
    is_weight = isinstance(quantizer.observer, Latest)
    observes = quantizer.observe and (quantizer.training or not quantizer.quantize or is_weight)
    recomputing = not is_weight and not torch.compiler.is_compiling() and checkpoint.is_recomputing()
    if observes and not recomputing and x.numel() > 0:
        if is_weight:
            _observe_weight(quantizer, x.detach())
        elif not quantizer.scheme.dynamic:
            quantizer._observe_range(x)
            derive_scale(quantizer)
        quantizer._note_observed()
    if not quantizer.quantize:
        return x
    quantizer._require_calibrated()
    seed = None
    if quantizer.scheme.rounding == "stochastic":
        seed = quantizer.draws.clone()
        if quantizer.training:
            quantizer.draws[1] += 1
    scale = quantizer.codebook if isinstance(quantizer.scheme.format, Codebook) else quantizer.scale
    return torch.ops.rarefy.simulate(x, scale, quantizer.zero_point, quantizer.scheme_json, seed)
