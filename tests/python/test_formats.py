"""Rounding to formats: groups, blocks and tokens of integers, minifloats, MX, NVFP4, NF4, against plain loops."""

import itertools
import re

import format_reference as reference
import numpy as np
import pytest
import torch
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import choose_qparams
from strategies import FLOAT_TYPES, layouts

from rarefy import _core

ops = torch.ops.rarefy

#: axis and block: the tensor, channels, groups along each kind of axis, blocks, tokens.
SHARINGS = [(None, []), (0, []), (1, []), (-1, [3]), (0, [2]), (1, [4]), (-1, [-1]), (-1, [2, 3]), (-1, [100, 5])]

#: Elements on numbers and between them, of all sizes, zeros of both signs, beyond both ends.
SHAPES = [(5, 7), (2, 6, 4, 5), (3, 8, 33), (1, 1), (4, 0, 3), (0, 5)]


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-12, 6, shape, generator=generator).double())
    halves = torch.round(x * 4) / 4  # ties of many grids
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, halves, x)
    return x.to(dtype)


def special(x: torch.Tensor) -> torch.Tensor:
    """A NaN, infinities and zeros of both signs put in."""
    x = x.clone()
    for place, value in zip(range(0, x.numel(), 3), itertools.cycle([float("nan"), torch.inf, -0.0, -torch.inf, 0.0])):
        x.view(-1)[place] = value
    return x


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit but those of a NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    where = ~expected.isnan()
    assert torch.equal(torch.signbit(actual)[where], torch.signbit(expected)[where])


def fits(shape: tuple[int, ...], axis: int | None, block: list[int]) -> bool:
    if axis is not None and not -len(shape) <= axis < len(shape):
        return False
    return all(shape[axis - i] != 0 for i in range(len(block))) if block else True


def some_scales(x: torch.Tensor, axis: int | None, block: list[int], seed: int = 1) -> torch.Tensor:
    shape = reference.scale_shape(x.shape, axis, block)
    return torch.exp2(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3)


# --- Given scales ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_of_integers(shape, axis, block, dtype):
    if not fits(shape, axis, block):
        return
    x = special(data(shape, dtype))
    scale = some_scales(x, axis, block)
    zero_point = torch.randint(-3, 4, scale.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    expected = reference.integers(x, scale.numpy(), zero_point.numpy(), axis, block, -8, 7)
    same(ops.fake_quantize_group(x, scale, zero_point, axis, block, -8, 7), expected)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
@pytest.mark.parametrize("name", reference.MINIFLOATS)
def test_minifloats_with_scales(name, axis, block, dtype):
    e, m, bias, specials = reference.MINIFLOATS[name]
    for shape in [(5, 7), (2, 6, 4, 5)]:
        x = special(data(shape, dtype))
        scale = some_scales(x, axis, block)
        for saturate in (True,) if specials == "none" else (True, False):
            expected = reference.with_scales(
                x,
                scale.numpy(),
                axis,
                block,
                lambda y, _, s=saturate: reference.to_minifloat(y, e, m, bias, specials, s),
            )
            same(ops.cast_minifloat(x, scale, axis, block, e, m, bias, specials, saturate), expected)


@pytest.mark.parametrize(("axis", "block"), [(1, []), (-1, [3]), (1, [4]), (-1, [2, 3]), (-1, [-1])])
def test_layouts_give_the_same_values_and_keep_their_strides(axis, block):
    x = data((2, 6, 4, 5))
    scale = some_scales(x, axis, block)
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    calls = {
        "group": lambda x: ops.fake_quantize_group(x, scale, zero_point, axis, block, -8, 7),
        "minifloat": lambda x: ops.cast_minifloat(x, scale, axis, block, 4, 3, 7, "nan"),
        "dynamic": lambda x: ops.fake_quantize_dynamic(x, axis, block, -8, 7, False),
        "dynamic minifloat": lambda x: ops.cast_minifloat_dynamic(x, axis, block, 2, 1, 1, "none"),
    }
    if len(block) == 1 and block != [-1]:
        calls["mx"] = lambda x: ops.fake_quantize_mx(x, "e4m3", block[0], axis)
        calls["nf4"] = lambda x: ops.fake_quantize_nf4(x, block[0], 4, axis)
    for name, call in calls.items():
        expected = call(x)
        for layout, view in layouts(x).items():
            y = call(view)
            assert torch.equal(y, expected), (name, layout)
            assert y.stride() == torch.empty_like(view).stride(), (name, layout)


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_agree_in_every_bit(dtype):
    x = special(data((37, 129), dtype))
    scale = some_scales(x, -1, [10])
    zero_point = torch.ones(scale.shape, dtype=torch.int32)
    channel = some_scales(x, 1, [])
    grad = data((37, 129), dtype, seed=5)
    results = {}
    for isa in available_instruction_sets():
        _core.set_instruction_set(isa)
        results[isa] = [
            ops.fake_quantize_group(x, scale, zero_point, -1, [10], -8, 7),
            ops.cast_minifloat(x, scale, -1, [10], 5, 2, 15, "ieee", False),
            ops.cast_minifloat(x, channel, 1, [], 2, 3, 1, "none"),
            ops.fake_quantize_group(x, channel, zero_point.new_zeros(129), 1, [], 0, 15),
            ops.fake_quantize_dynamic(x, -1, [10], 0, 255, False),
            ops.cast_minifloat_dynamic(x, -1, [4, 9], 4, 3, 7, "nan"),
            ops.fake_quantize_mx(x, "e3m2"),
            ops.fake_quantize_mx(x, "int8", 7),
            ops.fake_quantize_nvfp4(x),
            ops.fake_quantize_nf4(x),
            ops.fake_quantize_nf4(x, 8, 16),
            ops.fake_quantize_group_backward(grad, x, scale, zero_point, -1, [10], -8, 7),
            ops.cast_minifloat_backward(grad, x, channel, 1, [], 2, 1, 1, "none"),
            *ops.block_range(x, -1, [10]),
        ]
    plain = results.pop("plain")
    for isa, found in results.items():
        for i, (a, b) in enumerate(zip(found, plain, strict=True)):
            bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
            nan = b.isnan()
            assert torch.equal(a.isnan(), nan), (isa, i)
            assert torch.equal(a.view(bits)[~nan], b.view(bits)[~nan]), (isa, i)


def test_large_tensors_stream_and_use_threads():
    """Past 32 MiB results bypass the caches; every thread has its stretch of blocks."""
    x = torch.randn(1 << 12, 2112)
    scale = torch.rand(1 << 12, 66) + 0.5
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    wide = scale.repeat_interleave(32, dim=1)
    expected = torch.clamp(torch.round(x / wide), -8, 7) * wide
    assert torch.equal(ops.fake_quantize_group(x, scale, zero_point, -1, [32], -8, 7), expected + 0.0)
    mx = ops.fake_quantize_mx(x, "int8")
    s = torch.exp2(torch.floor(torch.log2(x.view(1 << 12, 66, 32).abs().amax(-1)))).repeat_interleave(32, dim=1)
    assert torch.equal(mx.abs(), (torch.round(x.abs() / s * 64).clamp(max=127) / 64) * s)


# --- Scales from x ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
def test_dynamic_integers(axis, block, dtype):
    for shape, symmetric in itertools.product([(5, 7), (2, 6, 4, 5)], (True, False)):
        x = special(data(shape, dtype))
        qmin, qmax = (-8, 7) if symmetric else (0, 15)
        low, high = reference.ranges(x, axis, block)
        scale, zero = np.empty_like(low), np.zeros(low.shape, np.int32)
        for i in range(low.size):
            ends = (low.flat[i], high.flat[i]) if low.flat[i] <= high.flat[i] else (0.0, 0.0)
            scale.flat[i], zero.flat[i] = choose_qparams(*ends, qmin, qmax, symmetric)
        found_scale, found_zero = ops.group_qparams(x, axis, block, qmin, qmax, symmetric)
        assert np.array_equal(found_scale.numpy(), scale)
        assert np.array_equal(found_zero.numpy(), zero)
        expected = reference.integers(x, scale, zero, axis, block, qmin, qmax)
        same(ops.fake_quantize_dynamic(x, axis, block, qmin, qmax, symmetric), expected)
        if symmetric:
            wide = reference.up_to_power_of_two(scale)
            expected = reference.integers(x, wide, zero, axis, block, qmin, qmax)
            same(ops.fake_quantize_dynamic(x, axis, block, qmin, qmax, True, True), expected)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_dynamic_minifloats(name, axis, block, dtype):
    shape = reference.MINIFLOATS[name]
    x = special(data((2, 6, 4, 5), dtype))
    scale = reference.scale_of_largest(reference.largest(x, axis, block), reference.values_of(*shape)[-1])
    for power_of_two in (False, True):
        scale = reference.up_to_power_of_two(scale) if power_of_two else scale
        assert np.array_equal(ops.minifloat_scale(x, axis, block, *shape, power_of_two).numpy(), scale)
        expected = reference.with_scales(x, scale, axis, block, lambda y, _: reference.to_minifloat(y, *shape))
        same(ops.cast_minifloat_dynamic(x, axis, block, *shape, power_of_two), expected)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("element", [*reference.MINIFLOATS, "int8"])
def test_mx(element, dtype):
    for shape, block, axis in [((5, 70), 32, -1), ((3, 33, 4), 16, 1), ((2, 6, 4, 5), 3, -3), ((1,), 32, 0)]:
        x = special(data(shape, dtype))
        assert np.array_equal(
            ops.mx_scale(x, element, block, axis).numpy(), reference.mx_scale(x, element, block, axis)
        )
        same(ops.fake_quantize_mx(x, element, block, axis), reference.mx(x, element, block, axis))


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 2.0**-126, 1e-30, 1.0, 1e30, 3.4e38])
def test_mx_at_the_ends_of_float32(magnitude):
    x = data((4, 32)) / 64 * magnitude
    for element in (*reference.MINIFLOATS, "int8"):
        same(ops.fake_quantize_mx(x, element), reference.mx(x, element))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_nvfp4(dtype):
    for shape, block, axis in [((5, 40), 16, -1), ((3, 18, 4), 8, 1), ((1, 1), 16, -1)]:
        x = special(data(shape, dtype))
        same(ops.fake_quantize_nvfp4(x, None, block, axis), reference.nvfp4(x, block, axis))
    whole = ops.nvfp4_tensor_scale(x)
    assert torch.equal(ops.fake_quantize_nvfp4(x, whole).nan_to_num(), ops.fake_quantize_nvfp4(x).nan_to_num())
    scales = ops.nvfp4_scale(x, whole)
    assert torch.equal(scales.to(torch.float8_e4m3fn).float(), scales)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("scale_block", [0, 3, 256])
def test_nf4(scale_block, dtype):
    for shape, block, axis in [((5, 130), 64, -1), ((3, 18, 4), 8, 1), ((7,), 2, 0)]:
        x = special(data(shape, dtype))
        expected = reference.nf4_scale(x, block, scale_block, axis)
        assert np.array_equal(ops.nf4_scale(x, block, scale_block, axis).numpy(), expected)
        same(ops.fake_quantize_nf4(x, block, scale_block, axis), reference.nf4(x, block, scale_block, axis))


def test_values_of_formats_come_back_unchanged():
    """What lies on a format's numbers stays: twice is once."""
    x = data((6, 96))
    for call in (
        lambda x: ops.fake_quantize_mx(x, "e4m3"),
        lambda x: ops.fake_quantize_mx(x, "int8"),
        lambda x: ops.fake_quantize_nf4(x),
        lambda x: ops.cast_minifloat(x, torch.ones(1), None, [], 4, 3, 7, "nan"),
        lambda x: ops.fake_quantize_dynamic(x, -1, [16], -7, 7, True, True),
    ):
        once = call(x)
        assert torch.equal(call(once), once)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.data(),
    st.sampled_from(FLOAT_TYPES),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_axis_and_block(shape, draw, dtype, seed):
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    block = [draw.draw(st.sampled_from([-1, 1, 2, 3, 5, 40]))]
    if len(shape) >= 2 and draw.draw(st.booleans()):
        axis, block = -1, [draw.draw(st.sampled_from([1, 2, 5, -1])), block[0]]
    x = data(shape, dtype, seed)
    low, high = ops.block_range(x, axis, block)
    expected = reference.ranges(x, axis, block)
    assert np.array_equal(low.numpy(), expected[0])
    assert np.array_equal(high.numpy(), expected[1])
    scale = reference.scale_of_largest(reference.largest(x, axis, block), 6.0)
    wanted = reference.with_scales(
        x, scale, axis, block, lambda y, _: reference.to_minifloat(y, *reference.MINIFLOATS["e2m1"])
    )
    same(ops.cast_minifloat_dynamic(x, axis, block, *reference.MINIFLOATS["e2m1"]), wanted)


# --- Stochastic rounding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_stochastic_rounding_follows_philox(dtype):
    x = data((5, 9), dtype)
    scale, zero_point = torch.full((5, 3), 0.25), torch.zeros(5, 3, dtype=torch.int32)
    seed = torch.tensor([12345678901, 3])
    y = ops.fake_quantize_group(x, scale, zero_point, -1, [3], -100, 100, True, seed)
    values = reference.computing(x)
    for i, index in enumerate(np.ndindex(5, 9)):
        u = values.dtype.type(reference.uniform(12345678901, 3, i))
        q = np.floor(values.dtype.type(values[index] / values.dtype.type(0.25)) + u)
        assert float(y[index]) == float(torch.tensor(min(max(q, -100), 100) * 0.25).to(dtype))


def test_random_numbers_are_those_of_philox():
    # The known answers of Random123.
    assert reference.philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert reference.philox(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_stochastic_minifloats_are_right_on_average(name):
    e, m, bias, specials = reference.MINIFLOATS[name]
    numbers = reference.values_of(e, m, bias, specials)
    x = torch.tensor([0.3, -1.3, 2.2, 5.1, 0.01]).repeat(20000, 1)
    y = ops.cast_minifloat(x, torch.ones(1), None, [], e, m, bias, specials, True, True, torch.tensor([1, 0]))
    for column in range(5):
        value = abs(float(x[0, column]))
        above = next(v for v in numbers if v >= value)
        below = max(v for v in numbers if v <= value)
        assert set(y[:, column].abs().tolist()) <= {below, above}
        deviation = (above - below) / 2 / 20000**0.5
        assert abs(float(y[:, column].double().mean()) - float(x[0, column])) < 5 * deviation + 1e-6


def test_stochastic_rounding_depends_on_seed_call_and_place_alone():
    x = data((64, 1024))
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    call = lambda x, seed, number: ops.fake_quantize_group(  # noqa: E731
        x, scale, zero_point, None, [], -128, 127, True, torch.tensor([seed, number])
    )
    expected = call(x, 5, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(call(x, 5, 1), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(call(x.t().contiguous().t(), 5, 1), expected)
    assert not torch.equal(call(x, 5, 2), expected)
    assert not torch.equal(call(x, 6, 1), expected)
    on_grid = torch.arange(-128.0, 128.0)
    assert torch.equal(call(on_grid, 9, 9), on_grid)


# --- Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("axis", "block"), SHARINGS)
def test_clipped_gradients(axis, block, dtype):
    x = special(data((2, 6, 4, 5), dtype)).requires_grad_()
    scale = some_scales(x, axis, block)
    zero_point = torch.randint(-3, 4, scale.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    grad = data((2, 6, 4, 5), dtype, seed=3)
    ops.fake_quantize_group(x, scale, zero_point, axis, block, -8, 7).backward(grad)
    which = reference.blocks_of(x.shape, axis, block)
    values, kind = reference.computing(x), reference.computing(x).dtype.type
    y = np.asarray(values / scale.numpy().astype(kind).reshape(-1)[which])
    q = np.rint(y) + zero_point.numpy().reshape(-1)[which]
    assert torch.equal(x.grad, torch.where(torch.from_numpy((q >= -8) & (q <= 7)), grad, torch.zeros_like(grad)))

    for name in ("e4m3", "e2m1", "e5m2"):
        x.grad = None
        shape = reference.MINIFLOATS[name]
        ops.cast_minifloat(x, scale, axis, block, *shape).backward(grad)
        numbers = reference.values_of(*shape)
        edge = numbers[-1] + (numbers[-1] - numbers[-2]) / 2
        even = (len(numbers) - 1) % 2 == 0
        inside = (np.abs(y) <= edge) if even else (np.abs(y) < edge)
        assert torch.equal(x.grad, torch.where(torch.from_numpy(inside), grad, torch.zeros_like(grad))), name


def test_gradients_that_pass():
    grad = data((4, 64), seed=3)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for call in (
        lambda x: ops.fake_quantize_group(x, one, zero, None, [], -1, 1, False),
        lambda x: ops.cast_minifloat(x, one, None, [], 2, 1, 1, "none", True, False),
        lambda x: ops.fake_quantize_dynamic(x, -1, [8], -8, 7, True),
        lambda x: ops.cast_minifloat_dynamic(x, -1, [8], 4, 3, 7, "nan"),
        lambda x: ops.fake_quantize_mx(x, "e2m1"),
        lambda x: ops.fake_quantize_nvfp4(x),
        lambda x: ops.fake_quantize_nf4(x, 64, 2),
    ):
        x = special(data((4, 64))).requires_grad_()
        y = call(x)
        y.backward(grad)
        assert torch.equal(x.grad, grad)
        assert not call(x.detach()).requires_grad


def test_second_derivative_is_that_of_the_mask():
    x = data((4, 6)).double().requires_grad_()
    scale = torch.ones(4, 2)
    zero_point = torch.zeros(4, 2, dtype=torch.int32)
    upstream = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda x: ops.fake_quantize_group(x, scale, zero_point, -1, [3], -2, 1),
        lambda x: ops.cast_minifloat(x, scale, -1, [3], 2, 1, 1, "none"),
    ):
        (first,) = torch.autograd.grad(call(x), x, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), upstream)
        assert torch.equal(second, (first != 0).double())


# --- Errors ------------------------------------------------------------------------------------------

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.fake_quantize_mx(torch.ones(4, 0), "e4m3"),
            ValueError,
            "[fake_quantize_mx] the axis of blocks must not be empty, got shape [4, 0]",
        ),
        (
            lambda: ops.fake_quantize_mx(torch.ones(4), "e9"),
            ValueError,
            "[fake_quantize_mx] element must be e4m3, e5m2, e3m2, e2m3, e2m1 or int8, got 'e9'",
        ),
        (
            lambda: ops.fake_quantize_mx(torch.ones(4), "e4m3", 0),
            ValueError,
            "[fake_quantize_mx] block sizes must be at least 1, or -1 for the whole axis, got 0",
        ),
        (
            lambda: ops.fake_quantize_mx(torch.ones(4), "e4m3", 2, 1),
            IndexError,
            "[fake_quantize_mx] axis must be in [-1, 1) for an input of 1 dimensions, got 1",
        ),
        (
            lambda: ops.fake_quantize_mx(torch.ones(4, dtype=torch.int32), "e4m3"),
            TypeError,
            "[fake_quantize_mx] input must be float32, float64, bfloat16 or float16, got Int",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4, 6), torch.ones(4, 3), ZERO.expand(4, 2), -1, [3], -8, 7),
            ValueError,
            "[fake_quantize_group] scale must have shape [4, 2], got [4, 3]",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO, None, [3], -8, 7),
            ValueError,
            "[fake_quantize_group] blocks must be along an axis, got none",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO, -1, [2, 2], -8, 7),
            ValueError,
            "[fake_quantize_group] blocks of rows and columns must be of the last two axes, got axis -1 of 1",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO, -1, [1, 1, 1], -8, 7),
            ValueError,
            "[fake_quantize_group] block must have at most 2 sizes, got 3",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO.long(), None, [], -8, 7),
            TypeError,
            "[fake_quantize_group] zero_point must be int32, got Long",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO + 9, None, [], -8, 7),
            ValueError,
            "[fake_quantize_group] zero_point must be within [-8, 7], got 9 at index 0",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE * 0, ZERO, None, [], -8, 7),
            ValueError,
            "[fake_quantize_group] scale must be finite and positive, got 0 at index 0",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO, None, [], 7, -8),
            ValueError,
            "[fake_quantize_group] must have -32768 <= qmin < qmax <= 65535, got qmin 7 and qmax -8",
        ),
        (
            lambda: ops.fake_quantize_group(torch.ones(4), ONE, ZERO, None, [], -8, 7, True, torch.ones(1)),
            ValueError,
            "[fake_quantize_group] seed must be two int64 numbers",
        ),
        (
            lambda: ops.cast_minifloat(torch.ones(4), ONE.half(), None, [], 4, 3, 7, "nan"),
            TypeError,
            "[cast_minifloat] scale must be float32 or float64, got Half",
        ),
        (
            lambda: ops.cast_minifloat(torch.ones(4), ONE, None, [], 4, 4, 7, "nan"),
            ValueError,
            "[cast_minifloat] a minifloat must have 1 to 7 exponent bits, 0 to 6 mantissa bits and 7 of both, got 4 and 4",
        ),
        (
            lambda: ops.cast_minifloat(torch.ones(4), ONE, None, [], 4, 3, 7, "inf"),
            ValueError,
            "[cast_minifloat] specials must be none, nan or ieee, got 'inf'",
        ),
        (
            lambda: ops.cast_minifloat(torch.ones(4), ONE, None, [], 4, 3, 7, "none", False),
            ValueError,
            "[cast_minifloat] a minifloat without NaN and infinity must saturate, got saturate false",
        ),
        (
            lambda: ops.fake_quantize_dynamic(torch.ones(4), None, [], 0, 255, False, True),
            ValueError,
            "[fake_quantize_dynamic] power_of_two needs a fixed zero point: symmetric must be true, got false",
        ),
        (
            lambda: ops.fake_quantize_nvfp4(torch.ones(4), ONE * torch.nan),
            ValueError,
            "[fake_quantize_nvfp4] tensor_scale must be finite and at least 2^-60, got nan",
        ),
        (
            lambda: ops.fake_quantize_nvfp4(torch.ones(4), torch.ones(2)),
            ValueError,
            "[fake_quantize_nvfp4] tensor_scale must be one float32, got 2 of Float",
        ),
        (
            lambda: ops.nf4_scale(torch.ones(4), 64, -1),
            ValueError,
            "[nf4_scale] scale_block must not be negative, got -1",
        ),
        (
            lambda: ops.cast_minifloat_backward(torch.ones(3), torch.ones(4), ONE, None, [], 4, 3, 7, "nan"),
            ValueError,
            "[cast_minifloat_backward] grad must have the input's shape [4] and dtype Float, got [3] and Float",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
