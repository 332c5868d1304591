"""fake_quantize_learned: values of fake_quantize, and gradients for x and scale against the formula in numpy."""

import re

import numpy as np
import pytest
import reference
import strategies
import torch
from conftest import available_instruction_sets

from rarefy import _core

ops = torch.ops.rarefy
INT8 = (-128, 127)


def grid(count: int, qmin: int, qmax: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.randint(qmin, qmax + 1, (count,), generator=generator, dtype=torch.int32)
    return 10 ** (torch.rand(count, generator=generator) * 2 - 2), zero_point


def inputs(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, limits: tuple[int, int] = INT8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with values inside, at the edges of and beyond the grid; scale, zero point; an upstream gradient that is not 1."""
    scale, zero_point = grid(1 if axis is None else shape[axis], *limits)
    x = strategies.around_bins(shape, scale, zero_point, axis, *limits, seed=1).to(dtype)
    return x, scale, zero_point, (torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)


def expected_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    limits: tuple[int, int],
    gradient_scale: float,
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """dx, dscale, and the sum of the magnitudes that dscale adds up.

    The quotient is in the type that x is computed in, as the decisions of rounding are; the rest is in float64.
    """
    values = reference.to_numpy(x)
    ratio = values / reference.along(scale.detach().cpu().numpy().astype(values.dtype), values.ndim, axis)
    rounded, ratio = np.rint(ratio).astype(np.float64), ratio.astype(np.float64)
    zero = reference.along(zero_point.cpu().numpy().astype(np.float64), values.ndim, axis)
    q = rounded + zero
    inside = (q >= limits[0]) & (q <= limits[1])
    with np.errstate(invalid="ignore"):
        t = np.where(inside, rounded - ratio, np.clip(q, *limits) - zero)
    g = grad.detach().cpu().double().numpy()
    products = np.where(np.isnan(values), 0.0, g * t)
    others = tuple(i for i in range(values.ndim) if axis is None or i != axis % values.ndim)
    dx = torch.where(torch.from_numpy(np.asarray(inside)), grad.cpu(), torch.zeros_like(grad.cpu()))
    total, size = gradient_scale * products.sum(others), abs(gradient_scale) * np.abs(products).sum(others)
    return dx, np.atleast_1d(total), np.atleast_1d(size)


def gradients(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
    ops.fake_quantize_learned(x, scale, *rest).backward(grad)
    return x.grad, scale.grad


def check(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grad: torch.Tensor,
    axis: int | None,
    limits: tuple[int, int] = INT8,
    gradient_scale: float = 1.0,
) -> None:
    device = x.device
    on_device = scale.to(device), zero_point.to(device)
    x_hat = ops.fake_quantize_learned(x, *on_device, axis, *limits, gradient_scale)
    assert torch.equal(x_hat, ops.fake_quantize(x, *on_device, axis, *limits))
    dx, dscale = gradients(grad, x, *on_device, axis, *limits, gradient_scale)
    expected, total, size = expected_gradients(grad, x, scale, zero_point, axis, limits, gradient_scale)
    assert dx.dtype == x.dtype
    assert dx.stride() == x_hat.stride()
    assert torch.equal(dx.cpu(), expected)
    assert dscale.dtype == torch.float32
    assert dscale.shape == scale.shape
    error = np.abs(dscale.cpu().double().numpy() - total)
    # One rounding to float32 at the end. Unless x is float64, a product is rounded to float32 and takes part in at most 64
    # additions in float32. Products of numbers next to 0 are denormal.
    relative = 2.0**-40 if x.dtype == torch.float64 else 66 * 2.0**-24
    bound = 2.0**-23 * np.abs(total) + relative * size + np.finfo(np.float32).tiny
    assert (error <= bound).all(), (error, total, size)


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", strategies.ODD_SHAPES, ids=str)
def test_every_shape_axis_and_type(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, *range(-len(shape), len(shape))):
        x, scale, zero_point, grad = inputs(shape, axis, dtype)
        check(x.to(device), scale, zero_point, grad.to(device), axis)


@pytest.mark.parametrize("limits", [(-128, 127), (0, 255), (-2, 1), (0, 15), (-32768, 32767)], ids=str)
@pytest.mark.parametrize("gradient_scale", [1.0, 1 / 340.5, -2.0, 0.0])
def test_ranges_and_gradient_scale(limits: tuple[int, int], gradient_scale: float, device: torch.device) -> None:
    for axis in (None, 0, 1, -1):
        x, scale, zero_point, grad = inputs((37, 53), axis, torch.float32, limits)
        check(x.to(device), scale, zero_point, grad.to(device), axis, limits, gradient_scale)


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 3, 160), (2, 17, 6, 5), (2, 3, 33, 9), (4, 40, 5, 5), (19, 34)], ids=str)
def test_every_layout(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, *range(len(shape))):
        x, scale, zero_point, grad = inputs(shape, axis, dtype)
        for view in strategies.layouts(x.to(device)).values():
            check(view, scale, zero_point, grad.to(device), axis)  # grad is contiguous, view may not be
            check(view, scale, zero_point, torch.empty_like(view).copy_(grad), axis)


@pytest.mark.parametrize("shape", [(70_001,), (33, 4099), (4099, 33), (3, 7, 9001), (2, 20_000, 5), (600, 3, 20, 9)])
def test_more_than_one_piece(shape: tuple[int, ...], device: torch.device) -> None:
    for axis in (None, *range(len(shape))):
        x, scale, zero_point, grad = inputs(shape, axis, torch.float32)
        check(x.to(device), scale, zero_point, grad.to(device), axis)


def test_larger_than_the_caches() -> None:
    x, scale, zero_point, grad = inputs((3000, 3003), 1, torch.float32)
    check(x, scale, zero_point, grad, 1)
    check(x, scale[:1], zero_point[:1], grad, None)
    unaligned = torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(3000, 3003)
    check(unaligned, *grid(3000, *INT8), grad, 0)


def test_a_stated_example(device: torch.device) -> None:
    # Quotients 0.25, 1.75 (inside), 9 and -9 (clamped to 3 and -4 before the zero point of 0).
    x = torch.tensor([0.5, 3.5, 18.0, -18.0], device=device)
    grad = torch.tensor([1.0, 10.0, 100.0, 1000.0], device=device)
    scale, zero_point = torch.tensor([2.0], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    dx, dscale = gradients(grad, x, scale, zero_point, None, -4, 3, 0.5)
    assert dx.tolist() == [1.0, 10.0, 0.0, 0.0]
    assert dscale.tolist() == [0.5 * (-0.25 + 2.5 + 300.0 - 4000.0)]


def test_a_scale_without_dimensions(device: torch.device) -> None:
    x, scale, zero_point, grad = inputs((300,), None, torch.float32)
    check(x.to(device), scale, zero_point, grad.to(device), None)
    scalar = gradients(grad.to(device), x.to(device), scale[0].to(device), zero_point[0].to(device), None, *INT8, 1.0)
    vector = gradients(grad.to(device), x.to(device), scale.to(device), zero_point.to(device), None, *INT8, 1.0)
    assert scalar[1].shape == ()
    assert scalar[1] == vector[1][0]


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_nan_adds_nothing_and_infinity_is_clamped(dtype: torch.dtype, device: torch.device) -> None:
    # 37 values reach the vector loop and its tail; 640 the row loop.
    torch.manual_seed(0)
    special = [float("nan"), float("inf"), -float("inf"), 0.25, 1e4, -1e4]
    for shape, axis in (((37,), None), ((20, 32), 1), ((32, 20), 0)):
        x = torch.tensor((special * 107)[: shape[0] * shape[-1] if len(shape) > 1 else 37], dtype=dtype).view(shape)
        grad = torch.randn(shape).to(dtype)
        grad[x.isnan()] = torch.inf
        count = 1 if axis is None else 32
        scale, zero_point = torch.full((count,), 0.5), torch.full((count,), 3, dtype=torch.int32)
        dx, dscale = gradients(grad.to(device), x.to(device), scale.to(device), zero_point.to(device), axis, *INT8, 1.0)
        assert not dx[~(x == 0.25)].any()
        assert torch.equal(dx[x == 0.25].cpu(), grad[x == 0.25])
        t = torch.where(x.isnan(), 0.0, torch.where(x > 1, 124.0, torch.where(x < 0, -131.0, -0.5))).double()
        products = torch.where(x.isnan(), 0.0, grad.double() * t)
        others = [i for i in range(x.dim()) if i != axis]
        assert torch.allclose(dscale.double().cpu(), products.sum(others).reshape(-1), rtol=1e-5, atol=1e-3)


def test_nan_in_the_gradient_reaches_the_scale(device: torch.device) -> None:
    grad = torch.ones(50, device=device)
    grad[40] = torch.nan
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    dx, dscale = gradients(
        grad, torch.rand(50, device=device), torch.ones(1, device=device), zero_point, None, *INT8, 1.0
    )
    assert dscale.isnan().all()
    assert dx.isnan().nonzero().tolist() == [[40]]


# --- The same bits ----------------------------------------------------------------------------------------------------

SHAPES = [(5, 4, 3, 160), (217, 131), (64, 1, 3, 3), (3, 3, 32, 31), (200_003,), (90, 12, 7, 7), (3000, 12)]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_instruction_sets_agree_in_every_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    nans = torch.tensor([0x7F923456, -0x3AAAAA, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    for axis in (None, *range(len(shape))):
        x, scale, zero_point, grad = inputs(shape, axis, dtype)
        x.view(-1)[3:6] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        with_nans = grad.clone()
        with_nans.view(-1)[3:6] = nans.to(dtype)
        for view in strategies.layouts(x).values():
            results = {True: [], False: []}
            for name in available_instruction_sets():
                _core.set_instruction_set(name)
                for upstream in (grad, with_nans):
                    results[upstream is grad].append(
                        ops.fake_quantize_learned_backward(upstream, view, scale, zero_point, axis, *INT8, 0.3)
                    )
            assert results[True][0][1].isfinite().all()
            assert results[False][0][1].isnan().any()
            for same in results.values():
                for dx, dscale in same[1:]:
                    assert torch.equal(bits_of(dx), bits_of(same[0][0]))
                    assert torch.equal(bits_of(dscale), bits_of(same[0][1]))


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_threads_agree_in_every_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for shape in ((217, 331), (200_003,), (90, 12, 7, 17), (30_000, 12), (3000, 20)):
            for axis in (None, *range(len(shape))):
                x, scale, zero_point, grad = inputs(shape, axis, dtype)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(ops.fake_quantize_learned_backward(grad, x, scale, zero_point, axis, *INT8, 0.3))
                for dx, dscale in results[1:]:
                    assert torch.equal(bits_of(dx), bits_of(results[0][0]))
                    assert torch.equal(bits_of(dscale), bits_of(results[0][1]))
    finally:
        torch.set_num_threads(before)


def test_gradient_bits_pass_unchanged() -> None:
    # A signalling NaN would become quiet in arithmetic.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        grad = patterns.view(dtype)
        scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        x = torch.zeros(len(grad), dtype=dtype)
        dx, _ = ops.fake_quantize_learned_backward(grad, x, scale, zero_point, None, *INT8, 1.0)
        assert torch.equal(bits_of(dx), patterns)


# --- Autograd ---------------------------------------------------------------------------------------------------------


def test_in_place_and_out_of_place_agree() -> None:
    for dtype in strategies.FLOAT_TYPES:
        for axis in (None, 0, 1):
            x, scale, zero_point, grad = inputs((70, 333), axis, dtype)
            rest = x, scale, zero_point, axis, *INT8, 0.7
            dx, dscale = ops.fake_quantize_learned_backward(grad, *rest)
            assert torch.equal(ops.fake_quantize_learned_backward_(grad, *rest), dscale)
            assert torch.equal(grad, dx)


def test_a_gradient_that_others_see_is_not_overwritten() -> None:
    x, scale, zero_point, grad = inputs((50, 20), None, torch.float32)
    kept = grad.clone()
    gradients(grad, x, scale, zero_point, None, *INT8, 1.0)
    assert torch.equal(grad, kept)


def test_a_gradient_of_ours_is_overwritten() -> None:
    # The product's gradient belongs to nobody else; the upstream gradient itself is the caller's.
    x, scale, zero_point, grad = inputs((50, 20), None, torch.float32)
    for factor, is_in_place in ((2.0, True), (None, False)):
        leaf = x.detach().requires_grad_()
        y = ops.fake_quantize_learned(leaf, scale, zero_point, None, *INT8, 1.0)
        y = y if factor is None else y * factor
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y.backward(grad)
        names = {event.name for event in profile.events()}
        assert ("rarefy::fake_quantize_learned_backward_" in names) == is_in_place
        assert ("rarefy::fake_quantize_learned_backward" in names) != is_in_place
        expected = expected_gradients(grad * (factor or 1.0), x, scale, zero_point, None, INT8, 1.0)[0]
        assert torch.equal(leaf.grad, expected)


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, scale, zero_point, grad = inputs((50, 20), None, torch.float32)
    both = gradients(grad, x, scale, zero_point, None, *INT8, 1.0)
    leaf = x.detach().requires_grad_()
    ops.fake_quantize_learned(leaf, scale, zero_point, None, *INT8, 1.0).backward(grad)
    assert torch.equal(leaf.grad, both[0])
    step = scale.detach().requires_grad_()
    ops.fake_quantize_learned(x, step, zero_point, None, *INT8, 1.0).backward(grad)
    assert torch.equal(step.grad, both[1])
    assert not ops.fake_quantize_learned(x, scale, zero_point, None, *INT8, 1.0).requires_grad
    with torch.no_grad():
        assert not ops.fake_quantize_learned(leaf, step, zero_point, None, *INT8, 1.0).requires_grad


def test_saves_the_input_and_parameters_only() -> None:
    x, scale, zero_point, _ = inputs((50, 20), None, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.fake_quantize_learned(x.requires_grad_(), scale.requires_grad_(), zero_point, None, *INT8, 1.0)
    assert sorted(saved) == sorted([x.data_ptr(), scale.data_ptr(), zero_point.data_ptr()])


def test_no_second_derivative() -> None:
    x, scale, zero_point, grad = inputs((50,), None, torch.float32)
    y = ops.fake_quantize_learned(x.requires_grad_(), scale, zero_point, None, *INT8, 1.0)
    with pytest.raises(NotImplementedError, match=r"\[fake_quantize_learned\] there is no second derivative"):
        torch.autograd.grad(y, x, grad, create_graph=True)


def test_a_scale_that_is_learned_approaches_the_best_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000)
    zero_point = torch.zeros(1, dtype=torch.int32)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (ops.fake_quantize_learned(x, scale, zero_point, None, -8, 7, 1.0) - x).square().mean()

    scale = torch.nn.Parameter(torch.tensor([1.5]))
    optimizer = torch.optim.Adam([scale], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        error(scale).backward()
        optimizer.step()
    candidates = torch.linspace(0.05, 1.5, 300)
    errors = torch.stack([error(candidate.view(1)) for candidate in candidates])
    assert error(scale.detach()) <= 1.02 * errors.min()


# --- Inside torch -----------------------------------------------------------------------------------------------------


def cases() -> list[tuple[str, tuple[object, ...]]]:
    x = torch.randn(5, 4, 3, 7)
    last = x.to(memory_format=torch.channels_last)

    def rest(count: int = 1, learned: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.rand(count) * 0.1 + 0.01).requires_grad_(learned), torch.zeros(count, dtype=torch.int32)

    leaf = x.clone().requires_grad_()
    return [
        ("fake_quantize_learned", (x, *rest(learned=False), None, *INT8, 1.0)),
        ("fake_quantize_learned", (leaf, *rest(), None, *INT8, 0.1)),
        ("fake_quantize_learned", (leaf, *rest(4), 1, *INT8, 0.1)),
        ("fake_quantize_learned", (last.detach().requires_grad_(), *rest(5), -4, *INT8, 1.0)),
        ("fake_quantize_learned", (x[:, :, ::2, 1:], *rest(), None, *INT8, 1.0)),
        ("fake_quantize_learned", (x[:, :1].expand(5, 4, 3, 7), *rest(4), 1, *INT8, 1.0)),
        ("fake_quantize_learned", (torch.randn(0, 3), *rest(), None, *INT8, 1.0)),
        ("fake_quantize_learned", (torch.randn(()), *rest(), None, *INT8, 1.0)),
        ("fake_quantize_learned_backward", (x, last, *rest(4, learned=False), 1, *INT8, 1.0)),
        ("fake_quantize_learned_backward_", (x.clone(), x, *rest(learned=False), None, *INT8, 1.0)),
    ]


@pytest.mark.parametrize(("name", "arguments"), cases(), ids=[f"{i}-{name}" for i, (name, _) in enumerate(cases())])
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)


class Block(torch.nn.Module):
    """A linear layer that learns the scales of its input and, per channel, of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 8)
        self.input_scale = torch.nn.Parameter(torch.full((1,), 0.05))
        self.weight_scale = torch.nn.Parameter(torch.full((8,), 0.01))
        self.register_buffer("zero", torch.zeros(8, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ops.fake_quantize_learned(x, self.input_scale, self.zero[:1], None, *INT8, 0.1)
        weight = ops.fake_quantize_learned(self.linear.weight, self.weight_scale, self.zero, 0, *INT8, 0.2)
        return torch.nn.functional.linear(x, weight, self.linear.bias)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_full_graph_with_backward(backend: str) -> None:
    torch.manual_seed(0)
    eager, twin = Block(), Block()
    twin.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for rows in (4, 4, 6):  # another size at the end: recompiled with a symbolic one
        x = torch.randn(rows, 16)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager(left).square().sum().backward()
        compiled(right).square().sum().backward()
        torch.testing.assert_close(right.grad, left.grad)
    for ours, theirs in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.int32)}, TypeError, "[fake_quantize_learned] input must be float32"),
        ({"scale": torch.ones(1).double()}, TypeError, "[fake_quantize_learned] scale must be float32, got Double"),
        ({"scale": torch.ones(2)}, ValueError, "[fake_quantize_learned] scale must have 1 element"),
        ({"scale": torch.zeros(1)}, ValueError, "[fake_quantize_learned] scale must be finite and positive, got 0"),
        ({"scale": -torch.ones(1)}, ValueError, "[fake_quantize_learned] scale must be finite and positive, got -1"),
        ({"scale": torch.full((1,), torch.nan)}, ValueError, "scale must be finite and positive, got nan at index 0"),
        ({"zero_point": torch.zeros(1)}, TypeError, "[fake_quantize_learned] zero_point must be int32"),
        ({"zero_point": torch.tensor([9], dtype=torch.int32)}, ValueError, "zero_point must be within [-8, 7], got 9"),
        ({"axis": 1}, IndexError, "[fake_quantize_learned] axis must be in [-1, 1)"),
        ({"qmin": 7}, ValueError, "[fake_quantize_learned] must have -32768 <= qmin < qmax <= 65535, got qmin 7"),
        ({"gradient_scale": torch.inf}, ValueError, "[fake_quantize_learned] gradient_scale must be finite, got inf"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.ones(3),
        "scale": torch.ones(1),
        "zero_point": torch.zeros(1, dtype=torch.int32),
        "axis": None,
        "qmin": -8,
        "qmax": 7,
        "gradient_scale": 1.0,
    }
    with pytest.raises(error, match=re.escape(message)):
        ops.fake_quantize_learned(*(arguments | change).values())


def test_errors_of_the_backward_pass() -> None:
    x, scale, zero_point, grad = inputs((4, 6), None, torch.float32)
    rest = scale, zero_point, None, *INT8, 1.0
    with pytest.raises(TypeError, match=r"grad must have the input's type Float, got Double"):
        ops.fake_quantize_learned_backward(grad.double(), x, *rest)
    with pytest.raises(ValueError, match=r"grad must have the input's shape \[4, 6\], got \[6, 4\]"):
        ops.fake_quantize_learned_backward(grad.t(), x, *rest)
    before = grad.clone()
    with pytest.raises(ValueError, match=r"grad must have the input's strides \[1, 4\], got \[6, 1\]"):
        ops.fake_quantize_learned_backward_(grad, x.t().contiguous().t(), *rest)
    with pytest.raises(ValueError, match="strides must be those of a dense tensor"):
        ops.fake_quantize_learned_backward_(grad[:, ::2], x[:, ::2], *rest)
    assert torch.equal(grad, before)
