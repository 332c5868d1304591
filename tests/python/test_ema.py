"""Moving averages of a student: the formula, and students of every kind."""

import copy
import io

import pytest
import torch
from torch import nn

from rarefy._core.distillation import Ema
from rarefy.distillation import DistillationLoss, DistillationTrainer, EMATeacher
from rarefy.quantization import QConfig, convert, prepare_qat


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, width), nn.BatchNorm1d(width)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


@pytest.fixture
def student() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor = X) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def decay_of(t: int, decay: float, warmup: float) -> float:
    return decay if warmup == 0 else min(decay, t / (t + warmup))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 1.0), (0.9, 0.0), (0.999, 10.0), (0.0, 1.0)])
def test_averages_follow_the_formula(student, dtype, decay, warmup):
    student = student.to(dtype)
    teacher = EMATeacher(student, decay, warmup)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    expected = [p.detach().clone() for p in student.parameters()]
    for t in range(12):
        train(student, optimizer, X.to(dtype))
        teacher.update(student)
        weight = 1.0 - decay_of(t, decay, warmup)
        torch._foreach_lerp_(expected, [p.detach() for p in student.parameters()], weight)
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), expected, strict=True))  # bit for bit
        for (name, a), b in zip(teacher.module.named_buffers(), student.buffers(), strict=True):
            assert torch.equal(a, b), name
    assert teacher.updates == 12
    assert repr(teacher).startswith(f"EMATeacher(\n  decay={decay:g}, warmup={warmup:g}, updates=12")


def test_a_warmup_of_one_is_the_mean_at_first(student):
    teacher = EMATeacher(student, 0.999)
    seen = []
    for value in (3.0, 5.0, 10.0):
        with torch.no_grad():
            student.last.bias.fill_(value)
        teacher.update(student)
        seen.append(teacher.module.last.bias[0].item())
    assert seen == pytest.approx([3.0, 4.0, 6.0])


def test_the_teacher_is_constant_and_in_evaluation_mode(student):
    student.train()
    train(student, torch.optim.SGD(student.parameters(), 0.1))  # gradients are not copied
    teacher = EMATeacher(student)
    assert not any(m.training for m in teacher.train().modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert student.training
    assert student.first.weight.requires_grad
    assert torch.equal(teacher(X), teacher(X))
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_16_bits_are_not_lost(dtype):
    student = nn.Linear(4, 3).to(dtype)
    teacher = EMATeacher(student, 0.999, warmup=0)
    with torch.no_grad():
        start = student.weight.float()
        student.weight.add_(0.25)
    moved = student.weight.float()
    for _ in range(500):
        teacher.update(student)
    expected = moved + (start - moved) * 0.999**500
    assert teacher.module.weight.dtype == dtype
    torch.testing.assert_close(teacher.module.weight.float(), expected, rtol=1e-2, atol=2e-3)
    assert (teacher.module.weight.float() - start).abs().min() > 0.05


def test_saved_and_loaded(student):
    student = student.bfloat16()
    student.drop.p = 0.0
    x = X.bfloat16()
    twin = copy.deepcopy(student)
    whole, half = EMATeacher(student, 0.99), EMATeacher(twin, 0.99)
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (student, twin)]
    for _ in range(6):
        train(student, optimizers[0], x)
        whole.update(student)
    for _ in range(3):
        train(twin, optimizers[1], x)
        half.update(twin)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    loaded = EMATeacher(copy.deepcopy(twin), 0.99)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.updates == 3
    for _ in range(3):
        train(twin, optimizers[1], x)
        loaded.update(twin)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, loaded.module.state_dict()[name]), name
    state, again = whole.get_extra_state(), loaded.get_extra_state()
    assert state["updates"] == again["updates"] == 6
    assert all(torch.equal(state["masters"][k], again["masters"][k]) for k in state["masters"])


def test_copied_and_pickled(student):
    teacher = EMATeacher(student, 0.9)
    teacher.update(student)
    twin = copy.deepcopy(teacher)
    twin.update(student)
    assert (teacher.updates, twin.updates) == (1, 2)


def test_wrapped_students(student, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(student, backend="eager"))
        teacher = EMATeacher(wrapped, 0.5, warmup=0)
        with torch.no_grad():
            student.last.bias += 2.0
        teacher.update(wrapped)
        assert type(teacher.module) is Net
        assert torch.allclose(teacher.module.last.bias, student.last.bias - 1.0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_student_prepared_for_qat(student):
    student = prepare_qat(student, QConfig.int8(), X)
    teacher = EMATeacher(student, 0.5)  # before anything was observed
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for scale in (1.0, 3.0):
        train(student, optimizer, scale * X)
        teacher.update(student)
    ranges = {k: v for k, v in student.state_dict().items() if k.endswith("max_val")}
    assert ranges
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    for name, value in ranges.items():
        assert torch.equal(before[name], value), name
    out = teacher(X)
    assert out.isfinite().all()
    for name, value in teacher.module.state_dict().items():
        if ".quant.input." in name:  # evaluation observes no activations
            assert torch.equal(value, before[name]), name
    torch.testing.assert_close(convert(copy.deepcopy(teacher.module))(X), out, rtol=0.05, atol=0.05)


def test_a_teacher_in_the_trainer(student):
    teacher = EMATeacher(student, 0.9)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    labels = torch.randint(3, (16,), generator=torch.Generator().manual_seed(0))
    trainer = DistillationTrainer(student, teacher, optimizer, DistillationLoss(2.0, 0.5))
    trainer.fit([(X, labels)] * 4, epochs=2, progress=False)
    assert teacher.updates == 8  # after each step, by the trainer
    assert not torch.equal(teacher.module.first.weight, student.first.weight)


def test_a_student_that_has_changed_is_refused(student):
    teacher = EMATeacher(student)
    before = copy.deepcopy(teacher.module.state_dict())
    with pytest.raises(
        ValueError, match=r"\[EMATeacher\] the student must keep the shapes of its parameters, got \[7, 4\]"
    ):
        teacher.update(Net(7))
    other = Net()
    other.drop = nn.PReLU()
    with pytest.raises(ValueError, match=r"must have the teacher's parameters, got a difference in 'drop\.weight'"):
        teacher.update(other)
    other = Net()
    other.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="must have the teacher's buffers, got a difference in 'extra'"):
        teacher.update(other)
    assert teacher.updates == 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"\[Ema\] decay must be in \[0, 1\), got 1"),
        ({"decay": float("nan")}, r"\[Ema\] decay must be in \[0, 1\), got nan"),
        ({"warmup": -1.0}, r"\[Ema\] warmup must be 0 or more and finite, got -1"),
        ({"warmup": float("inf")}, r"\[Ema\] warmup must be 0 or more and finite, got inf"),
    ],
)
def test_options_are_checked(student, options, message):
    with pytest.raises(ValueError, match=message):
        EMATeacher(student, **options)


def test_lists_of_tensors():
    ema = Ema(0.5, 0.0)
    averages = [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(0)]
    ema.update(averages, [torch.ones(3, dtype=torch.bfloat16), torch.ones(2), torch.zeros(0)])
    assert averages[0].tolist() == [0.5] * 3
    assert averages[1].tolist() == [0.5] * 2
    assert repr(ema) == "Ema(decay=0.5, warmup=0, updates=1)"
    with pytest.raises(TypeError, match="averages must be float32 or float64, got BFloat16 at 0"):
        ema.update([torch.zeros(1, dtype=torch.bfloat16)], [torch.zeros(1)])
    with pytest.raises(ValueError, match="one value per average, got 2 values for 1 averages"):
        ema.update([torch.zeros(1)], [torch.zeros(1)] * 2)
    assert ema.updates == 1
