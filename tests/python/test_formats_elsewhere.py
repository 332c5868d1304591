"""Numbers from elsewhere: ml_dtypes, torch's float8 types, brevitas, the node cases of ONNX, torch's fake quantization."""

import base64
import json
from pathlib import Path

import format_reference as reference
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

ops = torch.ops.rarefy
ONE = torch.ones(1)

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def edge_cases(name: str) -> np.ndarray:
    """Every bfloat16, every number of the format, every middle between two, the floats on both sides of all of them, and beyond
    both ends."""
    numbers = np.array(reference.values_of(*reference.MINIFLOATS[name]), dtype=np.float64)
    following = numbers[-1] + (numbers[-1] - numbers[-2])
    ladder = np.concatenate([numbers, [following, 2 * following]])
    centers = np.concatenate([ladder, (ladder[1:] + ladder[:-1]) / 2]).astype(np.float32)
    around = np.concatenate(
        [centers, np.nextafter(centers, np.float32(np.inf)), np.nextafter(centers, np.float32(-np.inf))]
    )
    bfloat16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    tiny = np.float32([1e-45, 1e-40, 1.1754944e-38, 3.4028235e38])
    return np.concatenate([around, -around, bfloat16, tiny, -tiny])


def equal_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes(name):
    x = edge_cases(name)
    specials = reference.MINIFLOATS[name][3]
    if specials == "none":
        x = x[~np.isnan(x)]  # no code is NaN: ml_dtypes makes some number of it
    with np.errstate(all="ignore"):
        expected = x.astype(ML_DTYPES[name]).astype(np.float32)
    shape = reference.MINIFLOATS[name]
    y = ops.cast_minifloat(torch.from_numpy(x), ONE, None, [], *shape, specials == "none")
    equal_bits(y.numpy(), expected)
    double = ops.cast_minifloat(torch.from_numpy(x).double(), ONE, None, [], *shape, specials == "none")
    equal_bits(double.numpy().astype(np.float32), expected)


@pytest.mark.parametrize(
    ("kind", "shape"), [(ml_dtypes.float8_e3m4, (3, 4, 3, "ieee")), (ml_dtypes.float8_e4m3, (4, 3, 7, "ieee"))]
)
def test_ml_dtypes_of_other_shapes(kind, shape):
    x = edge_cases("e4m3")
    with np.errstate(all="ignore"):
        expected = x.astype(kind).astype(np.float32)
    equal_bits(ops.cast_minifloat(torch.from_numpy(x), ONE, None, [], *shape, False).numpy(), expected)


@pytest.mark.parametrize(("name", "kind"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_float8(name, kind, dtype):
    x = torch.from_numpy(edge_cases(name)).to(dtype)
    saturates = name == "e4m3"  # torch 2.13 does for e4m3fn, and gives infinity for e5m2
    y = ops.cast_minifloat(x, ONE, None, [], *reference.MINIFLOATS[name], saturates)
    equal_bits(y.float().numpy(), x.float().to(kind).to(dtype).float().numpy())


@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m1", "e4m3", "e5m2"])
def test_saturation_is_the_only_difference_above(name):
    x = torch.from_numpy(edge_cases(name))
    shape = reference.MINIFLOATS[name]
    y = ops.cast_minifloat(x, ONE, None, [], *shape, True)
    greatest = reference.values_of(*shape)[-1]
    assert float(y.nan_to_num().abs().max()) == greatest
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.all(y[x.abs() == torch.inf].abs() == greatest)


# --- brevitas ------------------------------------------------------------------------------------------

FIXTURE = json.loads((Path(__file__).parent.parent / "data" / "brevitas_formats.json").read_text())


def numbers(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())


@pytest.mark.parametrize("name", FIXTURE["cases"])
def test_brevitas(name):
    case = FIXTURE["cases"][name]
    x = numbers(FIXTURE["x"]).reshape(FIXTURE["shape"])
    expected, scale = numbers(case["value"]).reshape(x.shape), numbers(case["scale"])
    if name.startswith("int"):
        bits, zero_point = case["bits"], torch.tensor([case["zero_point"]], dtype=torch.int32)
        qmin = (-(2 ** (bits - 1)) if case["signed"] else 0) + int(case["narrow"])
        qmax = 2 ** (bits - 1) - 1 if case["signed"] else 2**bits - 1
        y = ops.fake_quantize_group(x, scale, zero_point, None, [], qmin, qmax)
    elif name.startswith("mx"):
        y = ops.fake_quantize_mx(x, name.split()[1])
    else:
        shape = reference.MINIFLOATS[name.split()[0]]
        axis = None if name.endswith("tensor") else 0
        found = ops.minifloat_scale(x, axis, [], *shape)
        assert torch.equal(found, scale)
        y = ops.cast_minifloat(x, found, axis, [], *shape)
    assert torch.equal(y, expected)


# --- ONNX ------------------------------------------------------------------------------------------


def node_cases() -> dict[str, object]:
    """The cases that the wheel generates when their modules are imported."""
    import onnx.backend.test.case.node.dequantizelinear
    import onnx.backend.test.case.node.quantizelinear  # noqa: F401
    from onnx.backend.test.case import node

    return {
        case.name.removeprefix("test_"): case
        for case in node._NodeTestCases
        if "quantizelinear" in case.name and "dynamic" not in case.name
    }


CASES = node_cases()


def array(value: object) -> np.ndarray:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


RANGES = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "uint4": (0, 15),
    "int4": (-8, 7),
    "uint2": (0, 3),
    "int2": (-2, 1),
}
FLOATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float4_e2m1fn": "e2m1"}


def rounded(
    x: torch.Tensor, scale: np.ndarray, zero_point: np.ndarray | None, kind: str, axis: int, block: int
) -> torch.Tensor:
    """x on the grid of a node, by our operators."""
    scales = torch.from_numpy(scale.astype(np.float32))
    per_tensor = scales.numel() == 1
    sharing = (None, []) if per_tensor else (axis, [block] if block else [])
    scales = scales.reshape(1) if per_tensor else scales
    if kind in FLOATS:
        return ops.cast_minifloat(x, scales, *sharing, *reference.MINIFLOATS[FLOATS[kind]])
    zeros = np.zeros(scale.shape) if zero_point is None else zero_point
    zeros = torch.from_numpy(zeros.astype(np.int32)).reshape(scales.shape)
    return ops.fake_quantize_group(x, scales, zeros, *sharing, *RANGES[kind])


@pytest.mark.parametrize("name", CASES)
def test_onnx_node_cases(name):
    case = CASES[name]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}
    inputs, outputs = case.data_sets[0]
    inputs, expected = [array(value) for value in inputs], array(outputs[0])
    x, scale, zero_point = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    integers = expected if name.startswith("quantize") else x
    kind = integers.dtype.name
    if kind not in FLOATS:
        codes = integers.astype(np.int64)
        zeros = np.zeros(scale.shape, np.int64) if zero_point is None else zero_point.astype(np.int64)
    else:
        codes, zeros = integers.astype(np.float32), np.zeros(scale.shape, np.float32)

    def spread(values: np.ndarray) -> np.ndarray:
        if values.size == 1:
            return values.reshape(())
        if block:
            return np.repeat(values, block, axis=axis)[tuple(slice(n) for n in codes.shape)]
        return values.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])

    y = ((codes - spread(zeros)).astype(np.float32) * spread(scale.astype(np.float32))).astype(np.float32)
    if name.startswith("quantize"):
        found = rounded(torch.from_numpy(x), scale, zero_point, kind, axis, block)
        assert np.array_equal(found.numpy(), y)
    else:
        assert np.array_equal(y.astype(expected.dtype), expected)  # the test's own arithmetic is the standard's
    # What a file holds comes back unchanged.
    finite = torch.from_numpy(np.nan_to_num(y, posinf=0, neginf=0))
    assert torch.equal(rounded(finite, scale, zero_point, kind, axis, block), finite)


def test_enough_onnx_cases_were_found():
    kinds = {name for name in CASES if any(word in name for word in ("int4", "int16", "e4m3fn", "blocked"))}
    assert len(CASES) >= 25
    assert len(kinds) >= 10


def test_torch_away_from_ties():
    """torch multiplies by the inverse of the scale; that differs next to ties alone."""
    x = torch.randn(16, 96)
    scale, zero_point = torch.rand(16) / 8 + 0.01, torch.randint(-8, 8, (16,), dtype=torch.int32)
    t = x / scale[:, None]
    away = (t - t.floor() - 0.5).abs() > 1e-4
    ours = ops.fake_quantize_group(x, scale[:, None].expand(16, 1), zero_point[:, None], -1, [-1], -8, 7)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -8, 7)
    assert torch.equal(ours[away], theirs[away])
    assert away.float().mean() > 0.99
