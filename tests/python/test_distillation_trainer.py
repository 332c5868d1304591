"""The distillation trainer: equal to a hand-written loop, and leaving everything else as it was."""

import copy
import functools
import gc
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.distillation import (
    Callbacks,
    DistillationLoss,
    DistillationTrainer,
    EpochMetrics,
    Evaluation,
    StepResult,
)

CLASSES = 5


class Net(nn.Module):
    """Small, with batch norm and dropout: modes matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


@functools.cache
def _problem():
    torch.manual_seed(0)
    rule = torch.randn(8, CLASSES)
    inputs = torch.randn(192, 8)
    labels = (inputs @ rule).argmax(-1)
    teacher = Net(64)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(teacher(inputs), labels).backward()
        optimizer.step()
    return Net(16), teacher, [(inputs[i : i + 32], labels[i : i + 32]) for i in range(0, 192, 32)]


def problem():
    """A student that does not know the rule, a teacher that does, and batches."""
    return copy.deepcopy(_problem())


def make_trainer(student, teacher, loss_fn=None, lr=0.05, **options):
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    return DistillationTrainer(student, teacher, optimizer, loss_fn or DistillationLoss(4.0, 0.7), **options)


def assert_same_state(a, b):
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_learns():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher)
    before = trainer.evaluate(batches)
    history = trainer.fit(batches, epochs=15, progress=False, evaluate=batches)
    assert before.accuracy < 0.5
    assert history[-1].evaluation.accuracy > 0.85
    assert history[-1].loss < 0.4 * history[0].loss
    assert [entry.epoch for entry in history] == list(range(1, 16))
    assert [entry.step for entry in history] == [6 * epoch for epoch in range(1, 16)]
    assert trainer.evaluate(batches) == history[-1].evaluation
    assert (trainer.epoch, trainer.step) == (15, 90)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_equals_a_hand_written_loop(max_grad_norm):
    student, teacher, batches = problem()
    twin = copy.deepcopy(student)
    loss_fn = DistillationLoss(4.0, 0.7)

    torch.manual_seed(5)
    losses = []
    trainer = make_trainer(
        student, teacher, loss_fn, max_grad_norm=max_grad_norm, callbacks=Callbacks(lambda _, loss: losses.append(loss))
    )
    trainer.fit(batches, epochs=3, progress=False)

    torch.manual_seed(5)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    teacher.eval()
    twin.train()
    expected = []
    for _ in range(3):
        for inputs, labels in batches:
            with torch.no_grad():
                target = teacher(inputs)
            loss = loss_fn(twin(inputs), target, labels)
            optimizer.zero_grad()
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
            optimizer.step()
            expected.append(loss.item())
    if max_grad_norm is None:  # bit for bit
        assert losses == expected
        assert_same_state(student, twin)
    else:  # torch's C++ and Python clip with differently rounded norms
        assert losses == pytest.approx(expected, rel=1e-4)


def test_clipping_bounds_the_step():
    student, teacher, batches = problem()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(), max_grad_norm=0.01)
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    trainer.train_step(*batches[0])
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_teacher_and_modes_are_left_alone():
    student, teacher, batches = problem()
    teacher.train()
    teacher.body[1].eval()  # a mode of its own
    student.eval()
    student.head.train()
    modes = [m.training for m in (*teacher.modules(), *student.modules())]
    frozen = copy.deepcopy(teacher)
    seen = []

    def spy(module, arguments):
        seen.append((any(m.training for m in module.modules()), torch.is_grad_enabled()))

    handle = teacher.register_forward_pre_hook(spy)
    trainer = make_trainer(student, teacher)
    trainer.fit(batches, epochs=2, progress=False, evaluate=batches[:2])
    trainer.train_step(*batches[0])
    trainer.evaluate(batches[:1])
    handle.remove()
    assert set(seen) == {(False, False)}
    assert_same_state(teacher, frozen)
    assert all(p.grad is None for p in teacher.parameters())
    assert [m.training for m in (*teacher.modules(), *student.modules())] == modes


def test_student_trains_in_training_mode_and_is_evaluated_in_evaluation_mode():
    student, teacher, batches = problem()
    seen = []
    student.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    student.eval()
    trainer = make_trainer(student, teacher)
    trainer.fit(batches[:2], epochs=2, progress=False, evaluate=batches[:1])
    assert seen == [(True, True), (True, True), (False, False)] * 2
    assert not student.training
    seen.clear()
    student.train()
    trainer.evaluate(batches[:1])
    assert seen == [(False, False)]
    assert student.training


def test_evaluate_changes_nothing_and_matches_the_formula():
    student, teacher, batches = problem()
    labels = batches[0][1].clone()
    labels[::2] = -100
    batches = [(batches[0][0], labels), (batches[1][0][:7], batches[1][1][:7])]
    before = copy.deepcopy(student)
    loss_fn = DistillationLoss(3.0, 0.4)
    trainer = make_trainer(student, teacher, loss_fn)
    result = trainer.evaluate(batches)
    assert_same_state(student, before)
    assert (trainer.epoch, trainer.step, trainer.history) == (0, 0, [])
    student.eval()
    teacher.eval()
    total, correct, rows = 0.0, 0, 0
    with torch.no_grad():
        for inputs, target in batches:
            logits, valid = student(inputs), target != -100
            rows += int(valid.sum())
            correct += int((logits.argmax(-1) == target)[valid].sum())
            total += loss_fn(logits, teacher(inputs), target).item() * int(valid.sum())
    assert rows == 16 + 7
    assert result.loss == pytest.approx(total / rows, rel=1e-12)
    assert result.accuracy == correct / rows


def test_without_labels():
    student, teacher, batches = problem()
    unlabelled = [inputs for inputs, _ in batches]
    trainer = make_trainer(student, teacher, DistillationLoss(4.0, 1.0))
    before = trainer.evaluate(unlabelled)
    trainer.fit(unlabelled, epochs=3, progress=False)
    after = trainer.evaluate([(inputs,) for inputs in unlabelled])
    assert after.loss < before.loss
    assert after.accuracy is None


def test_batches_of_every_form_are_the_same():
    results = []
    for form in (
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"inputs": x, "labels": y, "index": 3},
        lambda x, y: {"pixels": x, "target": y},
    ):
        student, teacher, batches = problem()
        batches = [form(x, y) for x, y in batches]
        keys = {"input_key": "pixels", "label_key": "target"} if "pixels" in batches[0] else {}
        torch.manual_seed(1)
        make_trainer(student, teacher, **keys).fit(batches, epochs=1, progress=False)
        results.append(student)
    for other in results[1:]:
        assert_same_state(results[0], other)


def test_data_loader_and_progress(capsys):
    student, teacher, batches = problem()
    data = torch.utils.data.TensorDataset(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)
    trainer = make_trainer(student, teacher)
    trainer.fit(loader, epochs=2)
    printed = capsys.readouterr().err
    assert "epoch 1/2" in printed
    assert "epoch 2/2" in printed
    assert "4/4" in printed
    assert "loss=" in printed
    trainer.fit(loader, epochs=3, progress=False)
    assert capsys.readouterr().err == ""
    assert trainer.step == 12


def test_callbacks_see_every_step_and_epoch():
    student, teacher, batches = problem()
    calls = []
    trainer = make_trainer(
        student,
        teacher,
        callbacks=[
            Callbacks(on_step=lambda step, loss: calls.append(("step", step, loss))),
            Callbacks(on_epoch_end=lambda epoch, metrics: calls.append(("epoch", epoch, metrics, trainer.epoch))),
        ],
    )
    trainer.fit(batches[:2], epochs=2, progress=False)
    assert [call[:2] for call in calls] == [
        ("step", 1),
        ("step", 2),
        ("epoch", 1),
        ("step", 3),
        ("step", 4),
        ("epoch", 2),
    ]
    assert calls[2][3] == 1
    assert calls[2][2] == trainer.history[0]
    assert trainer.history[0].loss == (calls[0][2] + calls[1][2]) / 2


def test_a_callback_can_prune_inside_the_loop():
    student, teacher, batches = problem()
    mask = torch.rand_like(student.head.weight) > 0.5

    def prune(step, loss):
        with torch.no_grad():
            student.head.weight.mul_(mask)

    make_trainer(student, teacher, callbacks=Callbacks(on_step=prune)).fit(batches, epochs=2, progress=False)
    assert torch.count_nonzero(student.head.weight[~mask]) == 0
    assert torch.count_nonzero(student.head.weight[mask]) == mask.sum()


def test_custom_loss():
    student, teacher, batches = problem()
    twin = copy.deepcopy(student)

    def mse(student_logits, teacher_logits, labels):
        assert labels.dtype == torch.int64
        return F.mse_loss(student_logits, teacher_logits)

    torch.manual_seed(2)
    losses = []
    make_trainer(student, teacher, mse, callbacks=Callbacks(lambda _, loss: losses.append(loss))).fit(
        batches[:1], epochs=1, progress=False
    )
    torch.manual_seed(2)
    teacher.eval()
    twin.train()
    with torch.no_grad():
        target = teacher(batches[0][0])
    assert losses == [F.mse_loss(twin(batches[0][0]), target).item()]


def test_teacher_may_be_a_function():
    student, teacher, batches = problem()
    teacher.eval()
    trainer = make_trainer(student, lambda x: teacher(x) * 2)
    trainer.fit(batches[:1], epochs=1, progress=False)
    assert trainer.step == 1


def test_train_step():
    student, teacher, batches = problem()
    student.train()
    trainer = make_trainer(student, teacher)
    result = trainer.train_step(*batches[0])
    assert isinstance(result, StepResult)
    assert repr(result).startswith("StepResult(loss=")
    assert trainer.step == 1
    assert trainer.epoch == 0
    with pytest.raises(ValueError, match="labels must be given when alpha is below 1"):
        trainer.train_step(batches[0][0])
    assert trainer.step == 1


def test_resume_equals_an_uninterrupted_run(tmp_path):
    def run(student, teacher, batches, trainer, optimizer, upto):
        def reseed(epoch, metrics=None):
            torch.manual_seed(100 + epoch)  # the random state at an epoch's start is the user's to restore

        reseed(trainer.epoch)
        trainer.callbacks = (Callbacks(on_epoch_end=reseed),)
        return trainer.fit(batches, epochs=upto, progress=False, evaluate=batches[:2])

    def fresh():
        student, teacher, batches = problem()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        return (
            student,
            teacher,
            batches,
            DistillationTrainer(student, teacher, optimizer, DistillationLoss()),
            optimizer,
        )

    whole = fresh()
    expected = run(*whole, 5)
    first = fresh()
    run(*first, 2)
    file = tmp_path / "run.pt"
    torch.save(
        {"trainer": first[3].state_dict(), "student": first[0].state_dict(), "optimizer": first[4].state_dict()}, file
    )
    second = fresh()
    saved = torch.load(file, weights_only=True)
    second[3].load_state_dict(saved["trainer"])
    second[0].load_state_dict(saved["student"])
    second[4].load_state_dict(saved["optimizer"])
    assert run(*second, 5) == expected
    assert_same_state(second[0], whole[0])
    assert run(*second, 5) == expected  # nothing is left to do


def test_state_dict_is_checked():
    student, teacher, _ = problem()
    trainer = make_trainer(student, teacher)
    with pytest.raises(ValueError, match="history must have one entry per epoch, got 0 entries for 2 epochs"):
        trainer.load_state_dict({"epoch": 2, "step": 4, "history": []})
    with pytest.raises(ValueError, match="epoch and step must be 0 or more, got epoch 0 and step -1"):
        trainer.load_state_dict({"epoch": 0, "step": -1, "history": []})
    state = trainer.state_dict()
    assert (state["epoch"], state["step"], state["batch"], state["history"]) == (0, 0, 0, [])
    with pytest.raises(ValueError, match="within an epoch must hold the random state of its start, got none"):
        trainer.load_state_dict({"epoch": 0, "step": 1, "batch": 1, "history": []})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_the_step(bad):
    student, teacher, batches = problem()
    poisoned = batches[2][0].clone()
    poisoned[0, 0] = bad
    trainer = make_trainer(student, teacher)
    steps = []
    trainer.callbacks = (Callbacks(lambda step, _: steps.append(copy.deepcopy(student.state_dict()))),)
    with pytest.raises(ValueError, match=r"\[DistillationTrainer\] the loss must be finite, got -?nan at step 3"):
        trainer.fit([batches[0], batches[1], (poisoned, batches[2][1])], epochs=1, progress=False)
    assert trainer.step == 2
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, steps[-1][name]), name


def test_a_gradient_that_is_not_finite_is_refused_when_clipping():
    student, teacher, batches = problem()

    def bad(student_logits, teacher_logits, labels):
        return (student_logits * 0).sum().sqrt()  # 0, with an infinite slope

    before = copy.deepcopy(student)
    trainer = make_trainer(student, teacher, bad, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"the gradient's norm must be finite, got -?nan at step 1"):
        trainer.train_step(*batches[0])
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, dict(before.named_parameters())[name])


class Boom(Exception):
    pass


def raiser(*_):
    raise Boom("from inside")


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Boom("from the backward pass")


@pytest.mark.parametrize(
    "place", ["student", "teacher", "loss", "on_step", "on_epoch_end", "loader", "backward", "step"]
)
def test_python_errors_come_out_as_themselves(place):
    student, teacher, batches = problem()
    teacher.train()
    student.eval()
    trainer = make_trainer(
        student,
        teacher,
        raiser if place == "loss" else None,
        callbacks=Callbacks(**{place: raiser}) if place.startswith("on_") else (),
    )
    if place in ("student", "teacher"):
        {"student": student, "teacher": teacher}[place].head.register_forward_hook(raiser)
    if place == "backward":
        student.head.register_forward_hook(lambda module, arguments, output: BadBackward.apply(output))
    if place == "step":
        trainer.optimizer.step = raiser
    if place == "loader":

        def broken(good):
            yield from good
            raise Boom("from the loader")

        batches = broken(batches[:2])
    with pytest.raises(Boom, match="from"):
        trainer.fit(batches, epochs=1, progress=False)
    assert teacher.training
    assert not student.training
    assert trainer.step == {"on_step": 1, "on_epoch_end": 6, "loader": 2}.get(place, 0)


def test_keyboard_interrupt_comes_through():
    student, teacher, batches = problem()

    def interrupt(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(student, teacher, callbacks=Callbacks(on_step=interrupt)).fit(batches, epochs=1, progress=False)


def test_bad_input():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher)
    with pytest.raises(ValueError, match="an epoch must have at least one batch, got none in epoch 1"):
        trainer.fit([], epochs=1, progress=False)
    with pytest.raises(ValueError, match="an epoch must have at least one batch, got none in epoch 2"):
        trainer.fit((batch for batch in batches), epochs=2, progress=False)
    with pytest.raises(ValueError, match="epochs must be 0 or more, got -1"):
        trainer.fit(batches, epochs=-1, progress=False)
    with pytest.raises(ValueError, match="evaluation must have at least one valid row, got 0 batches and none"):
        trainer.evaluate([])
    with pytest.raises(TypeError, match=r"a batch must be a tensor, a tuple or list .* got tuple of length 3"):
        trainer.fit([(batches[0][0], batches[0][1], 1)], epochs=9, progress=False)
    with pytest.raises(
        KeyError, match=r"under names that the model's forward has, got the keys \['labels', 'pixels'\]"
    ):
        trainer.fit([{"pixels": batches[0][0], "labels": batches[0][1]}], epochs=9, progress=False)
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got float"):
        make_trainer(student, teacher, lambda s, t, y: 0.5).train_step(*batches[0])
    with pytest.raises(ValueError, match=r"the loss function must return one number, got a tensor of shape \[32, 5\]"):
        make_trainer(student, teacher, lambda s, t, y: s).train_step(*batches[0])
    with pytest.raises(TypeError, match="a model must return logits as a tensor"):
        make_trainer(student, lambda x: {"scores": x}).train_step(*batches[0])
    for norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm must be positive or None, got"):
            make_trainer(student, teacher, max_grad_norm=norm)
    with pytest.raises(ValueError, match=r"max_grad_norm must be 0 .* or positive and finite, got inf"):
        make_trainer(student, teacher, max_grad_norm=math.inf)


def test_repr():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher)
    text = repr(trainer)
    assert "student=Net (261 parameters)" in text
    assert "teacher=Net (1,029 parameters)" in text
    assert "optimizer=SGD over 261 parameters" in text
    assert "DistillationLoss(temperature=4, alpha=0.7)" in text
    assert "epoch=0, step=0" in text
    trainer.fit(batches, epochs=1, progress=False, evaluate=batches)
    assert "last=EpochMetrics(epoch=1, step=6, loss=" in repr(trainer)
    assert "evaluation=Evaluation(loss=" in repr(trainer)
    assert repr(Evaluation(1.5)) == "Evaluation(loss=1.5, accuracy=None)"
    assert repr(EpochMetrics(1, 2, 0.5)) == "EpochMetrics(epoch=1, step=2, loss=0.5, evaluation=None)"


def test_a_trainer_can_be_collected():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, callbacks=Callbacks(lambda step, loss: None))
    trainer.fit(batches[:1], epochs=1, progress=False)
    alive = weakref.ref(trainer), weakref.ref(teacher)
    del trainer, teacher
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_learning_rate_scheduler_made_after_the_trainer():
    student, teacher, batches = problem()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trainer.callbacks = (Callbacks(on_epoch_end=lambda epoch, metrics: scheduler.step()),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns when the optimizer's step went past it
        trainer.fit(batches[:1], epochs=2, progress=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
