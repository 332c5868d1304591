"""The integer specification, four ways: the plain reference, rarefy, ONNX's reference evaluator, ONNX Runtime.

Where every intermediate result is exact (scales that are powers of two, sums below 2^24) all of them must be equal.
Elsewhere float rounding may move a result over a rounding edge: such mismatches are counted, and are one step.
"""

import integer_reference as ref
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.quantization import PerTensor, QConfig, Scheme, calibrate, convert, prepare

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

EXACT = (2.0**-5, 2.0**-7, 2.0**-4)  # s_x, s_w, s_y
INEXACT = (0.0373, 0.00611, 0.0917)

# sizes of x and w, stride, padding, dilation, groups
CONVOLUTIONS = {
    "1d": ((2, 3, 11), (4, 3, 3), (2,), (1,), (1,), 1),
    "2d": ((2, 3, 9, 7), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d strided, dilated": ((1, 4, 12, 11), (6, 4, 3, 2), (2, 3), (2, 0), (2, 1), 1),
    "2d grouped": ((2, 6, 6, 6), (4, 3, 3, 3), (1, 2), (1, 1), (1, 1), 2),
    "2d depthwise": ((2, 8, 5, 5), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8),
    "3d": ((1, 2, 5, 6, 4), (3, 2, 3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_integers(shape, low, high, seed=0):
    return np.random.default_rng(seed).integers(low, high + 1, shape, dtype=np.int64)


def steps_apart(a: np.ndarray, b: np.ndarray, most: float) -> int:
    """How many integers differ, each by one step, and no more than the share ``most`` of them."""
    difference = np.abs(a.astype(np.int64) - b.astype(np.int64))
    assert difference.max(initial=0) <= 1
    count = int((difference > 0).sum())
    assert count <= most * difference.size, f"{count} of {difference.size} differ"
    return count


def quantizer(signed: bool) -> tuple[int, int, int]:
    return (-128, 127, -7) if signed else (0, 255, 121)


# --- quantize -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [0.25, 0.1, 3.7e-4])
def test_quantize_and_dequantize(scale, signed):
    qmin, qmax, z = quantizer(signed)
    steps = np.concatenate([np.arange(-300, 300), np.arange(-300, 300) + 0.5, np.linspace(-150, 150, 4001)])
    x = (steps.astype(np.float32) * np.float32(scale)).astype(np.float32)
    s, zero = torch.tensor([scale]), torch.tensor([z], dtype=torch.int32)
    q = ref.quantize(x, s.numpy(), zero.numpy(), qmin, qmax)
    assert np.array_equal(torch.ops.rarefy.quantize(torch.from_numpy(x), s, zero, None, qmin, qmax).numpy(), q)
    fake = torch.ops.rarefy.fake_quantize(torch.from_numpy(x), s, zero, None, qmin, qmax)
    assert np.array_equal(fake.numpy(), ref.dequantize(q, s.numpy(), z))


def test_quantize_per_channel():
    w = torch.randn(5, 4, 3)
    s = torch.tensor([0.01, 0.02, 0.005, 0.3, 1.0])
    zero = torch.zeros(5, dtype=torch.int32)
    q = ref.quantize(w.numpy(), s.numpy(), zero.numpy(), -127, 127, axis=0)
    assert np.array_equal(torch.ops.rarefy.quantize(w, s, zero, 0, -127, 127).numpy(), q)


def test_rounding_is_half_to_even_before_the_zero_point():
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.5], np.float32)
    assert ref.quantize(x, np.float32(1), np.int64(3), 0, 255).tolist() == [3, 5, 3, 1, 5]


def test_relabelling_is_the_same_grid():
    q = random_integers((1000,), -128, 127)
    unsigned, z = ref.to_unsigned(q, -5)
    assert unsigned.min() >= 0
    assert unsigned.max() <= 255
    assert np.array_equal(ref.dequantize(unsigned, np.float32(0.1), z), ref.dequantize(q, np.float32(0.1), -5))
    back, z_back = ref.to_signed(unsigned, z)
    assert z_back == -5
    assert np.array_equal(back, q)
    w = random_integers((3, 1000), -127, 127, 1)
    assert np.array_equal(ref.linear(unsigned, z, w), ref.linear(q, -5, w))


def test_relabelled_layers_of_rarefy_agree():
    x, w = torch.randn(33, 24), torch.from_numpy(random_integers((7, 24), -127, 127)).to(torch.int8)
    s_w = torch.full((7,), 0.01)
    results = [
        torch.ops.rarefy.quantized_linear(x, w, s_w, None, torch.tensor([0.02]), torch.tensor([z], dtype=torch.int32),
                                          qmin, qmin + 255, False)
        for qmin, z in ((0, 121), (-128, -7))
    ]  # fmt: skip
    assert torch.equal(*results)


# --- The bias -------------------------------------------------------------------------------------------------------
def test_integer_bias_is_rounded_and_never_clipped():
    s_x, s_w = np.float32(0.5), np.array([0.5, 0.25], np.float32)
    assert ref.integer_bias(np.array([0.375, -0.3125], np.float32), s_x, s_w).tolist() == [2, -2]
    with pytest.raises(
        OverflowError, match=r"the bias of channel 1 must fit int32 in steps of s_x \* s_w, got 8000000000"
    ):
        ref.integer_bias(np.array([0.0, 1e9], np.float32), s_x, s_w)


def test_sums_must_fit_int32():
    q = np.full((1, 140_000), 127)
    with pytest.raises(OverflowError, match="sums must fit int32"):
        ref.linear(q, 0, q)


# --- Beside rarefy --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 4), (64, 96, 33), (2, 3, 40, 8), (1, 1, 1)])
@pytest.mark.parametrize("scales", [EXACT, INEXACT], ids=["exact", "inexact"])
def test_linear(shape, scales, signed):
    *batch, width, outputs = shape
    qmin, qmax, z = quantizer(signed)
    s_x, s_w, s_y = scales
    x = torch.randn(*batch, width)
    w = torch.from_numpy(random_integers((outputs, width), -127, 127)).to(torch.int8)
    bias = torch.randint(-200, 200, (outputs,)) * 2.0**-8
    s_w = torch.full((outputs,), s_w) * (2.0 ** torch.arange(outputs).remainder(3))
    zero, s_x = torch.tensor([z], dtype=torch.int32), torch.tensor([s_x])
    q_x = ref.quantize(x.numpy(), s_x.numpy(), z, qmin, qmax)
    sums = ref.linear(q_x, z, w.numpy())
    assert np.abs(sums).max() < 2**24
    expected = ref.to_float(sums, s_x.numpy(), s_w.numpy(), bias.numpy(), -1, np.float64)

    x_hat = torch.ops.rarefy.fake_quantize(x, s_x, zero, None, qmin, qmax)
    w_hat = w * s_w[:, None]
    in_float = F.linear(x_hat.double(), w_hat.double(), bias.double()).numpy()
    y = torch.ops.rarefy.quantized_linear(x, w, s_w, bias, s_x, zero, qmin, qmax, False)
    if scales is EXACT:
        assert np.array_equal(in_float, expected)
        assert np.array_equal(y.double().numpy(), expected)
    else:
        size = np.abs(expected).max()
        np.testing.assert_allclose(in_float, expected, rtol=0, atol=3e-7 * size)
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=3e-7 * size)
    on_grid = ref.quantize(expected.astype(np.float32), np.float32(s_y), 100, 0, 255)
    steps_apart(ref.quantize(y.numpy(), np.float32(s_y), 100, 0, 255), on_grid, 0 if scales is EXACT else 1e-3)
    relu = torch.ops.rarefy.quantized_linear(x, w, s_w, bias, s_x, zero, qmin, qmax, True)
    assert torch.equal(relu, torch.relu(y))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", [n for n in CONVOLUTIONS if n.startswith("2d")])
@pytest.mark.parametrize("scales", [EXACT, INEXACT], ids=["exact", "inexact"])
def test_conv2d(name, scales, signed):
    x_shape, w_shape, *geometry, groups = CONVOLUTIONS[name]
    qmin, qmax, z = quantizer(signed)
    s_x, s_w, _ = scales
    x, bias = torch.randn(x_shape), torch.randint(-200, 200, w_shape[:1]) * 2.0**-8
    w = torch.from_numpy(random_integers(w_shape, -127, 127)).to(torch.int8)
    s_w = torch.full(w_shape[:1], s_w) * (2.0 ** torch.arange(w_shape[0]).remainder(3))
    zero, s_x = torch.tensor([z], dtype=torch.int32), torch.tensor([s_x])
    q_x = ref.quantize(x.numpy(), s_x.numpy(), z, qmin, qmax)
    expected = ref.to_float(
        ref.conv(q_x, z, w.numpy(), *geometry, groups), s_x.numpy(), s_w.numpy(), bias.numpy(), 1, np.float64
    )

    x_hat = torch.ops.rarefy.fake_quantize(x, s_x, zero, None, qmin, qmax)
    in_float = F.conv2d(x_hat.double(), (w * s_w.view(-1, 1, 1, 1)).double(), bias.double(), *geometry, groups).numpy()
    y = torch.ops.rarefy.quantized_conv(x, w, s_w, bias, s_x, zero, qmin, qmax, *geometry, groups, False)
    if scales is EXACT:
        assert np.array_equal(in_float, expected)
        assert np.array_equal(y.double().numpy(), expected)
    else:
        size = np.abs(expected).max()
        np.testing.assert_allclose(in_float, expected, rtol=0, atol=3e-7 * size)
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=3e-7 * size)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_of_the_reference_is_the_convolution(name):
    """In every number of dimensions, against torch in float64, in which the sums are exact."""
    x_shape, w_shape, *geometry, groups = CONVOLUTIONS[name]
    q_x, q_w = random_integers(x_shape, 0, 255), random_integers(w_shape, -127, 127, 1)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(x_shape)]
    expected = function(torch.from_numpy(q_x - 121).double(), torch.from_numpy(q_w).double(), None, *geometry, groups)
    assert np.array_equal(ref.conv(q_x, 121, q_w, *geometry, groups), expected.numpy())


@pytest.mark.parametrize("weight", [PerTensor(), None], ids=["per tensor", "per channel"])
def test_converted_model(weight):
    """Convolution, ReLU and linear layer, each on what the layer before it gave."""
    config = QConfig.int8() if weight is None else QConfig.int8(weight=Scheme(narrow_range=True, granularity=weight))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 6)).eval()
    x = torch.randn(16, 3, 9, 9)
    with torch.no_grad():
        converted = convert(calibrate(prepare(model, config, x), [x]))
        conv, linear = converted[0], converted[3]
        inputs = {}
        linear.register_forward_pre_hook(lambda module, args: inputs.update(linear=args[0]))
        y = converted(x)
    for layer, given, axis, result in ((conv, x, 1, None), (linear, inputs["linear"], -1, y)):
        q = layer.quant.input
        s_x, z, s_w = q.scale.numpy(), int(q.zero_point), layer.quant.weight.scale.numpy()
        q_x = ref.quantize(given.numpy(), s_x, z, q.qmin, q.qmax)
        q_w = layer.integer_weight.numpy()
        sums = ref.conv(q_x, z, q_w, (2, 2), (1, 1), (1, 1)) if axis == 1 else ref.linear(q_x, z, q_w)
        expected = ref.to_float(sums, s_x, s_w, layer.bias.numpy(), axis, np.float64)
        if result is None:  # the convolution's result, with its ReLU, is what the linear layer was given
            expected, result = np.maximum(expected, 0).reshape(16, -1), inputs["linear"]
            s_y, z_y = linear.quant.input.scale.numpy(), int(linear.quant.input.zero_point)
            mine = ref.quantize(expected.astype(np.float32), s_y, z_y, 0, 255)
            steps_apart(ref.quantize(result.numpy(), s_y, z_y, 0, 255), mine, 1e-3)
        np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


# --- Beside ONNX ----------------------------------------------------------------------------------------------------
# Processors without VNNI add pairs of uint8 * int8 in 16 bits in ONNX Runtime, with saturation: 2 * 255 * 64 just fits.
ORT_WEIGHT = 64
BACKENDS = ("reference", "runtime")


def run_onnx(
    op: str,
    inputs: dict[str, np.ndarray],
    output: int,
    rank: int,
    backends: tuple[str, ...] = BACKENDS,
    **attributes: object,
) -> list[np.ndarray]:
    """The operator in ONNX's reference evaluator and in ONNX Runtime, optimizations off; activations are arguments."""
    first = next(iter(inputs))
    node = helper.make_node(op, list(inputs), ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(
                first, helper.np_dtype_to_tensor_dtype(inputs[first].dtype), inputs[first].shape
            )
        ],
        [helper.make_tensor_value_info("y", output, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in inputs.items() if name != first],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {first: inputs[first]}
    run = {"reference": ReferenceEvaluator(model).run, "runtime": session.run}
    return [run[backend](None, feed)[0] for backend in backends]


def activation(shape, signed) -> tuple[np.ndarray, np.ndarray]:
    qmin, qmax, z = quantizer(signed)
    dtype = np.int8 if signed else np.uint8
    return random_integers(shape, qmin, qmax, 2).astype(dtype), np.array(z, dtype)


@pytest.mark.parametrize("signed", [False, True])
def test_matmul_integer(signed):
    q_x, z = activation((17, 64), signed)
    q_w = random_integers((64, 9), -ORT_WEIGHT, ORT_WEIGHT, 3).astype(np.int8)
    expected = ref.linear(q_x, int(z), q_w.T)
    inputs = {"x": q_x, "w": q_w, "z_x": z, "z_w": np.array(0, np.int8)}
    for result in run_onnx("MatMulInteger", inputs, TensorProto.INT32, expected.ndim):
        assert np.array_equal(result, expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_integer(name):
    x_shape, w_shape, stride, padding, dilation, groups = CONVOLUTIONS[name]
    q_x, z = activation(x_shape, False)
    q_w = random_integers(w_shape, -ORT_WEIGHT, ORT_WEIGHT, 3)
    # ONNX Runtime's ConvInteger takes uint8 weights only: relabelled, they are the same grid.
    labelled, z_w = ref.to_unsigned(q_w, 0)
    inputs = {"x": q_x, "w": labelled.astype(np.uint8), "z_x": z, "z_w": np.array(z_w, np.uint8)}
    geometry = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    expected = ref.conv(q_x, int(z), q_w, stride, padding, dilation, groups)
    for result in run_onnx("ConvInteger", inputs, TensorProto.INT32, expected.ndim, **geometry):
        assert np.array_equal(result, expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scales", [EXACT, INEXACT], ids=["exact", "inexact"])
def test_qlinear_matmul(scales, signed):
    s_x, s_w, s_y = (np.float32(s) for s in scales)
    s_y = np.float32(s_y * 4)
    q_x, z = activation((33, 64), signed)
    qmin, qmax, _ = quantizer(signed)
    q_w = random_integers((64, 21), -ORT_WEIGHT, ORT_WEIGHT, 3).astype(np.int8)
    z_y = np.array(z + 3, z.dtype)
    inputs = {
        "x": q_x, "s_x": np.array(s_x), "z_x": z, "w": q_w, "s_w": np.array(s_w), "z_w": np.array(0, np.int8),
        "s_y": np.array(s_y), "z_y": z_y,
    }  # fmt: skip
    expected = ref.requantize(ref.linear(q_x, int(z), q_w.T), s_x, s_w, s_y, int(z_y), qmin, qmax, -1)
    assert len(np.unique(expected)) > 50  # the range is in use
    for result in run_onnx("QLinearMatMul", inputs, TensorProto.INT8 if signed else TensorProto.UINT8, expected.ndim):
        steps_apart(result, expected, 0 if scales is EXACT else 0.01)


@pytest.mark.parametrize("name", [n for n in CONVOLUTIONS if n.startswith(("1d", "2d", "3d"))])
@pytest.mark.parametrize("scales", [EXACT, INEXACT], ids=["exact", "inexact"])
def test_qlinear_conv_with_integer_bias(name, scales):
    x_shape, w_shape, stride, padding, dilation, groups = CONVOLUTIONS[name]
    s_x, s_w, s_y = (np.float32(s) for s in scales)
    s_y = np.float32(s_y * 4)
    s_w = (s_w * 2.0 ** (np.arange(w_shape[0]) % 3)).astype(np.float32)
    q_x, z = activation(x_shape, False)
    q_w = random_integers(w_shape, -ORT_WEIGHT, ORT_WEIGHT, 3).astype(np.int8)
    bias = np.random.default_rng(4).normal(size=w_shape[0]).astype(np.float32)
    q_bias = ref.integer_bias(bias, s_x, s_w)
    z_y = np.array(128, np.uint8)
    inputs = {
        "x": q_x, "s_x": np.array(s_x), "z_x": z, "w": q_w, "s_w": s_w, "z_w": np.zeros(len(s_w), np.int8),
        "s_y": np.array(s_y), "z_y": z_y, "bias": q_bias.astype(np.int32),
    }  # fmt: skip
    geometry = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    sums = ref.conv(q_x, int(z), q_w, stride, padding, dilation, groups)
    expected = ref.requantize(ref.add_bias(sums, q_bias, 1), s_x, s_w, s_y, 128, 0, 255, 1)
    in_float = ref.to_float(sums, s_x, s_w, bias, 1, np.float64)
    size = np.abs(ref.product_of_scales(s_x, s_w)).max() / 2
    np.testing.assert_allclose(ref.to_float(ref.add_bias(sums, q_bias, 1), s_x, s_w, None, 1, np.float64), in_float,
                               rtol=0, atol=1.01 * size)  # fmt: skip
    # The reference evaluator's QLinearConv adds its bias in two dimensions only.
    backends = BACKENDS if len(x_shape) == 4 else ("runtime",)
    for result in run_onnx("QLinearConv", inputs, TensorProto.UINT8, expected.ndim, backends, **geometry):
        steps_apart(result, expected, 0 if scales is EXACT else 0.01)


def test_relu_of_integers_is_a_lower_bound():
    q_x, z = activation((50, 16), False)
    sums = ref.linear(q_x, int(z), random_integers((8, 16), -127, 127, 5))
    s_x, s_w, s_y = EXACT
    with_relu = ref.requantize(sums, s_x, s_w, s_y, 30, 0, 255, -1, relu=True)
    plain = ref.to_float(sums, s_x, s_w, None, -1, np.float64)
    assert np.array_equal(with_relu, ref.quantize(np.maximum(plain, 0).astype(np.float32), np.float32(s_y), 30, 0, 255))
