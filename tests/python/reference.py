"""What the quantization operators must compute, in plain numpy: division, np.rint, np.clip."""

import numpy as np
import torch


def along(values: np.ndarray, ndim: int, axis: int | None) -> np.ndarray:
    """Parameters of one axis, shaped to broadcast against an array of ndim dimensions."""
    if axis is None:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = values.size
    return values.reshape(shape)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """x in the type that it is computed in: float64 stays, everything else becomes float32."""
    return (x.detach().cpu() if x.dtype == torch.float64 else x.detach().cpu().float()).numpy()


def grid_index(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> np.ndarray:
    """round_half_even(x / scale) + zero_point before clamping."""
    values = to_numpy(x)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = along(scale.detach().cpu().numpy().astype(values.dtype), values.ndim, axis)
        zero_points = along(zero_point.cpu().numpy().astype(values.dtype), values.ndim, axis)
        return np.rint(values / scales) + zero_points


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None, qmin: int, qmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_hat in x's dtype, and where the value was not clamped."""
    q = grid_index(x, scale, zero_point, axis)
    scales = along(scale.detach().cpu().numpy().astype(q.dtype), q.ndim, axis)
    zero_points = along(zero_point.cpu().numpy().astype(q.dtype), q.ndim, axis)
    with np.errstate(invalid="ignore"):
        x_hat = (np.clip(q, qmin, qmax) - zero_points) * scales
        inside = (q >= qmin) & (q <= qmax)
    return torch.from_numpy(np.asarray(x_hat)).to(x.dtype), torch.from_numpy(np.asarray(inside))


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None, qmin: int, qmax: int
) -> torch.Tensor:
    """The integers; a NaN becomes qmax."""
    q = grid_index(x, scale, zero_point, axis)
    q = np.clip(np.where(np.isnan(q), qmax, q), qmin, qmax)
    return torch.from_numpy(np.asarray(q).astype(np.int8 if qmin < 0 else np.uint8))


def choose_qparams(low: float, high: float, qmin: int, qmax: int, symmetric: bool) -> tuple[np.float32, int]:
    """Scale and zero point of a range, in float64 with one rounding to float32 at the end."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        zero_point = -((-(qmin + qmax)) // 2)
        width, steps, reach = max(-low, high), qmax - zero_point, zero_point - qmin
    else:
        zero_point = qmin
        width, steps, reach = high - low, qmax - qmin, qmax - qmin
    if width == 0:
        scale = np.float32(1.0)
    else:
        largest = np.float32(float.fromhex("0x1.fffep127") / reach)
        with np.errstate(over="ignore"):
            scale = min(max(np.float32(width / steps), np.float32(2.0**-60)), largest)
    if not symmetric:
        zero_point = int(np.clip(qmin - np.rint(low / np.float64(scale)), qmin, qmax))
    return scale, zero_point
