"""Checkpoints: a run that is killed anywhere goes on to the same bits, and a load that fails changes nothing."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.distillation import Callbacks, DistillationLoss, DistillationTrainer, EMATeacher, checkpoint

EPOCHS = 3


class Student(nn.Module):
    """Dropout and batch norm: random state and buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(F.dropout(torch.relu(self.norm(self.hidden(x))), 0.2, self.training))


class Rows(torch.utils.data.Dataset):
    """Rows with noise drawn from Python's random state when they are loaded."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(44, 6, generator=generator)
        self.y = torch.randint(0, 3, (44,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + random.gauss(0, 0.1), self.y[i]


class Hint(nn.Module):
    student_layers, teacher_layers = ("hidden",), ("hidden",)

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(12, 12)

    def forward(self, student, teacher, batch):
        return F.mse_loss(self.adapter(student.features["hidden"]), teacher.features["hidden"])


def build(losses, kind="plain", stop_in_step=None):
    """Everything of a run, as a script makes it anew; `losses` gets (step, loss)."""
    torch.manual_seed(0)
    random.seed(0)
    student, teacher, hint = Student(), Student(), Hint()
    if kind == "qat":
        student = rf.quantization.prepare_qat(student, rf.quantization.QConfig.int8(), (torch.randn(8, 6),))
    if kind == "ema":
        teacher = EMATeacher(student, decay=0.9)
    terms = {"logits": DistillationLoss(2.0, 0.5)}
    parameters = [*student.parameters()]
    if kind == "plain":
        terms["hint"] = (0.1, hint)
        parameters += hint.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    callbacks = [Callbacks(lambda step, loss: losses.append((step, loss)))]
    if kind == "qat":
        pruner = rf.pruning.MagnitudePruner(
            student, sparsity=0.5, schedule=rf.pruning.PolynomialSchedule(begin=0, end=12, every=2)
        )
        callbacks.append(Callbacks(lambda step, loss: pruner.step()))
    trainer = DistillationTrainer(
        student, teacher, optimizer, terms, scheduler=schedule, accumulate=2 if kind == "plain" else 1,
        precision="fp16" if kind == "ema" else "fp32", max_grad_norm=1.0, log_every=3, callbacks=callbacks,
    )  # fmt: skip
    if stop_in_step is not None:
        calls = iter(range(10_000))
        last = stop_in_step * (2 if kind == "plain" else 1)

        def killed(module, arguments):
            if module.training and next(calls) == last:
                raise KeyboardInterrupt

        student.register_forward_pre_hook(killed)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8, shuffle=True)
    return trainer, loader


def fit(trainer, loader, folder=None):
    return trainer.fit(
        loader, EPOCHS, progress=False, evaluate=torch.utils.data.DataLoader(Rows(), batch_size=16),
        checkpoint=folder, checkpoint_every=None if folder is None else 1,
    )  # fmt: skip


def same_state(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


@pytest.mark.parametrize("kind", ["plain", "qat", "ema"])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, kind):
    expected = []
    whole, loader = build(expected, kind)
    fit(whole, loader)
    for step in range(len(expected)):
        folder = tmp_path / str(step)
        losses = []
        trainer, loader = build(losses, kind, stop_in_step=step)
        with pytest.raises(KeyboardInterrupt):
            fit(trainer, loader, folder)
        assert len(losses) == step
        trainer, loader = build(losses, kind)
        if step > 0:  # whatever the new process has drawn; without a checkpoint the script's own seeds count
            torch.manual_seed(step)
            random.seed(step)
        fit(trainer, loader, folder)
        assert losses == expected, f"stopped within step {step + 1}"
        same_state(trainer.student.state_dict(), whole.student.state_dict())
        assert trainer.history == whole.history
        assert [entry.terms for entry in trainer.log] == [entry.terms for entry in whole.log]
        if kind == "ema":
            same_state(trainer.teacher.state_dict(), whole.teacher.state_dict())


SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from test_distillation_checkpoint import *
folder, out = sys.argv[1], sys.argv[2]
class Log(list):
    def append(self, item):
        with open(out, "a") as file:
            file.write(f"{{item[0]}} {{item[1].hex()}}\\n")
        time.sleep(0.03)
trainer, loader = build(Log())
fit(trainer, loader, folder)
torch.save(trainer.student.state_dict(), out + ".pt")
"""


def test_a_process_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    expected = []
    whole, loader = build(expected)
    fit(whole, loader)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    out = tmp_path / "losses"
    kills = 0
    for target in (2, 4, 7, None):
        process = subprocess.Popen([sys.executable, script, tmp_path / "run", out], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 100
        while target is not None and process.poll() is None and time.monotonic() < deadline:
            if out.exists() and len(out.read_text().splitlines()) >= target + kills:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills == 3
    seen = [line.split() for line in out.read_text().splitlines()]
    assert {int(step) for step, _ in seen} == set(range(1, len(expected) + 1))
    for step, loss in seen:  # what was done twice gave the same twice
        assert float.fromhex(loss) == expected[int(step) - 1][1], step
    same_state(torch.load(f"{out}.pt", weights_only=True), whole.student.state_dict())


def test_last_and_best(tmp_path):
    trainer, loader = build([])
    fit(trainer, loader, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    same_state(last["student"], trainer.student.state_dict())
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    losses = [entry.evaluation.loss for entry in trainer.history]
    assert best["trainer"][0]["epoch"] == trainer.best_epoch == losses.index(min(losses)) + 1
    fresh, loader = build([])
    fresh.load_checkpoint(tmp_path / "best.pt")
    same_state(fresh.student.state_dict(), best["student"])
    assert fresh.epoch == trainer.best_epoch
    again, loader = build([])
    again.fit(loader, 1, progress=False, checkpoint=tmp_path, resume=False)
    assert again.epoch == 1


def test_the_teacher_is_in_it_by_its_hash_alone(tmp_path):
    class Wide(Student):
        def __init__(self):
            super().__init__()
            self.ballast = nn.Parameter(torch.zeros(1_000_000))

    student, teacher = Student(), Wide()
    trainer = DistillationTrainer(student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), DistillationLoss())
    trainer.save_checkpoint(tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    assert len(torch.load(tmp_path / "x.pt", weights_only=True)["teacher"]) == 16
    with torch.no_grad():
        teacher.ballast[123_456] += 1e-6
    with pytest.raises(ValueError, match="must be of a run with this teacher, got the fingerprint"):
        trainer.load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("what", ["shape", "name", "optimizer", "scheduler", "parts", "format", "cut", "text", "none"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, what):
    saved, loader = build([])
    fit(saved, loader, tmp_path)
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)
    if what == "shape":
        content["student"]["out.bias"] = torch.zeros(7)
    elif what == "name":
        content["student"]["other"] = content["student"].pop("out.bias")
    elif what == "optimizer":
        content["optimizer"]["param_groups"][0]["params"].pop()
    elif what == "scheduler":
        content["scheduler"] = None
    elif what == "parts":
        del content["term hint"]
    elif what == "format":
        content["format"] = "something else"
    torch.save(content, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "text":
        path.write_text("not a checkpoint")
    elif what == "none":
        path.unlink()

    losses = []
    trainer, loader = build(losses)
    trainer.fit(loader, 1, progress=False)
    before = copy.deepcopy(
        (trainer.student.state_dict(), trainer.optimizer.state_dict()["state"], trainer.scheduler.state_dict())
    )
    position = trainer.state_dict()["step"]
    message = {"parts": "must hold the states of", "format": "must be a checkpoint of the format", "none": "found none",
               "cut": "must be a checkpoint", "text": "must be a checkpoint"}.get(what, "does not fit")  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer.load_checkpoint(path)
    same_state(trainer.student.state_dict(), before[0])
    for index, state in trainer.optimizer.state_dict()["state"].items():
        same_state(state, before[1][index])
    assert trainer.scheduler.state_dict() == before[2]
    assert trainer.step == position
    trainer.fit(loader, 2, progress=False)  # and it can go on


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer, loader = build([])
    trainer.fit(loader, 1, progress=False, checkpoint=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    write = torch.save

    def full(content, file):
        write({"student": content["student"]}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"last\.pt could not be written: .*No space left"):
        trainer.fit(loader, 2, progress=False, checkpoint=tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.pt"]


def test_another_loader_is_noticed(tmp_path):
    trainer, loader = build([], stop_in_step=2)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, loader, tmp_path)
    again, _ = build([])
    again.load_checkpoint(tmp_path / "last.pt")
    short = torch.utils.data.DataLoader(Rows(), batch_size=30)
    with pytest.raises(ValueError, match="the source must have more than the 4 batches that were done, got 2"):
        again.fit(short, EPOCHS, progress=False)


def test_checkpoint_every_needs_a_folder():
    trainer, loader = build([])
    with pytest.raises(ValueError, match="checkpoint_every must be 1 or more, with a folder as checkpoint"):
        trainer.fit(loader, 1, progress=False, checkpoint_every=5)


def test_further_objects_are_kept(tmp_path):
    class Counter:
        value = 0

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    student, teacher = Student(), Student()
    counters = Counter(), Counter()
    for counter in counters:
        trainer = DistillationTrainer(
            student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), DistillationLoss(),
            stateful={"counter": counter},
        )  # fmt: skip
        if counter is counters[0]:
            counter.value = 5
            trainer.save_checkpoint(tmp_path / "x.pt")
        else:
            trainer.load_checkpoint(tmp_path / "x.pt")
    assert counters[1].value == 5


def test_numbers_of_numpy_are_kept_and_other_objects_refused(tmp_path):
    student, teacher = Student(), Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + np.cos(np.pi * i / 100)))
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(), scheduler=schedule)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
    trainer.fit(loader, 1, progress=False, checkpoint=tmp_path)
    rate = optimizer.param_groups[0]["lr"]
    assert isinstance(rate, np.float64)
    trainer.load_checkpoint(tmp_path / "last.pt")
    assert optimizer.param_groups[0]["lr"] == rate

    class Odd:
        def state_dict(self):
            return {"value": Odd}

    trainer.stateful["odd"] = Odd()
    with pytest.raises(TypeError, match="holds tensors and plain values, got a type in the state of 'stateful odd'"):
        trainer.save_checkpoint(tmp_path / "odd.pt")
    assert not (tmp_path / "odd.pt").exists()


def test_multi_step_schedules_are_kept(tmp_path):
    student, teacher = Student(), Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 9])
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(), scheduler=schedule)
    trainer.fit(torch.utils.data.DataLoader(Rows(), batch_size=8), 1, progress=False, checkpoint=tmp_path)
    trainer.load_checkpoint(tmp_path / "last.pt")
    assert schedule.milestones == {3: 1, 9: 1}
    assert schedule._get_closed_form_lr() == pytest.approx([optimizer.param_groups[0]["lr"]])
