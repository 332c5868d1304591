"""fake_quantize and quantize: values, layouts, gradients and errors against the plain formula in reference.py."""

import itertools
import re

import numpy as np
import pytest
import reference
import strategies
import torch
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import _core

ops = torch.ops.rarefy
INT8 = (-128, 127)


def parameters(count: int | None, qmin: int, qmax: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales over four decades and zero points over the whole range, one per channel (None: one)."""
    generator = torch.Generator().manual_seed(seed)
    n = 1 if count is None else count
    scale = 10 ** (torch.rand(n, generator=generator) * 4 - 3)
    zero_point = torch.randint(qmin, qmax + 1, (n,), generator=generator, dtype=torch.int32)
    return scale, zero_point


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every value, NaN equal to NaN, and in dtype and shape."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    different = (actual != expected) & ~actual.isnan()
    assert not different.any(), (
        f"{int(different.sum())} differ, first {actual[different][0]} for {expected[different][0]}"
    )


def check(x: torch.Tensor, axis: int | None, qmin: int, qmax: int, seed: int = 0) -> None:
    """fake_quantize, its mask and quantize of x equal the reference on x's device."""
    scale, zero_point = parameters(None if axis is None else x.shape[axis], qmin, qmax, seed)
    expected, inside = reference.fake_quantize(x, scale, zero_point, axis, qmin, qmax)
    arguments = (x, scale.to(x.device), zero_point.to(x.device), axis, qmin, qmax)
    assert_same(ops.fake_quantize(*arguments).cpu(), expected)
    x_hat, mask = ops.fake_quantize_mask(*arguments)
    assert_same(x_hat.cpu(), expected)
    assert_same(unpack(mask, x_hat).cpu(), inside)
    assert_same(ops.quantize(*arguments).cpu(), reference.quantize(x, scale, zero_point, axis, qmin, qmax))


def unpack(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The packed mask as a bool tensor with the strides of `like`, the tensor that came with it."""
    assert mask.dtype == torch.uint8
    assert mask.numel() == (like.numel() + 63) // 64 * 8
    bits = torch.from_numpy(np.unpackbits(mask.cpu().numpy(), bitorder="little"))
    assert not bits[like.numel() :].any(), "the padding must be 0"
    return bits[: like.numel()].bool().as_strided(like.shape, like.stride())


def inputs_for(
    shape: tuple[int, ...], axis: int | None, qmin: int, qmax: int, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    scale, zero_point = parameters(None if axis is None else shape[axis], qmin, qmax, seed)
    return strategies.around_bins(shape, scale, zero_point, axis, qmin, qmax, seed).to(dtype)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", strategies.ODD_SHAPES, ids=str)
def test_every_shape_axis_and_type(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, *range(-len(shape), len(shape))):
        check(inputs_for(shape, axis, *INT8, dtype).to(device), axis, *INT8)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_range(bits: int, device: torch.device) -> None:
    for signed, narrow in itertools.product((True, False), (True, False)):
        qmin, qmax = strategies.integer_range(bits, signed, narrow)
        for axis in (None, 0, 1):
            check(inputs_for((37, 53), axis, qmin, qmax, torch.float32, bits).to(device), axis, qmin, qmax, bits)


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 3, 160), (2, 17, 6, 5), (2, 3, 33, 9), (19, 34)], ids=str)
def test_every_layout(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for axis in (None, *range(len(shape))):
        x = inputs_for(shape, axis, *INT8, dtype).to(device)
        for name, view in strategies.layouts(x).items():
            assert torch.equal(view, x), name
            check(view, axis, *INT8)


def test_expanded_input(device: torch.device) -> None:
    row = torch.linspace(-300, 300, 33, device=device)
    for axis in (None, 0, 1):
        check(row.expand(7, 33), axis, *INT8)
        check(row[:, None].expand(33, 5), axis, *INT8)


@pytest.mark.parametrize("shape", [(70_001,), (33, 4099), (4099, 33), (3, 7, 9001), (2, 20_000, 5)], ids=str)
def test_more_than_one_thread(shape: tuple[int, ...], device: torch.device) -> None:
    for axis in (None, *range(len(shape))):
        check(inputs_for(shape, axis, *INT8, torch.float32).to(device), axis, *INT8)


def test_larger_than_the_caches() -> None:
    # Above the size from which outputs bypass the caches, at an odd alignment and length.
    x = torch.randn(9_000_011)[1:] * 40
    for view, axis in ((x, None), (x[: 3000 * 3000].view(3000, 3000), 0), (x[: 3000 * 3000].view(3000, 3000), 1)):
        check(view, axis, *INT8)


@pytest.mark.parametrize(("qmin", "qmax"), [(-32768, 32767), (0, 65535), (-5, 3), (7, 9)])
def test_wide_and_odd_ranges(qmin: int, qmax: int, device: torch.device) -> None:
    scale, zero_point = parameters(None, qmin, qmax)
    x = strategies.around_bins((501,), scale, zero_point, None, qmin, qmax, 0).to(device)
    expected, _ = reference.fake_quantize(x, scale, zero_point, None, qmin, qmax)
    assert_same(ops.fake_quantize(x, scale.to(device), zero_point.to(device), None, qmin, qmax).cpu(), expected)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_input_matches_the_reference(data: st.DataObject) -> None:
    shape = data.draw(strategies.shapes())
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1)) if shape else None
    qmin, qmax = data.draw(strategies.integer_ranges())
    count = 1 if axis is None else shape[axis]
    scale = torch.tensor(data.draw(st.lists(strategies.scales(), min_size=count, max_size=count)))
    zero_point = torch.tensor(
        data.draw(st.lists(st.integers(qmin, qmax), min_size=count, max_size=count)), dtype=torch.int32
    )
    x = strategies.around_bins(shape, scale, zero_point, axis, qmin, qmax, data.draw(st.integers(0, 2**31)))
    x = x.to(data.draw(st.sampled_from(strategies.FLOAT_TYPES)))
    _name, view = data.draw(st.sampled_from(sorted(strategies.layouts(x).items(), key=lambda item: item[0])))
    expected, inside = reference.fake_quantize(view, scale, zero_point, axis, qmin, qmax)
    x_hat, mask = ops.fake_quantize_mask(view, scale, zero_point, axis, qmin, qmax)
    assert_same(x_hat, expected)
    assert_same(unpack(mask, x_hat), inside)
    assert_same(
        ops.quantize(view, scale, zero_point, axis, qmin, qmax),
        reference.quantize(view, scale, zero_point, axis, qmin, qmax),
    )


# --- Properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5])
def test_ties_go_to_the_even_integer(exponent: int, device: torch.device) -> None:
    # k + 0.5 times a power of two is exact, so is the quotient.
    scale = torch.tensor([2.0**exponent], device=device)
    k = torch.arange(-120, 120, device=device)
    q = ops.quantize((k + 0.5) * scale, scale, torch.zeros(1, dtype=torch.int32, device=device), None, *INT8)
    assert torch.equal(q.long(), torch.where(k % 2 == 0, k, k + 1))


def test_ties_are_decided_before_the_zero_point_is_added(device: torch.device) -> None:
    # 0.5 rounds to 0 and then becomes 3; rounding 3.5 would give 4.
    q = ops.quantize(
        torch.tensor([0.5, 1.5], device=device),
        torch.ones(1, device=device),
        torch.tensor([3], dtype=torch.int32, device=device),
        None,
        *INT8,
    )
    assert q.tolist() == [3, 5]


def test_divides_where_the_inverse_would_differ(device: torch.device) -> None:
    generator = np.random.default_rng(0)
    scale = generator.uniform(0.001, 1, 200_000).astype(np.float32)
    x = ((generator.integers(-100, 100, scale.size) + 0.5) * scale).astype(np.float32)
    divided, multiplied = np.rint(x / scale), np.rint(x * (np.float32(1) / scale))
    differs = divided != multiplied
    assert differs.sum() > 1000, "the inputs must tell the two formulas apart"
    x, scale = torch.from_numpy(x[differs]).to(device), torch.from_numpy(scale[differs]).to(device)
    zero_point = torch.zeros(scale.shape, dtype=torch.int32, device=device)
    q = ops.quantize(x, scale, zero_point, 0, *INT8)
    assert np.array_equal(q.cpu().numpy(), divided[differs])


@settings(deadline=None, max_examples=100)
@given(scale=strategies.scales(), limits=strategies.integer_ranges(), data=st.data())
def test_grid_values_come_back_and_errors_are_bounded(
    scale: float, limits: tuple[int, int], data: st.DataObject
) -> None:
    qmin, qmax = limits
    zero_point = torch.tensor([data.draw(st.integers(qmin, qmax))], dtype=torch.int32)
    s = torch.tensor([scale])
    q = torch.arange(qmin, qmax + 1)
    grid = (q - zero_point) * s
    assert torch.equal(ops.fake_quantize(grid, s, zero_point, None, qmin, qmax), grid)
    assert torch.equal(ops.quantize(grid, s, zero_point, None, qmin, qmax).long(), q)
    assert ops.fake_quantize(torch.zeros(3), s, zero_point, None, qmin, qmax).tolist() == [0.0, 0.0, 0.0]

    x = strategies.around_bins((999,), s, zero_point, None, qmin, qmax, data.draw(st.integers(0, 2**31)))
    x_hat = ops.fake_quantize(x, s, zero_point, None, qmin, qmax)
    assert torch.equal(ops.fake_quantize(x_hat, s, zero_point, None, qmin, qmax), x_hat)
    inside = (x >= grid[0]) & (x <= grid[-1])
    error = (x.double() - x_hat.double()).abs()[inside]
    assert (error <= scale / 2 * (1 + 2.0**-23) + x.double().abs()[inside] * 2.0**-23).all()
    assert torch.equal(x_hat[x > grid[-1]], grid[-1].expand(int((x > grid[-1]).sum())))
    assert torch.equal(x_hat[x < grid[0]], grid[0].expand(int((x < grid[0]).sum())))


def test_negative_zero_becomes_zero(device: torch.device) -> None:
    x = torch.tensor([-0.0, -0.1], device=device)
    x_hat = ops.fake_quantize(
        x, torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device), None, *INT8
    )
    assert not torch.signbit(x_hat).any()


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, device: torch.device) -> None:
    # 37 values reach the vector loop and its tail.
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, 1e4, -1e4] * 6 + [float("nan")], dtype=dtype, device=device
    )
    scale, zero_point = torch.tensor([0.5], device=device), torch.tensor([3], dtype=torch.int32, device=device)
    x_hat, mask = ops.fake_quantize_mask(x, scale, zero_point, None, *INT8)
    nan, inf = x.isnan(), x.isinf()
    assert x_hat[nan].isnan().all()
    assert x_hat[~nan].isfinite().all()
    assert set(x_hat[inf].tolist()) == {(127 - 3) * 0.5, (-128 - 3) * 0.5}
    inside = unpack(mask, x_hat)
    assert not inside[(nan | inf).cpu()].any()
    assert inside[(x == 0).cpu()].all()
    q = ops.quantize(x, scale, zero_point, None, *INT8)
    assert (q[nan] == 127).all()
    assert (q[x == float("inf")] == 127).all()
    assert (q[x == -float("inf")] == -128).all()


def test_float64_keeps_its_precision(device: torch.device) -> None:
    # In float32 the quotient would round onto the tie, and 1/3 would lose half of its digits.
    scale = torch.tensor([1 / 3], dtype=torch.float64, device=device)
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.tensor([0.5 + 1e-12, 1.5 - 1e-12], dtype=torch.float64, device=device) / 3
    assert ops.quantize(x, scale, zero_point, None, *INT8).tolist() == [1, 1]
    assert ops.fake_quantize(x, scale, zero_point, None, *INT8).tolist() == [1 / 3, 1 / 3]


def test_quantize_types_and_relabelling(device: torch.device) -> None:
    # int8 with zero point z and uint8 with z + 128 are one grid.
    x = torch.randn(3, 50, device=device) * 30
    scale, zero_point = torch.tensor([0.3], device=device), torch.tensor([-7], dtype=torch.int32, device=device)
    signed = ops.quantize(x, scale, zero_point, None, -128, 127)
    unsigned = ops.quantize(x, scale, zero_point + 128, None, 0, 255)
    assert signed.dtype == torch.int8
    assert unsigned.dtype == torch.uint8
    assert torch.equal(signed.int() + 128, unsigned.int())
    assert torch.equal(
        ops.fake_quantize(x, scale, zero_point, None, -128, 127),
        ops.fake_quantize(x, scale, zero_point + 128, None, 0, 255),
    )
    dequantized = (signed.int() - zero_point) * scale
    assert torch.equal(dequantized, ops.fake_quantize(x, scale, zero_point, None, -128, 127))


def test_memory_format_is_kept(device: torch.device) -> None:
    scale, zero_point = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.randn(2, 3, 4, 5, device=device)
    for view in (x, x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2)):
        assert ops.fake_quantize(view, scale, zero_point, None, *INT8).stride() == view.stride()
        assert ops.quantize(view, scale, zero_point, None, *INT8).stride() == view.stride()


# --- Instruction sets -------------------------------------------------------------------------------------------------


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 3, 160), (217, 131), (64, 1, 3, 3), (3, 3, 32, 31), (200_003,)], ids=str)
def test_instruction_sets_agree_in_every_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -0.0, 3e38]).to(dtype)
    for axis in (None, *range(len(shape))):
        scale, zero_point = parameters(None if axis is None else shape[axis], *INT8)
        x = inputs_for(shape, axis, *INT8, dtype)
        state = (
            torch.full_like(scale, float("inf")),
            torch.full_like(scale, -float("inf")),
            scale.clone(),
            zero_point.clone(),
            torch.zeros(1, dtype=torch.int64),
        )
        observed = x.clone()
        x.view(-1)[3 : 3 + len(special)] = special
        for view in strategies.layouts(x).values():
            results = {}
            for name in available_instruction_sets():
                _core.set_instruction_set(name)
                x_hat, mask = ops.fake_quantize_mask(view, scale, zero_point, axis, *INT8)
                grad = ops.fake_quantize_backward(view.clone(), mask, x_hat.stride())
                q = ops.quantize(view, scale, zero_point, axis, *INT8)
                own = [s.clone() for s in state]
                y = ops.observe_fake_quantize(observed, *own, axis, 0.1, *INT8, False)
                results[name] = [bits_of(t) for t in (x_hat, mask, grad, q, y, *own)]
            for name, tensors in results.items():
                assert all(map(torch.equal, tensors, results["plain"])), name


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", available_instruction_sets())
def test_all_65536_patterns(name: str, dtype: torch.dtype) -> None:
    _core.set_instruction_set(name)
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    # A fine grid with the widest range passes small values through, a coarse one the large ones.
    for exponent in range(-26, 20, 3):
        arguments = torch.tensor([2.0**exponent * 1.1]), torch.zeros(1, dtype=torch.int32), None, -32768, 32767
        expected, inside = reference.fake_quantize(x, *arguments)
        x_hat, mask = ops.fake_quantize_mask(x, *arguments)
        assert_same(x_hat, expected)
        assert_same(unpack(mask, x_hat), inside)
        # The gradient passes through bit by bit where the mask says so, signalling NaNs included.
        grad = ops.fake_quantize_backward(x, mask, x.stride())
        assert torch.equal(bits_of(grad), torch.where(inside, bits_of(x), 0))
        # The tail of a vector goes another way than its body.
        for start, stop in ((0, 65529), (7, 65536), (31743, 31750), (64500, 64503)):
            part, _ = ops.fake_quantize_mask(x[start:stop], *arguments)
            assert torch.equal(bits_of(part), bits_of(x_hat[start:stop]))


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=re.escape("[set_instruction_set] must be one of plain, avx2 and avx512")):
        _core.set_instruction_set("sse9")


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
def test_gradient_is_straight_through_and_clipped(dtype: torch.dtype, device: torch.device) -> None:
    for shape, axis in itertools.product([(5, 4, 3, 160), (217, 13)], (None, 0, 1)):
        x = inputs_for(shape, axis, *INT8, dtype)
        scale, zero_point = parameters(None if axis is None else shape[axis], *INT8)
        _, inside = reference.fake_quantize(x, scale, zero_point, axis, *INT8)
        assert 0 < inside.sum() < inside.numel()
        for view in strategies.layouts(x).values():
            leaf = view.to(device).detach().requires_grad_()
            y = ops.fake_quantize(leaf, scale.to(device), zero_point.to(device), axis, *INT8)
            upstream = torch.randn(shape).to(dtype) * 3 + 7
            (grad,) = torch.autograd.grad(y, leaf, upstream.to(device))
            assert_same(grad.cpu(), torch.where(inside, upstream, torch.zeros((), dtype=dtype)))


def test_gradient_of_expanded_and_channels_last_upstream(device: torch.device) -> None:
    scale, zero_point = torch.tensor([0.1], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = (torch.randn(2, 5, 6, 7, device=device) * 10).requires_grad_()
    inside = reference.fake_quantize(x, scale, zero_point, None, *INT8)[1].to(device)
    y = ops.fake_quantize(x, scale, zero_point, None, *INT8)
    (grad,) = torch.autograd.grad(y.sum() * 2.5, x, retain_graph=True)
    assert torch.equal(grad, inside * 2.5)
    upstream = torch.randn_like(x).to(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, torch.where(inside, upstream, 0.0))
    assert grad.stride() == x.stride()


def test_gradient_leaves_the_upstream_gradient_alone(device: torch.device) -> None:
    scale, zero_point = torch.tensor([0.01], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.randn(40, 50, device=device, requires_grad=True)
    inside = reference.fake_quantize(x, scale, zero_point, None, *INT8)[1].to(device)
    seen = []
    y = ops.fake_quantize(x, scale, zero_point, None, *INT8)
    y.retain_grad()
    y.register_hook(lambda grad: seen.append(grad.clone()))
    upstream = torch.randn_like(x)
    before = upstream.clone()
    (y * 1.0).backward(upstream)
    assert torch.equal(upstream, before)
    assert torch.equal(y.grad, before)
    assert torch.equal(seen[0], before)
    assert torch.equal(x.grad, torch.where(inside, before, 0.0))


def test_chain_of_two_and_shared_gradients(device: torch.device) -> None:
    # The gradient that reaches the first is also the one that reaches its sibling: neither may see the other's mask.
    scale, zero_point = torch.tensor([0.01], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.linspace(-4, 4, 1001, device=device, requires_grad=True)
    z = torch.zeros_like(x).requires_grad_()
    total = ops.fake_quantize(x, scale, zero_point, None, *INT8) + ops.fake_quantize(z, scale, zero_point, None, *INT8)
    upstream = torch.linspace(1, 2, 1001, device=device)
    (total * 1.0).backward(upstream)
    assert torch.equal(z.grad, upstream)
    inside = reference.fake_quantize(x, scale, zero_point, None, *INT8)[1].to(device)
    assert torch.equal(x.grad, torch.where(inside, upstream, 0.0))


def test_gradient_is_masked_in_place_where_nobody_else_holds_it() -> None:
    scale, zero_point = torch.tensor([0.01]), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(64, 50, requires_grad=True)
    inside = reference.fake_quantize(x, scale, zero_point, None, *INT8)[1]
    upstream = torch.randn(64, 50)

    def operators(keep: bool) -> set[str]:
        y = ops.fake_quantize(x, scale, zero_point, None, *INT8)
        held = []
        if keep:
            y.register_hook(held.append)
        z = y * 2.0  # its backward makes the gradient of y, which only the engine holds
        x.grad = None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            z.backward(upstream)
        assert torch.equal(x.grad, torch.where(inside, upstream * 2.0, 0.0))
        assert not keep or torch.equal(held[0], upstream * 2.0)
        return {event.name for event in profile.events() if event.name.startswith("rarefy::")}

    assert operators(keep=False) == {"rarefy::fake_quantize_backward_"}
    assert operators(keep=True) == {"rarefy::fake_quantize_backward"}


def test_second_derivative(device: torch.device) -> None:
    # The gradient is linear in the upstream gradient (by the mask) and flat in x.
    scale, zero_point = torch.tensor([0.1], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.linspace(-20, 20, 101, device=device, requires_grad=True)
    inside = reference.fake_quantize(x, scale, zero_point, None, *INT8)[1].to(device)
    y = ops.fake_quantize(x, scale, zero_point, None, *INT8)
    upstream = torch.randn_like(x).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    direction = torch.randn_like(x)
    second_x, second_upstream = torch.autograd.grad(grad, (x, upstream), direction, allow_unused=True)
    assert second_x is None or not second_x.any()
    assert torch.equal(second_upstream, torch.where(inside, direction, 0.0))


def test_gradient_goes_to_the_input_only(device: torch.device) -> None:
    scale = torch.tensor([0.1], device=device, requires_grad=True)
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    x = torch.randn(5, device=device, requires_grad=True)
    ops.fake_quantize(x, scale, zero_point, None, *INT8).sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    assert not ops.fake_quantize(x.detach(), scale, zero_point, None, *INT8).requires_grad
    assert not ops.quantize(x, scale, zero_point, None, *INT8).requires_grad
    with torch.no_grad():
        assert not ops.fake_quantize(x, scale, zero_point, None, *INT8).requires_grad


def test_backward_saves_one_bit_per_element() -> None:
    x = torch.randn(1024, 100, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.fake_quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, *INT8)
    assert sum(t.nbytes for t in saved) == 1024 * 100 / 8


# --- Errors -----------------------------------------------------------------------------------------------------------

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("function", ["fake_quantize", "fake_quantize_mask", "quantize"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(4, 3, dtype=torch.int32)},
            TypeError,
            "input must be float32, float64, bfloat16 or float16, got Int",
        ),
        ({"x": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "got ComplexFloat"),
        ({"axis": 2}, IndexError, "axis must be in [-2, 2) for an input of 2 dimensions, got 2"),
        ({"axis": -3}, IndexError, "axis must be in [-2, 2) for an input of 2 dimensions, got -3"),
        ({"x": torch.tensor(1.0), "axis": 0}, IndexError, "axis must be in [0, 0) for an input of 0 dimensions, got 0"),
        ({"scale": torch.ones(1, dtype=torch.float16)}, TypeError, "scale must be float32 or float64, got Half"),
        ({"zero_point": torch.zeros(1)}, TypeError, "zero_point must be int32, got Float"),
        ({"scale": torch.ones(2)}, ValueError, "scale must have 1 element (one for the tensor), got 2"),
        ({"zero_point": torch.zeros(0, dtype=torch.int32)}, ValueError, "zero_point must have 1 element"),
        ({"axis": 0}, ValueError, "scale must have shape [4] (one per index of axis 0), got [1]"),
        (
            {"axis": -1, "scale": torch.ones(3)},
            ValueError,
            "zero_point must have shape [3] (one per index of axis 1), got [1]",
        ),
        (
            {"axis": 0, "scale": torch.ones(4, 1)},
            ValueError,
            "scale must have shape [4] (one per index of axis 0), got [4, 1]",
        ),
        ({"scale": torch.tensor([0.0])}, ValueError, "scale must be finite and positive, got 0 at index 0"),
        ({"scale": torch.tensor([-0.5])}, ValueError, "scale must be finite and positive, got -0.5 at index 0"),
        ({"scale": torch.tensor([float("nan")])}, ValueError, "scale must be finite and positive, got nan at index 0"),
        ({"scale": torch.tensor([float("inf")])}, ValueError, "scale must be finite and positive, got inf at index 0"),
        ({"scale": torch.tensor([1e300], dtype=torch.float64)}, ValueError, "scale must be finite and positive"),
        ({"scale": torch.tensor([1e-300], dtype=torch.float64)}, ValueError, "scale must be finite and positive"),
        (
            {"axis": 1, "scale": torch.tensor([1.0, 1.0, -1.0]), "zero_point": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "scale must be finite and positive, got -1 at index 2",
        ),
        ({"zero_point": ZERO + 128}, ValueError, "zero_point must be within [-128, 127], got 128 at index 0"),
        ({"zero_point": ZERO - 129}, ValueError, "zero_point must be within [-128, 127], got -129 at index 0"),
        ({"qmin": 127}, ValueError, "must have -32768 <= qmin < qmax <= 65535, got qmin 127 and qmax 127"),
        ({"qmin": 5, "qmax": 4}, ValueError, "got qmin 5 and qmax 4"),
        ({"qmin": -32769}, ValueError, "got qmin -32769 and qmax 127"),
        ({"qmax": 65536}, ValueError, "got qmin -128 and qmax 65536"),
    ],
)
def test_errors(function: str, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.ones(4, 3),
        "scale": ONE,
        "zero_point": ZERO,
        "axis": None,
        "qmin": -128,
        "qmax": 127,
    } | change
    expected = "[quantize] " if function == "quantize" else "[fake_quantize] "
    with pytest.raises(error, match=re.escape(expected) + ".*" + re.escape(message)):
        getattr(ops, function)(**arguments)


@pytest.mark.parametrize(("qmin", "qmax"), [(-129, 0), (-1, 128), (0, 256)])
def test_quantize_range_must_fit_a_byte(qmin: int, qmax: int) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"[quantize] the range must fit int8 or uint8, got [{qmin}, {qmax}]")
    ):
        ops.quantize(torch.ones(3), ONE, ZERO, None, qmin, qmax)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grad": torch.ones(64, dtype=torch.int32)},
            TypeError,
            "grad must be float32, float64, bfloat16 or float16, got Int",
        ),
        (
            {"mask": torch.zeros(7, dtype=torch.uint8)},
            ValueError,
            "mask must hold 8 bytes for 64 elements, got 7 of Byte",
        ),
        (
            {"mask": torch.zeros(8, dtype=torch.int8)},
            ValueError,
            "mask must hold 8 bytes for 64 elements, got 8 of Char",
        ),
        ({"mask": torch.zeros(16, dtype=torch.uint8)[::2]}, ValueError, "mask must be contiguous"),
        ({"strides": [0]}, ValueError, "strides must be those of a dense tensor of shape [64], got [0]"),
        ({"strides": [2]}, ValueError, "strides must be those of a dense tensor of shape [64], got [2]"),
        ({"strides": [64, 1]}, ValueError, "strides must be those of a dense tensor of shape [64], got [64, 1]"),
    ],
)
def test_backward_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"grad": torch.ones(64), "mask": torch.zeros(8, dtype=torch.uint8), "strides": [1]} | change
    with pytest.raises(error, match=re.escape("[fake_quantize_backward] " + message)):
        ops.fake_quantize_backward(**arguments)
