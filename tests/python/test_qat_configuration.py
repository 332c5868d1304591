"""What QConfig and prepare let the user say: overrides by function, first and last layers, strictness, execution."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import QConfig, Scheme, prepare, prepare_qat, report


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.a = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)
        self.add = rf.nn.Add()

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(self.add(self.b(x), x))


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def states(model: nn.Module) -> dict[str, str]:
    return {row.name: row.state for row in report(model).layers}


def notes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.note for row in report(model).layers}


# --- Overrides by function ------------------------------------------------------------------------------------------
def test_overrides_by_function():
    four = QConfig(Scheme(bits=4), Scheme(bits=4, symmetric=False))
    seen = []

    def choose(name: str, module: nn.Module):
        seen.append((name, type(module)))
        if isinstance(module, nn.Linear) and module.out_features == 2:
            return None
        return four if name == "b" else NotImplemented

    model = prepare_qat(Backwards(), QConfig.int8(overrides=choose))
    assert ("a", nn.Linear) in seen
    assert states(model) == {"c": "fp32", "b": "prepared", "a": "prepared", "add": "prepared"}
    assert notes(model)["c"] == "kept in FP32 by the override choose"
    assert model.b.quant.weight.scheme.bits == 4
    assert model.a.quant.weight.scheme.bits == 8


def test_a_function_must_give_a_configuration():
    model = Backwards()
    message = "[QConfig] overrides must give a QConfig, None or NotImplemented, got str for c"
    with pytest.raises(TypeError, match=re.escape(message)):
        prepare_qat(model, QConfig.int8(overrides=lambda name, module: "int8"), inplace=True)
    assert type(model.c) is nn.Linear
    with pytest.raises(TypeError, match=re.escape("[QConfig] overrides must be a mapping or a function")):
        QConfig.int8(overrides=["c"])


# --- First and last layer -------------------------------------------------------------------------------------------
def test_first_and_last_layer_in_module_order():
    model = prepare_qat(Backwards(), QConfig.int8(first_last_fp32=True))
    assert states(model) == {"c": "fp32", "b": "prepared", "a": "fp32", "add": "prepared"}
    assert notes(model)["c"] == "kept in FP32 as the first layer (first_last_fp32)"
    assert notes(model)["a"] == "kept in FP32 as the last layer (first_last_fp32)"


def test_first_and_last_layer_in_the_order_of_the_run():
    class Five(Backwards):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Linear(2, 2)
            self.e = nn.Linear(2, 2)

        def forward(self, x):
            return self.d(self.e(super().forward(x)))

    model = prepare_qat(Five(), QConfig.int8(first_last_fp32=True), torch.randn(2, 3))
    assert notes(model)["a"] == "kept in FP32 as the first layer (first_last_fp32)"
    assert notes(model)["d"] == "kept in FP32 as the last layer (first_last_fp32)"
    assert [n for n, s in states(model).items() if s == "fp32"] == ["a", "d"]


def test_an_override_counts_before_first_and_last():
    config = QConfig.int8(first_last_fp32=True, overrides={"c": QConfig.int8()})
    assert states(prepare_qat(Backwards(), config)) == {
        "c": "prepared",
        "b": "prepared",
        "a": "fp32",
        "add": "prepared",
    }


def test_first_and_last_must_leave_something():
    with pytest.raises(ValueError, match=r"\[prepare\] the model must have a layer that the configuration quantizes"):
        prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), QConfig.int8(first_last_fp32=True))


# --- strict ---------------------------------------------------------------------------------------------------------
def left_alone() -> nn.Sequential:
    return nn.Sequential(Scaled(3, 3), nn.Linear(3, 3))


def test_strict_names_layers_that_nobody_excluded():
    model = left_alone()
    message = (
        "[prepare_qat] every layer must be quantized or excluded by an override to None (or strict=False), but these are "
        "not: 0 (Scaled is a subclass of Linear)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_qat(model, QConfig.int8(), inplace=True)
    assert type(model[1]) is nn.Linear
    for overrides in ({"0": None}, {Scaled: None}):
        assert states(prepare_qat(left_alone(), QConfig.int8(overrides=overrides))) == {"0": "fp32", "1": "prepared"}


def test_strict_refuses_an_override_that_asks_for_the_impossible():
    with pytest.raises(ValueError, match=r"0 \(Scaled is a subclass of Linear\)"):
        prepare(left_alone(), QConfig.int8(overrides={"0": QConfig.int8()}))


def test_not_strict_reports():
    model = prepare_qat(left_alone(), QConfig.int8(overrides={"typo": None, nn.LSTM: None}), strict=False)
    assert states(model) == {"0": "fp32", "1": "prepared"}
    assert notes(model)["0"] == "Scaled is a subclass of Linear"
    found = report(model)
    assert found.warnings == ("override 'typo' matches no layer", "override LSTM matches no layer")
    assert "override 'typo' matches no layer" in repr(found)
    assert "override &#x27;typo&#x27; matches no layer" in found._repr_html_()


# --- execution and gradient_dtype -----------------------------------------------------------------------------------
def test_execution_and_gradient_dtype_reach_the_layers():
    config = QConfig.int8(
        execution="simulated",
        gradient_dtype=torch.bfloat16,
        overrides={"c": QConfig.int8(execution="integer")},
    )
    model = prepare_qat(Backwards(), config)
    assert (model.a.execution, model.a.gradient_dtype) == ("simulated", torch.bfloat16)
    assert (model.c.execution, model.c.gradient_dtype) == ("integer", torch.float32)
    assert prepare_qat(Backwards(), QConfig.int8()).a.execution is None


def test_execution_in_integers_needs_both_sides():
    config = dataclasses.replace(QConfig.int8(execution="integer"), activation=None)
    message = "[prepare_qat] layer c cannot execute in integers: the input stays in floating point"
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_qat(Backwards(), config)
    assert QConfig.int8().why_not_integer() is None
    assert prepare_qat(Backwards(), dataclasses.replace(config, execution=None)).c.quant.input is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"execution": "int"}, "[QConfig] execution must be 'integer', 'simulated' or None, got 'int'"),
        ({"gradient_dtype": torch.float16}, "[QConfig] gradient_dtype must be float32 or bfloat16, got Half"),
    ],
)
def test_qconfig_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QConfig.int8(**fields)


def test_qconfig_is_a_value():
    config = QConfig.int8(execution="integer", first_last_fp32=True)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config != QConfig.int8()
