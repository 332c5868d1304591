"""fake_quantize_range: values and gradients against plain loops."""

import math
import re

import numpy as np
import pytest
import reference
import torch
from conftest import available_instruction_sets

from rarefy import _core

ops = torch.ops.rarefy
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def parameters(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.05 + torch.rand(count, generator=generator) / 4
    low = -scale * torch.randint(0, 9, (count,), generator=generator) - 0.01
    return scale, low, scale * torch.randint(1, 9, (count,), generator=generator) + 0.013


def in_loops(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, axis: int | None
) -> tuple[list[float], list[float], np.ndarray]:
    """x_hat and dx, in the order of x's elements, and the sums [3, channels] for scale, low and high."""
    values, g = reference.to_numpy(x), reference.to_numpy(grad)
    kind = values.dtype.type
    sums = np.zeros((3, scale.numel()))
    x_hat, dx = [], []
    for place in np.ndindex(values.shape):
        c = 0 if axis is None else place[axis]
        s, a, b, v = kind(scale[c].item()), kind(low[c].item()), kind(high[c].item()), values[place]
        if math.isnan(v):
            x_hat.append(math.nan)
            dx.append(0.0)
            continue
        q = min(max(np.rint(v / s), np.rint(a / s)), np.rint(b / s))
        x_hat.append(float(kind(q) * s))
        dx.append(float(g[place]) if a <= v <= b else 0.0)
        if v < a:
            sums[1, c] += g[place]
        elif v > b:
            sums[2, c] += g[place]
        else:
            sums[0, c] += float(g[place]) * float(np.rint(v / s) - v / s)
    return x_hat, dx, sums


def layouts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Values in and beyond the ends, on ties and at 0, in several layouts."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) * 1.5
    x.view(-1)[:: max(1, x.numel() // 7)] = 0.0
    found = [x]
    if len(shape) == 4:
        found.append(x.to(memory_format=torch.channels_last))
    if len(shape) > 1:
        found.append(x.transpose(0, 1).contiguous().transpose(0, 1))
        found.append(torch.cat([x, x], 1)[:, : shape[1]])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((7,), None), ((5, 3), None), ((5, 3), 1), ((2, 3, 4, 5), 1), ((3, 2, 1, 4), -4), ((4, 0, 2), 0), ((1,), 0)],
)
def test_loops(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    scale, low, high = parameters(1 if axis is None else shape[axis])
    for x in layouts(shape):
        x = x.to(dtype).requires_grad_()
        learned = [p.clone().requires_grad_() for p in (scale, low, high)]
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        y = ops.fake_quantize_range(x, *learned, axis, 0.5)
        y.backward(grad)
        x_hat, dx, sums = in_loops(grad, x, scale, low, high, axis)
        assert y.dtype == x.grad.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(y.detach().reshape(-1).double(), torch.tensor(x_hat, dtype=torch.float64).to(dtype).double())
        assert not torch.signbit(y.detach()[y.detach() == 0]).any()
        assert torch.equal(x.grad.reshape(-1).double(), torch.tensor(dx, dtype=torch.float64))
        for parameter, expected in zip(learned, 0.5 * sums, strict=True):
            assert parameter.grad.dtype == torch.float32
            np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=2e-5, atol=2e-5)


def test_values_that_are_not_finite() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3], requires_grad=True)
    scale, low, high = (torch.tensor([v], requires_grad=True) for v in (0.25, -0.5, 1.0))
    y = ops.fake_quantize_range(x, scale, low, high, None)
    torch.testing.assert_close(y.detach(), torch.tensor([math.nan, 1.0, -0.5, 0.25]), equal_nan=True)
    y.backward(torch.tensor([math.nan, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 4.0]
    assert low.grad.item() == 3.0
    assert high.grad.item() == 2.0
    torch.testing.assert_close(scale.grad, torch.tensor([4.0 * (1 - 0.3 / 0.25)]))


def test_differences_where_it_is_smooth() -> None:
    """Beyond the ends x_hat is an end, and moves with it where that moves by whole steps."""
    x = torch.tensor([-3.0, 4.0, 5.0])
    weight = torch.tensor([2.0, 3.0, 5.0])
    scale = torch.tensor([0.125])

    def loss(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (ops.fake_quantize_range(x, scale, low, high, None) * weight).sum()

    low, high = torch.tensor([-1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    loss(low, high).backward()
    with torch.no_grad():
        assert low.grad.item() == ((loss(low + 0.25, high) - loss(low, high)) / 0.25).item() == 2.0
        assert high.grad.item() == ((loss(low, high + 0.25) - loss(low, high)) / 0.25).item() == 8.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_opcheck(axis: int | None, dtype: torch.dtype) -> None:
    learned = [p.requires_grad_() for p in parameters(1 if axis is None else 3)]
    x = torch.randn(2, 3, 4).to(dtype).requires_grad_()
    torch.library.opcheck(ops.fake_quantize_range, (x, *learned, axis, 0.5))
    plain = [p.detach() for p in learned]
    grad = torch.randn(2, 3, 4).to(dtype)
    torch.library.opcheck(ops.fake_quantize_range_backward, (grad, x.detach(), *plain, axis, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "input must be float32, float64, bfloat16 or float16"),
        ({"scale": torch.ones(3)}, ValueError, "scale must have 1 element (one for the tensor), got 3"),
        ({"low": torch.ones(1, dtype=torch.float64)}, TypeError, "low must be float32, got Double"),
        ({"axis": 1}, ValueError, "scale must have shape [3] (one per index of axis 1), got [1]"),
        ({"axis": 2}, IndexError, "axis must be in [-2, 2) for an input of 2 dimensions, got 2"),
        ({"gradient_scale": math.inf}, ValueError, "gradient_scale must be finite, got inf"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(change: dict[str, object], error: type[Exception], message: str, device: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "scale": torch.ones(1), "low": -torch.ones(1), "high": torch.ones(1)}
    arguments |= {"axis": None, "gradient_scale": 1.0, **change}
    values = [v.to(device) if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    with pytest.raises(error, match=re.escape(f"[fake_quantize_range] {message}")):
        ops.fake_quantize_range(*values)


def test_no_second_derivative() -> None:
    x = torch.randn(4, requires_grad=True)
    y = ops.fake_quantize_range(x, torch.ones(1), -torch.ones(1), torch.ones(1), None)
    with pytest.raises(NotImplementedError, match="there is no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_instruction_sets_give_equal_bits(dtype: torch.dtype, axis: int | None) -> None:
    x, grad = (
        torch.randn(3, 30011, generator=torch.Generator().manual_seed(1)).to(dtype),
        torch.randn(3, 30011).to(dtype),
    )
    learned = parameters(1 if axis is None else 3)
    before, threads = _core.instruction_set(), torch.get_num_threads()
    found = []
    try:
        for name in available_instruction_sets():
            _core.set_instruction_set(name)
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(ops.fake_quantize_range_backward(grad, x, *learned, axis, 1.0))
    finally:
        _core.set_instruction_set(before)
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_scale_that_is_not_positive() -> None:
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"\[fake_quantize_range\] scale must be finite and positive"):
            ops.fake_quantize_range(torch.zeros(2), torch.tensor([scale]), -torch.ones(1), torch.ones(1), None)
