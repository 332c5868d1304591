"""ExecuTorch: the file runs, in integers, and computes what the model computes."""

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    check_case,
    check_failed_verification,
    check_refusals,
    check_whole_network_in_integers,
    evaluate,
    make,
)
from torch import Tensor

import rarefy as rf
from rarefy.export import to_executorch

pytest.importorskip("executorch")


def run(path, *inputs: Tensor) -> np.ndarray:
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute(list(inputs))[0].numpy().copy()


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path):
    check_case(name, to_executorch, run, tmp_path / "model.pte")


def test_whole_network_in_integers(tmp_path):
    check_whole_network_in_integers(to_executorch, run, tmp_path / "model.pte", steps=3)


def test_refusals(tmp_path):
    check_refusals(to_executorch, tmp_path / "model.pte")


def test_failed_verification_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    check_failed_verification(to_executorch, "_run", tmp_path / "model.pte", monkeypatch)


def test_embeddings_are_looked_up_in_integers(tmp_path):
    model, ids = make("encoder")
    report = to_executorch(model, {"ids": ids}, tmp_path / "model.pte")
    names = {operator.name for operator in report.in_integers}
    assert {"tokens/embedding", "places/embedding"} <= names
    assert np.allclose(run(tmp_path / "model.pte", ids), evaluate(model, ids).numpy(), atol=1e-4)


def test_converted_model(tmp_path):
    model, x = make("cnn")
    converted = rf.quantization.convert(model)
    report = to_executorch(converted, x, tmp_path / "model.pte")
    assert len(report.in_integers) == 9
    assert report.max_abs < 0.02


def test_the_file_takes_other_values_of_the_same_shape(tmp_path):
    model, x = make("cnn")
    to_executorch(model, x, tmp_path / "model.pte", verify=False)
    other = 3 * torch.randn_like(x)  # clipped at the ends of the ranges
    expected = evaluate(model, other)
    got = run(tmp_path / "model.pte", other)
    assert np.abs(got - expected.numpy()).max() < 2.5 / 255 * float(expected.max() - expected.min())
