"""torch.ops.rarefy.distillation_loss against the definition, written in float64 with torch's own operators or loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import available_instruction_sets

import rarefy as rf
from rarefy import _core
from rarefy.distillation import DistillationLoss

IGNORE = -100
#: Tolerances per dtype: of the gradient, relative to its largest value, and of the loss, which is float32 or float64.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LOSS_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def loss_op(student, teacher, labels, temperature, alpha, ignore_index=IGNORE, row_weights=None, **settings):
    settings |= {"temperature": temperature, "alpha": alpha, "ignore_index": ignore_index}
    return torch.ops.rarefy.distillation_loss(student, teacher, labels, row_weights, **settings)


def forward_op(student, teacher, labels, temperature, alpha, ignore_index=IGNORE, row_weights=None, **settings):
    settings |= {"temperature": temperature, "alpha": alpha, "ignore_index": ignore_index}
    return torch.ops.rarefy.distillation_loss_forward(student, teacher, labels, row_weights, **settings)


backward_op = torch.ops.rarefy.distillation_loss_backward


def reference(student, teacher, labels, temperature, alpha, ignore_index=IGNORE):
    """The definition, in float64, from torch's operators."""
    classes = student.shape[-1]
    s, t = student.double().reshape(-1, classes), teacher.double().reshape(-1, classes)
    if labels is not None:
        y = labels.reshape(-1)
        s, t, y = s[y != ignore_index], t[y != ignore_index], y[y != ignore_index]
    loss = torch.zeros((), dtype=torch.float64)
    if alpha > 0:
        kl = F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
        loss = loss + alpha * temperature**2 * kl
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(s, y)
    return loss


def looped_reference(student, teacher, labels, temperature, alpha):
    """The definition once more, in plain Python floats."""

    def log_softmax(row):
        top = max(row)
        log_sum = math.log(sum(math.exp(x - top) for x in row))
        return [x - top - log_sum for x in row]

    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        log_q, log_p = log_softmax([x / temperature for x in s]), log_softmax([x / temperature for x in t])
        kl = sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        total += alpha * temperature**2 * kl - (1 - alpha) * log_softmax(s)[y]
    return total / len(labels)


def make(*shape, dtype=torch.float32, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(*shape, generator=generator) * spread).to(dtype)
    teacher = (torch.randn(*shape, generator=generator) * spread).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return student, teacher, labels


def assert_matches(student, teacher, labels, temperature, alpha, upstream=1.0):
    ours = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss = loss_op(ours, teacher, labels, temperature, alpha, IGNORE)
    expected = reference(exact, teacher, labels, temperature, alpha)
    (loss * upstream).backward()
    (expected * upstream).backward()
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert ours.grad.dtype == student.dtype
    tolerance = LOSS_TOLERANCE[student.dtype]
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    size = exact.grad.abs().max().item()
    tolerance = GRADIENT_TOLERANCE[student.dtype]
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 7.3, 8.0, 20.0])
def test_matches_the_definition(temperature, alpha):
    for classes in (2, 10, 16, 217, 1000, 2500):
        assert_matches(*make(17, classes, seed=classes), temperature, alpha)


def test_matches_plain_loops():
    student, teacher, labels = make(9, 21)
    for temperature, alpha in [(1.0, 0.5), (4.0, 0.7), (3.0, 1.0), (2.0, 0.0)]:
        expected = looped_reference(student, teacher, labels, temperature, alpha)
        loss = loss_op(student, teacher, labels, temperature, alpha, IGNORE).item()
        assert loss == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
@pytest.mark.parametrize("shape", [(217, 256), (5, 4, 3, 160), (1, 1296), (7, 1), (3, 15), (2, 17), (2, 31), (13,)])
def test_dtypes_and_odd_shapes(dtype, shape):
    for temperature in (1.0, 3.0, 4.0):
        assert_matches(*make(*shape, dtype=dtype), temperature, 0.6)


def test_one_class_has_no_loss_and_no_gradient():
    student, teacher, labels = make(6, 1)
    student.requires_grad_()
    loss = loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros(6, 1))


def test_non_contiguous_logits_and_labels():
    student, teacher, labels = make(12, 40)
    wide = torch.randint(0, 40, (12, 3))
    assert_matches(student.t().contiguous().t(), teacher[:, ::1], labels, 4.0, 0.5)
    assert_matches(make(12, 80)[0][:, ::2], make(24, 40)[1][::2], wide[:, 1], 4.0, 0.5)
    assert_matches(student[:1].expand(12, 40), teacher, labels, 3.0, 0.5)
    channels_last = make(2, 3, 4, 8)[0].contiguous(memory_format=torch.channels_last)
    assert_matches(channels_last, *make(2, 3, 4, 8, seed=1)[1:], 2.0, 0.5)


@pytest.mark.parametrize("upstream", [0.0, -2.5, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_upstream_gradient_is_applied(upstream, dtype):
    assert_matches(*make(11, 37, dtype=dtype), 4.0, 0.5, upstream)


def test_float16_gradients_survive_the_mean_over_many_rows():
    # Averaged over 65536 rows the gradient is below float16's range; a loss scale brings it back.
    student, teacher, labels = make(65536, 4, dtype=torch.float16)
    assert_matches(student, teacher, labels, 4.0, 0.5, upstream=65536.0)


def test_gradcheck_in_float64():
    student, teacher, labels = make(5, 7, dtype=torch.float64, spread=2.0)
    labels[2] = IGNORE
    student.requires_grad_()
    for temperature, alpha in [(0.5, 0.5), (1.0, 0.3), (4.0, 1.0), (20.0, 0.9), (3.0, 0.0)]:
        assert torch.autograd.gradcheck(lambda s: loss_op(s, teacher, labels, temperature, alpha, IGNORE), student)  # noqa: B023


def test_equal_logits_have_no_kl_and_no_kl_gradient():
    for dtype in GRADIENT_TOLERANCE:
        for temperature in (0.5, 1.0, 4.0, 5.5):
            student, _, _ = make(20, 333, dtype=dtype)
            teacher = student.clone()
            student.requires_grad_()
            loss = loss_op(student, teacher, None, temperature, 1.0, IGNORE)
            loss.backward()
            assert loss.item() == 0.0
            assert torch.count_nonzero(student.grad) == 0


def test_the_gradient_keeps_its_size_as_the_temperature_grows():
    # What T^2 is for: at high temperature the KL gradient tends to (s - t) / classes, both centred, whatever T.
    student, teacher, _ = make(6, 10, dtype=torch.float64)
    student.requires_grad_()
    loss_op(student, teacher, None, 1e4, 1.0, IGNORE).backward()
    centred = (student - teacher).detach()
    centred -= centred.mean(-1, keepdim=True)
    torch.testing.assert_close(student.grad, centred / 10 / 6, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_logits_of_ten_thousand_stay_finite(temperature):
    student, teacher, labels = make(8, 100, spread=1.0)
    student, teacher = student.sign() * 1e4, teacher.sign() * 1e4
    assert_matches(student, teacher, labels, temperature, 0.5)
    assert_matches(student.double(), teacher.double(), labels, temperature, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_minus_infinity_is_a_class_of_probability_zero(dtype, temperature):
    student, teacher, _ = make(6, 40, dtype=dtype)
    labels = torch.arange(6)
    # Masked in both: as if the class did not exist.
    both_s, both_t = student.clone(), teacher.clone()
    both_s[:, 30:] = both_t[:, 30:] = -math.inf
    full = both_s.clone().requires_grad_()
    loss = loss_op(full, both_t, labels, temperature, 0.5, IGNORE)
    loss.backward()
    cut = both_s[:, :30].clone().requires_grad_()
    expected = loss_op(cut, both_t[:, :30].contiguous(), labels, temperature, 0.5, IGNORE)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    tolerance = GRADIENT_TOLERANCE[dtype]
    torch.testing.assert_close(full.grad[:, :30], cut.grad, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(full.grad[:, 30:]) == 0
    # In the teacher only: adds nothing to the KL term; the student's mass there is pushed down.
    teacher_only = student.clone().requires_grad_()
    loss = loss_op(teacher_only, both_t, labels, temperature, 1.0, IGNORE)
    loss.backward()
    expected = reference(student[:, :], both_t, labels, temperature, 1.0)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=5e-6, atol=0)
    assert (teacher_only.grad[:, 30:] > 0).all()
    # In the student only: the teacher has mass where the student has none.
    student_only = both_s.clone().requires_grad_()
    loss = loss_op(student_only, teacher, labels, temperature, 1.0, IGNORE)
    loss.backward()
    assert loss.item() == math.inf
    assert torch.isfinite(student_only.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_seen(dtype):
    student, teacher, labels = make(4, 50, dtype=dtype)
    for target in (student, teacher):
        for place in (0, 49):
            kept = target[1, place].clone()
            target[1, place] = math.nan
            assert math.isnan(loss_op(student, teacher, labels, 4.0, 0.5, IGNORE).item())
            target[1, place] = kept


def test_ignored_rows_add_nothing():
    student, teacher, labels = make(30, 20)
    labels[::3] = IGNORE
    for alpha in (0.0, 0.5, 1.0):
        assert_matches(student, teacher, labels, 4.0, alpha)
    # An ignored row may hold anything, and its gradient is 0.
    student[0, 0], teacher[3, 1] = math.nan, math.inf
    student.requires_grad_()
    loss = loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.count_nonzero(student.grad[::3]) == 0
    # Another index, in the range of the classes.
    labels = labels.clamp(min=0)
    expected = reference(student.detach()[labels != 0], teacher[labels != 0], labels[labels != 0], 4.0, 0.5)
    assert loss_op(student, teacher, labels, 4.0, 0.5, 0).item() == pytest.approx(expected.item(), rel=5e-6)


def test_alpha_one_needs_no_labels_and_alpha_zero_no_teacher():
    student, teacher, labels = make(8, 12)
    without = loss_op(student, teacher, None, 4.0, 1.0, IGNORE)
    assert torch.equal(without, loss_op(student, teacher, labels, 4.0, 1.0, IGNORE))
    nothing = torch.full_like(teacher, math.nan)
    hard = loss_op(student, nothing, labels, 4.0, 0.0, IGNORE)
    torch.testing.assert_close(hard, F.cross_entropy(student, labels), rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_gives_the_same_bits(dtype, restore_instruction_set):
    names = available_instruction_sets()
    for classes in (1, 7, 16, 40, 217, 1030, 3000):
        student, teacher, labels = make(9, classes, dtype=dtype)
        if classes > 1:
            student[0, 0] = teacher[1, -1] = -math.inf
        student[2] *= 200
        for temperature, alpha in [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5), (8.0, 0.1), (4.0, 1.0), (4.0, 0.0)]:
            results = []
            for name in names:
                _core.set_instruction_set(name)
                results.append(forward_op(student, teacher, labels, temperature, alpha, IGNORE))
            for loss, grad, scale in results[1:]:
                assert torch.equal(loss, results[0][0])
                assert torch.equal(grad, results[0][1])
                assert torch.equal(scale, results[0][2])
    factor = torch.tensor(0.37)
    grad = make(7, 33, dtype=dtype)[0]
    scaled = []
    for name in names:
        _core.set_instruction_set(name)
        scaled.append(backward_op(grad, torch.ones(()), factor))
    assert all(torch.equal(s, scaled[0]) for s in scaled)


def test_the_number_of_threads_does_not_matter():
    student, teacher, labels = make(513, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_op(student, teacher, labels, 4.0, 0.5, IGNORE))
    finally:
        torch.set_num_threads(before)
    for loss, grad, _ in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_with_and_without_gradient_agree():
    student, teacher, labels = make(20, 77)
    without = loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    with_gradient = loss_op(student.clone().requires_grad_(), teacher, labels, 4.0, 0.5, IGNORE)
    assert not without.requires_grad
    assert torch.equal(without, with_gradient.detach())


def test_only_the_gradient_is_saved():
    student, teacher, labels = make(64, 1000)
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    assert sum(saved) <= student.nbytes + 16


def test_backward_twice_with_a_retained_graph():
    student, teacher, labels = make(6, 9)
    student.requires_grad_()
    loss = loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, first * 2)


def test_no_gradient_flows_to_the_teacher():
    student, teacher, labels = make(6, 9)
    student.requires_grad_()
    teacher.requires_grad_()
    loss_op(student, teacher, labels, 4.0, 0.5, IGNORE).backward()
    assert teacher.grad is None
    assert not loss_op(student.detach(), teacher, labels, 4.0, 0.5, IGNORE).requires_grad


def test_double_backward_says_so():
    student, teacher, labels = make(6, 9)
    student.requires_grad_()
    loss = loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\[distillation_loss\] is differentiable once"):
        grad.square().sum().backward()


def test_opcheck():
    for dtype in (torch.float32, torch.float16, torch.float64):
        student, teacher, labels = make(6, 20, dtype=dtype)
        for labelled, alpha in ((labels, 0.5), (None, 1.0)):
            settings = {"temperature": 4.0, "alpha": alpha}
            torch.library.opcheck(
                torch.ops.rarefy.distillation_loss.default,
                (student.clone().requires_grad_(), teacher, labelled),
                settings,
            )
            torch.library.opcheck(
                torch.ops.rarefy.distillation_loss_forward.default, (student, teacher, labelled), settings
            )
        _, grad, scale = forward_op(student, teacher, labels, 4.0, 0.5, IGNORE)
        upstream = torch.tensor(2.0, dtype=scale.dtype)
        torch.library.opcheck(torch.ops.rarefy.distillation_loss_backward.default, (grad, scale, upstream))
    strided = make(6, 40)[0][:, ::2].requires_grad_()
    torch.library.opcheck(
        torch.ops.rarefy.distillation_loss.default,
        (strided, make(6, 20)[1], make(6, 20)[2]),
        {"temperature": 4.0, "alpha": 0.5},
    )


def test_compiles_as_one_graph():
    model = torch.nn.Linear(12, 10)
    loss_fn = DistillationLoss(temperature=4.0, alpha=0.5)
    inputs, teacher, labels = torch.randn(6, 12), torch.randn(6, 10), torch.randint(0, 10, (6,))

    def step(x):
        return loss_fn(model(x), teacher, labels) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    step(inputs).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    loss = compiled(inputs)
    loss.backward()
    torch.testing.assert_close(loss, step(inputs))
    torch.testing.assert_close(model.weight.grad, expected)


def test_autocast_takes_the_student_in_bfloat16():
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 10)
    inputs, labels = torch.randn(6, 12), torch.randint(0, 10, (6,))
    teacher = torch.randn(6, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)
        assert logits.dtype == torch.bfloat16
        same = loss_op(logits, teacher.bfloat16(), labels, 4.0, 0.5, IGNORE)
        mixed = loss_op(logits, teacher, labels, 4.0, 0.5, IGNORE)
    assert same.dtype == mixed.dtype == torch.float32
    expected = reference(logits.detach(), teacher.bfloat16(), labels, 4.0, 0.5)
    assert same.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mixed.item() == pytest.approx(reference(logits.detach(), teacher, labels, 4.0, 0.5).item(), rel=1e-5)
    mixed.backward()
    assert torch.isfinite(model.weight.grad).all()
    assert model.weight.grad.abs().max() > 0


def test_module():
    student, teacher, labels = make(8, 12)
    loss_fn = DistillationLoss(temperature=3, alpha=0.25)
    assert loss_fn(student, teacher, labels).item() == pytest.approx(
        reference(student, teacher, labels, 3.0, 0.25).item(), rel=5e-6
    )
    assert repr(loss_fn) == "DistillationLoss(temperature=3, alpha=0.25)"
    assert repr(DistillationLoss(2.5, 1.0, ignore_index=0)) == (
        "DistillationLoss(temperature=2.5, alpha=1, ignore_index=0)"
    )
    assert loss_fn.state_dict() == {}
    assert rf.distillation.DistillationLoss is DistillationLoss
    labels[:4] = 11
    assert DistillationLoss(3, 0.25, ignore_index=11)(student, teacher, labels).item() == pytest.approx(
        reference(student, teacher, labels, 3.0, 0.25, 11).item(), rel=5e-6
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
def test_cuda_agrees_with_the_cpu(dtype, cuda):
    for shape in ((217, 256), (3, 5, 1000), (4, 32001), (6, 1)):
        student, teacher, labels = make(*shape, dtype=dtype)
        labels.view(-1)[::4] = IGNORE
        for temperature, alpha in [(1.0, 0.5), (4.0, 0.7), (3.0, 1.0), (4.0, 0.0)]:
            here, there = student.clone().requires_grad_(), student.to(cuda).requires_grad_()
            expected = loss_op(here, teacher, labels, temperature, alpha, IGNORE)
            loss = loss_op(there, teacher.to(cuda), labels.to(cuda), temperature, alpha, IGNORE)
            (expected * 3).backward()
            (loss * 3).backward()
            tolerance = GRADIENT_TOLERANCE[dtype]
            torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-6)
            size = here.grad.abs().max().item()
            torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=tolerance, atol=tolerance * size)
    ignored = torch.full((6,), IGNORE, device=cuda)
    assert math.isnan(loss_op(there, teacher.to(cuda), ignored, 4.0, 0.5, IGNORE).item())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(temperature):
    student, teacher, labels = make(4, 5)
    with pytest.raises(ValueError, match=r"\[distillation_loss\] temperature must be positive and finite, got "):
        loss_op(student, teacher, labels, temperature, 0.5, IGNORE)
    with pytest.raises(ValueError, match=r"\[DistillationLoss\] temperature must be positive and finite, got "):
        DistillationLoss(temperature=temperature)


def test_extreme_temperature():
    with pytest.raises(ValueError, match=r"temperature must be in \[1e-6, 1e6\], got 1e-07"):
        DistillationLoss(temperature=1e-7)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_bad_alpha(alpha):
    student, teacher, labels = make(4, 5)
    with pytest.raises(ValueError, match=r"\[distillation_loss\] alpha must be in \[0, 1\], got "):
        loss_op(student, teacher, labels, 4.0, alpha, IGNORE)
    with pytest.raises(ValueError, match=r"\[DistillationLoss\] alpha must be in \[0, 1\], got "):
        DistillationLoss(alpha=alpha)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_tensors(device):
    def call(student, teacher, labels, alpha=0.5):
        arguments = [None if t is None else t.to(device) for t in (student, teacher, labels)]
        return loss_op(*arguments, 4.0, alpha, IGNORE)

    student, teacher, labels = make(4, 5)
    with pytest.raises(ValueError, match=r"teacher_logits must have the student's shape \[4, 5\], got \[4, 6\]"):
        call(student, make(4, 6)[1], labels)
    with pytest.raises(ValueError, match=r"labels must have the logits' shape without classes, \[4\], got \[4, 1\]"):
        call(student, teacher, labels[:, None])
    with pytest.raises(ValueError, match=r"labels must be given when alpha is below 1, got none with alpha 0.5"):
        call(student, teacher, None)
    with pytest.raises(ValueError, match=r"must have at least one class, got shape \[4, 0\]"):
        call(student[:, :0], teacher[:, :0], labels)
    with pytest.raises(ValueError, match=r"must have at least one row, got shape \[0, 5\]"):
        call(student[:0], teacher[:0], labels[:0])
    with pytest.raises(ValueError, match=r"must have shape \[\.\.\., classes\], got a scalar"):
        call(student[0, 0], teacher[0, 0], None, alpha=1.0)
    with pytest.raises(TypeError, match="student_logits must be float32, float64, bfloat16 or float16, got Long"):
        call(labels[None], labels[None], labels[:1])
    with pytest.raises(TypeError, match="teacher_logits must have the student's dtype Float, got Double"):
        call(student, teacher.double(), labels)
    with pytest.raises(TypeError, match="labels must be int64, got Int"):
        call(student, teacher, labels.int())


def test_bad_labels():
    student, teacher, labels = make(4, 5)
    for wrong in (5, -1):
        labels[2] = wrong
        with pytest.raises(
            IndexError, match=rf"labels must be in \[0, 5\) or ignore_index \(-100\), got {wrong} at row 2"
        ):
            loss_op(student, teacher, labels, 4.0, 0.5, IGNORE)
    with pytest.raises(ValueError, match=r"at least one row must be valid .* got 4 rows, all ignored"):
        loss_op(student, teacher, torch.full((4,), IGNORE), 4.0, 0.5, IGNORE)
