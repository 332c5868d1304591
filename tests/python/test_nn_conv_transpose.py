"""Transposed convolutions: against plain loops, the channel axis with groups, integers against simulation, files."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    PerChannel,
    QConfig,
    Scheme,
    calibrate,
    convert,
    load_quantized,
    prepare,
    prepare_qat,
    report,
    save_quantized,
)

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (7,), 2: (5, 4), 3: (3, 2, 4)}


def loops(q_x, zero_point, q_w, stride, padding, output_padding, dilation, groups):
    """The exact int64 sums of a transposed convolution of integers, by its definition: every product is added where it goes."""
    x, w = q_x.astype(np.int64) - zero_point, q_w.astype(np.int64)
    dims = x.ndim - 2
    kernel, per_in, per_out = w.shape[2:], w.shape[0] // groups, w.shape[1]
    full = [
        (n - 1) * s + d * (k - 1) + 1 + o
        for n, s, d, k, o in zip(x.shape[2:], stride, dilation, kernel, output_padding, strict=True)
    ]
    y = np.zeros((x.shape[0], per_out * groups, *full), np.int64)
    for place in itertools.product(*map(range, x.shape[2:])):
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(place[i] * stride[i] + tap[i] * dilation[i] for i in range(dims))
            for g in range(groups):
                a = x[(slice(None), slice(g * per_in, (g + 1) * per_in), *place)]
                b = w[(slice(g * per_in, (g + 1) * per_in), slice(None), *tap)]
                y[(slice(None), slice(g * per_out, (g + 1) * per_out), *at)] += a @ b
    cut = tuple(slice(p, n - p) for p, n in zip(padding, full, strict=True))
    return y[(slice(None), slice(None), *cut)]


def numbers(value, dims):
    return (value,) * dims if isinstance(value, int) else value


MOVES = [
    {"kernel_size": 3},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 3, "padding": 2, "output_padding": 2, "groups": 4, "bias": False},
    {"kernel_size": 2, "stride": 3, "groups": 2},  # positions that no tap reaches
    {
        "kernel_size": 3,
        "stride": 2,
        "dilation": 2,
        "padding": 2,
        "output_padding": 1,
    },  # dilation and stride share a factor
    {"kernel_size": 3, "stride": 4, "dilation": 6, "padding": 5},
    {"kernel_size": 1, "stride": 1, "padding": 0},
]


def integer_result(layer, x, move, dims):
    """By the specification: exact sums, scaled once per channel of each group, then the bias."""
    q, w = layer.quant.input, layer.quant.weight
    q_x = np.clip(np.rint(x.numpy() / q.scale.numpy()) + q.zero_point.numpy(), q.qmin, q.qmax)
    groups = move.get("groups", 1)
    weight, scale = layer.weight.detach().numpy(), w.scale.numpy()
    # [groups, in / groups, out / groups, ...]: the scale of channel o of group g is number g * (out / groups) + o
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    scales = np.broadcast_to(scale.reshape(groups, 1, -1, *[1] * dims) if scale.size > 1 else scale, by_group.shape)
    q_w = np.clip(np.rint(by_group / scales), w.qmin, w.qmax).reshape(weight.shape)
    movement = [numbers(move.get(k, d), dims) for k, d in MOVE_DEFAULTS]
    sums = loops(q_x, int(q.zero_point), q_w, *movement, groups).astype(np.float32)
    factor = (q.scale.numpy() * scale).astype(np.float32)
    y = sums * (factor.reshape(1, -1, *[1] * dims) if factor.size > 1 else factor)
    if layer.bias is not None:
        y = y + layer.bias.detach().numpy().reshape(1, -1, *[1] * dims)
    return torch.from_numpy(y)


MOVE_DEFAULTS = (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))


@pytest.mark.parametrize("move", MOVES, ids=lambda m: " ".join(f"{k}={v}" for k, v in m.items()))
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_integers_are_those_of_the_loops(dims, move):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[dims](8, 4, **move))
    x = torch.randn(2, 8, *SIZES[dims])
    try:
        expected_size = model(x).shape
    except RuntimeError:
        pytest.skip("torch finds no result of that size")
    execution = None if dims == 3 and move.get("groups", 1) > 1 else "integer"
    simulated = prepare_qat(model, QConfig.int8(), x)
    model = prepare_qat(model, QConfig.int8(execution=execution), x)
    assert report(simulated).layers[0].note.startswith("simulated: ")
    torch.testing.assert_close(simulated(x), model(x), rtol=1e-4, atol=1e-5)
    layer = model[0]
    y = model(x)
    assert y.shape == expected_size
    assert layer.quant.weight.scale.shape == (4,)
    assert layer.quant.weight.axis == 1
    expected = integer_result(layer, x, move, dims)
    # oneDNN's convolution has its own order of the two last steps: docs/dev/numerics.md
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-6 if execution else 1e-5)
    model.eval()
    converted = convert(model)
    assert type(converted[0]).__name__ == f"QuantizedConvTranspose{dims}d"
    assert converted[0].integer_weight.shape == layer.weight.shape
    with torch.no_grad():
        torch.testing.assert_close(converted(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(converted(x[0]), expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(x[0]), expected[0], rtol=1e-6, atol=1e-6 if execution else 1e-5)


def test_every_channel_of_every_group_has_its_own_scale():
    """Weights whose channels differ by powers of 16 from each other, also between groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2))
    factors = torch.tensor([1.0, 16.0, 256.0, 4096.0])  # group 0: channels 0 and 1, group 1: channels 2 and 3
    with torch.no_grad():
        weight = torch.rand(6, 2, 3, 3) * 0.5 + 0.5
        weight[:3] *= factors[:2].view(1, 2, 1, 1)
        weight[3:] *= factors[2:].view(1, 2, 1, 1)
        model[0].weight.copy_(weight)
    prepared = prepare_qat(model, QConfig.int8())
    x = torch.randn(1, 6, 4, 4)
    prepared(x)
    layer = prepared[0]
    largest = torch.cat([weight[:3].amax((0, 2, 3)), weight[3:].amax((0, 2, 3))])
    torch.testing.assert_close(layer.quant.weight.scale, largest / 127)
    # No channel loses its precision to another: the error is that of its own rounding.
    back = convert(prepared)[0].weight + 0.0
    assert float(((back - weight).abs() / weight.abs()).max()) < 1 / 127
    # One scale for all would lose it.
    one = convert(calibrate(prepare(model, QConfig(Scheme(narrow_range=True), Scheme(symmetric=False))), [x]))[0].weight
    assert float((((one + 0.0) - weight).abs() / weight.abs()).max()) > 0.9


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("move", MOVES[3:6], ids=str)
def test_gradients_are_those_of_the_simulated_layer(dims, move):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[dims](8, 4, **move), nn.ReLU())
    x = torch.randn(2, 8, *SIZES[dims])
    integer = prepare_qat(model, QConfig.int8(execution="integer"), x)
    simulated = prepare_qat(model, QConfig.int8(execution="simulated"), x)
    assert integer[0].relu
    results = []
    for prepared in (integer, simulated):
        inputs = x.clone().requires_grad_()
        y = prepared(inputs)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view_as(y))
        results.append([y.detach(), inputs.grad, *(p.grad for p in prepared.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "empty"])
def test_types_and_layouts(dtype, layout):
    torch.manual_seed(0)
    prepared = prepare_qat(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)), QConfig.int8())
    prepared(torch.randn(2, 4, 5, 6))
    prepared.eval().to(dtype)
    for quantizer in prepared[0].quant.children():
        quantizer.to(torch.float32)
    x = torch.randn(2, 4, 5, 12).to(dtype)
    x = {
        "contiguous": lambda: x[..., :6].contiguous(),
        "channels-last": lambda: x[..., :6].contiguous(memory_format=torch.channels_last),
        "strided": lambda: x[..., ::2],
        "empty": lambda: x[:0, ..., :6],
    }[layout]()
    y = prepared(x)
    assert y.dtype == dtype
    assert y.shape == (len(x), 6, 9, 11)
    reference = prepared(x.contiguous())
    torch.testing.assert_close(y, reference, rtol=1e-5 if dtype in (torch.float32, torch.float64) else 1e-2, atol=1e-2)
    if len(x):
        converted = convert(prepared)
        torch.testing.assert_close(converted(x), y.float(), rtol=2e-2, atol=2e-2)


def test_output_size_is_that_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1))
    layer = prepare_qat(model, QConfig.int8())[0]
    x = torch.randn(1, 3, 4, 5)
    for size in ((7, 9), (8, 10), (1, 2, 7, 10)):
        expected = model[0](x, output_size=list(size))
        assert layer(x, output_size=size).shape == expected.shape
    layer.eval()
    converted = convert(nn.Sequential(layer))[0]
    torch.testing.assert_close(converted(x, output_size=(8, 10)), layer(x, output_size=(8, 10)), rtol=1e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"\[ConvTranspose2d\] output_size must be within 7 to 8, 9 to 10, got \(9, 9\)"
    ):
        layer(x, output_size=(9, 9))
    with pytest.raises(ValueError, match=r"\[ConvTranspose2d\] output_size must have 2 or 4 values, got 1"):
        layer(x, output_size=(9,))


class Decoder(nn.Module):
    """Grouped transposed convolutions with ReLUs, from a code to an image: they hand on bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2)
        self.up2 = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up1(code))
        return self.out(torch.relu(self.up2(y)))


def trained_decoder(steps: int = 60) -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[float]]:
    torch.manual_seed(0)
    codes = torch.randn(32, 8, 3, 3)
    grid = torch.linspace(-1, 1, 12)
    images = torch.sin(3 * grid[:, None] * codes[:, :1, :1, :1] + 2 * grid * codes[:, 1:2, :1, :1])
    model = prepare_qat(Decoder(), QConfig.int8(), codes)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(codes), images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), codes, images, losses


def test_a_trained_grouped_decoder_equals_its_simulated_self():
    model, codes, images, losses = trained_decoder()
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        expected = model(codes)
        plain, linked = convert(model), convert(model, codes)
        y = plain(codes)
        assert torch.equal(y, linked(codes))
    step = float(model.out.quant.input.scale)
    assert float((y - expected).abs().max()) <= 2 * step  # of a rounding edge in the layer before, at most
    assert float((y - expected).abs().mean()) < 0.01 * step
    assert abs(nn.functional.mse_loss(y, images) - nn.functional.mse_loss(expected, images)) < 1e-4
    notes = {layer.name: layer.note for layer in report(linked).layers}
    assert "gives bytes" in notes["up1"]
    assert "gives bytes" in notes["up2"]
    assert "ReLU fused" in notes["up1"]


def test_a_folder_gives_the_same_layer_back(tmp_path):
    model, codes, _, _ = trained_decoder(3)
    converted = convert(model, codes)
    save_quantized(converted, tmp_path / "decoder")
    again = load_quantized(Decoder(), tmp_path / "decoder")
    with torch.no_grad():
        assert torch.equal(again(codes), converted(codes))
    other = Decoder()
    other.up1 = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"the weight of layer up1 must have|the bias of layer up1 must have"):
        load_quantized(other, tmp_path / "decoder")


def test_what_is_not_supported_says_so():
    x = torch.randn(1, 4, 3, 3, 3)
    grouped = nn.Sequential(nn.ConvTranspose3d(4, 4, 2, groups=2))
    prepared = prepare_qat(grouped, QConfig.int8())
    assert "no integer kernel for groups in three dimensions" in report(prepared).layers[0].note
    prepared(x)
    prepared.eval()
    torch.testing.assert_close(convert(prepared)(x), prepared(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[ConvTranspose3d\] execution='integer' must be possible"):
        prepare_qat(grouped, QConfig.int8(execution="integer"))(x)


def test_weights_only_and_sixteen_bits():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), torch.randn(2, 4, 5, 5)
    weights = prepare_qat(model, QConfig(weight=Scheme(bits=4, granularity=PerChannel(0))))
    converted = convert(weights)
    assert converted[0].integer_weight.abs().max() <= 8
    torch.testing.assert_close(converted(x), weights(x), rtol=1e-6, atol=1e-6)
    wide = calibrate(prepare(model, QConfig.int8(activation=Scheme(bits=16, symmetric=False))), [x])
    assert type(convert(wide)[0]) is rf.nn.ConvTranspose2d
    torch.testing.assert_close(convert(wide)(x), model(x), rtol=0.05, atol=0.05)


OPERATOR = torch.ops.rarefy.quantized_conv_transpose


def arguments(**changes):
    values = {
        "x": torch.randn(2, 4, 5, 5),
        "weight": torch.randint(-127, 128, (4, 3, 3, 3), dtype=torch.int8),
        "weight_scale": torch.rand(6) + 0.1,
        "bias": torch.randn(6),
        "input_scale": torch.tensor([0.05]),
        "input_zero_point": torch.tensor([7], dtype=torch.int32),
        "qmin": 0,
        "qmax": 255,
        "stride": [2, 1],
        "padding": [1, 0],
        "output_padding": [1, 0],
        "dilation": [1, 2],
        "groups": 2,
        "relu": True,
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "groups must divide 4 input channels, got 3"),
        ({"stride": [2]}, "stride, padding, output_padding and dilation must have 2 values, got 1, 2, 2 and 2"),
        ({"stride": [0, 1]}, "stride and dilation must be positive"),
        ({"output_padding": [2, 0]}, "output_padding must be less than stride or dilation, got"),
        ({"padding": [9, 0]}, "the result must have a size along axis 2, got"),
        ({"weight_scale": torch.ones(3)}, r"weight_scale must have 1 or 6 elements, got shape \[3\]"),
        ({"bias": torch.ones(3)}, r"bias must have shape \[6\], got \[3\]"),
        ({"x": torch.randn(2, 5, 5, 5)}, "input must have 4 dimensions and 4 channels"),
    ],
)
def test_errors_name_the_rule(changes, message):
    with pytest.raises(ValueError, match=rf"\[quantized_conv_transpose\] {message}"):
        OPERATOR(**arguments(**changes))


def test_weights_that_are_not_int8_are_a_type_error():
    with pytest.raises(TypeError, match=r"\[quantized_conv_transpose\] weight must be int8, got Float"):
        OPERATOR(**arguments(weight=torch.randn(4, 3, 3, 3)))


@pytest.mark.parametrize("bytes_in", [False, True])
@pytest.mark.parametrize("bytes_out", [False, True])
def test_opcheck(bytes_in, bytes_out):
    torch.manual_seed(0)
    given = arguments()
    if bytes_in:
        given["x"] = torch.randint(0, 256, (2, 4, 5, 5), dtype=torch.uint8)
    if bytes_out:
        given.update(output_scale=torch.tensor([0.3]), output_zero_point=torch.tensor([3], dtype=torch.int32))
    torch.library.opcheck(OPERATOR, (), given)


def test_integer_conv_transpose_opcheck():
    torch.manual_seed(0)
    grids = (torch.tensor([0.05]), torch.tensor([7], dtype=torch.int32), 0, 255)
    weights = (torch.full((6,), 0.02), torch.zeros(6, dtype=torch.int32), -127, 127)
    x, w, b = torch.randn(1, 4, 3, 3), torch.randn(4, 3, 3, 3), torch.randn(6)
    movement = ([2, 2], [1, 1], [1, 0], [1, 1], 2)
    for t in (x, w, b):
        t.requires_grad_()
    given = (x, w, b, *grids, *weights, *movement, True, False, None)
    torch.library.opcheck(torch.ops.rarefy.integer_conv_transpose, given)
