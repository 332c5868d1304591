"""Export of multi-head attention to ONNX: the file computes what the model does, and says so by its own verification."""

import numpy as np
import pytest
import torch
from test_nn_attention import HEADS, WIDTH, SelfAttends, attention
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import QConfig, Scheme, calibrate, convert, prepare

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Cross(nn.Module):
    """Attention of three inputs, masked, with its probabilities as a second result."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention, self.out = module, nn.Linear(WIDTH, 4)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(query, key, value, key_padding_mask=padding)
        return self.out(y), weights


def cross_inputs(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    shapes = [(3, 5, WIDTH), (3, 4, module.kdim), (3, 4, module.vdim)]
    tensors = [torch.randn(shape) for shape in shapes]
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[1, 2:] = True
    return (*tensors, padding)


def run(path, tensors) -> list[Tensor]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def close(got: Tensor, want: Tensor) -> None:
    """Root mean square of the difference: a value on a rounding edge may be met from either side."""
    assert got.shape == want.shape
    assert float((got - want).square().mean().sqrt()) <= 0.01 * float(want.square().mean().sqrt())


@pytest.mark.parametrize(
    ("form", "converted"), [("batch first", True), ("other widths", False), ("bias_kv", False), ("no bias", False)]
)
def test_the_file_computes_what_the_model_does(form, converted, tmp_path):
    module = attention(form)
    module.batch_first = True
    tensors = cross_inputs(module)
    model = calibrate(prepare(Cross(module), QConfig.int8()), [tensors], forward=lambda m, b: m(*b)).eval()
    if converted:
        model = convert(model)
    rf.export.to_onnx(model, tensors, tmp_path / "m.onnx")  # verifies itself
    with torch.no_grad():
        for got, want in zip(run(tmp_path / "m.onnx", tensors), model(*tensors), strict=True):
            close(got, want)
    weights = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(len(t.dims) == 2 for t in weights) == 5  # three projections, the output projection, the last layer


def test_one_input_is_quantized_once(tmp_path):
    x = torch.randn(2, 5, WIDTH)
    model = calibrate(prepare(nn.Sequential(SelfAttends(attention("batch first"))), QConfig.int8()), [x]).eval()
    report = rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    assert report.nodes_checked
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" and node.input[0] == graph.input[0].name for node in graph.node) == 1


@pytest.mark.parametrize("target", ["onnxruntime", "qnn"])
def test_a_transformer_for_each_target(target, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, 3))
    x = torch.randn(2, 5, WIDTH)
    model = calibrate(prepare(model, QConfig.int8(target=target), x), [x]).eval()
    rf.export.to_onnx(model, x, tmp_path / "m.onnx", target=target)
    with torch.no_grad():
        close(run(tmp_path / "m.onnx", [x])[0], model(x))


def test_formats_and_16_bits(tmp_path):
    x = torch.randn(2, 5, WIDTH)
    model = nn.Sequential(SelfAttends(attention("batch first")))
    for config in (QConfig.nf4(), QConfig.mxfp8()):
        prepared = calibrate(prepare(model, config), [x]).eval()
        rf.export.to_onnx(prepared, x, tmp_path / "m.onnx")
        want = prepared(x).detach()
        assert (run(tmp_path / "m.onnx", [x])[0] - want).abs().max() <= 0.1 * want.abs().max()
        with pytest.raises(ValueError, match="qnn"):
            rf.export.to_onnx(prepared, x, tmp_path / "none.onnx", target="qnn")
    wide = calibrate(prepare(model, QConfig.int8(activation=Scheme(bits=16, symmetric=False))), [x]).eval()
    rf.export.to_onnx(wide, x, tmp_path / "m.onnx")
    assert np.isfinite(run(tmp_path / "m.onnx", [x])[0].numpy()).all()
