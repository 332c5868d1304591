"""quantize_mask, integer_linear and integer_conv: values, layouts and errors against exact integers."""

import itertools
import re

import integer_cases
import numpy as np
import pytest
import reference
import strategies
import torch
from conftest import available_instruction_sets
from integer_cases import conv, linear

from rarefy import _core

ops = torch.ops.rarefy
UINT8, INT8 = (0, 255), (-128, 127)


def unpack(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The packed mask as a bool tensor with the strides of ``like``."""
    assert mask.dtype == torch.uint8
    assert mask.numel() == (like.numel() + 63) // 64 * 8
    bits = torch.from_numpy(np.unpackbits(mask.cpu().numpy(), bitorder="little"))
    assert not bits[like.numel() :].any(), "the padding must be 0"
    return bits[: like.numel()].bool().as_strided(like.shape, like.stride())


def parameters(count: int, qmin: int, qmax: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = integer_cases.generator(seed)
    scale = 10 ** (torch.rand(count, generator=g) * 4 - 3)
    return scale, torch.randint(qmin, qmax + 1, (count,), generator=g, dtype=torch.int32)


def multipliers(count: int) -> torch.Tensor:
    """Positive, negative, tiny, large, 0."""
    values = torch.tensor([1.5, -0.75, 1e-12, -1e-3, 3.0, 0.0, 1e6])
    return values.repeat(count // len(values) + 1)[:count].clone()


def check_quantize_mask(x: torch.Tensor, axis: int | None, limits: tuple[int, int], multiplied: bool) -> None:
    count = 1 if axis is None else x.shape[axis]
    scale, zero_point = parameters(count, *limits)
    # float64 has no integers of its own; every other type is exact in float32.
    values = x.float()
    multiplier = None
    if multiplied:
        multiplier = multipliers(count).to(x.device)
        shape = [-1 if axis is not None and d == axis % x.dim() else 1 for d in range(x.dim())]
        values = values * multiplier.reshape(shape)
    q, mask, used = ops.quantize_mask(x, scale.to(x.device), zero_point.to(x.device), axis, *limits, multiplier)
    index = reference.grid_index(values, scale, zero_point, axis)
    expected = reference.quantize(values, scale, zero_point, axis, *limits)
    assert q.dtype == expected.dtype
    assert torch.equal(q.cpu(), expected)
    inside = torch.from_numpy(np.asarray((index >= limits[0]) & (index <= limits[1])))
    assert torch.equal(unpack(mask, q), inside)
    if values.isnan().any():
        assert used.isnan().all()
    else:
        assert torch.equal(used.cpu(), scale)
    assert used.numel() == 0 or used.data_ptr() != scale.data_ptr()


# --- quantize_mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("dtype", strategies.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in strategies.ODD_SHAPES if len(s) > 0], ids=str)
def test_quantize_mask_of_every_shape_axis_and_type(shape, dtype, multiplied, device) -> None:
    for axis in (None, *range(-len(shape), len(shape))):
        for limits in (UINT8, INT8, (-7, 7), (0, 15)):
            scale, zero_point = parameters(1 if axis is None else shape[axis], *limits)
            x = strategies.around_bins(shape, scale, zero_point, axis, *limits, seed=1).to(dtype).to(device)
            check_quantize_mask(x, axis, limits, multiplied)


def test_quantize_mask_keeps_every_dense_layout(device) -> None:
    x = torch.randn(5, 4, 3, 16, generator=integer_cases.generator(0)).to(device)
    for name, view in strategies.layouts(x).items():
        for axis in (None, 0, 1, 3):
            check_quantize_mask(view, axis, INT8, multiplied=True)
        if view.is_contiguous() or name.startswith(("permuted", "channels_last")):
            q = ops.quantize_mask(view, torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device),
                                  None, *INT8, None)[0]  # fmt: skip
            assert q.stride() == view.stride()


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 63, 64, 5000, 69_999])
def test_quantize_mask_of_values_that_are_not_finite(special, position, device) -> None:
    x = torch.randn(70_000, device=device)
    x[position] = special
    check_quantize_mask(x, None, UINT8, multiplied=False)
    check_quantize_mask(x.reshape(100, 700), 1, INT8, multiplied=False)


def test_quantize_mask_of_a_product_that_is_nan(device) -> None:
    x = torch.tensor([[1.0, torch.inf], [2.0, 3.0]], device=device)
    grid = torch.ones(2, device=device), torch.zeros(2, dtype=torch.int32, device=device), 0, *INT8
    q, mask, used = ops.quantize_mask(x, *grid, torch.tensor([0.0, 1.0], device=device))
    assert q.tolist() == [[0, 127], [2, 3]]
    assert unpack(mask, q).tolist() == [[True, False], [True, True]]
    assert used.isnan().all()
    assert not ops.quantize_mask(x, *grid, torch.tensor([2.0, 1.0], device=device))[2].isnan().any()
    assert ops.quantize_mask(x[1:], *(g[:1] if torch.is_tensor(g) else g for g in grid),
                             torch.tensor([torch.nan], device=device))[2].isnan().all()  # fmt: skip


@pytest.mark.usefixtures("restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_instruction_sets_agree(dtype) -> None:
    scale, zero_point = parameters(37, *INT8)
    for shape, axis in (((37, 65), 0), ((65, 37), 1), ((3, 37, 5, 7), 1), ((3, 37), 1)):
        x = strategies.around_bins(shape, scale, zero_point, axis, *INT8, seed=3).to(dtype)
        layers = [
            linear((19,), (37, 21), relu=True, bf16=True).to(dtype=dtype),
            conv((2, 5, 9, 9), 8, relu=True, multiplied=True).to(dtype=dtype),
        ]
        results = {}
        for name in available_instruction_sets():
            _core.set_instruction_set(name)
            tensors = list(ops.quantize_mask(x, scale, zero_point, axis, *INT8, multipliers(37)))
            for layer in layers:
                live = layer.requiring("x", "weight")
                y = live.run()
                needed = [t for t in live.leaves().values() if t.requires_grad]
                tensors += [y.detach(), *torch.autograd.grad(y, needed, torch.ones_like(y))]
            results[name] = [t.contiguous().view(torch.uint8) for t in tensors]
        for name, tensors in results.items():
            assert all(map(torch.equal, tensors, results["plain"])), name


# --- Linear -----------------------------------------------------------------------------------------------------------


def assert_exact(layer: integer_cases.Layer) -> None:
    """Bit for bit: the sum as float32, times the product of scales, plus bias."""
    y = layer.run()
    assert y.dtype == torch.float32
    assert torch.equal(y, layer.expected(np.float32))


LINEAR = {
    "plain": {},
    "transposed": {"transposed": True},
    "relu": {"relu": True},
    "without_bias": {"bias": False},
    "per_tensor": {"per_channel": False, "relu": True},
    "per_tensor_transposed": {"per_channel": False, "transposed": True},
    "one_sample": {"leading": ()},
    "three_leading": {"leading": (2, 3, 4)},
    "no_rows": {"leading": (0,)},
    "no_rows_of_many": {"leading": (3, 0, 2), "relu": True},
    "one_row": {"leading": (1,)},
    "one_column": {"features": (1, 5)},
    "one_result": {"features": (9, 1), "relu": True},
    "one_everything": {"leading": (1,), "features": (1, 1)},
    "wide": {"leading": (33,), "features": (200, 130), "relu": True},
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_equals_exact_integers(case) -> None:
    assert_exact(linear(**LINEAR[case]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "narrow"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("w_narrow", [False, True])
def test_linear_on_every_grid(bits, signed, narrow, w_narrow) -> None:
    limits = strategies.integer_range(bits, signed, narrow), strategies.integer_range(bits, True, w_narrow)
    assert_exact(linear((6,), (11, 9), *limits))
    assert_exact(linear((6,), (11, 9), *limits, per_channel=False, transposed=True, relu=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_sum_of_the_largest_products(sign) -> None:
    k = 65_793
    x, weight = torch.full((18, k), 255.0), torch.full((3, k), -128.0 * sign).clamp(max=127)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    layer = integer_cases.Layer(x, weight, None, UINT8, INT8, one, zero, one)
    assert_exact(layer)
    assert layer.run()[0, 0] == np.float32(-k * 255 * 128 if sign == 1 else k * 255 * 127)
    # With the zero point at the other end, the same sums lie on the other side of 0.
    assert_exact(layer.to(x=x - 255, x_zero_point=zero + 255))
    assert_exact(layer.to(x=x - 128, x_limits=INT8))
    assert_exact(layer.to(x=x - 256, x_limits=INT8, x_zero_point=zero + 127))


def test_sums_that_float32_rounds() -> None:
    layer = linear((40,), (40_000, 7))
    layer = layer.to(x=layer.x.abs(), weight=layer.weight.abs())
    sums, _ = layer.integers()
    assert (np.abs(sums) > 2**24).any()
    assert (sums.astype(np.float32) != sums).any()
    assert_exact(layer)


def test_linear_of_every_layout() -> None:
    layer = linear((4, 6), (16, 5))
    for view in strategies.layouts(layer.x).values():
        assert torch.equal(layer.to(x=view).run(), layer.run())
    for view in strategies.layouts(layer.weight).values():
        assert torch.equal(layer.to(weight=view).run(), layer.run())


# --- Convolutions -----------------------------------------------------------------------------------------------------

# Those under "matmul" become matrix products of bytes, those under "onednn" oneDNN's convolution.
MATMUL = {
    "1d": {"size": (2, 3, 11), "kernel": (3,), "out": 40, "padding": 1},
    "1d_pointwise": {"size": (2, 5, 30), "kernel": (1,)},
    "1d_dilated": {"size": (2, 3, 17), "kernel": (4,), "out": 40, "dilation": 3, "stride": 2, "padding": 2},
    "2d_pointwise": {"size": (3, 6, 8, 7), "kernel": (1, 1)},
    "2d_wide": {"size": (1, 6, 5, 4), "out": 40, "padding": 1, "relu": True},
    "2d_strided": {"size": (2, 3, 9, 8), "out": 50, "stride": 2, "padding": 1, "channels_last": True},
    "2d_far_padding": {"size": (2, 3, 3, 2), "out": 90, "padding": 4},
    "2d_dilated": {"size": (2, 3, 9, 8), "out": 90, "dilation": 2, "padding": 2, "kernel": (3, 2)},
    "3d": {"size": (2, 3, 4, 5, 6), "kernel": (3, 2, 3), "padding": 1, "relu": True},
    "3d_strided": {"size": (2, 3, 4, 5, 6), "kernel": (2, 2, 2), "stride": 2, "dilation": 2, "channels_last": True},
    "no_samples": {"size": (0, 3, 5, 5)},
    "no_samples_1d": {"size": (0, 3, 5), "kernel": (3,), "relu": True},
    "per_tensor": {"size": (2, 3, 5, 5), "out": 40, "per_channel": False, "bias": False},
}
ONEDNN = {
    "1d": {"size": (3, 4, 40), "kernel": (3,), "padding": 1, "relu": True},
    "1d_grouped": {"size": (3, 4, 20), "kernel": (3,), "groups": 2, "stride": 2},
    "2d": {"size": (3, 4, 9, 7), "padding": 1},
    "2d_channels_last": {"size": (3, 4, 9, 7), "padding": 1, "channels_last": True, "relu": True},
    "2d_without_bias": {"size": (3, 4, 9, 7), "stride": 2, "dilation": 2, "bias": False, "relu": True},
    "2d_per_tensor": {"size": (3, 4, 9, 7), "per_channel": False},
    "2d_grouped": {"size": (2, 6, 6, 5), "groups": 3, "padding": 1},
    "depthwise": {"size": (2, 6, 9, 7), "groups": 6, "padding": 2, "dilation": 2},
    "pointwise_grouped": {"size": (2, 6, 5, 4), "groups": 2, "kernel": (1, 1)},
}
# One input channel in each group, where oneDNN's kernel reads what nothing has written (see ops/cpu/onednn.h): exact.
FLOATS = {
    "1d_far_padding": {"size": (2, 1, 40), "kernel": (2,), "out": 8, "padding": 2},
    "2d_far_padding": {"size": (2, 1, 28, 28), "out": 2, "padding": 4, "relu": True},
    "depthwise_far_padding": {"size": (2, 16, 7, 5), "out": 16, "kernel": (1, 2), "padding": [1, 0], "groups": 16},
    "depthwise_of_width_1": {"size": (2, 4, 7, 5), "out": 8, "kernel": (2, 3), "stride": [1, 3], "groups": 4},
    "depthwise_of_width_1_4x4": {
        "size": (2, 4, 4, 4), "out": 8, "kernel": (2, 3), "stride": [1, 3], "groups": 4, "relu": True
    },
    "large_kernel": {"size": (1, 2, 24, 25), "out": 2, "kernel": (24, 23), "stride": 3, "groups": 2},
}  # fmt: skip
CONV = {f"matmul_{name}": case for name, case in MATMUL.items()}
CONV |= {f"onednn_{name}": case for name, case in ONEDNN.items()}
CONV |= {f"floats_{name}": case for name, case in FLOATS.items()}
GRIDS = [(UINT8, (-127, 127)), (INT8, INT8), ((-7, 7), (-8, 7)), ((0, 15), (-1, 1))]


def check_conv(layer: integer_cases.Layer, exact: bool) -> None:
    y = layer.run()
    if exact:
        assert torch.equal(y, layer.expected(np.float32))
    error = (y.double() - layer.expected()).abs()
    assert (error <= layer.tolerance()).all(), f"largest excess {(error - layer.tolerance()).max()}"
    x, weight = layer.x, layer.weight
    in_float = integer_cases.CONVOLVE[weight.dim() - 2](x, weight, None, *layer.geometry)
    assert y.shape == in_float.shape
    if y.numel():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim(), torch.contiguous_format)
        wanted = last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
        assert y.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("case", CONV)
def test_conv_equals_exact_integers(case, grids, multiplied) -> None:
    options = dict(zip(("x_limits", "w_limits"), grids, strict=True), multiplied=multiplied)
    check_conv(conv(**CONV[case], **options), exact=not case.startswith("onednn"))


def test_conv_of_every_layout() -> None:
    for case in ("matmul_2d_wide", "onednn_2d", "onednn_2d_grouped", "matmul_2d_pointwise"):
        layer = conv(**CONV[case], multiplied=True)
        expected = layer.run()
        for view in strategies.layouts(layer.x).values():
            assert torch.equal(layer.to(x=view).run(), expected)
        for view in strategies.layouts(layer.weight).values():
            assert torch.equal(layer.to(weight=view).run(), expected)


def test_patches_are_written_out_in_parts() -> None:
    # 27 * 64 * 20^3 bytes a sample: four samples do not fit at once.
    layer = conv((5, 64, 20, 20, 20), 2, (3, 3, 3), padding=1)
    whole = layer.run()
    for n in range(5):
        assert torch.equal(layer.to(x=layer.x[n : n + 1]).run(), whole[n : n + 1])


# --- Types, NaN, state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, conv, lambda **o: conv((1, 4, 4, 4), 40, **o)])
def test_types_of_results(make) -> None:
    layer = make(relu=True)
    y = layer.run()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = layer.to(x=layer.x.to(dtype)).run()
        assert narrow.dtype == dtype
        exact = layer.to(x=layer.x.to(dtype), dtype=torch.float32).run()
        assert exact.dtype == torch.float32
        assert torch.equal(narrow, exact.to(dtype))
        assert torch.equal(layer.to(dtype=dtype).run(), y.to(dtype))
    assert torch.equal(layer.to(x=layer.x.double()).run(), y)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = layer.to(bias=layer.bias.to(dtype).float()).run()
        assert torch.equal(layer.to(bias=layer.bias.to(dtype)).run(), rounded)


@pytest.mark.parametrize("make", [linear, conv, lambda **o: conv((1, 4, 4, 4), 40, **o)])
@pytest.mark.parametrize("relu", [False, True])
def test_a_nan_in_the_input_makes_every_result_nan(make, relu) -> None:
    layer = make(relu=relu)
    layer.x.view(-1)[17] = torch.nan
    for dtype in (None, torch.bfloat16):
        live = layer.to(dtype=dtype).requiring("x", "weight", "bias")
        y = live.run()
        assert y.isnan().all()
        gx, gw = torch.autograd.grad(y, [live.x, live.weight], torch.ones_like(y))
        assert gx.flatten()[17] == 0
        assert gw.isnan().any()
    layer.x.view(-1)[17] = torch.inf
    assert torch.isfinite(layer.run()).all()


@pytest.mark.parametrize("make", [linear, conv])
def test_equal_for_threads_and_from_run_to_run(make) -> None:
    big = {"leading": (300,), "features": (300, 200)} if make is linear else {"size": (8, 32, 24, 24), "out": 48}
    layer = make(**big, relu=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(layer.run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_first_called_in_inference_mode() -> None:
    """In a process of its own: what an operator keeps from its first call must serve training too."""
    import subprocess
    import sys

    script = """
import torch, rarefy
from integer_cases import conv, linear
torch.set_default_dtype(torch.float64)
for make in (linear, conv, lambda: conv((1, 4, 4, 4), 40)):
    torch.set_default_dtype(torch.float32)
    layer = make()
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode():
        first = layer.run()
        assert first.dtype == torch.float32
    live = layer.requiring("x", "weight", "bias")
    y = live.run()
    assert torch.equal(y, first)
    y.sum().backward()
    assert live.x.grad.dtype == live.weight.grad.dtype == torch.float32
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=__file__.rsplit("/", 1)[0])


# --- Errors -----------------------------------------------------------------------------------------------------------

_L, _C = linear(), conv()
_F64 = torch.ones(1, dtype=torch.float64)
_INT = torch.zeros(1, dtype=torch.int32)
ERRORS = [
    (_L, {"x": _L.x.int()}, TypeError, "input must be float32, float64, bfloat16 or float16, got Int"),
    (_L, {"weight": _L.weight.int()}, TypeError, "weight must be float32, float64, bfloat16 or float16, got Int"),
    (_L, {"weight": torch.ones(3)}, ValueError, "weight must have 2 dimensions, got shape [3]"),
    (_L, {"weight": torch.ones(6, 0)}, ValueError, "weight must not be empty, got shape [6, 0]"),
    (_L, {"x": torch.ones(5, 3)}, ValueError, "input must have 7 features in its last dimension, got shape [5, 3]"),
    (_L, {"x": torch.tensor(1.0)}, ValueError, "input must have 7 features in its last dimension, got shape []"),
    (_L, {"x_limits": (-129, 127)}, ValueError, "the range must fit int8 or uint8, got [-129, 127]"),
    (_L, {"w_limits": (0, 255)}, ValueError, "the weight's range must be signed and fit int8, got [0, 255]"),
    (_L, {"x_scale": torch.ones(2)}, ValueError, "x_scale and x_zero_point must have 1 element, got 2 and 1"),
    (_L, {"w_scale": torch.ones(2)}, ValueError, "w_scale must have 1 or 6 elements, got shape [2]"),
    (_L, {"bias": torch.ones(5)}, ValueError, "bias must have shape [6], got [5]"),
    (_L, {"bias": torch.ones(6).int()}, TypeError, "bias must be float32, float64, bfloat16 or float16, got Int"),
    (_L, {"bias": torch.ones(6, device="meta")}, ValueError, "bias must be on the input's device cpu, got meta"),
    (_L, {"weight": _L.weight.to("meta")}, ValueError, "weight must be on the input's device cpu, got meta"),
    (_L, {"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16, got Double"),
    (_L, {"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16 or float16, got Char"),
    (_C, {"weight": torch.ones(6, 4)}, ValueError, "weight must have 3 to 5 dimensions, got shape [6, 4]"),
    (_C, {"geometry": ([1, 1], [0, 0], [1, 1], 4)}, ValueError, "groups must divide 6 output channels, got 4"),
    (_C, {"geometry": ([1, 1], [0, 0], [1, 1], 0)}, ValueError, "groups must divide 6 output channels, got 0"),
    (_C, {"geometry": ([1, 1], [0, 0], [1, 1], 2)}, ValueError, "input must have 4 dimensions and 8 channels"),
    (_C, {"geometry": ([1], [0, 0], [1, 1], 1)}, ValueError, "stride, padding and dilation must have 2 values, got 1, 2"),
    (_C, {"geometry": ([0, 1], [0, 0], [1, 1], 1)}, ValueError, "stride and dilation must be positive and padding not"),
    (_C, {"geometry": ([1, 1], [-1, 0], [1, 1], 1)}, ValueError, "stride and dilation must be positive and padding not"),
    (_C, {"geometry": ([1, 1], [0, 0], [1, 0], 1)}, ValueError, "stride and dilation must be positive and padding not"),
    (_C, {"geometry": ([2, 2], [0, 0], [4, 4], 1)}, ValueError, "the padded input must hold a window of 9 along axis 3, got 7"),
    (_C, {"x": torch.ones(3, 4, 0, 7)}, ValueError, "input must not be empty beside its batch, got shape [3, 4, 0, 7]"),
    (_C, {"multiplier": torch.ones(5)}, ValueError, "multiplier must have shape [6] (one per index of axis 0), got [5]"),
    (_C, {"multiplier": torch.ones(6, requires_grad=True)}, ValueError, "multiplier is a constant and must not require"),
    (_C, {"multiplier": torch.ones(6).int()}, TypeError, "multiplier must be float32, float64, bfloat16 or float16"),
]  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("layer", "changes", "kind", "message"), ERRORS)
def test_errors(layer, changes, kind, message, inference) -> None:
    wrong = layer.to(**changes)
    function = "integer_linear" if layer.geometry is None else "integer_conv"
    with torch.inference_mode(inference), pytest.raises(kind, match=re.escape(f"[{function}] {message}")):
        wrong.run()


@pytest.mark.parametrize("make", [linear, conv])
def test_errors_of_grids(make) -> None:
    layer = make()
    function = "integer_linear" if make is linear else "integer_conv"
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=re.escape("[quantize_mask] scale must be finite and positive, got")):
            layer.to(x_scale=torch.tensor([bad])).run()
    with pytest.raises(ValueError, match=re.escape("[quantize_mask] zero_point must be within [0, 255], got 256")):
        layer.to(x_zero_point=torch.tensor([256], dtype=torch.int32)).run()
    shifted = layer.to()
    shifted.w_zero_point[2] = -3
    with pytest.raises(ValueError, match=re.escape(f"[{function}] w_zero_point must be 0, got -3 at index 2")):
        shifted.run()


def test_a_sum_that_is_too_long() -> None:
    message = "an int32 sum must have at most 65793 products of bytes, got 65794"
    with pytest.raises(ValueError, match=re.escape(f"[integer_linear] {message}")):
        linear((1,), (65_794, 1)).run()
    with pytest.raises(ValueError, match=re.escape(f"[integer_conv] {message}")):
        conv((1, 65_794, 1), 1, (1,)).run()
    assert_exact(conv((1, 65_793, 1), 1, (1,)))


def test_groups_in_three_dimensions_are_refused() -> None:
    message = "[integer_conv] groups in three dimensions must execute simulated, got 2 groups"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        conv((1, 4, 3, 3, 3), kernel=(2, 2, 2), groups=2).run()


@pytest.mark.parametrize("make", [linear, conv])
def test_inner_operators_check_too(make) -> None:
    """They are reachable by name, and a compiled graph calls them."""
    q_x = torch.zeros((5, 7) if make is linear else (2, 4, 5, 5), dtype=torch.uint8)
    q_w = torch.zeros((6, 7) if make is linear else (6, 4, 3, 3), dtype=torch.int8)
    grid = torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.ones(6)
    how = (False,) if make is linear else ([1, 1], [0, 0], [1, 1], 1)
    name = make.__name__
    forward, backward = (getattr(ops, f"integer_{name}_{pass_}") for pass_ in ("forward", "backward"))
    y = forward(q_x, q_w, *grid, None, *how, False, torch.float32)[0]
    for device, function in itertools.product(("cpu", "meta"), (forward, backward)):

        def call(q_x=q_x, q_w=q_w, grid=grid, how=how, bias=None, grad=y, dtype=torch.float32, device=device,
                 function=function):  # fmt: skip
            if function is forward:
                tensors = [q_x, q_w, *grid, bias]
                rest = (*how, False, dtype)
            else:
                tensors = [grad, q_x, q_w, *grid]
                rest = (*how, False, [True, True])
            return function(*(t if t is None else t.to(device) for t in tensors), *rest)

        prefix = f"[integer_{name}_{'forward' if function is forward else 'backward'}]"
        call()
        bad = [
            ({"q_x": q_x.float()}, TypeError, "q_x must be uint8 or int8, got Float"),
            ({"q_w": q_w.byte()}, TypeError, "q_w must be int8, got Byte"),
            ({"grid": (_F64, *grid[1:])}, TypeError, "x_scale and w_scale must be float32, got Double and Float"),
            ({"grid": (grid[0], grid[1].long(), grid[2])}, TypeError, "x_zero_point must be int32, got Long"),
            ({"grid": (*grid[:2], torch.ones(4))}, ValueError, "w_scale must have 1 or 6 elements, got shape [4]"),
        ]
        if function is forward:
            bad += [
                ({"bias": torch.ones(2)}, ValueError, "bias must have shape [6], got [2]"),
                ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16, got Double"),
            ]
        else:
            bad += [({"grad": y[1:]}, ValueError, "grad must have shape")]
        if make is linear:
            bad += [({"q_x": q_x[:, 1:]}, ValueError, "q_x must have 7 columns, got shape [5, 6]")]
        else:
            bad += [({"how": ([1, 1], [0, 0], [9, 9], 1)}, ValueError, "the padded input must hold a window of 19")]
        for changes, kind, message in bad:
            with pytest.raises(kind, match=re.escape(f"{prefix} {message}")):
                call(**changes)
