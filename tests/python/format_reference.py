"""What formats must compute, in plain loops over numbers: no vector operation decides anything here."""

import math

import numpy as np
import torch

#: exponent bits, mantissa bits, bias, specials
MINIFLOATS = {
    "e4m3": (4, 3, 7, "nan"),
    "e5m2": (5, 2, 15, "ieee"),
    "e3m2": (3, 2, 3, "none"),
    "e2m3": (2, 3, 1, "none"),
    "e2m1": (2, 1, 1, "none"),
}

NORMAL_FLOAT = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def values_of(e: int, m: int, bias: int, specials: str) -> list[float]:
    """All finite magnitudes of a minifloat in ascending order: by its codes."""
    found = []
    for code in range(2 ** (e + m)):
        exponent, mantissa = code >> m, code % 2**m
        top = exponent == 2**e - 1
        if (specials == "ieee" and top) or (specials == "nan" and code == 2 ** (e + m) - 1):
            continue
        significand = mantissa / 2**m + (1 if exponent else 0)
        found.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return found


def to_minifloat(y: float, e: int, m: int, bias: int, specials: str, saturate: bool = True) -> float:
    """The nearest number, ties to the even code; by search among all of them."""
    if math.isnan(y):
        return y
    magnitudes = values_of(e, m, bias, specials)
    size, greatest = abs(y), magnitudes[-1]
    # Above the greatest number the next one counts, as if exponents went on.
    following = greatest + (greatest - magnitudes[-2])
    candidates = [*magnitudes, following]
    if size >= following:
        index = len(candidates) - 1
    else:
        upper = next(i for i, v in enumerate(candidates) if v >= size)
        lower = max(upper - 1, 0)
        below, above = size - candidates[lower], candidates[upper] - size
        index = lower if below < above or (below == above and lower % 2 == 0) else upper
    if index == len(candidates) - 1:
        result = greatest if saturate else math.inf if specials == "ieee" else math.nan
    else:
        result = candidates[index]
    return math.copysign(result, y)


def blocks_of(shape: tuple[int, ...], axis: int | None, block: list[int]) -> np.ndarray:
    """For each element the flat number of its scale, by its index."""
    out = np.zeros(shape, dtype=np.int64)
    scales = scale_shape(shape, axis, block)
    for index in np.ndindex(*shape):
        place = list(index)
        if axis is None:
            place = [0]
        elif not block:
            place = [index[axis]]
        else:
            for i, size in enumerate(block):
                at = axis % len(shape) - (len(block) - 1 - i)
                place[at] = index[at] // (shape[at] if size == -1 else size)
        out[index] = np.ravel_multi_index(place, scales)
    return out


def scale_shape(shape: tuple[int, ...], axis: int | None, block: list[int]) -> tuple[int, ...]:
    """The shape of the scales."""
    if axis is None:
        return (1,)
    if not block:
        return (shape[axis],)
    sizes = list(shape)
    for i, size in enumerate(block):
        at = axis % len(shape) - (len(block) - 1 - i)
        sizes[at] = -(-sizes[at] // (sizes[at] if size == -1 else size))
    return tuple(sizes)


def computing(x: torch.Tensor) -> np.ndarray:
    """Float32, float64 for float64."""
    return (x.detach() if x.dtype == torch.float64 else x.detach().float()).numpy()


def with_scales(x: torch.Tensor, scale: np.ndarray, axis: int | None, block: list[int], element) -> torch.Tensor:
    """element(x / scale, number of the scale) * scale, each operation rounded to the computing type."""
    values = computing(x)
    kind = values.dtype.type
    which = blocks_of(x.shape, axis, block)
    flat = scale.astype(kind).reshape(-1)
    out = np.empty_like(values)
    with np.errstate(over="ignore", invalid="ignore"):
        for index in np.ndindex(*x.shape):
            s = flat[which[index]]
            out[index] = kind(element(float(kind(values[index] / s)), which[index])) * s
    return torch.from_numpy(out).to(x.dtype)


def ranges(x: torch.Tensor, axis: int | None, block: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest finite float32 value of each block."""
    values = x.detach().float().numpy()
    which = blocks_of(x.shape, axis, block)
    scales = scale_shape(x.shape, axis, block)
    low, high = np.full(scales, np.inf, np.float32), np.full(scales, -np.inf, np.float32)
    for index in np.ndindex(*x.shape):
        if np.isfinite(values[index]):
            low.flat[which[index]] = min(low.flat[which[index]], values[index])
            high.flat[which[index]] = max(high.flat[which[index]], values[index])
    return low, high


def largest(x: torch.Tensor, axis: int | None, block: list[int]) -> np.ndarray:
    """Largest finite magnitude of each block, 0 where there is none."""
    low, high = ranges(x, axis, block)
    return np.where(low > high, np.float32(0), np.maximum(-low, high))


def scale_of_largest(value: np.ndarray, greatest: float) -> np.ndarray:
    out = np.ones_like(value)
    for i, v in enumerate(value.flat):
        if v != 0:
            out.flat[i] = max(np.float32(float(v) / greatest), np.float32(2.0**-60))
    return out


def up_to_power_of_two(scale: np.ndarray) -> np.ndarray:
    out = scale.copy()
    for i, v in enumerate(scale.flat):
        significand, exponent = math.frexp(float(v))
        out.flat[i] = math.ldexp(1.0, exponent - 1 if significand == 0.5 else exponent)
    return out


def mx_scale(x: torch.Tensor, element: str, block: int, axis: int) -> np.ndarray:
    """2^(floor(log2 of the largest) - n)."""
    n = 0 if element == "int8" else math.floor(math.log2(values_of(*MINIFLOATS[element])[-1]))
    value = largest(x, axis, [block])
    out = np.ones_like(value)
    for i, v in enumerate(value.flat):
        if v != 0:
            exponent = math.frexp(float(v))[1] - 1 - n
            out.flat[i] = math.ldexp(1.0, min(max(exponent, -127), 127))
    return out


def mx_element(y: float, element: str) -> float:
    if element != "int8":
        return to_minifloat(y, *MINIFLOATS[element])
    if math.isnan(y):
        return y
    # round() of Python is to even; copysign keeps the sign of what becomes 0.
    limited = min(max(y * 64, -1e9), 1e9)
    return math.copysign(min(abs(round(limited)), 127) / 64, y)


def mx(x: torch.Tensor, element: str, block: int = 32, axis: int = -1) -> torch.Tensor:
    return with_scales(x, mx_scale(x, element, block, axis), axis, [block], lambda y, _: mx_element(y, element))


def nvfp4(x: torch.Tensor, block: int = 16, axis: int = -1) -> torch.Tensor:
    whole = scale_of_largest(largest(x, None, []), 6.0 * 448.0)[0]
    value = largest(x, axis, [block])
    scale = np.empty_like(value)
    for i, v in enumerate(value.flat):
        wanted = float(np.float32(float(v) / (6.0 * float(whole))))
        scale.flat[i] = np.float32(max(to_minifloat(wanted, *MINIFLOATS["e4m3"]), 2.0**-9)) * whole
    return with_scales(x, scale, axis, [block], lambda y, _: to_minifloat(y, *MINIFLOATS["e2m1"]))


def nf4_scale(x: torch.Tensor, block: int = 64, scale_block: int = 0, axis: int = -1) -> np.ndarray:
    value = largest(x, axis, [block])
    scale = np.where(value == 0, np.float32(1), np.maximum(value, np.float32(2.0**-60))).astype(np.float32)
    if not scale_block:
        return scale
    flat = scale.reshape(-1)
    total = 0.0
    for v in flat:
        total += float(v)
    mean = np.float32(total / len(flat))
    for begin in range(0, len(flat), scale_block):
        part = flat[begin : begin + scale_block]
        deviation = np.abs(part - mean)
        step = scale_of_largest(np.array([deviation.max()], np.float32), 127.0)[0]
        for i, v in enumerate(part):
            q = min(max(np.rint(np.float32(v - mean) / step), -127), 127)
            flat[begin + i] = max(np.float32(np.float32(q) * step) + mean, np.float32(2.0**-60))
    return flat.reshape(scale.shape)


def nearest(values: list[float], y: float) -> int:
    """The place of the nearest of ascending values, the lower one in a tie; middles are rounded to float32."""
    place = 0
    for k in range(len(values) - 1):
        if y > float(np.float32((values[k] + values[k + 1]) / 2)):
            place = k + 1
    return place


def nf4(x: torch.Tensor, block: int = 64, scale_block: int = 0, axis: int = -1) -> torch.Tensor:
    scale = nf4_scale(x, block, scale_block, axis)
    values = [float(np.float32(v)) for v in NORMAL_FLOAT]
    return with_scales(x, scale, axis, [block], lambda y, _: y if math.isnan(y) else values[nearest(values, y)])


def integers(
    x: torch.Tensor, scale: np.ndarray, zero_point: np.ndarray, axis: int | None, block: list[int], qmin: int, qmax: int
) -> torch.Tensor:
    zeros = zero_point.reshape(-1)

    def element(y: float, which: int) -> float:
        if math.isnan(y):
            return y
        if math.isinf(y):
            return float((qmax if y > 0 else qmin) - int(zeros[which]))
        return float(min(max(float(np.rint(y)) + int(zeros[which]), qmin), qmax) - int(zeros[which]))

    return with_scales(x, scale, axis, block, element)


def philox(key: int, low: int, high: int) -> list[int]:
    """Philox4x32-10."""
    mask = 2**32 - 1
    words = [low & mask, low >> 32, high & mask, high >> 32]
    k0, k1 = key & mask, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(p1 >> 32) ^ words[1] ^ k0, p1 & mask, (p0 >> 32) ^ words[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return words


def uniform(seed: int, call: int, i: int) -> float:
    return (philox(seed, i // 4, call)[i % 4] >> 8) * 2.0**-24
