"""Both languages: the same state, the same training, the same integers. Files of one continue in the other."""

import dataclasses
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy as rf
from rarefy import distillation as kd
from rarefy.quantization import QConfig, convert, prepare_qat

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402

# Floating-point sums of the two languages may differ in order; a value that is rounded to the other side shows as a step.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Parity(nn.Module):
    """The first network of tests/cpp/parity.h."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain = rf.nn.ConvBn2d(2, 4, 3), nn.Conv2d(4, 4, 1)
        self.add, self.fc = rf.nn.Add(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.fc(self.add(y, self.plain(y)).mean((2, 3)))


class EveryLayer(nn.Module):
    """The second network of tests/cpp/parity.h, where the ReLUs are part of the layers from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.conv_bn1, self.conv1, self.mul = rf.nn.ConvBn1d(4, 6, 3), nn.Conv1d(6, 6, 1), rf.nn.Mul()
        self.conv_bn3, self.conv3 = rf.nn.ConvBn3d(2, 4, 3), nn.Conv3d(4, 4, (2, 1, 1))
        self.conv_bn2, self.conv2, self.add = rf.nn.ConvBn2d(4, 4, 3), nn.Conv2d(4, 4, 1), rf.nn.Add()
        self.cat, self.hidden, self.out = rf.nn.Cat(1), nn.Linear(34, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, volumes: Tensor) -> Tensor:
        a = torch.relu(self.conv_bn1(self.words(ids).transpose(1, 2)))
        a = self.mul(a, self.conv1(a))
        b = self.conv_bn2(self.conv3(torch.relu(self.conv_bn3(volumes))).squeeze(2))
        b = self.add(b, torch.relu(self.conv2(b)))
        return self.out(torch.relu(self.hidden(self.cat(a.flatten(1), b.flatten(1)))))


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (8, 5)), torch.randn(8, 2, 4, 6, 6)


def prepared(model: nn.Module, execution: str | None = None) -> nn.Module:
    return prepare_qat(model, dataclasses.replace(QConfig.int8(), execution=execution), make_batch())


def test_state_dict_keys_are_those_of_cpp(request):
    """One list, which the C++ tests are held to as well."""
    golden = (request.config.rootpath / "tests" / "state_dict_keys.txt").read_text().split()
    model = prepared(EveryLayer())
    keys = [f"prepared:{name}" for name in model.state_dict()]
    model(*make_batch())
    keys += [f"converted:{name}" for name in convert(model).state_dict()]
    assert sorted(keys) == sorted(golden)


@pytest.fixture(scope="module")
def parity_program(request):
    program = request.config.rootpath / "build" / "dev" / "tests" / "cpp" / "rarefy_parity"
    if not program.exists():
        pytest.skip("rarefy_parity is not built (-DRAREFY_BUILD_TESTS=ON)")
    return program


class Training:
    """The same training in both languages: on four batches, from a file to a file."""

    def __init__(self, program, execution: str, folder) -> None:
        self.program, self.execution, self.folder = program, execution, folder
        self.batches = [(*make_batch(), torch.randint(3, (8,))) for _ in range(4)]
        tensors = {}
        for i, batch in enumerate(self.batches):
            tensors |= {f"{name}{i}": t for name, t in zip(("ids", "volumes", "labels"), batch, strict=True)}
        save_file(tensors, folder / "data")

    def in_cpp(self, model: str, first: int, last: int, out: str) -> dict[str, Tensor]:
        """Trains on a range of batches; what ``OUT.results`` holds."""
        files = self.folder / model, self.folder / "data", str(first), str(last), self.folder / out
        subprocess.run([self.program, "--train", self.execution, *files], check=True, timeout=120)
        return load_file(self.folder / f"{out}.results")

    def in_python(self, model: nn.Module, first: int, last: int) -> Tensor:
        """Trains on a range of batches; the losses."""
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for ids, volumes, labels in self.batches[first:last]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids, volumes), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def load(self, file: str) -> nn.Module:
        """A new prepared model with the state of a file."""
        model = prepared(EveryLayer(), self.execution)
        assert load_model(model, self.folder / file) == (set(), [])
        return model


@pytest.fixture(params=["integer", "simulated"])
def training(request, parity_program, tmp_path):
    torch.manual_seed(3)
    return Training(parity_program, request.param, tmp_path)


def assert_equal_states(file: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert file.keys() == state.keys()
    for name, value in state.items():
        assert file[name].dtype == value.dtype, name
        torch.testing.assert_close(file[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_network_has_every_layer_and_executes_as_told(training):
    """What the tests below are about."""
    model = prepared(EveryLayer(), training.execution)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, rf.nn.QuantizableLayer)}
    convolutions = {f"{kind}{dim}d" for kind in ("Conv", "ConvBn") for dim in (1, 2, 3)}
    assert kinds == {"Embedding", "Linear", "Add", "Mul", "Cat"} | convolutions
    assert [n for n, m in model.named_modules() if getattr(m, "relu", False)] == [
        "conv_bn1", "conv_bn3", "conv2", "hidden"
    ]  # fmt: skip


def test_a_float_model_is_prepared_and_trained_in_cpp_and_continues_in_python(training):
    floating = EveryLayer()
    save_model(floating, training.folder / "float")
    returned = training.in_cpp("float", 0, 2, "trained")
    model = prepared(floating, training.execution)
    torch.testing.assert_close(returned["losses"], training.in_python(model, 0, 2), **TOLERANCE)
    assert_equal_states(load_file(training.folder / "trained"), model.state_dict())

    continued = training.load("trained")
    before = {name: value.clone() for name, value in continued.state_dict().items()}
    losses = training.in_python(continued, 2, 4)
    still = {name for name, value in continued.state_dict().items() if torch.equal(before[name], value)}
    assert {name.rpartition(".")[2] for name in still} <= {"skipped", "zero_point", "min_val"}  # a minimum of 0 stays
    returned = training.in_cpp("trained", 2, 4, "further")
    torch.testing.assert_close(returned["losses"], losses, **TOLERANCE)
    assert_equal_states(load_file(training.folder / "further"), continued.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(returned["evaluated"], continued.eval()(*training.batches[0][:2]), **TOLERANCE)


def test_a_model_prepared_and_trained_in_python_continues_in_cpp(training):
    model = prepared(EveryLayer(), training.execution)
    training.in_python(model, 0, 2)
    save_model(model, training.folder / "trained")
    returned = training.in_cpp("trained", 2, 4, "further")
    torch.testing.assert_close(returned["losses"], training.in_python(model, 2, 4), **TOLERANCE)
    assert_equal_states(load_file(training.folder / "further"), model.state_dict())


def test_conversion_gives_the_same_integers(training):
    model = prepared(EveryLayer(), training.execution)
    training.in_python(model, 0, 2)
    save_model(model, training.folder / "trained")
    returned = training.in_cpp("trained", 0, 0, "same")
    state = load_file(training.folder / "same")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    integer = convert(model)
    converted = load_file(training.folder / "same.converted")
    assert_equal_states(converted, integer.state_dict())
    integers = [name for name, value in converted.items() if value.dtype == torch.int8]
    assert len(integers) == 9
    assert all(torch.equal(converted[name], integer.state_dict()[name]) for name in integers)
    batch = training.batches[0][:2]
    with torch.no_grad():
        torch.testing.assert_close(returned["evaluated"], model.eval()(*batch), **TOLERANCE)
        torch.testing.assert_close(returned["converted"], integer(*batch), **TOLERANCE)
        # And a converted file of C++ is one of Python.
        load_model(integer, training.folder / "same.converted")
        torch.testing.assert_close(returned["converted"], integer(*batch), **TOLERANCE)


def test_distillation_in_both_languages(parity_program, tmp_path):
    torch.manual_seed(7)
    student, teacher = Parity(), Parity()
    data = {}
    for i in range(5):
        data[f"x{i}"], data[f"y{i}"] = torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    data["y1"][:5] = -100  # batches weigh differently
    save_model(student, tmp_path / "student")
    save_model(teacher, tmp_path / "teacher")
    save_file(data, tmp_path / "data")
    files = [tmp_path / name for name in ("student", "teacher", "data", "out")]
    subprocess.run([parity_program, "--distill", *files], check=True, timeout=120)

    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.01)
    terms = {
        "logits": rf.distillation.DistillationLoss(3.0, 0.6),
        "distance": (0.1, lambda s, t, batch: F.mse_loss(s.logits, t.logits)),
    }
    losses = []
    trainer = rf.distillation.DistillationTrainer(
        student, teacher, optimizer, terms, accumulate=2, max_grad_norm=0.5,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        callbacks=rf.distillation.Callbacks(lambda step, loss: losses.append(loss)),
    )  # fmt: skip
    batches = [(data[f"x{i}"], data[f"y{i}"]) for i in range(5)]
    trainer.fit(batches, epochs=4, progress=False)
    evaluation = trainer.evaluate(batches)
    results = load_file(tmp_path / "out.results")
    assert len(losses) == 12
    torch.testing.assert_close(results["losses"], torch.tensor(losses), **TOLERANCE)
    torch.testing.assert_close(results["evaluated"], torch.tensor([evaluation.loss, evaluation.accuracy]), **TOLERANCE)
    for name, value in load_file(tmp_path / "out").items():
        torch.testing.assert_close(value, student.state_dict()[name], **TOLERANCE)


def test_losses_of_distillation(parity_program, tmp_path):
    """Every loss has the same value, and adapters and memories the same state after a step, in both directions."""
    torch.manual_seed(4)
    s, t, u = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.randn(5, 3, 6)
    maps = torch.randn(2, 5, 2, 3, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]] * 2 + [[True, True, True]])
    labels, index = torch.randint(4, (5, 3)), torch.tensor([3, 10, 0, 7, 1])
    data = {"student": s, "teacher": t, "wide_teacher": u, "mask": mask, "labels": labels, "index": index}
    data |= {"student_maps": maps[0].clone(), "teacher_maps": maps[1].clone()}
    hint = kd.Hint(4, 6, loss="smooth_l1")
    contrastive = kd.ContrastiveRepresentation(11, 4, 6, features=3, negatives=7, variant="code", seed=5)
    save_file(data, tmp_path / "data")
    save_model(hint, tmp_path / "hint")
    save_model(contrastive, tmp_path / "contrastive")
    files = [tmp_path / name for name in ("hint", "contrastive", "data", "out")]
    subprocess.run([parity_program, "--losses", *files], check=True, timeout=120)

    rows, next_rows = [x[:, 0] for x in (s, t)], [x[:, 1] for x in (s, t)]
    expected = {
        "HiddenCosine": kd.HiddenCosine()(s, t, mask),
        "AttentionTransfer": kd.AttentionTransfer()(s, u, mask),
        "AttentionTransfer.code": kd.AttentionTransfer("code")(s, u, mask),
        "SimilarityPreserving": kd.SimilarityPreserving()(s, u, mask),
        "RelationalDistance": kd.RelationalDistance()(s, u, mask),
        "RelationalAngle": kd.RelationalAngle()(s, u, mask),
        "ProbabilisticKnowledgeTransfer": kd.ProbabilisticKnowledgeTransfer()(s, u, mask),
        "MiniLMRelations": kd.MiniLMRelations(2, weights=(1, 0, 0.5))((s, s, s * 2), (u, u, u * 2), mask),
        "AttentionMaps": kd.AttentionMaps()(*maps, mask),
        "AttentionMaps.kl": kd.AttentionMaps("kl", scores=True)(*maps, mask),
        "ContrastiveKL": kd.ContrastiveKL(2.0)(*rows),
        "AffinityMimicking": kd.AffinityMimicking(10.0, 20.0)(*zip(rows, next_rows, strict=True)),
        "EmbeddingMSE": kd.EmbeddingMSE()(*rows),
        "DKD": kd.DKD()(s, t, labels, mask=mask),
        "NKD": kd.NKD()(s, t, labels, mask=mask),
        "DIST": kd.DIST()(s, t, labels, mask=mask),
        "LogitMSE": kd.LogitMSE()(s, t, labels, mask=mask),
        "Hint": hint(s, u, mask),
        "ContrastiveRepresentation": contrastive(s[:, 0], u[:, 0], index),
    }
    (expected["Hint"] + expected["ContrastiveRepresentation"]).backward()
    torch.optim.SGD([*hint.parameters(), *contrastive.parameters()], 0.1).step()
    found = load_file(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value.detach(), **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_equal_states(load_file(tmp_path / "out.hint"), hint.state_dict())
    assert_equal_states(load_file(tmp_path / "out.contrastive"), contrastive.state_dict())
    assert load_model(kd.Hint(4, 6), tmp_path / "out.hint") == (set(), [])
    assert load_model(contrastive, tmp_path / "out.contrastive") == (set(), [])
