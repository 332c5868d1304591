"""ReLU that saves one bit per element for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rectify(x: Tensor) -> Tensor:
    """max(x, 0); where a gradient will flow, the sign is saved instead of the result."""
    if x.requires_grad and torch.is_grad_enabled():
        return torch.ops.rarefy.relu(x)
    return torch.relu(x)


def mark_rectified(x: Tensor) -> Tensor:
    """``x``, which a fused layer has just made without negative values, marked so that a ``ReLU`` after it does nothing.

    The mark holds for this tensor object until it is written to. Compiled graphs go without: they see no objects.
    """
    if not torch.compiler.is_compiling() and not x.is_inference():
        x._rarefy_rectified = x._version
    return x


def _is_rectified(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.is_inference():
        return False
    return getattr(x, "_rarefy_rectified", None) == x._version


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` with the same values and gradients, in place where that one is.

    Saves one bit per element for the backward pass. A result of a layer that has this ReLU fused comes back as it is.
    """

    @classmethod
    def from_float(cls, module: nn.ReLU) -> ReLU:
        """The same activation."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        if _is_rectified(x):
            return x
        if not self.inplace:
            return rectify(x)
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            torch.ops.rarefy.relu_(x)
            return x
        return F.relu(x, inplace=True)
