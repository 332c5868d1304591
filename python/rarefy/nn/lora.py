"""Linear layers with low-rank adapters over a frozen weight."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy._core.quantization import NF4, PerGroup, QuantizedTensorParts, Scheme

_BLOCK, _SCALE_BLOCK = 64, 256


class LoRALinear(nn.Module):
    """A linear layer whose weight is frozen, and adapters that train (Hu et al., 2021, arXiv:2106.09685):

        y = x W^T + bias + dropout(x) A^T B^T * (alpha / rank)

    Parameters ``lora_a`` [rank, in], from the distribution of torch's linear layers, and ``lora_b`` [out, rank], zeros, so
    that the layer begins as the one that it was made of; ``weight`` and ``bias`` without a gradient. A base in fewer bits
    has buffers in place of the weight: of "int8" ``weight`` (int8 [out, in]) and ``weight_scale`` (float32 [out]); of
    "nf4", 4-bit NormalFloat in blocks of 64 with double quantization as QLoRA keeps it (Dettmers et al., 2023,
    arXiv:2305.14314), ``weight_codes``, ``weight_scale_codes``, ``weight_scale_steps`` and ``weight_scale_mean``: about
    4.13 bits per value. The same names in C++.

    Args:
        linear: a base of "float" shares the memory of its weight; other bases are made of it.
        rank: of the adapters, in [1, min(in, out)].
        alpha: what the adapters' product is multiplied with is ``alpha / rank``; None: ``rank``.
        dropout: of the adapters' input while training, in [0, 1).
        base: how the frozen weight is kept.

    Raises:
        ValueError: a rank or dropout outside of its range, an unknown base, a weight that is not finite.
    """

    weight_scale: Tensor
    weight_codes: Tensor
    weight_scale_codes: Tensor
    weight_scale_steps: Tensor
    weight_scale_mean: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        base: Literal["float", "int8", "nf4"] = "float",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        most = min(self.in_features, self.out_features)
        if not 1 <= rank <= most:
            raise ValueError(f"[LoRALinear] rank must be within [1, {most}], got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"[LoRALinear] dropout must be within [0, 1), got {dropout}")
        if base not in ("float", "int8", "nf4"):
            raise ValueError(f"[LoRALinear] base must be 'float', 'int8' or 'nf4', got {base!r}")
        self.rank, self.alpha, self.dropout, self.base = rank, float(rank if alpha is None else alpha), dropout, base
        weight = linear.weight
        if base == "float":
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        elif base == "int8":
            values = weight.detach().float()
            low, high = values.aminmax(dim=1)
            scale, zero_point = torch.ops.rarefy.choose_qparams(low, high, -127, 127, True)
            self.register_buffer("weight", torch.ops.rarefy.quantize(values, scale, zero_point, 0, -127, 127))
            self.register_buffer("weight_scale", scale)
        else:
            packed = torch.ops.rarefy.pack_nf4(weight.detach(), _BLOCK, _SCALE_BLOCK)
            for name, tensor in zip(("codes", "scale_codes", "scale_steps", "scale_mean"), packed, strict=True):
                self.register_buffer(f"weight_{name}", tensor)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_a = nn.Parameter(weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, math.sqrt(5))
        self._merged: Tensor | None = None
        self.train(linear.training)

    @property
    def scaling(self) -> float:
        """What the adapters' product is multiplied with."""
        return self.alpha / self.rank

    @property
    def is_merged(self) -> bool:
        """Whether the layer computes with one product."""
        return self._merged is not None

    def base_weight(self) -> Tensor:
        """The frozen weight as numbers: of its own type, or float32."""
        if self.base == "float":
            return self.weight
        if self.base == "int8":
            return self.weight.float() * self.weight_scale.unsqueeze(1)
        parts = (self.weight_codes, self.weight_scale_codes, self.weight_scale_steps, self.weight_scale_mean)
        return torch.ops.rarefy.unpack_nf4(*parts, self.in_features, _BLOCK, _SCALE_BLOCK, torch.float32)

    def stored_base(self) -> QuantizedTensorParts:
        """The frozen weight of a base in NF4, as ``rarefy.quantization.quantize_to`` stores it.

        Raises:
            ValueError: another base.
        """
        if self.base != "nf4":
            raise ValueError(f"[LoRALinear] the base must be 'nf4' to be stored so, got {self.base!r}")
        scheme = Scheme(format=NF4(True, _SCALE_BLOCK), granularity=PerGroup(_BLOCK, 1))
        shape = [self.out_features, self.in_features]
        bytes_of_rows = self.weight_codes.reshape(self.out_features, -1).cpu()
        codes = torch.stack([bytes_of_rows & 15, bytes_of_rows >> 4], -1).flatten(1)[:, : self.in_features].flatten()
        if codes.numel() % 2:
            codes = F.pad(codes, (0, 1))
        tensors = {
            "data": codes[::2] | codes[1::2] << 4,
            "scale": self.weight_scale_codes.cpu().reshape(scheme.scale_shape(shape)),
            "scale_scale": self.weight_scale_steps.cpu().reshape(-1),
            "scale_mean": self.weight_scale_mean.cpu().reshape(1),
        }
        return QuantizedTensorParts(scheme, shape, torch.float32, tensors)

    def delta(self) -> Tensor:
        """What the adapters add to the weight."""
        return (self.lora_b @ self.lora_a) * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with one product of ``base_weight() + delta()`` from here on.

        The adapters must not change meanwhile. The state is that of the base and the adapters still.
        """
        self._merged = (self.base_weight() + self.delta()).detach()

    def unmerge(self) -> None:
        """Back to the base and the adapters, which ``merge`` has not touched: exactly as before."""
        self._merged = None

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with ``base_weight() + delta()``."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.lora_a.device, self.lora_a.dtype
        )
        linear.weight.copy_(self.base_weight() + self.delta())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged = fn(self._merged)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        if self._merged is not None:
            return F.linear(x, self._merged.to(x.dtype), self.bias)
        y = F.linear(x, self.base_weight().to(x.dtype), self.bias)
        return (
            y + F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a), self.lora_b) * self.scaling
        )

    def extra_repr(self) -> str:
        """Sizes and how the base is kept."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha:g}, base={self.base}"


def add_lora(
    model: nn.Module,
    targets: Sequence[str] = ("*",),
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    base: Literal["float", "int8", "nf4"] = "float",
    inplace: bool = False,
) -> nn.Module:
    """A model whose linear layers have adapters, and in which nothing but the adapters trains.

    Args:
        model: any.
        targets: name patterns (``*`` and ``?``, matched against the whole dotted name) of the linear layers to adapt.
        rank, alpha, dropout, base: as of ``LoRALinear``.
        inplace: swap in ``model`` itself.

    Raises:
        ValueError: a pattern that matches no ``nn.Linear``, or ``model`` is a linear layer itself; what ``LoRALinear`` refuses.
            The model is then as it was.
    """
    if type(model) is nn.Linear:
        raise ValueError("[add_lora] model must contain its layers, got a single Linear; wrap it in nn.Sequential")
    if not inplace:
        model = copy.deepcopy(model)
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    for pattern in targets:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"[add_lora] target {pattern!r} must match a linear layer, but matches none of: "
                             f"{', '.join(linears) or '(no such layer)'}")  # fmt: skip
    chosen = {n: m for n, m in linears.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in targets)}
    made = {id(m): LoRALinear(m, rank, alpha, dropout, base) for m in chosen.values()}
    model.requires_grad_(False)
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return model


def merge_lora(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with plain linear layers in place of those with adapters, of weights in floating point.

    Raises:
        ValueError: the model has no layer with adapters.
    """
    if not inplace:
        model = copy.deepcopy(model)
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)]
    if not layers or not layers[0][0]:
        raise ValueError("[merge_lora] the model must contain layers with adapters; call add_lora first")
    merged = {id(module): module.merged() for _, module in layers}
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, merged[id(module)])
    return model
