"""The largest of a window, of floats or of bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that takes bytes too: what ``rarefy.quantization.convert`` puts between integer layers.

    torch's own kernel refuses bytes of channels-last images with more than 127 pixels.
    """

    @classmethod
    def from_float(cls, module: nn.MaxPool2d) -> MaxPool2d:
        """The same windows."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The largest value of each window: [..., H, W] to [..., h, w]."""
        if x.dtype is not torch.uint8:
            return super().forward(x)
        if x.dim() == 3:  # one image without a batch dimension
            return self.forward(x.unsqueeze(0)).squeeze(0)
        windows = (_pair(size) for size in (self.kernel_size, self.stride, self.padding, self.dilation))
        return torch.ops.rarefy.max_pool2d_bytes(x, *windows, self.ceil_mode)
