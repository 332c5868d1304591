"""QATSchedule: when training observes, quantizes and freezes."""

import copy
import re

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import QATSchedule, QConfig, prepare_qat
from rarefy.quantization.fake_quantizer import FakeQuantizer


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return prepare_qat(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), QConfig.int8())


def flags(model: nn.Module) -> tuple[bool, bool]:
    found = {(m.observe, m.quantize) for m in model.modules() if isinstance(m, FakeQuantizer)}
    assert len(found) == 1
    return found.pop()


def expected(step: int) -> tuple[bool, bool]:
    return 1 <= step < 4, step >= 2


def test_each_step_has_the_switches_of_its_number():
    model, schedule = make_model(), QATSchedule(observe_from=1, quantize_from=2, freeze_observers_at=4)
    for step in range(6):
        schedule.step(model)
        assert flags(model) == expected(step)
        assert all(type(flag) is bool for flag in flags(model))
        assert schedule.steps == step + 1
        before = copy.deepcopy(model.state_dict())
        x = 10.0**step * torch.rand(5, 3)
        y = model(x)
        changed = any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert changed == expected(step)[0]
        plain = model[2].weight @ torch.relu(model[0].weight @ x.T + model[0].bias[:, None]) + model[2].bias[:, None]
        assert torch.allclose(y, plain.T, atol=1e-6) == (not expected(step)[1])


def test_batch_normalization_freezes_at_its_step():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, 5)
    model = prepare_qat(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), QConfig.int8(), x)
    schedule = QATSchedule(freeze_batch_norm_at=2)
    for step in range(4):
        schedule.step(model)
        before = model[1].running_mean.clone()
        model.train()
        model(x + step)
        assert torch.equal(before, model[1].running_mean) == (step >= 2)
    schedule.load_state_dict({"steps": 1})
    schedule.apply(model)
    before = model[1].running_mean.clone()
    model(x)
    assert not torch.equal(before, model[1].running_mean)


def test_a_model_that_cannot_follow_stays_as_it_was():
    schedule = QATSchedule(observe_from=1, quantize_from=2, freeze_batch_norm_at=0)
    model = make_model()
    for call in (schedule.step, schedule.apply):
        with pytest.raises(ValueError, match=r"\[QATSchedule\] the model must have a batch normalization"):
            call(model)
        assert flags(model) == (True, True)
    floating = nn.Sequential(rf.nn.ConvBn2d(2, 3, 3))
    with pytest.raises(ValueError, match=r"\[set_state\] the model must have prepared layers"):
        schedule.step(floating)
    assert not floating[0].bn.frozen
    assert schedule.steps == 0


@pytest.mark.parametrize("at", range(6))
def test_a_resumed_schedule_continues_with_the_same_switches(at: int):
    options = {"observe_from": 1, "quantize_from": 2, "freeze_observers_at": 4}
    model, schedule = make_model(), QATSchedule(**options)
    for _ in range(at):
        schedule.step(model)
    saved = schedule.state_dict()
    resumed, again = make_model(), QATSchedule(**options)
    again.load_state_dict(saved)
    again.apply(resumed)
    assert flags(resumed) == (expected(at - 1) if at else expected(0))
    assert again.steps == at
    for step in range(at, 6):
        again.step(resumed)
        assert flags(resumed) == expected(step)


def test_a_failed_step_is_not_counted():
    schedule = QATSchedule()
    with pytest.raises(ValueError, match=r"\[set_state\] the model must have prepared layers"):
        schedule.step(nn.Linear(2, 2))
    assert schedule.steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observe_from": -1}, "observe_from must not be negative, got -1"),
        ({"observe_from": 5, "quantize_from": 3}, "quantize_from must not be before observe_from (5), got 3"),
        ({"freeze_observers_at": 0}, "freeze_observers_at must be after observe_from (0), got 0"),
        ({"freeze_batch_norm_at": -2}, "freeze_batch_norm_at must not be negative, got -2"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(f"[QATSchedule] {message}")):
        QATSchedule(**options)


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": "3"}])
def test_a_wrong_state_is_refused(state: dict[str, object]):
    schedule = QATSchedule()
    with pytest.raises(ValueError, match=r"\[QATSchedule\] state must have 'steps'"):
        schedule.load_state_dict(state)
    assert schedule.steps == 0


def test_repr():
    text = "QATSchedule(observe_from=0, quantize_from=3, freeze_observers_at=None, freeze_batch_norm_at=None): 0 steps begun"
    assert repr(QATSchedule(quantize_from=3)) == text
