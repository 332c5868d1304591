"""What the trainer's options do, each against a loop written by hand or a property that must hold."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_distillation_trainer import CLASSES, assert_same_state, make_trainer, problem
from torch import nn

import rarefy as rf
from rarefy.distillation import Callbacks, DistillationLoss, DistillationTrainer, EMATeacher, Outputs, Selection


def plain(width=8):
    """A student whose gradient of a batch is the mean of those of its rows: no batch norm, no dropout."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, CLASSES))


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["loss", "terms"])
@pytest.mark.parametrize(("size", "accumulate"), [(32, 1), (8, 4), (1, 32), (5, 7)])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(size, accumulate, objective):
    _, teacher, batches = problem()
    inputs, labels = batches[0]
    labels = labels.clone()
    labels[[0, 1, 2, 3, 9, 20, 31]] = -100  # parts with fewer valid rows, and parts without any
    loss_fn = DistillationLoss(3.0, 0.6)
    student = plain()
    reference = copy.deepcopy(student)
    with torch.no_grad():
        target = teacher.eval()(inputs)
    loss = loss_fn(reference(inputs), target, labels)
    if objective == "terms":
        loss = loss_fn(reference(inputs), target, labels) + 0.5 * loss_fn(2 * reference(inputs), target, labels)
    loss.backward()

    terms = {
        "first": loss_fn,
        "second": (0.5, lambda s, t, batch: loss_fn(2 * s.logits, t.logits, batch[1])),
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = DistillationTrainer(
        student, teacher, optimizer, loss_fn if objective == "loss" else terms, accumulate=accumulate
    )
    losses = []
    trainer.callbacks = (Callbacks(lambda step, value: losses.append(value)),)
    parts = list(zip(inputs.split(size), labels.split(size), strict=True))
    trainer.fit(parts, epochs=1, progress=False)
    assert trainer.step == 1
    torch.testing.assert_close(flat_gradient(student), flat_gradient(reference), rtol=1e-5, atol=1e-7)
    assert losses == [pytest.approx(loss.item(), rel=1e-5)]


def test_sequences_count_tokens():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 11), nn.Linear(6, 11)
    inputs, labels = torch.randn(8, 10, 6), torch.randint(0, 11, (8, 10))
    for row in range(8):
        labels[row, row + 2 :] = -100
    loss_fn = DistillationLoss(2.0, 0.5)
    reference = copy.deepcopy(student)
    loss_fn(reference(inputs), teacher(inputs).detach(), labels).backward()
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.0), loss_fn, accumulate=4
    )
    trainer.fit([(inputs[i : i + 2], labels[i : i + 2]) for i in range(0, 8, 2)], epochs=1, progress=False)
    torch.testing.assert_close(flat_gradient(student), flat_gradient(reference), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_valid_rows_are_passed_over(accumulate):
    student, teacher, batches = problem()
    student = plain()
    twin = copy.deepcopy(student)
    ignored = [(x, torch.full_like(y, -100)) for x, y in batches[:2]]
    make_trainer(student, teacher, accumulate=accumulate).fit(
        [*ignored, *batches, (batches[0][0][:0], batches[0][1][:0])], epochs=1, progress=False
    )
    make_trainer(twin, teacher, accumulate=accumulate).fit(batches, epochs=1, progress=False)
    assert_same_state(student, twin)
    trainer = make_trainer(student, teacher, accumulate=accumulate)
    with pytest.raises(ValueError, match="must have at least one valid row, got none in the 2 batches of epoch 1"):
        trainer.fit(ignored, epochs=1, progress=False)
    with pytest.raises(ValueError, match="a step must have at least one valid row, got none"):
        trainer.train_step(*ignored[0])


def test_the_last_step_of_an_epoch_takes_what_is_left():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, accumulate=4)
    trainer.fit(batches, epochs=2, progress=False)
    assert trainer.step == 4  # 4 + 2 batches, twice


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_runs_both_models_in_16_bits(precision, dtype):
    student, teacher, batches = problem()
    student = plain(16)
    seen = set()
    for model in (student, teacher):
        model.register_forward_hook(lambda module, arguments, output: seen.add(output.dtype))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(4.0, 0.7), precision=precision)
    history = trainer.fit(batches, epochs=8, progress=False, evaluate=batches)
    assert seen == {dtype}
    assert history[-1].loss < 0.5 * history[0].loss
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert not torch.is_autocast_enabled("cpu")

    twin = plain(16)
    full = DistillationTrainer(
        twin, teacher, torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9), DistillationLoss(4.0, 0.7)
    ).fit(batches, epochs=8, progress=False)
    assert history[-1].loss == pytest.approx(full[-1].loss, rel=0.1)


def test_bf16_equals_a_hand_written_loop():
    _, teacher, batches = problem()
    student, twin = plain(), plain()
    loss_fn = DistillationLoss(4.0, 0.7)
    losses, expected = [], []
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), loss_fn, precision="bf16",
        callbacks=Callbacks(lambda step, loss: losses.append(loss)),
    )  # fmt: skip
    trainer.fit(batches, epochs=2, progress=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    teacher.eval()
    for inputs, labels in batches * 2:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = teacher(inputs)
            loss = loss_fn(twin(inputs), target, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
    assert_same_state(student, twin)


def test_a_gradient_that_overflows_lowers_the_loss_scale_and_changes_nothing():
    student, teacher, batches = problem()
    student = plain()
    before = copy.deepcopy(student)
    explode = SimpleNamespace(factor=1e30)
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1),
        lambda s, t, labels: F.mse_loss(s.float(), t.float()) * 1e-3 * explode.factor, precision="fp16",
    )  # fmt: skip
    result = trainer.train_step(*batches[0])
    assert result.skipped
    assert "skipped=True" in repr(result)
    assert_same_state(student, before)
    assert trainer.state_dict()["loss_scale"] == 65536 / 2
    explode.factor = 1.0
    assert not trainer.train_step(*batches[0]).skipped
    assert not torch.equal(student[0].weight, before[0].weight)
    explode.factor = math.inf
    with pytest.raises(ValueError, match="the gradient must be finite at some loss scale"):
        trainer.fit(batches * 10, epochs=1, progress=False)


def test_loss_scaling_equals_torch_s():
    _, teacher, batches = problem()
    student, twin = plain(), plain()
    loss_fn = DistillationLoss(4.0, 0.7)
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), loss_fn, precision="fp16"
    )
    trainer.fit(batches, epochs=1, progress=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    teacher.eval()
    for inputs, labels in batches:
        with torch.autocast("cpu", torch.float16), torch.no_grad():
            target = teacher(inputs)
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(twin(inputs), target, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_state(student, twin)


# ---- schedules, selection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_scheduler(interval):
    student, teacher, batches = problem()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 / (n + 1))
    rates = []
    trainer = DistillationTrainer(
        student, teacher, optimizer, DistillationLoss(), scheduler=scheduler, scheduler_interval=interval,
        callbacks=Callbacks(lambda step, loss: rates.append(optimizer.param_groups[0]["lr"])),
    )  # fmt: skip
    trainer.fit(batches[:2], epochs=2, progress=False)
    steps = [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert rates == (pytest.approx(steps) if interval == "step" else pytest.approx([1, 1, 1 / 2, 1 / 2]))


def test_reduce_on_plateau_sees_the_evaluation():
    student, teacher, batches = problem()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)  # little gets better
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(), scheduler=scheduler)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs an evaluation"):
        trainer.fit(batches[:1], epochs=1, progress=False)
    trainer.fit(batches[:1], epochs=4, progress=False, evaluate=batches[:1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 / 8)


def test_early_stopping_and_the_best_epoch():
    student, teacher, batches = problem()
    values = iter([3.0, 1.0, 2.0, 0.95, 1.5, 1.5, 1.5, 0.0])
    trainer = make_trainer(student, teacher, selection=Selection("score", "min", min_delta=0.1, patience=3))
    history = trainer.fit(batches[:1], epochs=50, progress=False, measure=lambda model: {"score": next(values)})
    assert [entry.evaluation.metrics["score"] for entry in history] == [3.0, 1.0, 2.0, 0.95, 1.5]
    assert trainer.best_epoch == 2
    assert trainer.epoch == 5
    assert trainer.fit(batches[:1], epochs=50, progress=False, measure=lambda model: {"score": 0.0}) == history


def test_selection_by_accuracy_takes_the_greatest():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, selection=Selection("accuracy"))
    history = trainer.fit(batches, epochs=6, progress=False, evaluate=batches)
    accuracies = [entry.evaluation.accuracy for entry in history]
    assert trainer.best_epoch == accuracies.index(max(accuracies)) + 1


def test_measure_runs_in_evaluation_mode_without_gradients():
    student, teacher, batches = problem()
    seen = []

    def measure(model):
        seen.append((model is student, model.training, torch.is_grad_enabled()))
        return {"weights": float(model.head.weight.abs().sum())}

    history = make_trainer(student, teacher).fit(batches[:1], epochs=2, progress=False, measure=measure)
    assert seen == [(True, False, False)] * 2
    assert history[0].evaluation.accuracy is None
    assert math.isnan(history[0].evaluation.loss)
    assert "weights=" in repr(history[0])


def test_stop():
    student, teacher, batches = problem()
    twin = copy.deepcopy(student)
    trainer = make_trainer(student, teacher)
    trainer.callbacks = (Callbacks(lambda step, loss: trainer.stop() if step == 8 else None),)
    torch.manual_seed(0)
    assert trainer.fit(batches, epochs=3, progress=False) == trainer.history
    assert (trainer.epoch, trainer.step) == (1, 8)
    trainer.fit(batches, epochs=3, progress=False)  # goes on behind the batches that were done
    whole = make_trainer(twin, teacher)
    torch.manual_seed(0)
    assert whole.fit(batches, epochs=3, progress=False) == trainer.history
    assert_same_state(student, twin)


# ---- batches and outputs --------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Takes its inputs by name, as models of Hugging Face do, and returns an object with logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(x.sum(1)), hidden=x)


def test_batches_by_name():
    torch.manual_seed(0)
    student, teacher = Named(), Named()
    batch = {
        "input_ids": torch.randint(0, 20, (8, 5)),
        "attention_mask": torch.ones(8, 5),
        "labels": torch.randint(0, CLASSES, (8,)),
        "sample_id": torch.arange(8),
        "text": ["words"] * 8,
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss_fn = DistillationLoss(2.0, 0.5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = loss_fn(student(**inputs).logits, teacher(**inputs).logits.detach(), batch["labels"]).item()
    trainer = DistillationTrainer(student, teacher, optimizer, loss_fn)
    assert trainer.train_step(batch).loss == expected
    assert trainer.evaluate([batch]).accuracy is not None
    with pytest.raises(KeyError, match="under names that the model's forward has, got the keys"):
        trainer.train_step({"sample_id": batch["sample_id"], "labels": batch["labels"]})


def test_several_inputs_and_nested_ones():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, CLASSES)

        def forward(self, a, b):
            return self.layer(a) - self.layer(b)

    torch.manual_seed(0)
    a, b, labels = torch.randn(4, 8), torch.randn(4, 8), torch.randint(0, CLASSES, (4,))
    losses = []
    for batch in ((a, b, labels), ((a, b), labels), [{"a": a, "b": b}, labels], {"a": a, "b": b, "labels": labels}):
        torch.manual_seed(1)
        student, teacher = Two(), Two()
        trainer = DistillationTrainer(
            student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), DistillationLoss()
        )
        losses.append(trainer.train_step(batch).loss)
    assert len(set(losses)) == 1


def test_a_model_without_logits_is_refused_where_a_loss_needs_them():
    student, teacher, batches = problem()
    trainer = make_trainer(student, lambda x: {"embedding": x})
    with pytest.raises(TypeError, match="a model must return logits"):
        trainer.train_step(*batches[0])
    chosen = make_trainer(student, lambda x: {"scores": teacher(x)}, teacher_logits=lambda raw: raw["scores"])
    assert chosen.train_step(*batches[0]).loss > 0


def test_masks_and_row_weights_come_from_the_batch():
    student, teacher, batches = problem()
    student.eval()
    inputs, labels = batches[0]
    weights = torch.rand(len(labels))
    mask = torch.rand(len(labels)) > 0.4
    loss_fn = DistillationLoss(2.0, 0.5)
    trainer = make_trainer(student, teacher, loss_fn, mask_key="mask", weight_key="weights")
    batch = {"inputs": inputs, "labels": labels, "mask": mask, "weights": weights}
    expected = loss_fn(student(inputs), teacher.eval()(inputs).detach(), labels, mask=mask, row_weights=weights).item()
    assert trainer.train_step(batch).loss == pytest.approx(expected, rel=1e-6)


# ---- terms ----------------------------------------------------------------------------------------------------------


class HintTerm(nn.Module):
    """A term with an adapter that learns."""

    student_layers = ("body.0",)
    teacher_layers = ("body.0",)

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(16, 64)

    def forward(self, student: Outputs, teacher: Outputs, batch) -> torch.Tensor:
        return F.mse_loss(self.adapter(student.features["body.0"]), teacher.features["body.0"])


def test_terms_with_layers_and_adapters():
    student, teacher, batches = problem()
    torch.manual_seed(0)
    hint = HintTerm()
    optimizer = torch.optim.SGD([{"params": student.parameters()}, {"params": hint.parameters(), "lr": 3.0}], lr=0.05)
    before = hint.adapter.weight.clone()
    trainer = DistillationTrainer(
        student, teacher, optimizer, {"logits": DistillationLoss(4.0, 0.7), "hint": (0.3, hint)}, log_every=4
    )
    trainer.fit(batches, epochs=4, progress=False)
    assert not torch.equal(hint.adapter.weight, before)
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    assert [entry.step for entry in trainer.log] == [1, 4, 8, 12, 16, 20, 24]
    assert trainer.log[-1].terms["hint"] < 0.9 * trainer.log[0].terms["hint"]
    for entry in trainer.log:
        assert set(entry.shares) == {"logits.soft", "logits.hard", "hint"}
        assert sum(entry.shares.values()) == pytest.approx(1.0)
        assert entry.loss == pytest.approx(entry.terms["logits"] + 0.3 * entry.terms["hint"], rel=1e-6)


def test_gradient_shares_are_those_of_separate_backward_passes():
    _, teacher, batches = problem()
    student = plain()
    loss_fn = DistillationLoss(4.0, 0.7)
    trainer = DistillationTrainer(student, teacher, torch.optim.SGD(student.parameters(), lr=0.0), loss_fn, log_every=1)
    trainer.train_step(*batches[0])
    measured = trainer.log[0].shares
    norms = {}
    with torch.no_grad():
        target = teacher.eval()(batches[0][0])
    for name, weight, alpha in (("loss.soft", 0.7, 1.0), ("loss.hard", 0.3, 0.0)):
        student.zero_grad()
        (weight * DistillationLoss(4.0, alpha)(student(batches[0][0]), target, batches[0][1])).backward()
        norms[name] = flat_gradient(student).norm().item()
    for name, norm in norms.items():
        assert measured[name] == pytest.approx(norm / sum(norms.values()), rel=1e-4)


def test_adapters_must_be_optimized():
    student, teacher, _ = problem()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"the parameters of the term 'hint', which learns too: adapter.weight"):
        DistillationTrainer(student, teacher, optimizer, {"hint": HintTerm()})
    with pytest.raises(ValueError, match="optimizer must hold parameters of the student, got none"):
        DistillationTrainer(copy.deepcopy(student), teacher, optimizer, DistillationLoss())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({}, "at least one term"),
        ({"a": (math.nan, HintTerm())}, "weight of a term must be a finite number"),
        ({"a": 3}, "a term must be callable, got int"),
        (5, "loss_fn must be callable, got int"),
    ],
)
def test_bad_objectives(objective, message):
    student, teacher, _ = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        DistillationTrainer(student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"precision": "int8"}, "precision must be 'fp32', 'bf16' or 'fp16', got 'int8'"),
        ({"log_every": -1}, "log_every must be 0"),
        ({"scheduler_interval": "day"}, "scheduler_interval must be 'step' or 'epoch', got 'day'"),
    ],
)
def test_bad_options(options, message):
    student, teacher, _ = problem()
    with pytest.raises(ValueError, match=message):
        make_trainer(student, teacher, **options)
    with pytest.raises(ValueError, match="mode must be 'min' or 'max' for 'score'"):
        Selection("score")
    with pytest.raises(ValueError, match="patience must be 1 or more"):
        Selection(patience=0)


def test_patience_needs_an_evaluation():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, selection=Selection(patience=2))
    with pytest.raises(
        ValueError, match="patience needs an evaluation that measures 'loss' after each epoch, got none"
    ):
        trainer.fit(batches, epochs=1, progress=False)


# ---- teachers -------------------------------------------------------------------------------------------------------


def test_a_teacher_that_changes_is_reported():
    student, teacher, batches = problem()

    def meddle(step, loss):
        if step == 3:
            teacher.body[1].running_mean.add_(1.0)

    trainer = make_trainer(student, teacher, callbacks=Callbacks(on_step=meddle))
    with pytest.raises(ValueError, match=r"a teacher must not change during training, changed: body\.1\.running_mean"):
        trainer.fit(batches, epochs=1, progress=False)


def test_an_ema_teacher_follows_the_student():
    student, _, batches = problem()
    teacher = EMATeacher(student, decay=0.9, warmup=0)
    before = teacher.module.head.weight.clone()
    shadow = before.clone()

    def follow(step, loss):
        shadow.lerp_(student.head.weight.detach(), 0.1)

    trainer = make_trainer(student, teacher, callbacks=Callbacks(on_step=follow))
    trainer.fit(batches, epochs=2, progress=False)
    assert teacher.updates == 12
    torch.testing.assert_close(teacher.module.head.weight, shadow, rtol=1e-5, atol=1e-6)
    assert not torch.equal(shadow, before)


def test_a_quantized_teacher():
    student, teacher, batches = problem()
    inputs = batches[0][0]
    quantized = rf.quantization.prepare(teacher.eval(), rf.quantization.QConfig.int8(), (inputs,))
    rf.quantization.calibrate(quantized, [x for x, _ in batches])
    quantized = rf.quantization.convert(quantized)
    trainer = make_trainer(student, quantized)
    history = trainer.fit(batches, epochs=12, progress=False, evaluate=batches)
    assert history[-1].evaluation.accuracy > 0.8


# ---- in the same loop: QAT and pruning ------------------------------------------------------------------------------


def test_a_qat_student_and_a_pruner_in_one_loop():
    student, teacher, batches = problem()
    student = rf.quantization.prepare_qat(student, rf.quantization.QConfig.int8(), (batches[0][0],))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    pruner = rf.pruning.MagnitudePruner(
        student, sparsity=0.5, schedule=rf.pruning.PolynomialSchedule(begin=0, end=30, every=5)
    )
    trainer = DistillationTrainer(
        student, teacher, optimizer, DistillationLoss(4.0, 0.7), callbacks=Callbacks(lambda step, loss: pruner.step())
    )
    history = trainer.fit(batches, epochs=15, progress=False, evaluate=batches)
    assert history[-1].evaluation.accuracy > 0.75
    pruner.finalize()
    zeros = sum(int((m.weight == 0).sum()) for m in student.modules() if isinstance(m, rf.nn.Linear))
    total = sum(m.weight.numel() for m in student.modules() if isinstance(m, rf.nn.Linear))
    assert zeros / total == pytest.approx(0.5, abs=0.02)


# ---- display --------------------------------------------------------------------------------------------------------


def test_html_and_plot():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, log_every=2, selection=Selection("accuracy"))
    assert "no epoch done" in trainer._repr_html_()
    trainer.fit(batches, epochs=3, progress=False, evaluate=batches, measure=lambda model: {"score": 0.5})
    html = trainer._repr_html_()
    assert html.count("<tr") == 4
    assert "score" in html
    assert html.count("font-weight:bold") == 1
    figure = trainer.plot()
    assert [axis.get_title() for axis in figure.axes] == [
        "loss", "accuracy, %", "terms before their weights", "share of the gradient"
    ]  # fmt: skip


# ---- random state ---------------------------------------------------------------------------------------------------


def test_random_state_covers_torch_python_numpy_and_the_loader():
    from rarefy.distillation import random_state

    generator = torch.Generator().manual_seed(4)
    sampler = torch.utils.data.RandomSampler(range(10), generator=generator)
    loader = torch.utils.data.DataLoader(range(10), sampler=sampler, generator=generator)
    generators = random_state.loader_generators(loader)
    assert len(generators) == 1

    def draw():
        return (
            torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(2).tolist(),
            np.random.randn(), torch.rand(2, generator=generator).tolist(), list(sampler),
        )  # fmt: skip

    draw()  # an odd number of Gaussians leaves one in store
    state = random_state.capture(generators)
    first = draw()
    assert draw() != first
    random_state.restore(state, generators)
    assert draw() == first
    with pytest.raises(ValueError, match="must cover the loader's 1 generators, got 0 saved"):
        random_state.restore(random_state.capture(), generators)


# ---- batches that are made ------------------------------------------------------------------------------------------


def test_prepare_changes_batches_before_they_are_counted():
    _, teacher, batches = problem()
    student, twin = plain(), plain()
    calls = []

    def halve(batch):
        calls.append(len(batch[1]))
        return batch[0][:16] * 2, batch[1][:16]

    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), DistillationLoss(), accumulate=2, prepare=halve
    )
    trainer.fit(batches, epochs=1, progress=False, evaluate=batches)
    assert calls == [32] * 6  # not in evaluation
    other = DistillationTrainer(
        twin, teacher, torch.optim.SGD(twin.parameters(), lr=0.1), DistillationLoss(), accumulate=2
    )
    other.fit([(x[:16] * 2, y[:16]) for x, y in batches], epochs=1, progress=False)
    assert_same_state(student, twin)


def test_prepare_is_not_called_for_batches_that_are_passed_over():
    student, teacher, batches = problem()
    calls = []

    def note(batch):
        calls.append(len(calls))
        return batch

    trainer = make_trainer(student, teacher, prepare=note)
    trainer.callbacks = (Callbacks(lambda step, loss: trainer.stop() if step == 4 else None),)
    trainer.fit(batches, epochs=1, progress=False)
    trainer.fit(batches, epochs=1, progress=False)
    assert len(calls) == 6


def test_on_policy_in_the_trainer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    student, teacher = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20.0)  # a teacher with an opinion
    loss_fn = DistillationLoss(1.0, 1.0, divergence="reverse_kl", shift=True)
    prompts = torch.randint(2, 23, (8, 4))
    labels = torch.cat([torch.full((8, 4), -100), torch.randint(2, 23, (8, 6))], 1)
    ids = torch.cat([prompts, labels[:, 4:]], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer = DistillationTrainer(
        student, teacher, torch.optim.AdamW(student.parameters(), lr=0.01), loss_fn,
        prepare=rf.distillation.OnPolicy(student, fraction=1.0, max_new_tokens=6), accumulate=2,
    )  # fmt: skip
    history = trainer.fit([batch, batch], epochs=25, progress=False)
    assert history[-1].loss < 0.7 * history[0].loss


def test_accumulated_weights_count():
    _, teacher, batches = problem()
    inputs, labels = batches[0]
    weights, mask = torch.rand(32), torch.rand(32) > 0.3
    loss_fn = DistillationLoss(2.0, 0.5)
    student, reference = plain(), plain()
    with torch.no_grad():
        target = teacher.eval()(inputs)
    loss_fn(reference(inputs), target, labels, row_weights=weights, mask=mask).backward()
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.0), loss_fn, accumulate=4,
        mask_key="mask", weight_key="weights",
    )  # fmt: skip
    whole = {"inputs": inputs, "labels": labels, "mask": mask, "weights": weights}
    parts = [{name: value[i : i + 8] for name, value in whole.items()} for i in range(0, 32, 8)]
    trainer.fit(parts, epochs=1, progress=False)
    torch.testing.assert_close(flat_gradient(student), flat_gradient(reference), rtol=1e-5, atol=1e-8)


def test_a_cached_teacher(tmp_path):
    student, teacher, batches = problem()
    twin = copy.deepcopy(student)
    named = [{"inputs": x, "labels": y, "sample_id": torch.arange(32) + 32 * i} for i, (x, y) in enumerate(batches)]
    rf.distillation.cache_teacher(
        teacher, named, tmp_path / "teacher.cache", k=CLASSES, temperature=4.0, input_key="inputs", progress=False
    )
    results = []
    for model, source in ((student, rf.distillation.CachedTeacher(tmp_path / "teacher.cache")), (twin, teacher)):
        torch.manual_seed(0)
        trainer = make_trainer(model, source, DistillationLoss(4.0, 0.7))
        results.append(trainer.fit(named, epochs=3, progress=False, evaluate=named))
    for cached, live in zip(*results, strict=True):
        assert cached.loss == pytest.approx(live.loss, rel=2e-2)  # float16 logits
    assert results[0][-1].loss < results[0][0].loss


def test_an_encoder_decoder_makes_its_decoder_s_inputs_of_the_labels():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=19,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    student, teacher = (transformers.T5ForConditionalGeneration(config) for _ in range(2))
    labels = torch.randint(2, 19, (3, 5))
    labels[0, 3:] = -100
    batch = {"input_ids": torch.randint(2, 19, (3, 4)), "attention_mask": torch.ones(3, 4), "labels": labels}
    loss_fn = DistillationLoss(2.0, 0.5)
    with torch.no_grad():
        expected = loss_fn(student(**batch).logits, teacher(**batch).logits, labels).item()
    trainer = DistillationTrainer(student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), loss_fn)
    assert trainer.train_step(batch).loss == pytest.approx(expected, rel=1e-6)


# ---- what the options of batches, terms and teachers mean together --------------------------------------------------


def test_losses_must_be_means():
    student, teacher, _ = problem()
    for loss in (DistillationLoss(reduction="sum"), {"a": DistillationLoss(reduction="none")}):
        with pytest.raises(ValueError, match="must have the reduction 'mean', got"):
            make_trainer(student, teacher, loss)


def test_sequences_without_labels_must_be_counted():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 11), nn.Linear(6, 11)
    batches = [torch.randn(2, 3, 6), torch.randn(2, 9, 6)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    options = {"accumulate": 2}
    with pytest.raises(ValueError, match="sequences without labels must be counted to be accumulated"):
        DistillationTrainer(student, teacher, optimizer, DistillationLoss(2.0, 1.0), **options).fit(
            batches, epochs=1, progress=False
        )
    trainer = DistillationTrainer(
        student, teacher, optimizer, DistillationLoss(2.0, 1.0), count=lambda x: x.shape[0] * x.shape[1], **options
    )
    trainer.fit(batches, epochs=1, progress=False)
    got = student.weight.grad.clone()
    student.zero_grad()
    rows = torch.cat([x.reshape(-1, 6) for x in batches])
    DistillationLoss(2.0, 1.0)(student(rows), teacher(rows).detach()).backward()
    torch.testing.assert_close(got, student.weight.grad, rtol=1e-5, atol=1e-7)


def test_measure_alone_does_not_end_training_in_silence():
    student, teacher, batches = problem()
    trainer = make_trainer(student, teacher, selection=Selection(patience=2))
    with pytest.raises(ValueError, match="patience needs an evaluation that measures 'loss'"):
        trainer.fit(batches, epochs=5, progress=False, measure=lambda model: {"score": 1.0})
    trainer = make_trainer(student, teacher)
    assert len(trainer.fit(batches[:1], epochs=3, progress=False, measure=lambda model: {"score": 1.0})) == 3
    assert trainer.best_epoch is None


def test_accuracy_obeys_the_mask_and_integer_masks_are_masks():
    inputs, labels = torch.eye(6), torch.tensor([0, 1, 2, 0, 0, 0])
    student = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        student.weight.copy_(10 * torch.eye(6))
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    trainer = DistillationTrainer(
        student, nn.Linear(6, 6), torch.optim.SGD(student.parameters(), lr=0.1), DistillationLoss(2.0, 0.0),
        mask_key="mask",
    )  # fmt: skip
    result = trainer.evaluate([{"inputs": inputs, "labels": labels, "mask": mask}])
    assert result.accuracy == 1.0
    assert result.loss < 1e-3
    with pytest.raises(TypeError, match="mask_key 'mask' needs a batch that has it, got a tuple"):
        trainer.train_step((inputs, labels))


def test_train_step_captures_layers():
    student, teacher, batches = problem()
    hint = HintTerm()
    optimizer = torch.optim.SGD([*student.parameters(), *hint.parameters()], lr=0.05)
    trainer = DistillationTrainer(student, teacher, optimizer, {"hint": hint})
    assert trainer.train_step(*batches[0]).loss > 0
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


def test_extractors_are_used_by_terms_of_outputs():
    student, teacher, batches = problem()
    trainer = make_trainer(
        student, lambda x: {"scores": teacher(x)}, {"mse": lambda s, t, batch: F.mse_loss(s.logits, t.logits)},
        teacher_logits=lambda raw: raw["scores"],
    )  # fmt: skip
    assert trainer.train_step(*batches[0]).loss > 0


def test_an_ema_teacher_takes_what_its_student_takes():
    torch.manual_seed(0)
    student = Named()
    teacher = EMATeacher(student)
    batch = {
        "input_ids": torch.randint(0, 20, (8, 5)), "attention_mask": torch.ones(8, 5),
        "labels": torch.randint(0, CLASSES, (8,)), "sample_id": torch.arange(8),
    }  # fmt: skip
    trainer = DistillationTrainer(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1),
        {"logits": DistillationLoss(), "head": rf.distillation.FeatureLoss("head", "head", rf.distillation.LogitMSE())},
    )  # fmt: skip
    assert trainer.train_step(batch).terms["head"] == 0.0


def test_samplers_inside_of_batch_samplers_are_told_the_epoch():
    epochs = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    student, teacher, batches = problem()
    data = torch.utils.data.TensorDataset(*batches[0])
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=torch.utils.data.BatchSampler(Sampler(data), 16, drop_last=False)
    )
    make_trainer(student, teacher).fit(loader, epochs=3, progress=False)
    assert epochs == [0, 1, 2]


def test_frozen_parts_keep_their_modes():
    student, teacher, batches = problem()
    student.train()
    student.body[1].eval()
    before = student.body[1].running_mean.clone()
    make_trainer(student, teacher).fit(batches, epochs=1, progress=False, evaluate=batches)
    assert torch.equal(student.body[1].running_mean, before)
    assert student.training
    assert not student.body[1].training


def test_labels_must_be_a_tensor():
    student, teacher, batches = problem()
    with pytest.raises(TypeError, match="labels must be a tensor, got list under 'labels'"):
        make_trainer(student, teacher).train_step({"inputs": batches[0][0], "labels": batches[0][1].tolist()})
