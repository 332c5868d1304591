"""The integer arithmetic of docs/dev/numerics.md, written to be read: numpy int64, float32 where the rule says float32.

Everything here is slow and obvious. Kernels, converted layers and exported files are compared with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

INT32 = (-(2**31), 2**31 - 1)


def _per_channel(values: np.ndarray, dims: int, axis: int | None) -> np.ndarray:
    values = np.asarray(values).reshape(-1)
    return values.reshape([1] * dims) if axis is None else values.reshape([-1 if d == axis else 1 for d in range(dims)])


def quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, qmin: int, qmax: int, axis: int | None = None
) -> np.ndarray:
    """clamp(round_half_even(x / s) + z, qmin, qmax): x float32; s and z one value, or one per index of ``axis``."""
    s = _per_channel(np.asarray(scale, np.float32), x.ndim, axis)
    z = _per_channel(np.asarray(zero_point, np.int64), x.ndim, axis)
    rounded = np.rint(x.astype(np.float32) / s)
    # Far outside of every range already: so that the conversion to integers is defined.
    return np.clip(np.clip(rounded, -1e6, 1e6).astype(np.int64) + z, qmin, qmax)


def dequantize(
    q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None = None, dtype: type = np.float32
) -> np.ndarray:
    """(q - z) * s in ``dtype``."""
    s = _per_channel(np.asarray(scale, np.float32), q.ndim, axis).astype(dtype)
    z = _per_channel(np.asarray(zero_point, np.int64), q.ndim, axis)
    return (q - z).astype(dtype) * s


def to_unsigned(q: np.ndarray, zero_point: int) -> tuple[np.ndarray, int]:
    """int8 with zero point z as uint8 with zero point z + 128: the same grid."""
    return q + 128, zero_point + 128


def to_signed(q: np.ndarray, zero_point: int) -> tuple[np.ndarray, int]:
    """uint8 with zero point z as int8 with zero point z - 128: the same grid."""
    return q - 128, zero_point - 128


def _as_int32(sums: np.ndarray) -> np.ndarray:
    if sums.size and (sums.min() < INT32[0] or sums.max() > INT32[1]):
        raise OverflowError(f"sums must fit int32, got {sums.min()} to {sums.max()}")
    return sums


def linear(q_x: np.ndarray, z_x: int, q_w: np.ndarray, z_w: int = 0) -> np.ndarray:
    """sum_k (q_x[..., k] - z_x) * (q_w[o, k] - z_w): [..., in] and [out, in] to [..., out]."""
    return _as_int32((q_x.astype(np.int64) - z_x) @ (q_w.astype(np.int64) - z_w).T)


def conv(
    q_x: np.ndarray,
    z_x: int,
    q_w: np.ndarray,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> np.ndarray:
    """The same sum over a window: x [N, in, *sizes], w [out, in / groups, *kernel] to [N, out, *sizes].

    Padding has the value 0, which is the integer z_x.
    """
    kernel = q_w.shape[2:]
    padded = np.pad(q_x.astype(np.int64), [(0, 0), (0, 0), *[(p, p) for p in padding]], constant_values=z_x) - z_x
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    out_channels, in_channels = q_w.shape[0], q_w.shape[1]
    sums = np.zeros((len(q_x), out_channels, *sizes), np.int64)
    for o in range(out_channels):
        first = o // (out_channels // groups) * in_channels
        for c in range(in_channels):
            for position in itertools.product(*[range(k) for k in kernel]):
                window = tuple(
                    slice(k * d, k * d + s * (n - 1) + 1, s)
                    for k, d, s, n in zip(position, dilation, stride, sizes, strict=True)
                )
                sums[:, o] += padded[(slice(None), first + c, *window)] * int(q_w[(o, c, *position)])
    return _as_int32(sums)


def product_of_scales(s_x: np.ndarray, s_w: np.ndarray) -> np.ndarray:
    """s_x * s_w, rounded once to float32: one value, or one per output channel."""
    return (np.asarray(s_x, np.float32).reshape(-1) * np.asarray(s_w, np.float32).reshape(-1)).astype(np.float32)


def integer_bias(bias: np.ndarray, s_x: np.ndarray, s_w: np.ndarray) -> np.ndarray:
    """round_half_even(bias / (s_x * s_w)), int32: what files with integer biases hold. Never clipped."""
    q = np.rint(bias.astype(np.float32) / product_of_scales(s_x, s_w)).astype(np.float64)
    bad = np.flatnonzero((q < INT32[0]) | (q > INT32[1]) | ~np.isfinite(q))
    if bad.size:
        raise OverflowError(f"the bias of channel {bad[0]} must fit int32 in steps of s_x * s_w, got {q[bad[0]]:.0f}")
    return q.astype(np.int64)


def _channels(values: np.ndarray, sums: np.ndarray, axis: int) -> np.ndarray:
    return _per_channel(values, sums.ndim, axis % sums.ndim if np.size(values) > 1 else None)


def to_float(
    sums: np.ndarray, s_x: np.ndarray, s_w: np.ndarray, bias: np.ndarray | None, axis: int, dtype: type = np.float32
) -> np.ndarray:
    """y = s_x * s_w * sum + bias in ``dtype``, with the product of scales in float32; ``axis`` is that of channels."""
    y = sums.astype(dtype) * _channels(product_of_scales(s_x, s_w), sums, axis).astype(dtype)
    return y if bias is None else y + _per_channel(bias.astype(np.float32), sums.ndim, axis % sums.ndim).astype(dtype)


def add_bias(sums: np.ndarray, q_bias: np.ndarray, axis: int) -> np.ndarray:
    """sum + bias in int32, which must hold it."""
    return _as_int32(sums + _per_channel(q_bias, sums.ndim, axis % sums.ndim))


def requantize(
    sums: np.ndarray,
    s_x: np.ndarray,
    s_w: np.ndarray,
    s_y: float,
    z_y: int,
    qmin: int,
    qmax: int,
    axis: int,
    relu: bool = False,
) -> np.ndarray:
    """The sum on the grid of the result: round_half_even(s_x * s_w / s_y * sum) + z_y, one rounding, in float64.

    A ReLU is a lower bound of z_y.
    """
    factor = _channels(product_of_scales(s_x, s_w), sums, axis).astype(np.float64) / np.float64(np.float32(s_y))
    q = np.rint(sums * factor) + z_y
    return np.clip(q, max(qmin, z_y) if relu else qmin, qmax).astype(np.int64)
