"""Torch's encoder layers have a second forward, which computes with the weights of their layers and does not call them."""

from __future__ import annotations

from collections.abc import Container

from torch import nn


def leave_fast_path(model: nn.Module, swapped: Container[int]) -> None:
    """Make ``nn.TransformerEncoderLayer`` call its layers in evaluation too, where some of them are to be quantized.

    Args:
        model: any; changed in place.
        swapped: the identities of the layers that have been put in.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(child) in swapped for child in module.modules()):
            module.activation_relu_or_gelu = 0  # read for the choice of the path alone
        if isinstance(module, nn.TransformerEncoder) and any(id(child) in swapped for child in module.modules()):
            module.use_nested_tensor = False  # only the fast path takes them
