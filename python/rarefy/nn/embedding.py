"""Lookup tables of fake-quantized rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.nn._base import WeightedLayer
from rarefy.quantization.fake_quantizer import FakeQuantizer
from rarefy.quantization.qconfig import QConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class TableLayer(WeightedLayer):
    """A lookup table. Only the weight is quantized, per row where the configuration says per channel.

    Then only the rows that are looked up are rounded and observed, so that a step costs as much as its batch, not as the
    table. With a scheme that is not plain (groups, minifloats, codebooks) the whole table is rounded.
    """

    fuses_relu = False
    quantizes_output = False  # rows lie on their grids
    bias = None

    embedding_dim: int

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why a table cannot be quantized, or None."""
        if module.max_norm is not None:
            return "max_norm is not supported: it rewrites the weight in forward"
        return "sparse gradients are not supported" if module.sparse else None

    @classmethod
    def from_float(
        cls, module: nn.Module, config: QConfig, *, relu: bool = False, quantize_output: bool = False
    ) -> Self:
        """A quantized layer over the weight of ``module``."""
        layer = super().from_float(module, config, relu=relu, quantize_output=quantize_output)
        quantizer = layer.quant.weight
        assert quantizer is not None
        if not layer.weight.is_meta:
            # Rows that no batch reaches have a range from the start.
            with torch.no_grad():
                quantizer(layer.weight)
        return layer

    def _make_quantizers(self, config: QConfig) -> dict[str, FakeQuantizer]:
        return {"weight": self._weight_quantizer(config)}

    def _on_grid(self, rows: Tensor, indices: Tensor) -> Tensor:
        """The rows of the indices, each on its grid."""
        quantizer = self.quant.weight
        assert quantizer is not None
        if not quantizer.is_plain or quantizer.learning is not None or quantizer.plan.noise:
            table, _ = self._rounded()
            looked_up = F.embedding(indices, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
            return looked_up.view_as(rows)
        if not quantizer.quantize or rows.numel() == 0:
            return rows
        limits = (quantizer.qmin, quantizer.qmax)
        if quantizer.axis is None:
            if quantizer.observe:
                with torch.no_grad():
                    self._rounded()
            return torch.ops.rarefy.fake_quantize(rows, quantizer.scale, quantizer.zero_point, None, *limits)
        flat, index = rows.reshape(-1, self.embedding_dim), indices.reshape(-1)
        if quantizer.observe:
            with torch.no_grad():
                low, high = flat.detach().float().aminmax(dim=1)
                symmetric = quantizer.scheme.symmetric
                scale, zero_point = torch.ops.rarefy.choose_qparams(low, high, *limits, symmetric)
                for state, values in (
                    (quantizer.min_val, low),
                    (quantizer.max_val, high),
                    (quantizer.scale, scale),
                    (quantizer.zero_point, zero_point),
                ):
                    state[index] = values
        else:
            scale, zero_point = quantizer.scale[index], quantizer.zero_point[index]
        return torch.ops.rarefy.fake_quantize(flat, scale, zero_point, 0, *limits).view_as(rows)


class Embedding(TableLayer, nn.Embedding):
    """``torch.nn.Embedding`` in quantization-aware training: indices of any shape to [..., embedding_dim].

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.Embedding``, whose Parameter it keeps.
    """

    def forward(self, indices: Tensor) -> Tensor:
        """The rows of the indices, each on its grid."""
        return self._on_grid(nn.Embedding.forward(self, indices), indices)


class EmbeddingBag(TableLayer, nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` in quantization-aware training: sums, means or largest values of rows on their grids.

    Made by ``rarefy.quantization.prepare_qat`` and ``prepare`` from an ``nn.EmbeddingBag``, whose Parameter it keeps.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``: [bags, embedding_dim]."""
        rows = F.embedding(input.reshape(-1), self.weight, None, scale_grad_by_freq=self.scale_grad_by_freq)
        return reduce_bags(
            self._on_grid(rows, input), input, offsets, per_sample_weights, self.mode, self.include_last_offset,
            self.padding_idx,
        )  # fmt: skip


def reduce_bags(
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """The bags of rows that were looked up.

    Args:
        rows: [n, embedding_dim], one for each of the n indices.
        input, offsets, per_sample_weights: as ``nn.EmbeddingBag.forward`` takes them.
        mode, include_last_offset, padding_idx: of the layer.
    """
    return torch.ops.rarefy.reduce_bags(
        rows, input, offsets, per_sample_weights, mode, include_last_offset, padding_idx
    )
