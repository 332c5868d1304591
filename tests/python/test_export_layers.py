"""Export of every layer, trained in integers: the file computes what the model computes, with the trained integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_nn_layers import conv1d_type  # noqa: F401, a fixture
from test_parity import EveryLayer, make_batch
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import FakeQuantizer, QConfig, convert, prepare_qat

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Gate(nn.Module):
    """The product of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mul, self.out = nn.Linear(6, 8), nn.Linear(6, 8), rf.nn.Mul(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mul(self.a(x), self.b(x)))


class Join(nn.Module):
    """Two branches and what was there before them, in other units, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.cat, self.out = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), rf.nn.Cat(1), nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cat(self.a(x), 10 * x, self.b(x)))


class ReadsWeight(nn.Module):
    """What Hugging Face's models do: the input takes the weight's type; and its size, [out, in], is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : self.a.weight.shape[1]].to(self.a.weight.dtype)
        return self.b(self.a(x).to(self.b.weight.dtype))


def convolutions(dim: int, batch_norm: bool) -> nn.Module:
    conv, norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
    middle = [norm(6)] if batch_norm else []
    return nn.Sequential(conv(2, 6, 3, padding=1, bias=not batch_norm), *middle, nn.ReLU(), conv(6, 4, 2, stride=2))


def volume(dim: int) -> Tensor:
    return torch.randn(4, 2, *(8, 7, 6)[:dim])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        f"{'conv_bn' if norm else 'conv'}{dim}d": (
            lambda dim=dim, norm=norm: convolutions(dim, norm),
            lambda dim=dim: volume(dim),
        )
        for dim in (1, 2, 3)
        for norm in (False, True)
    },
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), lambda: torch.randint(9, (4, 5))),
    "mul": (Gate, lambda: torch.randn(5, 6)),
    "weight read": (ReadsWeight, lambda: torch.randn(5, 7)),
    "cat": (Join, lambda: torch.randn(4, 2, 5, 5)),
}
# ONNX Runtime has no integer convolution with a float result, so that one at the end of a model stays in float.
IN_FLOAT = {"cat": ["out/Conv"]} | {f"conv{d}d": ["2/Conv"] for d in (1, 2, 3)}
IN_FLOAT |= {f"conv_bn{d}d": ["3/Conv"] for d in (1, 2, 3)}


def trained(model: nn.Module, *example: Tensor, config: QConfig | None = None) -> nn.Module:
    """Prepared, and trained in integers for a step; in evaluation mode."""
    model = prepare_qat(model, config or QConfig.int8(execution="integer"), example)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):  # a first one, so that ranges move
        optimizer.zero_grad()
        model(*example).square().mean().backward()
        optimizer.step()
    return model.eval()


def put_on_coarse_grid(model: nn.Module) -> None:
    """Powers of two as scales, and biases on the grid of the products: every float sum is then exact, in any order."""
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.observe = False
            module.scale.copy_(2.0 ** torch.ceil(torch.log2(module.scale)))
    for module in model.modules():
        if isinstance(module, rf.nn.WeightedLayer) and module.quant.input is not None:
            step = module.quant.input.scale * module.quant.weight.scale
            bias = module.bn.bias if isinstance(module, rf.nn.ConvBnLayer) else module.bias
            bias.data = torch.round(bias / step) * step
            if isinstance(module, rf.nn.ConvBnLayer):
                module.bn.running_mean.zero_()


def run(path, inputs: dict[str, Tensor], optimized: bool) -> Tensor:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def assert_holds_integers(path, model: nn.Module) -> None:
    """Every weight of the file is the trained int8 of its layer, and no other matrix is in it."""
    arrays = initializers(path)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, rf.nn.WeightedLayer)}
    assert layers
    for name, layer in layers.items():
        values = layer.integer_weight().values
        if isinstance(layer, rf.nn.Linear):
            values = values.t()
        assert arrays[f"{name}.weight"].dtype == np.int8
        np.testing.assert_array_equal(arrays[f"{name}.weight"], values.numpy())
    # Scales of rows are a column, biases may be rows.
    assert sum(a.size > max(a.shape, default=1) for a in arrays.values()) == len(layers)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check_exactly(model: nn.Module, inputs: dict[str, Tensor], path) -> rf.export.ExportReport:
    """Exports the model as it was trained, and with numbers whose sums are exact: then bit by bit."""
    example = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    report = rf.export.to_onnx(model, example, path)
    assert_holds_integers(path, model)
    put_on_coarse_grid(model)
    exact = rf.export.to_onnx(model, example, path)
    assert_holds_integers(path, model)
    with torch.no_grad():
        expected = model(**inputs) if len(inputs) > 1 else model(example)
    assert torch.equal(run(path, inputs, optimized=False), expected)
    assert all(d.max_abs == 0 for d in exact.differences if not d.optimized)
    # Optimized, a value may be on the other side of a tie: a step of its quantizer.
    assert exact.max_abs <= max(float(q.scale.max()) for q in model.modules() if isinstance(q, FakeQuantizer))
    return report


def optimized_operators(path, folder) -> list[str]:
    """What ONNX Runtime makes of the file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_trained_in_integers_is_exported_exactly(tmp_path, case):
    make, example = CASES[case]
    x = example()
    model = trained(make(), x)
    assert all(m.execution == "integer" for m in model.modules() if isinstance(m, rf.nn.QuantizableLayer))
    report = check_exactly(model, {"input": x}, tmp_path / "m.onnx")
    assert [op.name for op in report.in_float] == IN_FLOAT.get(case, [])
    assert report.in_integers


def test_a_product_runs_in_integers(tmp_path):
    x = torch.randn(5, 6)
    rf.export.to_onnx(trained(Gate(), x), x, tmp_path / "m.onnx")
    assert "QLinearMul" in optimized_operators(tmp_path / "m.onnx", tmp_path)


def test_a_concatenation_moves_integers_of_one_scale(tmp_path):
    x = torch.randn(4, 2, 5, 5)
    model = trained(Join(), x)
    path = tmp_path / "m.onnx"
    rf.export.to_onnx(model, x, path)
    graph, arrays = onnx.load(path).graph, initializers(path)
    (join,) = [node for node in graph.node if node.op_type == "Concat"]
    makers = {output: node for node in graph.node for output in node.output}
    sources = [makers[name] for name in join.input]
    assert [node.op_type for node in sources] == ["DequantizeLinear"] * 3
    assert {(float(arrays[n.input[1]]), int(arrays[n.input[2]])) for n in sources} == {
        (float(model.cat.quant.input.scale), int(model.cat.quant.input.zero_point))
    }
    assert "QLinearConcat" in optimized_operators(path, tmp_path)


def test_every_layer_in_one_model(tmp_path):
    ids, volumes = make_batch()
    model = trained(EveryLayer(), ids, volumes)
    report = check_exactly(model, {"ids": ids, "volumes": volumes}, tmp_path / "m.onnx")
    assert report.in_float == ()
    assert len(report.in_integers) == 9
    assert "Relu" not in report.nodes


def test_transposed_linear(tmp_path, conv1d_type):  # noqa: F811
    x = torch.randn(3, 5, 6)
    model = trained(nn.Sequential(conv1d_type(8, 6), nn.ReLU(), conv1d_type(4, 8)), x)
    assert type(model[0]) is rf.nn.TransposedLinear
    report = check_exactly(model, {"input": x}, tmp_path / "m.onnx")
    assert report.in_float == ()


def test_channels_last_weights_are_exported_as_any(tmp_path):
    x = volume(2)
    model = convolutions(2, batch_norm=True)
    files = {}
    for name, config in (("last", QConfig.int8()), ("first", QConfig.int8(execution="simulated"))):
        prepared = trained(model, x, config=config)
        assert (prepared[0].weight.stride()[1] == 1) == (name == "last")
        path = tmp_path / f"{name}.onnx"
        rf.export.to_onnx(prepared, x, path)
        files[name] = initializers(path)
        assert_holds_integers(path, prepared)
    assert files["last"].keys() == files["first"].keys()
    assert all(files["last"][name].shape == array.shape for name, array in files["first"].items())
    converted = convert(trained(model, x))
    report = rf.export.to_onnx(converted, x.to(memory_format=torch.channels_last), tmp_path / "converted.onnx")
    assert [op.name for op in report.in_integers] == ["0/Conv"]


def test_a_model_that_reads_the_sizes_of_its_layers(tmp_path):
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(2, 4, 3, stride=2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x * self.conv.stride[0])
            return self.fc(x.mean(2).reshape(-1, self.fc.in_features))

    x = volume(1)
    model = trained(Reads(), x)
    check_exactly(model, {"input": x}, tmp_path / "prepared.onnx")
    rf.export.to_onnx(convert(model), x, tmp_path / "converted.onnx")


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path):
    class Doubled(rf.nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = volume(1)
    model = trained(convolutions(1, batch_norm=False), x)
    model[2].__class__ = Doubled
    with pytest.raises(
        TypeError, match=r"a subclass of ConvLayer with its own forward cannot be exported, got Doubled"
    ):
        rf.export.to_onnx(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_several_inputs_export_quietly(tmp_path, recwarn):
    ids, volumes = make_batch()
    model = trained(EveryLayer(), ids, volumes)
    recwarn.clear()
    rf.export.to_onnx(model, (ids, volumes), tmp_path / "m.onnx", verify=False)
    assert [str(w.message) for w in recwarn] == []
