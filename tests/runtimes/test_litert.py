"""LiteRT: the file runs, in integers, and computes what the model computes."""

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    check_case,
    check_failed_verification,
    check_refusals,
    check_whole_network_in_integers,
    make,
)
from torch import Tensor

from rarefy.export import to_litert

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")


def run(path, x: Tensor) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    values, (scale, zero_point) = x.numpy(), source["quantization"]
    if scale:
        values = np.clip(np.rint(values / np.float32(scale)) + zero_point, -128, 127)
    interpreter.set_tensor(source["index"], values.astype(source["dtype"]))
    interpreter.invoke()
    values, (scale, zero_point) = interpreter.get_tensor(result["index"]), result["quantization"]
    return (values.astype(np.float32) - zero_point) * np.float32(scale) if scale else values.copy()


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path):
    check_case(name, to_litert, run, tmp_path / "model.tflite")


def test_whole_network_in_integers(tmp_path):
    check_whole_network_in_integers(to_litert, run, tmp_path / "model.tflite", steps=3)


def test_refusals(tmp_path):
    check_refusals(to_litert, tmp_path / "model.tflite")


def test_failed_verification_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    check_failed_verification(to_litert, "_run", tmp_path / "model.tflite", monkeypatch)


def test_the_report_tells_the_scales_of_int8_inputs(tmp_path):
    model, x = make("cnn")
    report = to_litert(model, {"x": x}, tmp_path / "model.tflite")
    quantizer = model.stem[0].quant.input
    zero_point = int(quantizer.zero_point) - 128
    assert report.notes == (f"x is int8: scale {float(quantizer.scale):.9g}, zero point {zero_point}",)
    assert f"zero point {zero_point}" in repr(report)


def test_the_file_holds_the_trained_integers(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model, x = make("mlp")
    to_litert(model, x, tmp_path / "model.tflite")
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    integers = model[0].integer_weight().values
    stored = [
        torch.from_numpy(interpreter.get_tensor(tensor["index"]))
        for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] is np.int8 and list(tensor["shape"]) == list(integers.shape)
    ]
    assert any(torch.equal(values, integers) for values in stored)
