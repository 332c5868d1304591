"""What the exporters for single runtimes share: the program's passes, the arguments, the place of the file."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from test_export_layers import CASES, trained
from torch import Tensor, nn

import rarefy as rf
from rarefy.export import program as passes
from rarefy.export import runtime
from rarefy.export.lowering import lower

EXPORTERS = {
    "openvino": (rf.export.to_openvino, "openvino"),
    "executorch": (rf.export.to_executorch, "executorch"),
    "litert": (rf.export.to_litert, "litert_torch"),
    "coreml": (rf.export.to_coreml, "coremltools"),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Pooled(nn.Module):
    """ReLUs behind layers that have applied them, pooling and reshaping before a quantizer, one value read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu, self.add, self.fc = nn.ReLU(), rf.nn.Add(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.relu(self.conv(x))), 2)
        return self.fc(torch.relu(self.add(self.a(x), self.b(x))).flatten(1))


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    example = runtime.check_example("test", x)
    return passes.export_program("test", lower(copy.deepcopy(model), False, linear="linear"), example)


@pytest.mark.parametrize("name", CASES)
def test_passes_change_no_value(name):
    make, example = CASES[name]
    x = example()
    model = trained(make(), x)
    with torch.no_grad():
        expected = lower(copy.deepcopy(model), False, linear="linear")(x)
        (result,) = exported(model, x).module()(x=x)
    assert torch.equal(result, expected)


def test_quantizers_stand_where_integer_kernels_look_for_them():
    x = torch.randn(3, 2, 4, 4)
    model = trained(Pooled(), x)
    program = exported(model, x)
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    (pool,) = (node for node in nodes.values() if node.target is torch.ops.aten.max_pool2d.default)
    (before,), (behind,) = pool.args[:1], pool.users
    assert before.target is passes.DEQUANTIZE
    assert behind.target is passes.QUANTIZE
    assert before.args[1:] == behind.args[1:]  # the same grid: the pooling runs on integers
    readers = list(behind.users)
    assert len(readers) == 2  # one quantizer for both convolutions, and a dequantizer for each
    assert all(reader.target is passes.DEQUANTIZE and len(reader.users) == 1 for reader in readers)
    (flatten,) = (node for node in nodes.values() if node.target is torch.ops.aten.flatten.using_ints)
    assert flatten.args[0].target is passes.DEQUANTIZE
    relus = [node for node in nodes.values() if node.target in (torch.ops.aten.relu.default,)]
    assert len(relus) == 2  # of four: those that the layers do not apply themselves are gone
    (product,) = passes.float_products(program)
    assert passes.module_path(product) == "fc"


def test_a_quantized_mean_keeps_its_axes():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3)))

    x = torch.randn(3, 2, 4, 4)
    model = trained(Mean(), x)
    program = exported(model, x)
    (mean,) = (node for node in program.graph_module.graph.nodes if node.target is torch.ops.aten.mean.dim)
    assert mean.args[1:] == ([2, 3], True)
    assert all(reader.target is passes.QUANTIZE for reader in mean.users)
    with torch.no_grad():
        expected = lower(copy.deepcopy(model), False, linear="linear")(x)
    assert torch.equal(program.module()(x=x)[0], expected)


def test_float_weights_replace_integers_and_change_no_value():
    x = torch.randn(3, 2, 4, 4)
    model = trained(Pooled(), x)
    program = exported(model, x)
    (expected,) = program.module()(x=x)
    (product,) = passes.float_products(program)
    passes.store_float_weight(program, product)
    passes.detach_from_quantizer(program, product)
    program.graph_module.recompile()
    assert product.args[0].target is torch.ops.aten.clamp.default
    assert program.state_dict["model.fc.weight"].dtype == torch.float32
    assert torch.equal(program.module()(x=x)[0], expected)


def test_example_inputs():
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    assert runtime.check_example("f", x).names == ("x",)
    assert runtime.check_example("f", (x, y)).names == ("x_0", "x_1")
    named = runtime.check_example("f", {"a": x, "use_cache": False, "b": y})
    assert named.names == ("a", "b")
    assert named.constants == {"use_cache": False}

    class Called(nn.Module):
        def forward(self, a: Tensor, b: Tensor, use_cache: bool = True) -> dict[str, Tensor | None]:
            return {"sum": a.sum() + b.sum() + (1000.0 if use_cache else 0.0), "none": None}

    program = passes.export_program("f", Called(), named)
    (result,) = program.module()(a=x, b=y)
    torch.testing.assert_close(result, x.sum() + y.sum())
    with pytest.raises(TypeError, match=r"\[f\] example_inputs must be tensors, got int"):
        runtime.check_example("f", 3)
    with pytest.raises(TypeError, match=r"\[f\] example_inputs must be tensors, got list among them"):
        runtime.check_example("f", {"a": [x]})


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch, tmp_path):
    export, package = EXPORTERS[name]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == package else find(n, *rest))
    with pytest.raises(ImportError, match=rf"\[to_{name}\] needs {package}.*: pip install rarefy\[{name}\]"):
        export(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_comparison():
    x = torch.randn(64, 12)
    model = trained(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 7)), x)
    prepared = runtime.prepare_model("f", model, x)
    (want,) = prepared.expected
    (noise,) = (free - want for free in prepared.unrounded)
    assert 0 < np.abs(noise).max() < 0.1 * np.abs(want).max()
    (same,) = runtime.compare("f", [want.copy()], prepared, [None])
    assert (same.max_abs, same.differing, same.steps) == (0.0, 0.0, None)
    (near,) = runtime.compare("f", [want + noise], prepared, [0.5])
    assert near.max_abs == pytest.approx(float(np.abs(noise).max()), rel=1e-4)
    assert near.steps == pytest.approx(near.max_abs / 0.5)
    with pytest.raises(RuntimeError, match=r"\[f\] verification failed: output_0 differs from the model by \S+ rms"):
        runtime.compare("f", [want + 10 * noise], prepared, [None])
    one_wrong = want.copy()
    one_wrong[0, 0] += 1.0
    with pytest.raises(RuntimeError, match="differs from the model by"):
        runtime.compare("f", [one_wrong], prepared, [None])
    with pytest.raises(RuntimeError, match=r"output_0 is float32 \(7, 64\), but the model gives float32 \(64, 7\)"):
        runtime.compare("f", [want.T], prepared, [None])
    with pytest.raises(RuntimeError, match="the file has 2 outputs, the model 1"):
        runtime.compare("f", [want, want], prepared, [None, None])
    one_wrong[0, 0] = np.nan
    with pytest.raises(RuntimeError, match="is not finite where the model is"):
        runtime.compare("f", [one_wrong], prepared, [None])


def test_files_get_their_names_when_all_is_well(tmp_path):
    path = tmp_path / "model.xml"
    with runtime.pending("f", path, ".xml") as temporary:
        assert temporary.parent.parent == tmp_path  # the same file system
        temporary.write_text("new")
        temporary.with_suffix(".bin").write_text("weights")
        assert not path.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]

    def fail() -> None:
        with runtime.pending("f", path, ".xml") as temporary:
            temporary.write_text("broken")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    folder = tmp_path / "a.mlpackage"
    for content in ("1", "2"):
        with runtime.pending("f", folder, ".mlpackage", folder=True) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [file.name for file in folder.iterdir()] == ["2"]
    assert runtime.size_of(folder) == 1
