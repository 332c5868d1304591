"""The operators of integer inference: bytes in and out, the kernel for any device, packed weights, opcheck."""

import itertools

import integer_reference as ref
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rarefy._core.quantization import clear_packed_weights, packed_weight_count

ops = torch.ops.rarefy
ANY_DEVICE = torch._C.DispatchKey.CompositeExplicitAutograd
FLOAT = (None, None, 0, 255)  # no output grid
GRIDS = [(0.02, 121, 0, 255), (0.03, -9, -128, 127), (0.25, 3, -8, 7), (0.05, 0, 0, 255), (0.4, 2, 0, 3)]


def grid(scale: float, zero_point: int, qmin: int, qmax: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32), qmin, qmax


def to_bytes(x: torch.Tensor, g: tuple) -> torch.Tensor:
    """The integers of the reference, as they are stored."""
    q = ref.quantize(x.numpy(), g[0].numpy(), g[1].numpy(), g[2], g[3])
    return torch.from_numpy((q + (128 if g[2] < 0 else 0)).astype(np.uint8))


def values(q: torch.Tensor, g: tuple) -> torch.Tensor:
    return (q.float() - (128 if g[2] < 0 else 0) - g[1]) * g[0]


CONVOLUTIONS = {
    "1d": ((2, 6, 17), (8, 3, 4), (2,), (1,), (2,), 2),
    "2d": ((2, 8, 9, 7), (12, 8, 3, 3), (2, 1), (1, 1), (1, 2), 1),
    "2d sides": ((2, 8, 9, 7), (12, 4, 2, 3), (1, 1), (1, 0, 2, 1), (1, 1), 2),
    "2d depthwise": ((1, 16, 8, 8), (16, 1, 3, 3), (1, 1), (1, 1), (1, 1), 16),
    "2d pointwise": ((3, 16, 5, 6), (4, 16, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    # One input channel in each group, where oneDNN's kernel reads what nothing has written (see ops/cpu/onednn.h).
    "1d far padding": ((2, 1, 40), (8, 1, 2), (1,), (2,), (1,), 1),
    "2d far padding": ((2, 1, 28, 28), (2, 1, 3, 3), (1, 1), (4, 4), (1, 1), 1),
    "2d depthwise far padding": ((2, 16, 7, 5), (16, 1, 1, 2), (1, 1), (1, 0), (1, 1), 16),
    "2d depthwise of width 1": ((2, 4, 7, 5), (8, 1, 2, 3), (1, 3), (0, 0), (1, 1), 4),
    "2d depthwise of width 1, 4x4": ((2, 4, 4, 4), (8, 1, 2, 3), (1, 3), (0, 0), (1, 1), 4),
    "3d": ((1, 4, 5, 6, 7), (6, 4, 2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 1),
    "3d groups": ((1, 4, 5, 6, 7), (6, 2, 2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 2),
}


def weight_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, shape).to(torch.int8), torch.rand(shape[0]) * 0.01 + 0.001, torch.randn(shape[0])


def layers() -> dict[str, tuple]:
    """A call without its input grid and what follows: operator, input, weight and its numbers, geometry."""
    torch.manual_seed(0)
    out = {"linear": ("quantized_linear", torch.randn(3, 5, 40), weight_of((24, 40)), ())}
    for name, (x_shape, w_shape, *geometry) in CONVOLUTIONS.items():
        out[name] = ("quantized_conv", torch.randn(x_shape), weight_of(w_shape), tuple(geometry))
    return out


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("relu", [False, True])
def test_bytes_are_those_of_the_floats(name, relu):
    op, x, weight, geometry = layers()[name]
    op = getattr(ops, op)
    for given, wanted in itertools.product(GRIDS, GRIDS):
        g, out = grid(*given), grid(*wanted)
        y = op(x, *weight, *g, *geometry, relu)
        assert y.dtype == torch.float32
        q = to_bytes(x, g)
        assert torch.equal(op(q, *weight, *g, *geometry, relu), y)
        for source in (x, q):
            rounded = op(source, *weight, *g, *geometry, relu, *out)
            assert rounded.dtype == torch.uint8
            assert torch.equal(rounded, to_bytes(y, out))


@pytest.mark.parametrize("name", [n for n in layers() if n != "linear"])
def test_convolution_of_bytes(name):
    """Against torch's, in float64, of the values that the bytes stand for: zeros around them included."""
    _, x, (w, s, bias), (stride, padding, dilation, groups) = layers()[name]
    g = grid(0.03, -9, -128, 127)
    x_hat = values(to_bytes(x, g), g).double()
    if len(padding) > len(stride):
        x_hat, padding = F.pad(x_hat, (padding[2], padding[3], padding[0], padding[1])), (0, 0)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    w_hat = w.double() * s.double().view(-1, *[1] * (w.dim() - 1))
    expected = function(x_hat, w_hat, bias.double(), stride, padding, dilation, groups)
    y = ops.quantized_conv(to_bytes(x, g), w, s, bias, *g, stride, layers()[name][3][1], dilation, groups, False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", [((2, 8, 5, 6),) * 2, ((4, 37), (37,)), ((3, 1, 5), (2, 5)), ((0, 3), (0, 3))])
@pytest.mark.parametrize("relu", [False, True])
def test_add(shapes, relu):
    torch.manual_seed(1)
    for given, second, wanted in itertools.product(GRIDS[:3], GRIDS[:3], GRIDS):
        g, h, out = grid(*given), grid(*second), grid(*wanted)
        a, b = torch.randn(shapes[0]), torch.randn(shapes[1])
        q_a, q_b = to_bytes(a, g), to_bytes(b, h)
        expected = values(q_a, g) + values(q_b, h)
        expected = torch.relu(expected) if relu else expected
        for x, y in itertools.product((a, q_a), (b, q_b)):
            assert torch.equal(ops.quantized_add(x, y, *g, *h, relu), expected)
            assert torch.equal(ops.quantized_add(x, y, *g, *h, relu, *out), to_bytes(expected, out))


def test_requantize():
    x = torch.randn(3, 5, 7)
    for given, wanted in itertools.product(GRIDS, GRIDS):
        g, out = grid(*given), grid(*wanted)
        q = to_bytes(x, g)
        for source in (x, q):
            assert torch.equal(ops.requantize(source, *g), values(q, g))
            result = ops.requantize(source, *g, *out)
            assert torch.equal(result, to_bytes(values(q, g), out))
            assert result.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    [((3, 3), (2, 2), (1, 1), (1, 1), False), ((2, 3), (2, 1), (1, 0), (2, 1), False), ((3, 2), (2, 2), (1, 1), (1, 1), True),
     ((2, 2), (3, 3), (1, 1), (1, 1), True)],
)  # fmt: skip
def test_max_pool(kernel, stride, padding, dilation, ceil_mode, channels_last):
    x = torch.randint(0, 256, (2, 5, 17, 14), dtype=torch.uint8)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode)
    y = ops.max_pool2d_bytes(x, kernel, stride, padding, dilation, ceil_mode)
    assert torch.equal(y.float(), expected)
    assert y.stride() == expected.stride()


def cases() -> list[tuple[str, tuple]]:
    out = []
    for op, x, weight, geometry in layers().values():
        g = grid(*GRIDS[1])
        sources = [x, to_bytes(x, g)]
        if x.dim() == 4:
            sources.append(x.to(memory_format=torch.channels_last))
        for source, following in itertools.product(sources, (FLOAT, grid(*GRIDS[0]))):
            out.append((op, (source, *weight, *g, *geometry, True, *following)))
    a, b = torch.randn(2, 8, 5, 6), torch.randn(8, 1, 1)
    g, h = grid(*GRIDS[0]), grid(*GRIDS[1])
    for following in (FLOAT, grid(*GRIDS[2])):
        out.append(("quantized_add", (a, to_bytes(b, h), *g, *h, True, *following)))
        out.append(("requantize", (a, *g, *following)))
        out.append(("requantize", (to_bytes(a, g), *g, *following)))
    q = torch.randint(0, 256, (1, 3, 8, 9), dtype=torch.uint8).to(memory_format=torch.channels_last)
    out.append(("max_pool2d_bytes", (q, (3, 3), (2, 2), (1, 1), (1, 1), True)))
    return out


@pytest.mark.parametrize(("op", "arguments"), cases(), ids=[f"{i}-{op}" for i, (op, _) in enumerate(cases())])
def test_opcheck_and_the_kernel_of_every_device(op, arguments):
    overload = getattr(ops, op).default
    torch.library.opcheck(overload, arguments)
    y = overload(*arguments)
    # What a GPU runs, on the CPU's tensors: the kernel that is registered for every device without one of its own.
    clear_packed_weights()
    other = overload._op_dk(ANY_DEVICE, *arguments)
    assert packed_weight_count() == 0
    assert (y.dtype, y.stride()) == (other.dtype, other.stride())
    if y.dtype == torch.uint8:  # a step, where a sum lies beside an edge of rounding
        steps = (y.int() - other.int()).abs()
        assert steps.max() <= 1
        assert (steps > 0).float().mean() <= 0.01
    else:
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)


def test_results_have_no_gradient():
    _, x, weight, _ = layers()["linear"]
    y = ops.quantized_linear(x.requires_grad_(), *weight, *grid(*GRIDS[0]), False)
    assert not y.requires_grad


def test_nan_is_the_largest_integer_on_every_device():
    g = grid(*GRIDS[2])
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert ops.requantize(x, *g, *g).tolist() == [128 + 7, 128 + 7, 128 - 8]
    assert ops.requantize.default._op_dk(ANY_DEVICE, x, *g, *g).tolist() == [135, 135, 120]


def test_packed_weights_follow_their_tensors():
    clear_packed_weights()
    op, x, (w, *rest), geometry = layers()["2d"]
    g = grid(*GRIDS[0])

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return getattr(ops, op)(x, w, *rest, *g, *geometry, False)

    y = run(x, w)
    for size in range(5, 14):  # more sizes than packed forms of one weight
        assert run(torch.randn(1, 8, size, size), w).shape[0] == 1
    assert torch.equal(run(x, w), y)
    assert packed_weight_count() == 1
    other = w.clone()
    assert torch.equal(run(x, other), y)
    assert packed_weight_count() == 2
    w.zero_()
    assert torch.equal(run(x, w), rest[1].view(1, -1, 1, 1).expand_as(y))
    del other
    assert packed_weight_count() == 1
    with torch.inference_mode():
        inside = w.clone()
        assert torch.equal(run(x, inside), run(x, w))
        inside.fill_(1)
        assert not torch.equal(run(x, inside), run(x, w))
    assert packed_weight_count() == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(2, 40, dtype=torch.int32)}, TypeError, "input must be floating point, or uint8 on its grid, got Int"),
        ({1: torch.zeros(24, 40)}, TypeError, "weight must be int8, got Float"),
        ({2: torch.ones(7)}, ValueError, r"weight_scale must have 1 or 24 elements, got shape \[7\]"),
        ({3: torch.ones(7)}, ValueError, r"bias must have shape \[24\], got \[7\]"),
        ({4: torch.tensor([-1.0])}, ValueError, "input_scale must be finite and positive, got -1"),
        ({5: torch.tensor([300], dtype=torch.int32)}, ValueError, r"input_zero_point must be within \[0, 255\], got 300"),
        ({7: 300}, ValueError, r"input range must be inside \[-128, 127\] or \[0, 255\], got \[0, 300\]"),
        ({9: torch.ones(1)}, ValueError, "output_scale and output_zero_point must be given together, got only output_scale"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change, error, message):
    _, x, weight, _ = layers()["linear"]
    arguments = [x, *weight, *grid(*GRIDS[0]), False, None, None]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=rf"\[quantized_linear\] {message}"):
        ops.quantized_linear(*arguments)


def test_a_weight_scale_that_is_no_number():
    for name in ("linear", "2d"):
        op, x, (w, s, bias), geometry = layers()[name]
        s[3] = float("nan")
        with pytest.raises(ValueError, match=rf"\[{op}\] weight_scale must be finite, got nan"):
            getattr(ops, op)(x, w, s, bias, *grid(*GRIDS[0]), *geometry, True)


@pytest.mark.parametrize("argument", range(3))
def test_windows_fit_32_bits(argument):
    _, x, weight, (*geometry, groups) = layers()["2d"]
    geometry[argument] = (1, 2**63 - 1)
    with pytest.raises(
        ValueError, match=r"\[quantized_conv\] sizes of windows, strides, padding and dilation must fit 32"
    ):
        ops.quantized_conv(x, *weight, *grid(*GRIDS[0]), *geometry, groups, False)


@pytest.mark.parametrize("argument", range(4))
def test_pooled_windows_fit_32_bits(argument):
    arguments = [[2, 2], [2, 2], [0, 0], [1, 1]]
    arguments[argument] = [2, 2**63 - 1]
    with pytest.raises(
        ValueError, match=r"\[max_pool2d_bytes\] sizes of windows, strides, padding and dilation must fit"
    ):
        ops.max_pool2d_bytes(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), *arguments)


def test_a_window_far_larger_than_its_image():
    x = torch.randint(0, 256, (1, 3, 5, 5), dtype=torch.uint8)
    size = 2**31 - 1
    y = ops.max_pool2d_bytes(x, [size] * 2, [size] * 2, [size // 2] * 2, [1, 1])
    assert torch.equal(y, x.amax((2, 3), keepdim=True))
