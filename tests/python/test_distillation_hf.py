"""A teacher inside of transformers' Trainer."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rarefy.distillation import DistillationLoss, DistillationTrainerMixin  # noqa: E402


class DistillationTrainer(DistillationTrainerMixin, transformers.Trainer):
    pass


CLASSES, WORDS = 3, 40


def bert(hidden: int, layers: int = 1, **options) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            initializer_range=0.3,
            attention_probs_dropout_prob=0.0,
            **options,
        )
    )


def gpt2(width: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS,
            n_embd=width,
            n_layer=1,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.3,
        )
    )


def sentences(count: int, with_labels: bool = True) -> list[dict]:
    """Sentences of one length; the class is the remainder of the first word."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, WORDS, (count, 8), generator=generator)
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * 8} for row in rows]
    for entry in data if with_labels else ():
        entry["labels"] = entry["input_ids"][0] % CLASSES
    return data


def texts(count: int) -> list[dict]:
    """Texts of one length whose labels are padding over a part that differs from text to text."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, WORDS, (count, 10), generator=generator)
    lengths = torch.randint(0, 10, (count,), generator=generator)
    labels = torch.where(torch.arange(10) < lengths[:, None], rows, -100)
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * 10, "labels": label.tolist()}
        for row, label in zip(rows, labels, strict=True)
    ]


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "max_grad_norm": 0.0,
            "seed": 0,
            **options,
        },
    )


def shifted_loss(student, teacher, labels):
    """The mean over the labelled positions, in plain float operations."""
    valid = labels[:, 1:] != -100
    s, t = student[:, :-1][valid], teacher[:, :-1][valid]
    soft = (F.softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).sum(-1).mean()
    return 0.5 * soft + 0.5 * F.cross_entropy(s, labels[:, 1:][valid])


shifted_loss.shift = True


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return bert(16), bert(32).train()


def gradients(make, data, batch, steps, folder, ddp_backend=None, **options):
    """The gradient at the only optimizer step of one pass over the data, and what was logged."""
    student, teacher = make()
    seen = {}

    class Stop(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    trainer = DistillationTrainer(
        model=student,
        args=arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            ddp_backend=ddp_backend,
        ),
        train_dataset=data,
        data_collator=transformers.default_data_collator,
        callbacks=[Stop()],
        teacher=teacher,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return seen, trainer.state.log_history[0]["loss"]


def pair_of(kind):
    def make():
        torch.manual_seed(0)
        return (gpt2(16), gpt2(32)) if kind == "texts" else (bert(16), bert(32))

    return make


@pytest.mark.parametrize("kind", ["texts", "sentences", "no labels", "objective"])
def test_accumulation_gives_equal_gradients(kind, tmp_path):
    if kind == "texts":
        data, options = texts(32), {"loss_fn": shifted_loss}
    elif kind == "objective":
        data = sentences(32)
        options = {
            "objective": {
                "kd": (0.7, lambda s, t, b: DistillationLoss(2.0, 1.0)(s.logits, t.logits)),
                "ce": (0.3, lambda s, t, b: F.cross_entropy(s.logits, b["labels"])),
            }
        }
    else:
        data = sentences(32, kind == "sentences")
        options = {"loss_fn": DistillationLoss(4.0, 0.5 if kind == "sentences" else 1.0)}
    expected, loss = gradients(pair_of(kind), data, 32, 1, tmp_path / "1", **options)
    assert sum(g.square().sum() for g in expected.values()) > 1e-6
    for batch, steps in ((8, 4), (1, 32)):
        result, again = gradients(pair_of(kind), data, batch, steps, tmp_path / str(steps), **options)
        assert result.keys() == expected.keys()
        for name, gradient in result.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        assert again == pytest.approx(loss, rel=1e-4)


def test_gradients_are_those_of_a_plain_loop(tmp_path):
    data = texts(8)
    result, loss = gradients(pair_of("texts"), data, 2, 4, tmp_path, loss_fn=shifted_loss)
    student, teacher = pair_of("texts")()
    batch = transformers.default_data_collator(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        target = teacher.eval()(**batch).logits
    expected = shifted_loss(student(**batch).logits, target, labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(result[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_evaluation_and_metrics(pair, tmp_path):
    student, teacher = pair
    before = copy.deepcopy(teacher.state_dict())
    seen = []
    teacher.register_forward_pre_hook(
        lambda module, _: seen.append((any(m.training for m in module.modules()), torch.is_grad_enabled()))
    )

    def metrics(prediction):
        assert prediction.predictions.shape == (24, CLASSES)
        return {"agreement": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = sentences(64)
    for entry in data:  # the teacher's own answers are the labels
        with torch.no_grad():
            logits = copy.deepcopy(teacher).eval()(input_ids=torch.tensor([entry["input_ids"]])).logits
        entry["labels"] = int(logits.argmax())
    seen.clear()
    trainer = DistillationTrainer(
        model=student,
        args=arguments(
            tmp_path,
            per_device_train_batch_size=16,
            num_train_epochs=3,
            label_smoothing_factor=0.0,
            eval_strategy="epoch",
        ),
        train_dataset=data,
        eval_dataset=data[:24],
        compute_metrics=metrics,
        teacher=teacher,
        loss_fn=DistillationLoss(2.0, 0.5),
    )
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_agreement"] >= first["eval_agreement"]
    assert set(seen) == {(False, False)}
    assert teacher.training  # as it was
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    predictions = trainer.predict(data[:24])
    assert np.asarray(predictions.predictions).shape == (24, CLASSES)
    loss = DistillationLoss(2.0, 0.5)
    batch = transformers.default_data_collator(data[:24])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = loss(student.eval()(**batch).logits, teacher.eval()(**batch).logits, labels)
    assert last["eval_loss"] == pytest.approx(expected.item(), rel=1e-3)


class Plain(nn.Module):
    """A model outside of transformers, in each of the forms that models return."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.embedding, self.head, self.form = nn.Embedding(WORDS, width), nn.Linear(width, CLASSES), form

    def forward(self, input_ids, labels=None):
        assert labels is None  # the model is not to compute a loss of its own
        hidden = self.embedding(input_ids).mean(1)
        logits = self.head(hidden)
        return {"tensor": logits, "tuple": (logits, hidden), "dict": {"logits": logits, "loss": None}}[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_models_of_every_form(form, tmp_path):
    torch.manual_seed(0)

    def metrics(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        assert logits.shape == (8, CLASSES)
        return {"seen": 1.0}

    trainer = DistillationTrainer(
        model=Plain(8, form),
        args=arguments(tmp_path, max_steps=2, per_device_train_batch_size=4),
        train_dataset=sentences(8),
        eval_dataset=sentences(8),
        compute_metrics=metrics,
        teacher=Plain(16, "tensor"),
        loss_fn=DistillationLoss(),
    )
    trainer.train()
    assert trainer.evaluate()["eval_seen"] == 1.0


def test_inputs_that_only_the_teacher_takes(pair, tmp_path):
    _, teacher = pair
    student = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=WORDS,
            dim=16,
            n_layers=1,
            n_heads=2,
            hidden_dim=16,
            max_position_embeddings=32,
            num_labels=CLASSES,
        )
    )
    types = []
    teacher.register_forward_pre_hook(
        lambda module, _, keywords: types.append(keywords.get("token_type_ids")), with_kwargs=True
    )
    data = [{**entry, "token_type_ids": [1] * 8} for entry in sentences(4)]
    DistillationTrainer(
        model=student,
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, remove_unused_columns=False),
        train_dataset=data,
        teacher=teacher,
        loss_fn=DistillationLoss(),
    ).train()
    assert torch.equal(types[0], torch.ones(4, 8, dtype=torch.int64))


def test_encoder_decoders_get_their_decoder_inputs(tmp_path):
    torch.manual_seed(0)

    def t5(width):
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=WORDS,
                d_model=width,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        )

    data = [{**e, "labels": [*e["input_ids"][:4], -100]} for e in sentences(8, False)]
    trainer = DistillationTrainer(
        model=t5(16),
        args=arguments(tmp_path, max_steps=3, per_device_train_batch_size=8),
        train_dataset=data,
        teacher=t5(32),
        loss_fn=DistillationLoss(2.0, 0.5),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


class Hint(nn.Module):
    """Hidden states of the teacher, through a learned adapter."""

    student_layers = ("bert.encoder.layer.0",)
    teacher_layers = ("bert.encoder.layer.0",)

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(16, 32)

    def forward(self, student, teacher, batch):
        (name,) = self.student_layers
        hidden = [f[name][0] if isinstance(f[name], tuple) else f[name] for f in (student.features, teacher.features)]
        assert not hidden[1].requires_grad
        return F.mse_loss(self.adapter(hidden[0]), hidden[1])


def test_terms_with_layers_and_adapters(pair, tmp_path):
    student, teacher = pair

    def kd(s, t, batch):
        return DistillationLoss(2.0, 1.0)(s.logits, t.logits)

    def make(student, hint, steps):
        return DistillationTrainer(
            model=student,
            args=arguments(
                tmp_path,
                max_steps=steps,
                per_device_train_batch_size=8,
                save_strategy="steps",
                save_steps=4,
                logging_steps=2,
                train_sampling_strategy="sequential",
            ),
            train_dataset=sentences(32),
            teacher=teacher,
            objective={"kd": kd, "hint": (0.5, hint)},
        )

    twin = copy.deepcopy(student)
    hint = Hint()
    fresh = copy.deepcopy(hint)
    before = hint.adapter.weight.detach().clone()
    trainer = make(student, hint, 8)
    trainer.train()
    assert not torch.equal(hint.adapter.weight, before)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry["loss/kd"] + entry["loss/hint"] == pytest.approx(entry["loss"], abs=2e-3)
    assert logs[-1]["loss/hint"] < logs[0]["loss/hint"]
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    # A run that is resumed ends where the other one did: the adapter comes back too.
    resumed = make(twin, fresh, 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(fresh.adapter.weight, hint.adapter.weight, rtol=0, atol=0)
    for (name, p), q in zip(student.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=0, msg=name)


def test_a_batch_without_valid_rows_adds_nothing(tmp_path):
    data = texts(4)
    for entry in data[:2]:
        entry["labels"] = [-100] * 10
    result, _ = gradients(pair_of("texts"), data, 2, 2, tmp_path / "a", loss_fn=shifted_loss)
    expected, _ = gradients(pair_of("texts"), data[2:], 2, 1, tmp_path / "b", loss_fn=shifted_loss)
    for name, gradient in result.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of loss_fn and objective must be given, got none of them"),
        ({"loss_fn": DistillationLoss(), "objective": {"a": DistillationLoss()}}, "got both of them"),
        ({"objective": {}}, "objective must have at least one term, got none"),
        ({"objective": {"a": (float("nan"), DistillationLoss())}}, "must be a finite number, got nan for 'a'"),
        (
            {"loss_fn": DistillationLoss(reduction="sum")},
            "loss_fn must have the reduction 'mean', got 'sum'",
        ),
        ({"loss_fn": DistillationLoss(), "compute_loss_func": print}, "got a compute_loss_func as well"),
        (
            {"loss_fn": DistillationLoss(), "smoothing": 0.1},
            "labels must be smoothed by the loss.* got label_smoothing_factor=0.1 in the arguments and 0.0 in the loss",
        ),
    ],
)
def test_what_is_refused(pair, options, message, tmp_path):
    options = dict(options)
    smoothing = options.pop("smoothing", 0.0)
    with pytest.raises(ValueError, match=r"\[DistillationTrainerMixin\] .*" + message):
        DistillationTrainer(
            model=pair[0], args=arguments(tmp_path, label_smoothing_factor=smoothing), teacher=pair[1], **options
        )


def test_smoothing_of_labels_is_the_losss(pair, tmp_path):
    def loss_fn(s, t, labels):
        return F.cross_entropy(s, labels, label_smoothing=0.1)

    loss_fn.label_smoothing = 0.1
    data = sentences(8)
    trainer = DistillationTrainer(
        model=pair[0],
        args=arguments(tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=8),
        eval_dataset=data,
        teacher=pair[1],
        loss_fn=loss_fn,
    )
    batch = transformers.default_data_collator(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = F.cross_entropy(pair[0].eval()(**batch).logits, labels, label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_distillation_hf import gradients, pair_of, shifted_loss, texts
result, loss = gradients(
    pair_of("texts"), texts(8), 2, 2, {folder!r}, loss_fn=shifted_loss, ddp_backend="gloo"
)
if torch.distributed.get_rank() == 0:
    torch.save((result, loss), {folder!r} + "/gradients.pt")
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    expected, loss = gradients(pair_of("texts"), texts(8), 8, 1, tmp_path / "one", loss_fn=shifted_loss)
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, again = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert result.keys() == expected.keys()
    for name, gradient in result.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert again == pytest.approx(loss, rel=1e-4)
