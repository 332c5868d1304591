"""Learned grids in both languages: the same training, files of one continue in the other, the same integers."""

import pytest
import torch
from test_parity import TOLERANCE, EveryLayer, Training, assert_equal_states, load_file, make_batch, save_model
from test_parity import parity_program as parity_program  # a fixture
from torch import nn

from rarefy.quantization import LSQ, TQT, FakeQuantizer, LearnedBits, LSQPlus, QConfig, Scheme, convert, prepare_qat

CONFIGS = {
    "lsq": QConfig.int8(observer=LSQ(), weight_observer=LSQ()),
    "lsq_plus": QConfig.int8(observer=LSQPlus(), weight_observer=LSQ()),
    "tqt": QConfig.int8(activation=Scheme(bits=8), observer=TQT(), weight_observer=TQT()),
    "bits": QConfig.int8(activation=Scheme(bits=8), observer=LearnedBits(), weight_observer=LearnedBits()),
}


def prepared(kind: str, model: nn.Module) -> nn.Module:
    return prepare_qat(model, CONFIGS[kind], make_batch())


@pytest.fixture(params=CONFIGS)
def training(request, parity_program, tmp_path):
    torch.manual_seed(3)
    return Training(parity_program, request.param, tmp_path)


def test_from_cpp_to_python(training):
    floating = EveryLayer()
    save_model(floating, training.folder / "float")
    returned = training.in_cpp("float", 0, 2, "trained")
    model = prepared(training.execution, floating)
    torch.testing.assert_close(returned["losses"], training.in_python(model, 0, 2), **TOLERANCE)
    assert_equal_states(load_file(training.folder / "trained"), model.state_dict())


def test_from_python_to_cpp_and_converted(training):
    model = prepared(training.execution, EveryLayer())
    training.in_python(model, 0, 2)
    for quantizer in (m for m in model.modules() if isinstance(m, FakeQuantizer)):
        quantizer.settle()  # what follows from the parameters is brought up to date by loading, too
    save_model(model, training.folder / "trained")
    returned = training.in_cpp("trained", 2, 4, "further")
    torch.testing.assert_close(returned["losses"], training.in_python(model, 2, 4), **TOLERANCE)
    assert_equal_states(load_file(training.folder / "further"), model.state_dict())

    save_model(model, training.folder / "trained")
    returned = training.in_cpp("trained", 0, 0, "same")
    integer = convert(model)
    converted = load_file(training.folder / "same.converted")
    assert_equal_states(converted, integer.state_dict())
    integers = [name for name, value in converted.items() if value.dtype == torch.int8]
    assert len(integers) == 9
    assert all(torch.equal(converted[name], integer.state_dict()[name]) for name in integers)
    with torch.no_grad():
        torch.testing.assert_close(returned["converted"], integer(*training.batches[0][:2]), **TOLERANCE)
