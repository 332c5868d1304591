"""A teacher inside of Lightning's Trainer."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")

from rarefy.distillation import DistillationCallback, DistillationLoss  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loaders and loggers


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def split(batch):
    return (batch["x"], batch["labels"]) if isinstance(batch, dict) else batch


class Module(lightning.LightningModule):
    """A module as a user has it; `returns` is the form of its training step."""

    def __init__(self, returns: str = "loss") -> None:
        super().__init__()
        self.model = net(8)
        self.returns = returns
        self.losses = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = split(batch)
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        if self.returns == "loss":
            return loss
        return {"loss": loss, "logits": logits} if self.returns == "dict" else None

    def validation_step(self, batch, batch_idx):
        x, y = split(batch)
        self.log("val", F.cross_entropy(self(x), y), batch_size=len(x))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def problem():
    """A module, a teacher in training mode, batches."""
    torch.manual_seed(0)
    module, teacher = Module(), net(32).train()
    x = torch.randn(64, 6)
    y = torch.randint(3, (64,))
    return module, teacher, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


def loader_of(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def fit(module, batches, callback, folder, epochs=1, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        **options,
    )
    trainer.fit(module, loader_of(batches), loader_of(batches))
    return trainer


LOSS = DistillationLoss(2.0, 1.0)


@pytest.mark.parametrize("form", ["dict", "layer", "forward of a layer", "batch of dicts"])
def test_the_loss_is_the_sum_and_the_step_that_of_a_plain_loop(problem, form, tmp_path):
    module, teacher, batches = problem
    twin, frozen = copy.deepcopy(module.model), copy.deepcopy(teacher.state_dict())
    options = {"layer": "model"}
    if form == "dict":
        module.returns, options = "dict", {}
    elif form == "forward of a layer":
        options = {"layer": "model.3"}
    elif form == "batch of dicts":
        options |= {"inputs": lambda batch: batch["x"]}
    loader = [{"x": x, "labels": y} for x, y in batches] if form == "batch of dicts" else batches
    callback = DistillationCallback(teacher, LOSS, weight=0.7, task_weight=0.3, **options)
    trainer = fit(module, loader, callback, tmp_path, epochs=2)

    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    teacher.eval()
    expected = []
    for x, y in batches * 2:
        with torch.no_grad():
            target = teacher(x)
        logits = twin(x)
        loss = 0.3 * F.cross_entropy(logits, y) + 0.7 * LOSS(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert module.losses == expected
    for (name, p), q in zip(module.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    task, distilled = (float(trainer.callback_metrics[name]) for name in ("task_loss", "distillation_loss"))
    assert 0.3 * task + 0.7 * distilled == pytest.approx(expected[-1], rel=1e-5)


def test_the_teacher_and_the_module_are_left_as_they_were(problem, tmp_path):
    module, teacher, batches = problem
    teacher[0].eval()
    modes = [m.training for m in teacher.modules()]
    seen = set()
    teacher.register_forward_pre_hook(
        lambda m, _: seen.add((any(part.training for part in m.modules()), torch.is_grad_enabled()))
    )
    keys = set(module.state_dict())
    trainer = fit(module, batches, DistillationCallback(teacher, LOSS, layer="model"), tmp_path)
    assert seen == {(False, False)}
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == keys
    before = len(module.losses)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, loader_of(batches))  # without the callback: the module's own loss
    assert len(module.losses) == before + 4
    assert "distillation_loss" not in trainer.callback_metrics


def test_the_module_is_left_as_it_was_by_an_exception(problem, tmp_path):
    module, teacher, batches = problem

    def fail(*_):
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        fit(module, batches, DistillationCallback(teacher, fail, layer="model"), tmp_path)
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


def test_accumulation_and_bf16(problem, tmp_path):
    module, teacher, batches = problem
    dtypes = set()
    teacher.register_forward_hook(lambda m, _, out: dtypes.add(out.dtype))
    callback = DistillationCallback(teacher, LOSS, layer="model")
    trainer = fit(module, batches, callback, tmp_path, accumulate_grad_batches=2, precision="bf16-mixed")
    assert trainer.global_step == 2
    assert dtypes == {torch.bfloat16}


def test_a_teacher_that_takes_keywords(problem, tmp_path):
    module, _, batches = problem

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": self.linear(x)}

    loader = [{"x": x, "labels": y, "index": 3} for x, y in batches]
    trainer = fit(module, loader, DistillationCallback(Teacher(), DistillationLoss(2.0, 0.5), layer="model"), tmp_path)
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("returns", "options", "error", "message"),
    [
        ("loss", {}, ValueError, "must return a dict with the logits under 'logits'.* got Tensor"),
        ("dict", {"key": "out"}, ValueError, r"under 'out'.* got the keys \['logits', 'loss'\]"),
        ("nothing", {"layer": "model"}, ValueError, "training_step must return a loss.* got NoneType"),
        ("loss", {"layer": "modle"}, ValueError, r"a path must name a layer of Module, got 'modle'; near: 'model'"),
    ],
)
def test_what_is_wrong_is_said(problem, returns, options, error, message, tmp_path):
    module, teacher, batches = problem
    module.returns = returns
    with pytest.raises(error, match=message):
        fit(module, batches, DistillationCallback(teacher, LOSS, **options), tmp_path)
    assert "training_step" not in vars(module)


def test_arguments_are_checked(problem, tmp_path):
    module, teacher, batches = problem
    with pytest.raises(ValueError, match="weights must be 0 or more, and one of them positive, got weight=-1"):
        DistillationCallback(teacher, LOSS, weight=-1.0)
    with pytest.raises(TypeError, match="teacher must be a module, got function"):
        DistillationCallback(lambda x: x, LOSS)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True, got False"):
        fit(module, batches, DistillationCallback(teacher, LOSS, layer="model"), tmp_path)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("DistillationCallback", "lightning"),
        ("DistillationTrainerMixin", "transformers"),
        ("DistillationTrainerMixin", "accelerate"),
    ],
)
def test_a_missing_package_is_named(name, package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import rarefy as rf\n"
        "try:\n"
        f"    rf.distillation.{name}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert f"[{name}] needs {package}" in result.stdout
    assert "pip install rarefy[integrations]" in result.stdout
