"""Core ML: the package holds the trained integers and every quantizer. It cannot be run here."""

import pytest
import torch
from cases import CASES, INT8, check_refusals, make, mlp, trained
from torch import nn

from rarefy.export import to_coreml
from rarefy.quantization import FakeQuantizer

ct = pytest.importorskip("coremltools")


def operations(path) -> list:
    package = ct.models.MLModel(str(path), skip_model_load=True)
    (function,) = package.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return list(block.operations)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_int8_and_every_quantizer_is_there(name, tmp_path):
    model, x = make(name)
    report = to_coreml(model, x, tmp_path / "model.mlpackage")
    quantizers = [key for key, module in model.named_modules() if isinstance(module, FakeQuantizer)]
    weights = [key for key in quantizers if key.endswith(".weight")]
    kinds = [operation.type for operation in operations(tmp_path / "model.mlpackage")]
    assert kinds.count("constexpr_affine_dequantize") == len(weights) == report.nodes["constexpr_affine_dequantize"]
    assert kinds.count("dequantize") >= kinds.count("quantize") > 0
    assert report.operators == report.differences == ()
    assert any("not run" in note for note in report.notes)
    assert "not run" in repr(report)
    assert [file.name for file in tmp_path.iterdir()] == ["model.mlpackage"]


def test_the_package_holds_the_trained_integers_and_scales(tmp_path):
    model, x = make("mlp")
    path = tmp_path / "model.mlpackage"
    to_coreml(model, x, path)
    files = [path / "Data/com.apple.CoreML" / name for name in ("weights/weight.bin", "model.mlmodel")]
    weights = b"".join(file.read_bytes() for file in files)  # the model itself holds tensors of up to ten numbers
    for index in (0, 2, 4):
        integers = model[index].integer_weight()
        assert integers.values.numpy().tobytes() in weights
        assert integers.scale.numpy().tobytes() in weights


def test_size_is_a_quarter_of_the_float_package(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    whole = to_coreml(wide, x, tmp_path / "float.mlpackage")
    small = to_coreml(trained(wide, x, INT8), x, tmp_path / "int8.mlpackage")
    assert small.bytes < 0.3 * whole.bytes


def test_float16(tmp_path):
    model, x = make("cnn")
    assert "cast" not in to_coreml(model, x, tmp_path / "a.mlpackage").nodes
    assert "cast" in to_coreml(model, x, tmp_path / "b.mlpackage", float16=True).nodes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)
    with pytest.raises(
        ValueError, match=r"\[to_coreml\] scales must be between 6.1\S+ and 65504 for float16=True, got"
    ):
        to_coreml(model, x, tmp_path / "c.mlpackage", float16=True)


def test_a_package_is_replaced_whole(tmp_path):
    path = tmp_path / "model.mlpackage"
    for name in ("cnn", "mlp"):
        report = to_coreml(*make(name), path)
        assert report.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert [operation.type for operation in operations(path)].count("conv") == 0
    with pytest.raises(ValueError, match="must have observed data"):
        to_coreml(trained(mlp(), torch.randn(2, 64)).apply(forget), torch.randn(2, 64), path)
    assert [operation.type for operation in operations(path)].count("linear") == 3
    (tmp_path / "file.mlpackage").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"\[to_coreml\] path must name a folder, got a file"):
        to_coreml(*make("mlp"), tmp_path / "file.mlpackage")


def forget(module: nn.Module) -> None:
    if isinstance(module, FakeQuantizer):
        module.min_val.fill_(torch.inf)
        module.max_val.fill_(-torch.inf)
        module.observe = False


def test_refusals(tmp_path):
    check_refusals(to_coreml, tmp_path / "model.mlpackage")
