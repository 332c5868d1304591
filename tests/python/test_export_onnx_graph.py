"""The graph passes of the ONNX export, each on a graph of a few nodes: what is left, and that it computes the same."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from rarefy._core.quantization import target_profile  # noqa: E402
from rarefy.export import onnx_targets  # noqa: E402


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
