"""Layers for the tests of integer execution: random inputs with their grids, and the float64 answer to each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import integer_reference
import numpy as np
import reference
import torch
import torch.nn.functional as F

ops = torch.ops.rarefy
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def straight_through(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None, limits):
    """fake_quantize by the formula in reference.py, as float64 with the stated gradient in the float64 leaf ``x``."""
    rounded, inside = reference.fake_quantize(x.detach().float(), scale, zero_point, axis, *limits)
    return rounded.double() + torch.where(inside, x - x.detach(), 0.0)


@dataclass
class Layer:
    """The arguments of integer_linear or, where there is a geometry, of integer_conv."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    x_limits: tuple[int, int]
    w_limits: tuple[int, int]
    x_scale: torch.Tensor
    x_zero_point: torch.Tensor
    w_scale: torch.Tensor
    transposed: bool = False
    geometry: tuple[list[int], list[int], list[int], int] | None = None  # stride, padding, dilation, groups
    multiplier: torch.Tensor | None = None
    relu: bool = False
    bf16: bool = False
    dtype: torch.dtype | None = None
    w_zero_point: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.w_zero_point = torch.zeros(self.w_scale.shape, dtype=torch.int32)

    @property
    def grids(self) -> tuple[object, ...]:
        return (
            *(self.x_scale, self.x_zero_point, *self.x_limits),
            *(self.w_scale, self.w_zero_point, *self.w_limits),
        )

    @property
    def arguments(self) -> tuple[object, ...]:
        if self.geometry is None:
            return self.x, self.weight, self.bias, *self.grids, self.transposed, self.relu, self.bf16, self.dtype
        own = (self.x, self.weight, self.multiplier, self.bias)
        return *own, *self.grids, *self.geometry, self.relu, self.bf16, self.dtype

    @property
    def op(self):
        return (ops.integer_linear if self.geometry is None else ops.integer_conv).default

    def run(self) -> torch.Tensor:
        return self.op(*self.arguments)

    def to(self, **changes: object) -> Layer:
        return replace(self, **changes)

    def leaves(self) -> dict[str, torch.Tensor]:
        tensors = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def requiring(self, *names: str) -> Layer:
        """The same with new leaves, of which these require a gradient."""
        return self.to(**{k: v.detach().clone().requires_grad_(k in names) for k, v in self.leaves().items()})

    @property
    def _w_axis(self) -> int | None:
        return None if self.w_scale.numel() == 1 else 1 if self.transposed else 0

    def _per_filter(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1, *[1] * (self.weight.dim() - 1))

    def integers(self) -> tuple[np.ndarray, np.ndarray]:
        """The exact sums (int64), and what they are multiplied by (float32)."""
        w = self.weight.float() if self.multiplier is None else self.weight.float() * self._per_filter(self.multiplier)
        q_x = reference.quantize(self.x.float(), self.x_scale, self.x_zero_point, None, *self.x_limits).numpy()
        q_w = reference.quantize(w, self.w_scale, self.w_zero_point, self._w_axis, *self.w_limits).numpy()
        s_w = self.w_scale if self.multiplier is None else self.w_scale / self.multiplier
        scale = integer_reference.product_of_scales(self.x_scale.numpy(), s_w.detach().numpy())
        if self.geometry is None:
            return integer_reference.linear(q_x, int(self.x_zero_point), q_w.T if self.transposed else q_w), scale
        stride, padding, dilation, groups = self.geometry
        return integer_reference.conv(q_x, int(self.x_zero_point), q_w, stride, padding, dilation, groups), scale

    def expected(self, dtype: type = np.float64) -> torch.Tensor:
        """The formula of docs/dev/numerics.md, its last steps in ``dtype``."""
        sums, scale = self.integers()
        channels = [1] * sums.ndim
        channels[-1 if self.geometry is None else 1] = -1
        y = sums.astype(dtype) * scale.astype(dtype).reshape(channels if scale.size > 1 else [1] * sums.ndim)
        if self.bias is not None:
            y = y + self.bias.detach().float().numpy().astype(dtype).reshape(channels)
        y = torch.from_numpy(y)
        return y.relu() if self.relu else y

    def tolerance(self) -> torch.Tensor:
        """Two units in the last place of each of the terms that y is the sum of."""
        plain = self.to(bias=None, relu=False).expected().abs()
        if self.bias is not None:
            shape = [1] * plain.dim()
            shape[-1 if self.geometry is None else 1] = -1
            plain = plain + self.bias.detach().double().abs().reshape(shape)
        return plain * 2.0**-22

    def simulated_gradients(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """By autograd, in float64, through fake quantization; the ReLU decides by the exact result."""
        leaf = {name: tensor.detach().double().requires_grad_() for name, tensor in self.leaves().items()}
        x = straight_through(leaf["x"], self.x_scale, self.x_zero_point, None, self.x_limits)
        w = leaf["weight"]
        if self.multiplier is not None:
            product = w * self._per_filter(self.multiplier.double())
            # The product is rounded to float32 before it is quantized.
            exact = self.weight.detach().float() * self._per_filter(self.multiplier.float())
            w = straight_through(product + (exact.double() - product).detach(), *self._w_grid)
            w = w / self._per_filter(self.multiplier.double())
        else:
            w = straight_through(w, *self._w_grid)
        bias = leaf.get("bias")
        if self.geometry is None:
            y = F.linear(x, w.t() if self.transposed else w, bias)
        else:
            stride, padding, dilation, groups = self.geometry
            y = CONVOLVE[w.dim() - 2](x, w, bias, stride, padding, dilation, groups)
        if self.relu:
            grad = grad * (self.expected() > 0)
        return dict(zip(leaf, torch.autograd.grad(y, list(leaf.values()), grad.double()), strict=True))

    @property
    def _w_grid(self) -> tuple[object, ...]:
        return self.w_scale, self.w_zero_point, self._w_axis, self.w_limits


def _grid(x: torch.Tensor, limits: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid that clamps a few of the values."""
    qmin, qmax = limits
    ends = (0.8 * x.min().clamp(max=0).item(), 0.8 * x.max().clamp(min=0).item()) if x.numel() else (-1.0, 1.0)
    scale = max((ends[1] - ends[0]) / (qmax - qmin), 1e-3)
    zero_point = min(max(round(qmin - ends[0] / scale), qmin), qmax)
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def _w_scale(weight: torch.Tensor, limits: tuple[int, int], axis: int | None) -> torch.Tensor:
    others = [d for d in range(weight.dim()) if d != axis]
    largest = weight.abs().amax(dim=others if axis is not None else None).reshape(-1)
    return (0.9 * largest / limits[1]).clamp(min=2.0**-60).float()


def linear(
    leading: tuple[int, ...] = (5,),
    features: tuple[int, int] = (7, 6),
    x_limits: tuple[int, int] = (0, 255),
    w_limits: tuple[int, int] = (-127, 127),
    *,
    per_channel: bool = True,
    bias: bool = True,
    seed: int = 0,
    **options: object,
) -> Layer:
    """A linear layer [*leading, in] to [*leading, out]; features is (in, out)."""
    g = generator(seed)
    inputs, outputs = features
    transposed = bool(options.get("transposed"))
    x = torch.randn(*leading, inputs, generator=g) + 0.2
    weight = torch.randn(*((inputs, outputs) if transposed else (outputs, inputs)), generator=g) / math.sqrt(inputs)
    own_bias = torch.randn(outputs, generator=g) if bias else None
    axis = (1 if transposed else 0) if per_channel else None
    return Layer(
        x, weight, own_bias, x_limits, w_limits, *_grid(x, x_limits, seed), _w_scale(weight, w_limits, axis), **options
    )


def conv(
    size: tuple[int, ...] = (3, 4, 9, 7),
    out: int = 6,
    kernel: tuple[int, ...] = (3, 3),
    stride: int | list[int] = 1,
    padding: int | list[int] = 0,
    dilation: int = 1,
    groups: int = 1,
    x_limits: tuple[int, int] = (0, 255),
    w_limits: tuple[int, int] = (-127, 127),
    *,
    per_channel: bool = True,
    bias: bool = True,
    multiplied: bool = False,
    channels_last: bool = False,
    seed: int = 0,
    **options: object,
) -> Layer:
    """A convolution of an input of this size, [N, C, spatial...]."""
    g = generator(seed)
    dims = len(kernel)
    x = torch.randn(*size, generator=g) + 0.2
    if channels_last and dims > 1:
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    weight = torch.randn(out, size[1] // groups, *kernel, generator=g)
    weight = weight / math.sqrt(weight[0].numel())
    multiplier = None
    if multiplied:  # of both signs, one of them small
        multiplier = torch.rand(out, generator=g) + 0.5
        multiplier[::2] *= -1
        multiplier[-1] = 0.01
    quantized = weight if multiplier is None else weight * multiplier.reshape(-1, *[1] * (dims + 1))
    scale = _w_scale(quantized, w_limits, 0 if per_channel else None)
    stride, padding = (v if isinstance(v, list) else [v] * dims for v in (stride, padding))
    geometry = (stride, padding, [dilation] * dims, groups)
    own_bias = torch.randn(out, generator=g) if bias else None
    grid = _grid(x, x_limits, seed)
    return Layer(
        *(x, weight, own_bias, x_limits, w_limits, *grid, scale),
        geometry=geometry, multiplier=multiplier, **options,
    )  # fmt: skip
