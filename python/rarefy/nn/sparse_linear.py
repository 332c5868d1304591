"""A linear layer whose weight is mostly zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy import _core


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with a sparse W: x [..., in_features] to [..., out_features]. For inference, on the CPU.

    Made by ``rarefy.pruning.sparsify`` where it is faster, or by ``from_linear``. Buffers ``weight_values``,
    ``weight_columns`` and ``weight_row_offsets`` hold the weight (compressed sparse rows, of single weights or of blocks);
    ``bias`` stays the parameter that it was. ``load_state_dict`` takes a state with these, however many values they have, or
    with a dense ``weight``.
    """

    weight_values: Tensor
    weight_columns: Tensor
    weight_row_offsets: Tensor

    def __init__(self, weight: tuple[Tensor, Tensor, Tensor], in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        values, columns, row_offsets = weight
        self.in_features = in_features
        self.block = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
        self.out_features = (len(row_offsets) - 1) * self.block[0]
        self.register_buffer("weight_values", values)
        self.register_buffer("weight_columns", columns)
        self.register_buffer("weight_row_offsets", row_offsets)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block: tuple[int, int] = (1, 1)) -> SparseLinear:
        """The sparse twin of a linear layer, float32 or bfloat16 on the CPU.

        Args:
            linear: its zeros are left out; its bias is shared.
            block: height and width of the blocks that are kept whole; (1, 1) keeps single weights.

        Raises:
            TypeError: a weight of another type.
            ValueError: sizes that are not multiples of the block's.
        """
        sparse = cls(_core.pruning.to_sparse_weight(linear.weight, *block), linear.in_features, linear.bias)
        return sparse.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer again: the same weights (-0 is +0), the same bias object."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], made at every access."""
        return _core.pruning.to_dense_weight(
            self.weight_values, self.weight_columns, self.weight_row_offsets, self.in_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer on x; a backward pass raises NotImplementedError."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"[SparseLinear] input must have {self.in_features} features, got {list(x.shape)}")
        return torch.ops.rarefy.sparse_linear(
            x, self.weight_values, self.weight_columns, self.weight_row_offsets, self.bias
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        dense = state_dict.get(f"{prefix}weight")
        fits = dense is not None and dense.shape == (self.out_features, self.in_features)
        if fits and f"{prefix}weight_values" not in state_dict:
            parts = _core.pruning.to_sparse_weight(dense.to(self.weight_values.dtype), *self.block)
            names = ("weight_values", "weight_columns", "weight_row_offsets")
            state_dict.update({prefix + name: part for name, part in zip(names, parts, strict=True)})
            del state_dict[f"{prefix}weight"]
        values, columns, offsets = (
            state_dict.get(f"{prefix}weight_{part}") for part in ("values", "columns", "row_offsets")
        )
        # Another number of kept values is what another pruning gives; all else that differs is another layer.
        if (
            values is not None
            and columns is not None
            and offsets is not None
            and offsets.shape == self.weight_row_offsets.shape
            and values.shape[1:] == self.weight_values.shape[1:]
            and len(values) == len(columns) == int(offsets[-1])
        ):
            own = self.weight_values
            self.weight_values = torch.empty_like(values, dtype=own.dtype, device=own.device)
            self.weight_columns = torch.empty_like(columns, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Sizes."""
        height, width = self.block
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={self.weight_values.numel()}, "
            f"block={height}x{width}, bias={self.bias is not None}"
        )
