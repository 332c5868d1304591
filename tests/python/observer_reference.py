"""What observers must compute, in plain loops: bins, re-binning, expected errors, divergences, splitting."""

import math
from collections.abc import Callable

import numpy as np
import reference


def exponent_and_base(low: float, high: float, bins: int) -> tuple[int, int]:
    """The smallest exponent from -100 for which the places of [min(low, 0), max(high, 0)] fit, and the lowest place."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    exponent = -100
    while place(high, exponent) - place(low, exponent) + 1 > bins:
        exponent += 1
    return exponent, place(low, exponent)


def place(x: float, exponent: int) -> int:
    """trunc(|x| / 2^exponent), and -1 minus that for negative x, in exact arithmetic."""
    numerator, denominator = abs(float(x)).as_integer_ratio()
    if exponent >= 0:
        denominator <<= exponent
    else:
        numerator <<= -exponent
    steps = numerator // denominator
    return -1 - steps if x < 0 else steps


def histogram(values: np.ndarray, bins: int) -> np.ndarray:
    """Counts of all values at once."""
    exponent, base = exponent_and_base(values.min(), values.max(), bins)
    counts = np.zeros(bins, dtype=np.int64)
    for value in values.ravel():
        counts[place(value, exponent) - base] += 1
    return counts


def quantize(x: np.ndarray, scale: float, zero_point: int, qmin: int, qmax: int) -> np.ndarray:
    """x_hat in float64."""
    return (np.clip(np.rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale


def error(
    x: np.ndarray, low: float, high: float, grid: tuple[int, int, bool], norm: float = 2.0, weight: object = 1.0
) -> float:
    """Sum of weight * |x - x_hat|^norm on the grid of a range."""
    scale, zero_point = reference.choose_qparams(low, high, *grid)
    x = x.astype(np.float64)
    return float((weight * np.abs(x - quantize(x, float(scale), zero_point, *grid[:2])) ** norm).sum())


def divergence(counts: list[int], first: int, last: int, levels: int) -> float:
    """Kullback-Leibler divergence of counts that are clipped to [first, last) from their form in levels."""
    clipped = [float(c) for c in counts[first:last]]
    raw = list(clipped)
    clipped[0] += sum(counts[:first])
    clipped[-1] += sum(counts[last:])
    width = last - first
    quantized = [0.0] * width
    for level in range(levels):
        members = [j for j in range(width) if j * levels // width == level]
        filled = [j for j in members if raw[j] > 0]
        for j in filled:
            quantized[j] = sum(raw[k] for k in members) / len(filled)
    p_sum, q_sum = sum(clipped), sum(quantized)
    total = 0.0
    for p, q in zip(clipped, quantized, strict=True):
        if p > 0 and q == 0:
            return math.inf
        if p > 0:
            total += p / p_sum * math.log((p / p_sum) / (q / q_sum))
    return total


def expected_error(
    counts: np.ndarray, edges: list[float], low: float, high: float, grid: tuple[int, int, bool], norm: float
) -> float:
    """Sum of |x - x_hat|^norm where the values of a bin are spread evenly over it: by many points in each bin."""
    scale, zero_point = reference.choose_qparams(low, high, *grid)
    total = 0.0
    points = (np.arange(400) + 0.5) / 400
    for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x = a + (b - a) * points
            total += count * float(np.mean(np.abs(x - quantize(x, float(scale), zero_point, *grid[:2])) ** norm))
    return total


def half_quadratic(
    x: np.ndarray, grid: tuple[int, int, bool], norm: float, beta: float, kappa: float, iterations: int
) -> tuple[float, int]:
    """Scale and zero point, in float64, as rarefy/ops/range_search.h says it."""
    qmin, qmax, symmetric = grid
    x = x.astype(np.float64).ravel()
    scale, zero_point = reference.choose_qparams(x.min(), x.max(), *grid)

    def error_of(s: float, z: int) -> float:
        return float((np.abs(x - quantize(x, s, z, qmin, qmax)) ** norm).sum())

    best = (float(scale), int(zero_point))
    best_error = error_of(*best)
    s, z = float(scale), float(zero_point)
    for _ in range(iterations):
        if best_error == 0.0:
            break
        q = np.clip(np.rint(x / s + z), qmin, qmax)
        r = x / s - (q - z)
        magnitude = np.maximum(np.abs(r), 1e-30)
        e = np.sign(r) * np.maximum(np.abs(r) - magnitude ** (norm - 1) / beta, 0)
        t = x / s - e
        if not symmetric:
            z = float(np.clip((q - t).mean(), qmin, qmax))
        square, product = ((q - z) ** 2).sum(), (t * (q - z)).sum()
        if not (square > 0 and product > 0):
            break
        s = s * product / square
        candidate = (float(np.float32(s)), int(np.rint(z)))
        candidate_error = error_of(*candidate)
        if not candidate_error < best_error:
            break
        best, best_error = candidate, candidate_error
        beta *= kappa
    return best


def narrowed(
    cost: Callable[[float, int], float], low: float, high: float, grid: tuple[int, int, bool], steps: int
) -> tuple[float, float]:
    """The range that the search for the least cost(scale, zero point) ends at: every candidate is tried in its turn."""
    low, high = min(np.float32(low), np.float32(0)), max(np.float32(high), np.float32(0))
    reach = max(-low, high)
    at = {"best": (low, high), "cost": cost(*reference.choose_qparams(low, high, *grid))}

    def along(ends: Callable[[float], tuple[np.float32, np.float32]]) -> None:
        factor_of_best = 0.0

        def show(factor: float) -> None:
            nonlocal factor_of_best
            candidate = ends(factor)
            of_this = cost(*reference.choose_qparams(*candidate, *grid))
            if of_this < at["cost"]:
                at.update(best=candidate, cost=of_this)
                factor_of_best = factor

        for i in range(steps, 0, -1):
            show(i / steps)
        center = factor_of_best
        for i in range(-4, 5):
            if i != 0 and center > 0 and 0 < center + 1 / steps * i / 5 < 1:
                show(center + 1 / steps * i / 5)

    def part(end: np.float32, factor: float) -> np.float32:
        return np.float32(factor * float(end))

    if grid[2]:
        along(lambda f: (max(low, -part(reach, f)), min(high, part(reach, f))))
        return at["best"]
    along(lambda f: (part(low, f), part(high, f)))
    for _ in range(2 if low < 0 < high else 0):
        before = at["cost"]
        fixed_low = at["best"][0]
        along(lambda f, fixed=fixed_low: (fixed, part(high, f)))
        fixed_high = at["best"][1]
        along(lambda f, fixed=fixed_high: (part(low, f), fixed))
        if at["cost"] == before:
            break
    return at["best"]


def expected_error_exactly(
    counts: np.ndarray,
    edges: np.ndarray,
    scale: float,
    zero_point: int,
    grid: tuple[int, int, bool],
    norm: float,
    clip_weight: float = 1.0,
) -> float:
    """As expected_error, by the integral in docs/dev/numerics.md; what is clipped counts clip_weight times (norm 2)."""
    first, last = grid[0] - int(zero_point), grid[1] - int(zero_point)
    s = float(scale)

    def antiderivative(x: np.ndarray) -> np.ndarray:
        k = np.clip(np.rint(x / s), first, last)
        r = x / s - k
        value = 2 * k * 0.5 ** (norm + 1) + np.sign(r) * np.abs(r) ** (norm + 1)
        value += (clip_weight - 1) * np.sign(r) * np.maximum(np.abs(r) ** 3 - 0.125, 0)
        return s ** (norm + 1) / (norm + 1) * value

    a, b = edges[:-1], edges[1:]
    spread = (counts > 0) & (b > a)
    within = (antiderivative(b) - antiderivative(a))[spread] / (b - a)[spread] * counts[spread]
    point = (counts > 0) & (b == a)
    r = np.abs(a[point] / s - np.clip(np.rint(a[point] / s), first, last))
    at_points = (r**norm + (clip_weight - 1) * np.maximum(r * r - 0.25, 0)) * s**norm * counts[point]
    return float(within.sum() + at_points.sum())
