"""Packed masks for tests: made and read bit by bit, and put on models without a pruner."""

import numpy as np
import torch
from torch import Tensor, nn


def pack(kept: np.ndarray) -> Tensor:
    """The packed mask of booleans in logical order."""
    flat = np.ascontiguousarray(kept).reshape(-1)
    bits = np.zeros(-(-flat.size // 64) * 64, dtype=np.uint8)
    bits[: flat.size] = flat
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The booleans of a packed mask; its padding must be zero."""
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    elements = int(np.prod(shape))
    assert not bits[elements:].any()
    return torch.from_numpy(bits[:elements].astype(bool).reshape(shape))


def put_masks(model: nn.Module, kept: float = 0.4, seed: int = 0, min_dim: int = 2, apply: bool = True) -> None:
    """Random masks for the parameters of 2 or more dimensions, applied to the values."""
    random = np.random.default_rng(seed)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() >= min_dim and name + "_mask_bits" not in module._buffers:
                keep = random.random(tuple(parameter.shape)) < kept
                module.register_buffer(name + "_mask_bits", pack(keep))
                if apply:
                    with torch.no_grad():
                        parameter[torch.from_numpy(~keep)] = 0.0


def masks_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters with masks, and what the masks keep."""
    found = {}
    for path, module in model.named_modules():
        for key, mask in module._buffers.items():
            if key.endswith("_mask_bits"):
                name = key.removesuffix("_mask_bits")
                parameter = module._parameters[name]
                full = f"{path}.{name}" if path else name
                found[full] = parameter, unpack(mask.cpu(), tuple(parameter.shape))
    return found


def stray(model: nn.Module) -> int:
    """How many pruned values are not zero."""
    return sum(int((p.detach().cpu()[~kept] != 0).sum()) for p, kept in masks_of(model).values())
