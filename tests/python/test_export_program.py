"""What the exporters for single runtimes share: the program's passes, the arguments, the place of the file."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
from pathlib import Path

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


def test_values_that_are_not_finite_must_be_the_same():
    x = torch.randn(4, 3)
    prepared = runtime.prepare_model("f", nn.Identity(), x)
    (want,) = prepared.expected
    want[0] = (np.nan, np.inf, -np.inf)
    (same,) = runtime.compare("f", [want.copy()], prepared, [None])
    assert same.max_abs == 0.0
    for value, place in ((-np.inf, 1), (np.nan, 2), (np.inf, 0)):
        other = want.copy()
        other[0, place] = value
        with pytest.raises(RuntimeError, match=r"\[f\] verification failed: output_0 has other infinities or NaN"):
            runtime.compare("f", [other], prepared, [None])
    want[:] = np.nan
    with pytest.raises(RuntimeError, match="output_0: the model gives no finite value on the example"):
        runtime.compare("f", [want.copy()], prepared, [None])


def test_an_index_may_differ_where_rounding_changes_it():
    want = np.arange(4)
    prepared = runtime.Prepared(nn.Identity(), runtime.check_example("f", torch.ones(1)), [want], [want])
    one_wrong = want + (want == 2)
    with pytest.raises(RuntimeError, match=r"differs from the model in 25.0% of its values \(allowed 0.0%\)"):
        runtime.compare("f", [one_wrong], prepared, [None])
    (found,) = runtime.compare("f", [one_wrong], dataclasses.replace(prepared, unrounded=[want - (want == 3)]), [None])
    assert (found.differing, found.allowed) == (0.25, 0.25)
    alone = dataclasses.replace(prepared, expected=[want[:1]], unrounded=[want[:1]])
    with pytest.raises(RuntimeError, match=r"differs from the model in 100.0% of its values"):
        runtime.compare("f", [one_wrong[:1] + 900], alone, [None])
    many = np.arange(100)
    prepared = dataclasses.replace(prepared, expected=[many], unrounded=[many])
    runtime.compare("f", [many + (many < 5)], prepared, [None])
    with pytest.raises(RuntimeError, match=r"in 6.0% of its values \(allowed 5.0%\)"):
        runtime.compare("f", [many + (many < 6)], prepared, [None])


def test_half_precision_has_its_own_tolerance():
    x = torch.randn(64, 12)
    prepared = runtime.prepare_model("f", nn.Linear(12, 7), x)
    (want,) = prepared.expected
    rounded = want * np.float32(1 + 2.0**-11)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        runtime.compare("f", [rounded], prepared, [None])
    runtime.compare("f", [rounded], prepared, [None], half=True)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        runtime.compare("f", [want * np.float32(1.01)], prepared, [None], half=True)


def test_types_that_numpy_lacks_are_refused():
    x = torch.randn(4, 3)
    message = r"\[f\] parameters must be float32, float64 or float16, got bfloat16 at weight; call model.float\(\)"
    with pytest.raises(TypeError, match=message):
        runtime.prepare_model("f", nn.Linear(3, 2).bfloat16(), x.bfloat16())
    with pytest.raises(TypeError, match=r"\[f\] example_inputs must be of a type that numpy has, got bfloat16"):
        runtime.prepare_model("f", nn.Identity(), x.bfloat16())


def test_what_was_there_comes_back_when_a_file_cannot_be_moved(tmp_path, monkeypatch):
    path, folder = tmp_path / "m.xml", tmp_path / "p.mlpackage"
    path.write_text("old graph")
    path.with_suffix(".bin").write_text("old weights")
    folder.mkdir()
    (folder / "x").write_text("old package")
    replace = os.replace

    def full(source, target):
        if Path(target) in (path, folder) and ".before" not in Path(source).name:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)

    def write_files() -> None:
        with runtime.pending("f", path, ".xml") as temporary:
            for suffix in (".xml", ".bin", ".map"):
                temporary.with_suffix(suffix).write_text("new")

    def write_folder() -> None:
        with runtime.pending("f", folder, ".mlpackage", folder=True) as temporary:
            temporary.mkdir()

    for write in (write_files, write_folder):
        with pytest.raises(OSError, match="no space left"):
            write()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml", "p.mlpackage"]
    assert path.with_suffix(".bin").read_text() == "old weights"
    assert path.read_text() == "old graph"
    assert (folder / "x").read_text() == "old package"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, TypeError, "path must be a string or a pathlib.Path, got None"),
        (3, TypeError, "path must be a string or a pathlib.Path, got 3"),
        (b"a.xml", TypeError, "path must be a string or a pathlib.Path, got b'a.xml'"),
        ("", IsADirectoryError, "path must name a file, got a folder"),
        ("missing.xml/", IsADirectoryError, "path must name a file, got a folder: missing.xml/"),
    ],
)
def test_what_is_no_path_of_a_file_is_refused(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)

    def enter() -> None:
        with runtime.pending("f", path, ".xml"):
            pass

    with pytest.raises(error, match=rf"^\[f\] {message}"):
        enter()
    assert list(tmp_path.iterdir()) == []


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
