"""DistillationLoss: the options around the operator, against the operator on tensors prepared by hand."""

import copy
import math
import pickle

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

from rarefy.distillation import DistillationLoss


def make(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    teacher = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    return student, teacher, torch.randint(0, shape[-1], shape[:-1], generator=generator)


def plain_loss(student, teacher, labels, temperature=4.0, alpha=0.5):
    """The definition for rows [rows, classes]; labels of -100 do not count."""
    rows = labels != -100
    s, t = student[rows], teacher[rows]
    log_p, log_q = F.log_softmax(t / temperature, -1), F.log_softmax(s / temperature, -1)
    terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
    return alpha * temperature**2 * terms.sum(-1).mean() + (1 - alpha) * F.cross_entropy(s, labels[rows])


def assert_same(loss, expected, student):
    """Two losses and their gradients in `student` are equal."""
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("of_student", "of_teacher"), [(12, 9), (9, 12)])
def test_truncate_keeps_the_classes_of_both(of_student, of_teacher):
    student, teacher, labels = make(6, of_student)[0].requires_grad_(), make(6, of_teacher)[1], make(6, 9)[2]
    loss = DistillationLoss(vocabulary="truncate")(student, teacher, labels)
    assert_same(loss, plain_loss(student[:, :9], teacher[:, :9], labels), student)
    with pytest.raises(IndexError, match=r"labels must be in \[0, 9\)"):
        DistillationLoss(vocabulary="truncate")(student, teacher, labels * 0 + 10)


def test_pad_gives_missing_classes_probability_zero():
    student, teacher, labels = make(6, 12)[0].requires_grad_(), make(6, 9)[1], make(6, 12)[2]
    padded = F.pad(teacher, (0, 3), value=-math.inf)
    assert_same(
        DistillationLoss(vocabulary="pad")(student, teacher, labels), plain_loss(student, padded, labels), student
    )
    # A student that lacks classes cannot follow KL(p || q) there, and can follow a divergence that is finite.
    short = make(6, 9)[0].requires_grad_()
    with pytest.raises(ValueError, match=r"'pad' gives the student probability 0 .* divergence 'kl' is infinite"):
        DistillationLoss(vocabulary="pad")(short, student.detach(), labels % 9)
    with pytest.raises(ValueError, match=r"'pad' gives the teacher probability 0 .* 'reverse_kl' is infinite"):
        DistillationLoss(vocabulary="pad", divergence="reverse_kl")(student, teacher, labels)
    for divergence in ("jensen_shannon", "skewed_kl", "total_variation"):
        loss = DistillationLoss(vocabulary="pad", divergence=divergence)(short, student.detach(), labels % 9)
        (grad,) = torch.autograd.grad(loss, short)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_map_names_the_teacher_class_of_each_student_class():
    student, teacher, labels = make(6, 5)[0].requires_grad_(), make(6, 9)[1], make(6, 5)[2]
    label_map = torch.tensor([8, 0, -1, 3, 3])
    loss_fn = DistillationLoss(vocabulary="map", label_map=label_map)
    mapped = torch.stack([teacher[:, 8], teacher[:, 0], torch.full((6,), -math.inf), teacher[:, 3], teacher[:, 3]], 1)
    assert_same(loss_fn(student, teacher, labels), plain_loss(student, mapped, labels), student)
    assert loss_fn.state_dict() == {}
    assert torch.equal(copy.deepcopy(loss_fn).label_map, label_map)
    with pytest.raises(ValueError, match=r"label_map must have one entry for each of the 6 student classes, got 5"):
        loss_fn(make(6, 6)[0], teacher, labels)
    with pytest.raises(ValueError, match=r"label_map must hold teacher classes in \[0, 7\) or -1, got 8"):
        loss_fn(student, teacher[:, :7], labels)
    with pytest.raises(ValueError, match=r"label_map must hold teacher classes in \[0, 9\) or -1, got -3"):
        DistillationLoss(vocabulary="map", label_map=label_map.clamp(min=-1) * 3)(student, teacher, labels)


def test_shift_compares_with_the_next_label():
    student, teacher, labels = make(3, 6, 8)
    student.requires_grad_()
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    masked = labels.where(mask, torch.tensor(-100))
    expected = plain_loss(student[:, :-1].reshape(-1, 8), teacher[:, :-1].reshape(-1, 8), masked[:, 1:].reshape(-1))
    loss_fn = DistillationLoss(shift=True)
    assert_same(loss_fn(student, teacher, labels, mask=mask), expected, student)
    assert_same(loss_fn(student, teacher, masked), expected, student)
    assert_same(loss_fn(student, teacher, labels, row_weights=mask.double()), expected, student)
    rows = DistillationLoss(alpha=1.0, shift=True, reduction="none")(student, teacher)
    assert rows.shape == (3, 5)
    torch.testing.assert_close(rows.mean(), DistillationLoss(alpha=1.0)(student[:, :-1], teacher[:, :-1]))
    with pytest.raises(ValueError, match=r"with length >= 2 for shift, got \[3, 1, 8\]"):
        loss_fn(student[:, :1], teacher[:, :1], labels[:, :1])


def test_mask_and_weights_combine():
    student, teacher, labels = make(8, 5)
    weights, mask = torch.rand(8), torch.arange(8) % 3 != 0
    weights[1] = math.nan if not mask[1] else weights[1]
    weights[0] = math.nan  # masked: it does not matter
    loss = DistillationLoss()(student, teacher, labels, row_weights=weights, mask=mask)
    expected = DistillationLoss()(student[mask], teacher[mask], labels[mask], row_weights=weights[mask])
    torch.testing.assert_close(loss, expected)
    with pytest.raises(TypeError, match=r"\[DistillationLoss\] mask must be bool, got Float"):
        DistillationLoss()(student, teacher, labels, mask=torch.ones(8))
    with pytest.raises(ValueError, match=r"mask must have the logits' shape without classes, \[8\], got \[5\]"):
        DistillationLoss()(student, teacher, labels, mask=mask[:5])


def test_several_teachers_are_their_mixture():
    student, _, labels = make(7, 9)
    student.requires_grad_()
    teachers = [make(7, 9, seed=k)[1] for k in range(3)]
    for weights in (None, [1.0, 2.0, 5.0]):
        parts = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
        parts = parts / parts.sum()
        p = sum(w * F.softmax(t / 3.0, -1) for w, t in zip(parts, teachers, strict=True))
        expected = plain_loss(student, 3.0 * p.log(), labels, 3.0, 0.7)
        loss_fn = DistillationLoss(3.0, 0.7, teacher_weights=weights)
        assert_same(loss_fn(student, teachers, labels), expected, student)
    alone = DistillationLoss(3.0, 0.7)
    torch.testing.assert_close(alone(student, teachers[:1], labels), alone(student, teachers[0], labels))
    masked = [F.pad(t[:, :6], (0, 3), value=-math.inf) for t in teachers]
    assert torch.isfinite(alone(student, masked, labels))
    with pytest.raises(ValueError, match="there must be at least one teacher, got none"):
        alone(student, [], labels)
    with pytest.raises(ValueError, match="all teachers must have the same classes, got 9 and 8"):
        alone(student, [teachers[0], teachers[1][:, :8]], labels)


def test_standardized_logits_ignore_scale_and_offset():
    student, teacher, labels = make(6, 10)
    student.requires_grad_()

    def z(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    expected = 0.6 * plain_loss(z(student), z(teacher), labels, 2.0, 1.0) + 0.4 * F.cross_entropy(student, labels)
    loss_fn = DistillationLoss(2.0, 0.6, standardize=True)
    assert_same(loss_fn(student, teacher, labels), expected, student)
    torch.testing.assert_close(loss_fn(student, 7 * teacher + 3, labels), expected, rtol=1e-6, atol=1e-6)
    soft = DistillationLoss(2.0, 1.0, standardize=True)
    assert soft(student, student.detach() * 4 - 1).item() == pytest.approx(0.0, abs=1e-12)
    # A row that does not count may hold anything.
    broken = student.detach().clone()
    broken[2] = math.inf
    broken.requires_grad_()
    mask = torch.arange(6) != 2
    loss = loss_fn(broken, teacher, labels, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, loss_fn(student[mask], teacher[mask], labels[mask]))
    assert torch.count_nonzero(broken.grad[2]) == 0
    assert torch.isfinite(broken.grad).all()


def test_the_teacher_is_cast_and_gets_no_gradient():
    student, teacher, labels = make(6, 10)
    low, high = student.bfloat16().requires_grad_(), teacher.float().requires_grad_()
    loss = DistillationLoss()(low, high, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, DistillationLoss()(low.float(), high, labels))
    loss.backward()
    assert high.grad is None
    with pytest.raises(TypeError, match="teacher_logits must be floating point, got Long"):
        DistillationLoss()(student, labels[:, None].expand(6, 10), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_logits_of_a_wider_teacher_stay_finite(dtype, device):
    # 1e5 is no float16 number, and the lowest float32, of masked classes, no bfloat16.
    student, teacher, labels = make(6, 10)
    student = student.to(device, dtype).requires_grad_()
    teacher, labels = teacher.float().to(device), labels.to(device)
    teacher[0], teacher[1, 3], teacher[2, 4] = 1e5, torch.finfo(torch.float32).min, 1e5 + 5
    for options in ({}, {"divergence": "jensen_shannon"}, {"standardize": True}):
        loss = DistillationLoss(**options)(student, teacher.clamp(min=-1e6), labels)
        exact = student.detach().double().requires_grad_()
        expected = DistillationLoss(**options)(exact, teacher.double().clamp(min=-1e6), labels)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        (grad,), (wanted,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, exact)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=1e-5)
    assert torch.isfinite(DistillationLoss()(student, teacher, labels))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    mixed = DistillationLoss()(student, teacher.clamp(-6e4, 6e4).to(other), labels)
    same = DistillationLoss()(student.float(), teacher.clamp(-6e4, 6e4).to(other).float(), labels)
    torch.testing.assert_close(mixed, same)


def test_standardized_rows_of_equal_logits_have_a_bounded_gradient():
    student, teacher, labels = make(6, 10)
    zeros = torch.zeros_like(student).requires_grad_()
    loss = DistillationLoss(4.0, 0.5, standardize=True, reduction="sum")(zeros, teacher, labels)
    (grad,) = torch.autograd.grad(loss, zeros)
    assert 0 < grad.abs().max() <= 0.5 * 4.0 / math.sqrt(1e-5)  # alpha * T * (a difference of probabilities)
    z = (teacher - teacher.mean(-1, keepdim=True)) / teacher.std(-1, correction=0, keepdim=True)
    soft = 0.5 * 4.0 * (0.1 - F.softmax(z / 4.0, -1)) / math.sqrt(1e-5)
    hard = 0.5 * (0.1 - F.one_hot(labels, 10))
    torch.testing.assert_close(grad, soft + hard, rtol=1e-4, atol=1e-4)


def test_pad_does_not_smooth_over_classes_that_the_student_lacks():
    student, teacher, labels = make(6, 9)[0], make(6, 12)[1], make(6, 9)[2]
    options = {"vocabulary": "pad", "divergence": "jensen_shannon"}
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with vocabulary 'pad' .* 9 beside 12.* got 0.1"):
        DistillationLoss(label_smoothing=0.1, **options)(student, teacher, labels)
    assert torch.isfinite(DistillationLoss(alpha=1.0, label_smoothing=0.1, **options)(student, teacher))
    assert torch.isfinite(DistillationLoss(label_smoothing=0.1, vocabulary="pad")(teacher, student, labels))


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"standardize": True}, {"reduction": "none"}], ids=str)
def test_weights_with_a_gradient_are_refused(options):
    student, teacher, labels = make(2, 6, 10)
    weights = torch.ones(2, 6, requires_grad=True)
    loss_fn = DistillationLoss(**options)
    for leaf in (student, student.clone().requires_grad_()):
        for mask in (None, torch.ones(2, 6, dtype=torch.bool)):
            with pytest.raises(ValueError, match="row_weights must not require a gradient"):
                loss_fn(leaf, teacher, labels, row_weights=weights, mask=mask)
    with torch.no_grad():
        loss_fn(student, teacher, labels, row_weights=weights)
    loss_fn(student, teacher, labels, row_weights=weights.detach())


def test_forward_mode_is_an_error_and_not_zero():
    student, teacher, labels = make(6, 10)
    for options in ({}, {"standardize": True}, {"vocabulary": "truncate"}):
        loss_fn = DistillationLoss(**options)
        with fwAD.dual_level():
            dual = fwAD.make_dual(student, torch.ones_like(student))
            with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
                loss_fn(dual, teacher, labels)
            # The teacher is a constant, with a tangent or without.
            loss_fn(student, fwAD.make_dual(teacher, torch.ones_like(teacher)), labels)
            with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
                torch.ops.rarefy.distillation_loss(student, dual, labels, temperature=4.0, alpha=0.5)
        with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
            torch.func.jvp(lambda s, f=loss_fn: f(s, teacher, labels), (student,), (torch.ones_like(student),))


GRADCHECKED = [
    {"vocabulary": "truncate"},
    {"vocabulary": "pad", "divergence": "skewed_reverse_kl", "skew": 0.2},
    {"vocabulary": "map", "label_map": torch.tensor([1, 0, -1, 3, 3, 2])},
    {"shift": True, "reduction": "none"},
    {"standardize": True, "label_smoothing": 0.1},
    {"standardize": True, "shift": True, "divergence": "jensen_shannon", "skew": 0.3},
    {"teacher_weights": [1.0, 3.0], "divergence": "reverse_kl", "reduction": "sum"},
]


@pytest.mark.parametrize("options", GRADCHECKED, ids=lambda o: " ".join(o))
def test_gradcheck(options):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator).requires_grad_()
    classes = 5 if options.get("vocabulary", "error") != "error" else 6
    teachers = [torch.randn(2, 3, classes, dtype=torch.float64, generator=generator) for _ in range(2)]
    teachers = teachers if "teacher_weights" in options else teachers[0]
    labels = torch.randint(0, 5, (2, 3), generator=generator)
    loss_fn = DistillationLoss(3.0, 0.4, **options)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    assert torch.autograd.gradcheck(lambda s: loss_fn(s, teachers, labels, mask=mask), student)


@pytest.mark.parametrize("options", [*GRADCHECKED, {}], ids=lambda o: " ".join(o))
def test_compiles_as_one_graph(options):
    student, _, labels = make(2, 3, 6, dtype=torch.float32)
    student.requires_grad_()
    classes = 5 if options.get("vocabulary", "error") != "error" else 6
    teachers = [make(2, 3, classes, dtype=torch.float32, seed=k)[1] for k in range(2)]
    teachers = teachers if "teacher_weights" in options else teachers[0]
    loss_fn = DistillationLoss(3.0, 0.4, **options)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    labels = labels % 5
    assert_same(compiled(student, teachers, labels).sum(), loss_fn(student, teachers, labels).sum(), student)


def test_says_what_it_computes():
    assert repr(DistillationLoss()) == "DistillationLoss(temperature=4, alpha=0.5)"
    loss_fn = DistillationLoss(2.0, 1.0, divergence="jensen_shannon", skew=0.1, shift=True, teacher_weights=[1, 2])
    assert repr(loss_fn) == (
        "DistillationLoss(temperature=2, alpha=1, divergence='jensen_shannon', skew=0.1, shift=True, "
        "teacher_weights=[1.0, 2.0])"
    )
    assert repr(pickle.loads(pickle.dumps(loss_fn))) == repr(loss_fn)


def test_bad_options():
    with pytest.raises(ValueError, match=r"vocabulary must be 'error', 'truncate', 'pad' or 'map', got 'cut'"):
        DistillationLoss(vocabulary="cut")
    with pytest.raises(ValueError, match="label_map must be given with vocabulary 'map' and only then, got none"):
        DistillationLoss(vocabulary="map")
    with pytest.raises(ValueError, match=r"label_map must be given with .* got one with 'pad'"):
        DistillationLoss(vocabulary="pad", label_map=torch.arange(3))
    with pytest.raises(TypeError, match="label_map must be int64, got Float"):
        DistillationLoss(vocabulary="map", label_map=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_map must have shape \[student classes\], got \[1, 3\]"):
        DistillationLoss(vocabulary="map", label_map=torch.arange(3)[None])
    with pytest.raises(ValueError, match="teacher_weights must be positive and finite, got 0"):
        DistillationLoss(teacher_weights=[1.0, 0.0])
    student, teacher, labels = make(4, 5)
    with pytest.raises(ValueError, match="teacher_weights must have one number per teacher, got 2 for 1 teachers"):
        DistillationLoss(teacher_weights=[1.0, 2.0])(student, teacher, labels)
    with pytest.raises(ValueError, match="same number of classes, got 5 and 4; vocabulary 'truncate', 'pad' or 'map'"):
        DistillationLoss()(student, teacher[:, :4], labels)
    with pytest.raises(ValueError, match="teacher_logits must have the student's rows"):
        DistillationLoss()(student, teacher[:3], labels)
