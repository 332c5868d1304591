"""Prepared models in the surroundings that users have: autocast, checkpointing, compile, EMA, files, trainers."""

import contextlib
import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rarefy as rf
from rarefy.quantization import (
    FakeQuantizer,
    MovingAverage,
    QConfig,
    checkpoint_context,
    load_float_state_dict,
    prepare_qat,
)


class Net(nn.Module):
    """Convolution, batch normalization, residual addition, classifier; optionally one block under checkpointing."""

    def __init__(self, mode: str | None = None) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.add = nn.Conv2d(8, 8, 3, padding=1), rf.nn.Add()
        self.classifier = nn.Linear(8, 5)
        self.mode = mode

    def block(self, x):
        return torch.relu(self.add(self.conv(x), x))

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        if self.mode == "reentrant":
            x = checkpoint(self.block, x, use_reentrant=True)
        elif self.mode == "not reentrant":
            x = checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        return self.classifier(x.mean((2, 3)))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3])


def prepared(images: torch.Tensor, mode: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return prepare_qat(Net(mode), QConfig.int8(), images)


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    F.cross_entropy(out.float(), LABELS).backward()
    return out.detach()


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def assert_same_gradients(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name, **tolerance)


# --- Autocast -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(images, dtype):
    model, reference = prepared(images), prepared(images)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, reference)]
    for _ in range(5):
        for m, optimizer, cast in zip((model, reference), optimizers, (True, False), strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=cast):
                out = step(m, images)
            optimizer.step()
            assert out.dtype == (dtype if cast else torch.float32)
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    assert all(q.scale.dtype == q.min_val.dtype == torch.float32 and q.calibrated for q in quantizers)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.eval()(images), reference.eval()(images), rtol=0.1, atol=0.1)


# --- Gradient checkpointing -----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the example run has no gradients
@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_checkpointing_changes_no_number(images, mode):
    plain, saving = prepared(images), prepared(images, mode)
    for scale in (1.0, 3.0, 0.5):
        outs = [step(model, images * scale) for model in (plain, saving)]
        assert torch.equal(*outs)
        assert_same_state(plain, saving)  # observed once
        assert_same_gradients(plain, saving, rtol=0, atol=0)
    saving.eval()
    plain.eval()
    assert torch.equal(step(plain, images), step(saving, images))
    assert_same_gradients(plain, saving, rtol=0, atol=0)


class Shared(nn.Module):
    """One layer that runs three times, on inputs of different ranges."""

    def __init__(self, context_fn=None) -> None:
        super().__init__()
        self.layer, self.context_fn, self.saving = nn.Linear(6, 6), context_fn, False

    def forward(self, x):
        for _ in range(3):
            if self.saving:
                x = 4 * checkpoint(self.layer, x, use_reentrant=False, context_fn=self.context_fn)
            else:
                x = 4 * self.layer(x)
        return x


def test_checkpoint_context_is_exact_where_a_layer_runs_several_times():
    def gradients(saving: bool, batches: int, context_fn=checkpoint_context) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = prepare_qat(Shared(context_fn), QConfig.int8(observer=MovingAverage(0.5)))
        model.saving = saving
        xs = [torch.randn(5, 6) * 3**i for i in range(batches)]
        ys = [model(x) for x in xs]  # all forward passes come before the first backward
        for y in ys:
            (y.square().mean() * 1e-3).backward()
        return [p.grad for p in model.parameters()]

    for batches in (1, 3):
        for plain, saved in zip(gradients(False, batches), gradients(True, batches), strict=True):
            assert torch.equal(plain, saved)
    # The test can fail: the latest parameters are others here.
    nothing = lambda: (contextlib.nullcontext(), contextlib.nullcontext())  # noqa: E731
    assert not all(map(torch.equal, gradients(False, 3), gradients(True, 3, nothing)))


def test_checkpoint_context_replays_for_a_second_backward():
    torch.manual_seed(0)
    model = prepare_qat(Shared(checkpoint_context), QConfig.int8())
    model.saving = True
    y = model(torch.randn(5, 6)).sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(y, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, parameters)))


# --- Compile --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_equals_eager(images, backend):
    torch._dynamo.reset()
    eager, twin = prepared(images), prepared(images)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for scale in (1.0, 2.0):
        for model in (eager, twin):
            model.zero_grad()
        torch.testing.assert_close(step(compiled, images * scale), step(eager, images * scale))
        assert_same_gradients(eager, twin)
    for (name, a), b in zip(eager.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(compiled.eval()(images), eager.eval()(images))


def test_compiled_training_counts_batches_that_are_not_finite(images):
    torch._dynamo.reset()
    model = prepared(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images)
    before = model.stem.quant.input.max_val.clone()
    assert compiled(torch.where(images > 2, torch.nan, images)).isnan().any()
    assert model.stem.quant.input.skipped.item() == 1
    assert torch.equal(model.stem.quant.input.max_val, before)


# --- Copies ---------------------------------------------------------------------------------------------------------
def test_exponential_moving_average_of_a_model(images):
    model = prepared(images)
    step(model, images)  # AveragedModel copies what it averages later: calibrated from here on
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    start = copy.deepcopy(average.module)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, images)
        optimizer.step()
        average.update_parameters(model)
    expected = [p.detach().clone() for p in start.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(expected, average.module.parameters(), strict=True))
    # Parameters are averaged, buffers are those of the model.
    for (name, value), own in zip(model.named_buffers(), average.module.buffers(), strict=True):
        assert torch.equal(value, own), name
    assert average.eval()(images).isfinite().all()
    assert average.module.stem.bn is average.module.bn


def test_deepcopy_and_pickle_of_a_trained_model(images):
    model = prepared(images)
    step(model, images)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
        assert_same_state(model, twin)
        assert twin.stem.quant.input.name == "stem.quant.input"
        twin.train()
        step(twin, images * 50)
        assert twin.stem.quant.input.max_val > model.stem.quant.input.max_val  # its own state
        assert twin.stem.bn is twin.bn is not model.bn


# --- Files ----------------------------------------------------------------------------------------------------------
def test_checkpoints_load_with_weights_only(images, tmp_path):
    model = prepared(images)
    step(model, images)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = prepared(images)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_same_state(model, fresh)
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_safetensors(images, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = prepared(images)
    step(model, images)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    fresh = prepared(images)
    assert safetensors.load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_same_state(model, fresh)
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_float_checkpoints_load_into_a_prepared_model(images):
    torch.manual_seed(5)
    floating = Net()
    floating(images)
    for load in (load_float_state_dict, lambda model, state: model.load_state_dict(state, strict=False)):
        model = prepared(images)
        step(model, images)
        quantizers = {k: v.clone() for k, v in model.state_dict().items() if ".quant." in k}
        load(model, floating.state_dict())
        state = model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in floating.state_dict().items())
        assert all(torch.equal(state[k], v) for k, v in quantizers.items())


def test_load_float_state_dict_is_strict_about_everything_else(images):
    model = prepared(images)
    state = dict(Net().state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state.pop("conv.bias")
    state["other"] = torch.zeros(1)
    state["classifier.weight"] = torch.zeros(4, 8)
    state["stem.quant.input.scale"] = torch.zeros(1)
    message = (
        "[load_float_state_dict] state must be that of the model before it was prepared, but: missing conv.bias, "
        "unexpected other, unexpected stem.quant.input.scale, classifier.weight of shape [4, 8] instead of [5, 8]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_float_state_dict(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"\[load_float_state_dict\] the model must have prepared layers"):
        load_float_state_dict(Net(), Net().state_dict())


# --- Trainers -------------------------------------------------------------------------------------------------------
def samples(count: int = 64) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(count, 6, generator=generator)
    return [(x, int(x[0] > 0)) for x in xs]


class Classifier(nn.Module):
    """Takes and gives what Hugging Face's Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = prepare_qat(Classifier(), QConfig.int8())
    data = [{"x": x, "labels": y} for x, y in samples()]

    def trainer(model: nn.Module, **changes: object):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            learning_rate=0.02,
            max_steps=40,
            save_steps=20,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=True,
            **changes,
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)

    runner = trainer(model)
    before = model.net[0].weight.detach().clone()
    runner.train()
    assert not torch.equal(before, model.net[0].weight)
    assert model.net[0].quant.input.calibrated
    predictions = runner.predict(data)
    logits = predictions.predictions
    assert (logits.argmax(1) == [y for _, y in samples()]).mean() > 0.9
    # Continues from its checkpoint, quantizers included.
    resumed = trainer(prepare_qat(Classifier(), QConfig.int8()))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert (resumed.predict(data).predictions == logits).all()
    assert_same_state(resumed.model, model)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = prepare_qat(Classifier(), QConfig.int8())

        def training_step(self, batch, index):
            return self.model(batch[0], batch[1])["loss"]

        def validation_step(self, batch, index):
            self.log("accuracy", (self.model(*batch)["logits"].argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    torch.manual_seed(0)
    module = Module()
    loader = torch.utils.data.DataLoader(samples(), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False, num_sanity_val_steps=0, precision="bf16-mixed",
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["accuracy"] > 0.9
    assert all(q.calibrated for q in module.modules() if isinstance(q, FakeQuantizer))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    fresh = Module()
    fresh.load_state_dict(state)
    assert_same_state(module, fresh)


def test_state_survives_a_buffer_of_bytes(images):
    model = prepared(images)
    step(model, images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert_same_state(model, twin)
