"""What is allowed between the output of a file and the output of the model that it was made from."""

from __future__ import annotations

import numpy as np

# An end-to-end difference cannot be bounded by a constant: one value that rounds to the other side of a tie (float sums
# have no fixed order) moves a deep network's outputs about as much as rounding all its activations does. So that
# effect, measured on the same inputs, is the unit. On untrained networks of 9 and 21 layers, 2 to 8 bits, the
# differences were at most 1.3 (rms) and 1.8 (largest) of it.
NOISE_FACTOR = 4.0
RELATIVE = (1e-4, 1e-3)  # rms and largest, for float networks: sums in another order
HALF = 4 * 2.0**-11  # besides, where numbers are rounded to half precision, which has 11 bits

# An index or a truth value flips where two scores are close; of fewer values, one is more than this fraction.
_FLIPS, _MANY = 0.05, 20


def rms(values: np.ndarray) -> float:
    """The root of the mean square; 0 of no values."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def largest(values: np.ndarray) -> float:
    """The largest absolute value; 0 of no values."""
    return float(np.abs(values).max()) if values.size else 0.0


def noise_of_rounding(unrounded: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """What rounding activations does to an output: finite differences of a float one, and where another one flips."""
    floating = np.issubdtype(expected.dtype, np.floating)
    if unrounded.shape != expected.shape:  # as many values as are found in the data
        return np.zeros(0) if floating else np.ones(1, dtype=bool)
    if not floating:
        return unrounded != expected
    both = np.isfinite(unrounded) & np.isfinite(expected)
    return unrounded[both].astype(np.float64) - expected[both].astype(np.float64)


def compare_integers(failed: str, got: np.ndarray, expected: np.ndarray, flips: np.ndarray) -> tuple[float, float]:
    """The fraction of indices or truth values that differ, and the fraction that may.

    Args:
        failed: how the error begins.
        got, expected: values of one shape.
        flips: which values rounding the activations changes: as many may differ, and one in 20 of many.

    Raises:
        RuntimeError: more differ.
    """
    differing = float(np.mean(got != expected)) if expected.size else 0.0
    allowed = (float(np.mean(flips)) if flips.size else 0.0) + (_FLIPS if expected.size >= _MANY else 0.0)
    if differing > allowed:
        raise RuntimeError(f"{failed} differs from the model in {differing:.1%} of its values (allowed {allowed:.1%})")
    return differing, allowed


def finite_values(failed: str, got: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of both, in float64, that are finite in the model's output.

    Args:
        failed: how the error begins.
        got, expected: float values of one shape.

    Raises:
        RuntimeError: the others are not the same infinities and NaN, or none is finite, so that there is nothing to compare.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(got), finite):
        raise RuntimeError(f"{failed} is not finite where the model is, or the reverse")
    if expected.size and not finite.any():
        raise RuntimeError(f"{failed.rstrip(',')}: the model gives no finite value on the example")
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        raise RuntimeError(f"{failed} has other infinities or NaN than the model")
    return got[finite].astype(np.float64), expected[finite].astype(np.float64)
