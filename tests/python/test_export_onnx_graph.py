"""The graph passes of the ONNX export, each on a graph of a few nodes: what is left, and that it computes the same."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from rarefy._core.quantization import target_profile  # noqa: E402
from rarefy.export import onnx_opset, onnx_targets  # noqa: E402


def rewritten(body: str, constants: str = "", shape: str = "N,4", result: str | None = None, target="onnxruntime"):
    """Two models: the text, and the text after the passes for the target."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
      g (float[{shape}] x) => (float[{result or shape}] y)
      <float s = {{0.1}}, uint8 z = {{3}}, uint8 zero = {{0}}, uint8 mid = {{128}} {constants}>
      {{ {body} }}"""
    before = onnx.parser.parse_model(text)
    before = onnx.shape_inference.infer_shapes(before)
    model = ir.from_proto(before)
    onnx_targets.place(model, target_profile(target))
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return before, after


def assert_same_function(before, after, x: np.ndarray) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    results = [
        ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (before, after)
    ]
    np.testing.assert_array_equal(*results)


def op_types(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


#: Around bin centres, bin edges and limits of a grid with scale 0.1, and far outside.
EDGES = np.concatenate(
    [np.arange(-40, 400) * np.float32(0.05), np.nextafter(np.float32(0.05), np.float32([0, 1])), [-1e30, 1e30, -30, 30]]
).astype(np.float32)
EDGES = EDGES[: len(EDGES) // 4 * 4].reshape(-1, 4)


@pytest.mark.parametrize(
    ("zero_point", "limits", "left"),
    [
        ("zero", "Relu(x)", ["QuantizeLinear"]),
        ("z", "Relu(x)", ["QuantizeLinear", "Clip"]),
        ("mid", "Relu(x)", ["QuantizeLinear", "Clip"]),
        ("zero", "Clip(x, low, high)", ["QuantizeLinear", "Clip"]),
        ("mid", "Clip(x, low, high)", ["QuantizeLinear", "Clip"]),
        ("zero", "Clip(x, low)", ["QuantizeLinear"]),
        ("zero", "Clip(x, low, wide)", ["QuantizeLinear"]),
    ],
)
def test_clipping_moves_behind_the_quantizer(zero_point, limits, left):
    before, after = rewritten(
        f"r = {limits} q = QuantizeLinear(r, s, {zero_point}) y = DequantizeLinear(q, s, {zero_point})",
        ", float low = {0.0}, float high = {6.0}, float wide = {25.5}",
    )
    assert op_types(after) == [*left, "DequantizeLinear"]
    assert_same_function(before, after, EDGES)


def test_clipping_and_a_narrow_range_become_one_limit():
    before, after = rewritten(
        "r = Relu(x) q = QuantizeLinear(r, s, z) c = Clip(q, one, fifteen) y = DequantizeLinear(c, s, z)",
        ", uint8 one = {1}, uint8 fifteen = {15}",
    )
    assert op_types(after) == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    assert_same_function(before, after, EDGES)


def test_a_relu_that_is_also_read_in_float_stays():
    before, after = rewritten("r = Relu(x) q = QuantizeLinear(r, s, z) d = DequantizeLinear(q, s, z) y = Add(r, d)")
    assert "Relu" in op_types(after)
    assert_same_function(before, after, EDGES)


def test_equal_quantizers_are_merged_and_different_ones_are_not():
    before, after = rewritten(
        """a = Neg(x) q1 = QuantizeLinear(a, s, z) d1 = DequantizeLinear(q1, s, z)
           q2 = QuantizeLinear(a, s2, z2) d2 = DequantizeLinear(q2, s2, z2)
           q3 = QuantizeLinear(a, s, zero) d3 = DequantizeLinear(q3, s, zero)
           q4 = QuantizeLinear(d1, s, z) d4 = DequantizeLinear(q4, s, z)
           y = Sum(d1, d2, d3, d4)""",
        ", float s2 = {0.1}, uint8 z2 = {3}",
    )
    assert op_types(after).count("QuantizeLinear") == 2
    assert op_types(after).count("DequantizeLinear") == 2
    assert_same_function(before, after, EDGES)


def test_quantizing_moves_before_pooling_and_reshaping():
    before, after = rewritten(
        """r = Relu(x) p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r) f = Flatten(p)
           q = QuantizeLinear(f, s, zero) y = DequantizeLinear(q, s, zero)""",
        shape="N,2,4,4",
        result="N,8",
    )
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert op_types(after) == [*pair, "MaxPool", *pair, "Flatten", *pair]
    assert_same_function(before, after, np.resize(EDGES, (6, 2, 4, 4)))


@pytest.mark.parametrize("keep", [0, 1])
def test_the_mean_of_quantized_images_becomes_a_pooling(keep):
    before, after = rewritten(
        f"q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = ReduceMean<keepdims = {keep}>(d, axes)",
        ", int64[2] axes = {-1, 2}",
        shape="N,2,4,4",
        result="N,2,1,1" if keep else "N,2",
    )
    assert op_types(after)[2:] == ["GlobalAveragePool"] + ([] if keep else ["Flatten"])
    from onnx.reference import ReferenceEvaluator

    x = np.resize(EDGES.clip(-30, 30), (6, 2, 4, 4))
    results = [ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (before, after)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_a_float_graph_is_left_alone():
    before, after = rewritten(
        "r = Relu(x) t = Relu(r) y = MatMul(t, w)", ", float[4,1] w = {1.0, 2.0, 3.0, 4.0}", result="N,1"
    )
    assert op_types(after) == op_types(before)


def test_a_graph_output_keeps_its_name_when_its_relu_goes():
    body = "a = Relu(x) q = QuantizeLinear(a, s, zero) d = DequantizeLinear(q, s, zero)"
    before, after = rewritten(f"{body} y = Relu(d)")
    assert op_types(after) == ["QuantizeLinear", "DequantizeLinear"]
    assert after.graph.output[0].name == "y"
    assert_same_function(before, after, EDGES)


# ---- operator sets --------------------------------------------------------------------------------------------------


def lowered(body: str, opset: int, constants: str = "", shape: str = "N,4", result: str | None = None):
    """A model of operator set 18, and the same for an older one."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
      g (float[{shape}] x) => (float[{result or shape}] y)
      <float half = {{0.5}}, int64[1] last = {{-1}} {constants}>
      {{ {body} }}"""
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.from_proto(before)
    onnx_opset.lower_opset(model, opset)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert after.opset_import[0].version == opset
    return before, after


SENTENCES = {
    "mean": ("y = ReduceMean<keepdims = 1>(x, last)", "N,1", ["ReduceMean"]),
    "largest": ("y = ReduceMax<keepdims = 1>(x, last)", "N,1", ["ReduceMax"]),
    "no axes": ("y = ReduceMean<noop_with_empty_axes = 1>(x)", None, ["Identity"]),
    "all axes": ("y = ReduceMean(x)", "1,1", ["ReduceMean"]),
    "split": ("a, b = Split<num_outputs = 2, axis = 1>(x) y = Mul(a, b)", "N,2", ["Split", "Mul"]),
    "pad": ("y = Pad(x, one, half, last)", "N,6", ["Pad"]),
    "shape": ("s = Shape<start = 1>(x) y = Reshape<allowzero = 1>(x, s2)", "2,M", ["Reshape"]),
    "hard swish": ("y = HardSwish(x)", None, ["HardSigmoid", "Mul"]),
    "resize": ('y = Resize<antialias = 0, mode = "linear">(x, , double)', "N,8", ["Resize"]),
    "batch norm": ("y = BatchNormalization<training_mode = 0>(x, w, w, w, w)", None, ["BatchNormalization"]),
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("case", [name for name in SENTENCES if name != "no axes"])
def test_older_operator_sets_say_the_same(case, opset):
    body, result, left = SENTENCES[case]
    before, after = lowered(
        body,
        opset,
        ", int64[2] one = {1, 1}, int64[2] s2 = {2, -1}, float[2] double = {1.0, 2.0}, float[4] w = {1.0, 2.0, 3.0, 0.5}",
        result=result,
        shape="4,4" if result == "2,M" else "N,4",
    )
    if opset == 13:
        assert op_types(after) == left
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 3
    if case == "hard swish":
        results = [run_plainly(model, x) for model in (before, after)]
        np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)
    else:
        assert_same_function(before, after, x)


def run_plainly(model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_layer_normalization_in_parts(axis, bias):
    before, after = lowered(
        f"y = LayerNormalization<axis = {axis}, epsilon = 0.001>(x, w{bias})",
        16,
        ", float[4] w = {1.0, 2.0, -1.0, 0.5}, float[4] b = {0.0, 1.0, 2.0, 3.0}",
        shape="N,3,4" if axis == -1 else "N,4",
    )
    assert "LayerNormalization" not in op_types(after)
    shape = (5, 3, 4) if axis == -1 else (5, 4)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 3 + 1
    np.testing.assert_allclose(run_plainly(before, x), run_plainly(after, x), rtol=1e-5, atol=1e-5)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 0.001) * np.float32([1, 2, -1, 0.5])
    expected = expected + np.float32([0, 1, 2, 3]) if bias else expected
    np.testing.assert_allclose(run_plainly(after, x), expected, rtol=1e-4, atol=1e-5)


def test_parts_of_shapes():
    before, after = lowered(
        "s = Shape<start = -1>(x) t = Concat<axis = 0>(s, last) y = Reshape(x, t)", 14, result="4,M"
    )
    assert op_types(after) == ["Shape", "Slice", "Concat", "Reshape"]
    assert_same_function(before, after, np.arange(12, dtype=np.float32).reshape(3, 4))


@pytest.mark.parametrize(
    ("body", "opset", "message"),
    [
        ("y = Mish(x)", 17, r"\[to_onnx\] opset must be one that has Mish \(18\), got 17, for node"),
        (
            'i = Cast<to = 7>(x) y = ScatterElements<reduction = "add">(x, i, x)',
            15,
            r"scattering with a reduction \(16\)",
        ),
        ("y = Resize<antialias = 1>(x, , wide)", 17, r"resizes with antialias \(18\), got 17, for node"),
        ("y = Reshape<allowzero = 1>(x, none)", 13, r"reshapes to a size of 0 \(14\), got 13"),
        ("k = Cast<to = 7>(half) a = Unsqueeze(k, none0) y = ReduceSumSquare(x, a)", 17, r"takes axes that the graph"),
    ],
)
def test_what_an_older_set_cannot_say_is_an_error(body, opset, message):
    with pytest.raises(ValueError, match=message):
        lowered(body, opset, ", int64[2] none = {0, 4}, int64[1] none0 = {0}, float[2] wide = {1.0, 2.0}", result="N,M")


def test_newer_operator_sets_keep_the_graph():
    before, after = lowered("y = ReduceMean<keepdims = 1>(x, last)", 18, result="N,1")
    assert op_types(after) == op_types(before)
    assert after.ir_version == 8


# ---- targets --------------------------------------------------------------------------------------------------------


def test_a_residual_before_a_normalization_is_a_sum():
    body = "a = Relu(x) b = Add(x, a) n = LayerNormalization(b, w) q = QuantizeLinear(n, s, z) y = DequantizeLinear(q, s, z)"
    before, after = rewritten(body, ", float[4] w = {1.0, 1.0, 2.0, 1.0}")
    assert op_types(after) == ["Relu", "Sum", "LayerNormalization", "QuantizeLinear", "DequantizeLinear"]
    assert_same_function(before, after, EDGES)
    _, kept = rewritten(body, ", float[4] w = {1.0, 1.0, 2.0, 1.0}", target="openvino")
    assert "Add" in op_types(kept)


def test_zero_points_of_weights_are_left_out_where_they_are_zero():
    body = """w = DequantizeLinear(i, s, zw) v = DequantizeLinear(i, s, zv) q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z) a = MatMul(d, w) b = MatMul(a, v) y = Add(a, b)"""
    constants = ", int8[4,4] i = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, int8 zw = {0}, int8 zv = {1}"
    before, after = rewritten(body, constants, target="openvino")
    counts = [len(node.input) for node in after.graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(counts) == [2, 3, 3]
    assert_same_function(before, after, EDGES[:20])


@pytest.mark.parametrize("zero_point", ["zero", "mid"])
def test_clipping_goes_where_the_type_saturates(zero_point):
    body = f"r = Relu(x) q = QuantizeLinear(r, s, {zero_point}) y = DequantizeLinear(q, s, {zero_point})"
    for target, left in (("qnn", zero_point == "mid"), ("openvino", True), ("tensorrt", True)):
        before, after = rewritten(body, target=target)
        assert ("Relu" in op_types(after)) == left
        assert "Clip" not in op_types(after)
        assert_same_function(before, after, EDGES)


@pytest.mark.parametrize("per_row", [False, True])
def test_rows_are_looked_up_before_they_are_scaled(per_row):
    scales, zeros = ("r", "zr") if per_row else ("s", "zt")
    body = f"""t = DequantizeLinear<axis = 0>(i, {scales}, {zeros}) j = Cast<to = 7>(x) e = Gather(t, j)
      y = ReduceSum<keepdims = 0>(e, last)"""
    constants = """, int8[3,2] i = {1, -2, 3, 4, -128, 127}, float[3] r = {0.5, 0.25, 0.1}, int8[3] zr = {0, 0, 0},
      int8 zt = {5}, int64[1] last = {-1}"""
    before, after = rewritten(body, constants)
    (gathers, kinds) = [n for n in after.graph.node if n.op_type == "Gather"], op_types(after)
    assert len(gathers) == (2 if per_row else 1)
    assert "i" in [node.input[0] for node in gathers]
    assert ("DequantizeLinear" in kinds) != per_row
    assert_same_function(before, after, np.float32([[0, 1, 2, 2], [2, 1, 0, 0]]))
