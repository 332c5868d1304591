"""The family of the distillation loss: the table of definitions, in float64 from torch's operators or from formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import _core
from rarefy.distillation import DistillationLoss

DIVERGENCES = ["kl", "reverse_kl", "jensen_shannon", "total_variation", "skewed_kl", "skewed_reverse_kl"]
#: Tolerances per dtype: of the gradient, relative to its largest value, and of the loss, relative to the size of its terms.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LOSS_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 5e-6, torch.float16: 5e-6}

op = torch.ops.rarefy.distillation_loss
forward_op = torch.ops.rarefy.distillation_loss_forward


def kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in the form of F.kl_div."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).where(log_p > -math.inf, 0.0).sum(-1)


def log_mixture(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(weight * a + (1 - weight) * b), through logsumexp."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def divergence_of(name: str, log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """D of each row."""
    if name == "kl" or (name in ("jensen_shannon", "skewed_kl") and skew == 0):
        return kl_div(log_p, log_q)
    if name == "reverse_kl" or (name == "jensen_shannon" and skew == 1) or (name == "skewed_reverse_kl" and skew == 0):
        return kl_div(log_q, log_p)
    if name == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if name == "skewed_kl":
        return kl_div(log_p, log_mixture(skew, log_p, log_q))
    if name == "skewed_reverse_kl":
        return kl_div(log_q, log_mixture(skew, log_q, log_p))
    middle = log_mixture(skew, log_p, log_q)
    return skew * kl_div(log_p, middle) + (1 - skew) * kl_div(log_q, middle)


def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None = None,
    *,
    temperature: float,
    alpha: float,
    divergence: str = "kl",
    skew: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The definition, in float64, from torch's operators."""
    s, t = student.double(), teacher.double()
    weight = torch.ones(s.shape[:-1], dtype=torch.float64) if weights is None else weights.double()
    loss = torch.zeros_like(weight)
    if labels is not None:
        weight = weight * (labels != ignore_index)
    if alpha > 0:
        log_p, log_q = F.log_softmax(t / temperature, -1), F.log_softmax(s / temperature, -1)
        loss = loss + alpha * temperature**2 * divergence_of(divergence, log_p, log_q, skew)
    if alpha < 1:
        flat = F.cross_entropy(
            s.reshape(-1, s.shape[-1]),
            labels.reshape(-1),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        loss = loss + (1 - alpha) * flat.reshape(weight.shape)
    loss = torch.where(weight > 0, loss, 0.0) * weight
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / weight.sum()}[reduction]


def make(*shape, dtype=torch.float32, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(*shape, generator=generator) * spread).to(dtype)
    teacher = (torch.randn(*shape, generator=generator) * spread).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return student, teacher, labels


def assert_matches(student, teacher, labels, weights=None, **options):
    ours = student.detach().clone().requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss = op(ours, teacher, labels, weights, **options)
    expected = reference(exact, teacher, labels, weights, **options)
    assert loss.shape == expected.shape
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    (loss * upstream.to(loss.dtype)).sum().backward()
    (expected * upstream).sum().backward()
    # Sums over p and q cancel: their error is that of probabilities of size 1, times T^2.
    size = max(1.0, options["alpha"] * options["temperature"] ** 2)
    tolerance = LOSS_TOLERANCE[student.dtype]
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance * size)
    tolerance = GRADIENT_TOLERANCE[student.dtype]
    # So do the gradients of the two terms, whose size is that of alpha * T * (a probability) / rows.
    rows = 1 if options.get("reduction", "mean") != "mean" else loss.numel() * student[..., 0].numel()
    size = max(exact.grad.abs().max().item(), 0.1 * options["alpha"] * options["temperature"] / rows)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_table_of_definitions(divergence, temperature):
    for alpha in (0.4, 1.0):
        for skew in (0.0, 0.1, 0.5, 0.9):
            student, teacher, labels = make(7, 217, seed=int(10 * skew))
            assert_matches(
                student, teacher, labels, temperature=temperature, alpha=alpha, divergence=divergence, skew=skew
            )


@settings(max_examples=150, deadline=None)
@given(
    temperature=st.floats(0.5, 20.0),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    divergence=st.sampled_from(DIVERGENCES),
    skew=st.floats(0.01, 0.99),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.sampled_from(["no", "weights", "mask"]),
    ignored=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    classes=st.integers(2, 70),
    seed=st.integers(0, 1000),
)
def test_every_option_with_every_other(
    temperature, alpha, divergence, skew, label_smoothing, reduction, weighted, ignored, dtype, classes, seed
):
    student, teacher, labels = make(3, 4, classes, dtype=dtype, seed=seed, spread=3.0)
    generator = torch.Generator().manual_seed(seed)
    weights = None
    if weighted != "no":
        weights = torch.rand(3, 4, generator=generator) + 0.1
        weights = weights if weighted == "weights" else (weights > 0.5).float()
        weights[0, 0], weights[2, 3] = 0.0, 1.0
    if ignored:
        labels[1] = -100
    assert_matches(
        student,
        teacher,
        labels,
        weights,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
        skew=skew,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dtypes_and_odd_shapes(divergence, dtype):
    for shape in ((217, 64), (5, 4, 3, 33), (1, 1296), (3, 15), (2, 17), (2, 2100), (13,)):
        student, teacher, labels = make(*shape, dtype=dtype)
        for temperature in (1.0, 3.0, 4.0):
            assert_matches(
                student, teacher, labels, temperature=temperature, alpha=0.6, divergence=divergence, label_smoothing=0.1
            )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_in_float64(divergence):
    student, teacher, labels = make(4, 6, dtype=torch.float64, spread=2.0)
    labels[1] = -100
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    student.requires_grad_()
    for temperature, alpha, smoothing, reduction in [
        (0.5, 0.5, 0.0, "mean"),
        (4.0, 1.0, 0.0, "sum"),
        (3.0, 0.3, 0.2, "none"),
    ]:
        assert torch.autograd.gradcheck(
            lambda s: op(
                s,
                teacher,
                labels,
                weights,
                temperature=temperature,  # noqa: B023
                alpha=alpha,  # noqa: B023
                divergence=divergence,
                skew=0.3,
                label_smoothing=smoothing,  # noqa: B023
                reduction=reduction,  # noqa: B023
            ),
            student,
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_when_teacher_equals_student(divergence):
    for dtype in GRADIENT_TOLERANCE:
        for temperature in (0.5, 1.0, 4.0, 5.5):
            student = make(20, 333, dtype=dtype)[0]
            student[3, 5:9] = -math.inf
            student[4] *= 100
            teacher = student.clone()
            student.requires_grad_()
            loss = op(student, teacher, temperature=temperature, alpha=1.0, divergence=divergence, skew=0.3)
            loss.backward()
            assert loss.item() == 0.0
            assert torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand_are_finite(divergence, dtype):
    student, teacher, labels = make(8, 100, spread=1.0)
    student, teacher = (student.sign() * 1e4).to(dtype), (teacher.sign() * 1e4).to(dtype)
    for temperature in (1.0, 3.0, 4.0):
        leaf = student.clone().requires_grad_()
        options = {"temperature": temperature, "alpha": 0.5, "divergence": divergence, "skew": 0.2}
        loss = op(leaf, teacher, labels, **options)
        loss.backward()
        expected = reference(student, teacher, labels, **options)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_a_class_of_probability_zero(divergence, dtype):
    options = {"temperature": 3.0, "alpha": 1.0, "divergence": divergence, "skew": 0.3}
    student, teacher, _ = make(6, 100, dtype=dtype)
    cut_s, cut_t = student.clone(), teacher.clone()
    cut_s[:, 70:] = cut_t[:, 70:] = -math.inf
    leaf, short = cut_s.clone().requires_grad_(), cut_s[:, :70].clone().requires_grad_()
    both, expected = op(leaf, cut_t, **options), op(short, cut_t[:, :70].contiguous(), **options)
    both.backward()
    expected.backward()
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:, :70], short.grad, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(leaf.grad[:, 70:]) == 0
    # In one of the two only: +inf where D averages over the other one, finite everywhere else.
    for s, t, infinite in ((cut_s, teacher, "kl"), (student, cut_t, "reverse_kl")):
        leaf = s.clone().requires_grad_()
        loss = op(leaf, t, **options)
        loss.backward()
        if divergence == infinite:
            assert loss.item() == math.inf
        else:
            assert torch.isfinite(leaf.grad).all()
            torch.testing.assert_close(loss.detach().double(), reference(s, t, None, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_seen_and_a_masked_row_may_hold_it(divergence):
    for dtype in (torch.float32, torch.float64):
        student, teacher, _ = make(4, 90, dtype=dtype)
        for target in (student, teacher):
            for place in (0, 89):
                kept = target[1, place].clone()
                target[1, place] = math.nan
                leaf = student.clone().requires_grad_()
                loss = op(leaf, teacher, temperature=4.0, alpha=1.0, divergence=divergence)
                loss.backward()
                assert math.isnan(loss.item())
                assert torch.isnan(leaf.grad[1]).any()
                weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
                leaf = student.clone().requires_grad_()
                loss = op(leaf, teacher, None, weights, temperature=4.0, alpha=1.0, divergence=divergence)
                loss.backward()
                assert math.isfinite(loss.item())
                assert torch.count_nonzero(leaf.grad[1]) == 0
                target[1, place] = kept


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_instruction_set_gives_the_same_bits(divergence, restore_instruction_set):
    for classes in (7, 40, 217, 1030):
        student, teacher, labels = make(9, classes)
        student[0, 0] = teacher[1, -1] = -math.inf
        student[2] *= 200
        results = []
        for name in available_instruction_sets():
            _core.set_instruction_set(name)
            options = {"temperature": 3.0, "alpha": 0.4, "divergence": divergence, "skew": 0.3, "label_smoothing": 0.1}
            results.append(forward_op(student, teacher, labels, **options))
        for loss, grad, _ in results[1:]:
            torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(grad, results[0][1], rtol=0, atol=0, equal_nan=True)


def test_reductions_are_of_one_another():
    student, teacher, labels = make(4, 5, 30)
    labels[1, 2] = -100
    weights = torch.rand(4, 5)
    options = {"temperature": 3.0, "alpha": 0.4}
    rows = op(student, teacher, labels, weights, reduction="none", **options)
    assert rows.shape == (4, 5)
    assert rows[1, 2] == 0
    total = op(student, teacher, labels, weights, reduction="sum", **options)
    torch.testing.assert_close(rows.sum(), total)
    valid = weights.where(labels != -100, torch.zeros(()))
    torch.testing.assert_close(total / valid.sum(), op(student, teacher, labels, weights, **options))
    nothing = torch.full_like(labels, -100)
    assert op(student, teacher, nothing, reduction="sum", **options).item() == 0.0


@pytest.mark.parametrize("size", [1e-300, 1e-6, 1.0, 1e6, 1e300])
def test_float16_mean_does_not_depend_on_the_size_of_the_weights(size, device):
    student, teacher, labels = make(64, 50, dtype=torch.float16)
    labels[3] = -100
    weights = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    weights[3] = 1e6 * weights[3]  # of a row that does not count
    for divergence in DIVERGENCES:
        leaf, exact = student.detach().clone().to(device).requires_grad_(), student.double().requires_grad_()
        options = {"temperature": 4.0, "alpha": 0.5, "divergence": divergence}
        loss = op(leaf, teacher.to(device), labels.to(device), (weights * size).to(device), **options)
        expected = reference(exact, teacher, labels, weights, **options)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (loss * 1024).backward()
        (expected * 1024).backward()
        largest = exact.grad.abs().max().item()
        torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=2e-3, atol=1e-3 * largest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "skewed_kl", "skewed_reverse_kl"])
def test_mixtures_of_far_apart_distributions(divergence, dtype, device):
    # Where p is 1e-17 of q and the reverse, p / m - 1 is -1 in floating point, whose log1p is -inf.
    options = {"divergence": divergence, "reduction": "none", "temperature": 1.0, "alpha": 1.0}
    a, b = torch.tensor([[0.0, 0.0, -1.0]], dtype=dtype), torch.tensor([[0.0, -38.0, 1.0]], dtype=dtype)
    far = [make(64, 200, dtype=dtype, spread=spread)[:2] for spread in (6.0, 30.0, 100.0, 300.0)]
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for student, teacher in [(a, b), (b, a), *far]:
        for skew in (0.1, 0.5, 0.9):
            ours, exact = student.detach().clone().to(device).requires_grad_(), student.double().requires_grad_()
            loss = op(ours, teacher.to(device), None, skew=skew, **options)
            expected = reference(exact, teacher, None, None, skew=skew, **options)
            torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
            assert (loss > 0).all()
            (grad,) = torch.autograd.grad(loss.sum(), ours)
            assert torch.isfinite(grad).all()
            (exact_grad,) = torch.autograd.grad(expected.sum(), exact)
            torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
def test_a_label_that_does_not_exist_shows_in_the_gradient_on_cuda(cuda):
    student, teacher, labels = (x.to(cuda) for x in make(4, 10))
    labels[1] = 10
    for divergence in DIVERGENCES:
        for alpha in (0.0, 0.5):
            leaf = student.clone().requires_grad_()
            loss = op(leaf, teacher, labels, temperature=4.0, alpha=alpha, divergence=divergence)
            loss.backward()
            assert loss.isnan()
            assert leaf.grad[1].isnan().any()


def test_float16_mean_over_weighted_rows_survives():
    student, teacher, labels = make(65536, 4, dtype=torch.float16)
    weights = torch.rand(65536)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    options = {"temperature": 4.0, "alpha": 0.5, "divergence": "jensen_shannon"}
    (op(leaf, teacher, labels, weights, **options) * 65536.0).backward()
    (reference(exact, teacher, labels, weights, **options) * 65536.0).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-3, atol=2e-3 * exact.grad.abs().max().item())


def test_opcheck():
    for dtype in (torch.float32, torch.float16, torch.float64):
        student, teacher, labels = make(2, 3, 20, dtype=dtype)
        for reduction in ("mean", "none"):
            options = {
                "temperature": 4.0,
                "alpha": 0.5,
                "divergence": "skewed_kl",
                "label_smoothing": 0.1,
                "reduction": reduction,
            }
            leaf = student.clone().requires_grad_()
            torch.library.opcheck(op.default, (leaf, teacher, labels, torch.rand(2, 3)), options)
            torch.library.opcheck(forward_op.default, (student, teacher, labels, torch.rand(2, 3)), options)
        _, grad, scale = forward_op(student, teacher, labels, **options)
        torch.library.opcheck(
            torch.ops.rarefy.distillation_loss_backward.default, (grad, scale, torch.rand(2, 3, dtype=scale.dtype))
        )


def test_bad_settings():
    student, teacher, labels = make(4, 5)

    def refuses(message, **options):
        with pytest.raises(ValueError, match=message):
            op(student, teacher, labels, **({"temperature": 4.0, "alpha": 0.5} | options))
        with pytest.raises(ValueError, match=message.replace("distillation_loss", "DistillationLoss")):
            DistillationLoss(**options)

    refuses(r"\[distillation_loss\] divergence must be 'kl', .* or 'skewed_reverse_kl', got 'js'", divergence="js")
    refuses(r"\[distillation_loss\] skew must be in \[0, 1\], got 1.5", skew=1.5)
    refuses(r"\[distillation_loss\] skew must be below 1 for divergence 'skewed_kl'", skew=1.0, divergence="skewed_kl")
    refuses(r"\[distillation_loss\] label_smoothing must be in \[0, 1\], got -0.1", label_smoothing=-0.1)
    refuses(r"\[distillation_loss\] reduction must be 'mean', 'sum' or 'none', got 'avg'", reduction="avg")


def test_bad_weights():
    student, teacher, labels = make(4, 5)
    options = {"temperature": 4.0, "alpha": 0.5}
    for wrong, shown in ((-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")):
        weights = torch.tensor([1.0, 1.0, wrong, 1.0])
        with pytest.raises(ValueError, match=rf"row_weights must be finite and >= 0, got {shown} at row 2"):
            op(student, teacher, labels, weights, **options)
    with pytest.raises(ValueError, match=r"row_weights must have the logits' shape without classes, \[4\], got \[5\]"):
        op(student, teacher, labels, torch.ones(5), **options)
    with pytest.raises(TypeError, match="row_weights must be floating point, got Bool"):
        op(student, teacher, labels, torch.ones(4, dtype=torch.bool), **options)
    with pytest.raises(ValueError, match=r"at least one row must be valid .* got 4 rows, all ignored"):
        op(student, teacher, labels, torch.zeros(4), **options)
    grad, scale = torch.randn(4, 5), torch.ones(())
    with pytest.raises(ValueError, match=r"upstream must be a scalar or have shape \[4\], got \[3\]"):
        torch.ops.rarefy.distillation_loss_backward(grad, scale, torch.ones(3))


#: What other libraries compute for the same logits at T = 4: value and gradient norm over the definition's. Formulas
#: transcribed from their sources; docs/dev/numerics.md has the table.
ELSEWHERE = {
    "batchmean, without T^2": lambda s, t, T: F.kl_div(
        F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean"
    ),
    "cross-entropy, without T^2": lambda s, t, T: -(F.softmax(t / T, 1) * F.log_softmax(s / T, 1)).sum(1).mean(),
    "mean over elements": lambda s, t, T: (
        F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="mean") * T**2
    ),
    "cross-entropy": lambda s, t, T: -(F.softmax(t / T, 1) * F.log_softmax(s / T, 1)).sum(1).mean() * T**2,
    "T not applied": lambda s, t, T: F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean"),
}


def test_what_other_libraries_compute_instead():
    student, teacher, _ = make(8, 10, dtype=torch.float64, spread=2.0)

    def value_and_gradient(loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, 4.0)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    value, gradient = value_and_gradient(lambda s, t, T: DistillationLoss(T, 1.0)(s, t))
    ratios = {}
    for name, loss in ELSEWHERE.items():
        other, slope = value_and_gradient(loss)
        ratios[name] = (other / value, (slope.norm() / gradient.norm()).item())
    assert ratios["batchmean, without T^2"] == pytest.approx((1 / 16, 1 / 16))
    assert ratios["mean over elements"] == pytest.approx((1 / 10, 1 / 10))
    assert ratios["cross-entropy, without T^2"][1] == pytest.approx(1 / 16)
    assert ratios["cross-entropy"][1] == pytest.approx(1.0)
    assert ratios["cross-entropy"][0] > 2.0
    assert abs(ratios["T not applied"][1] - 1.0) > 0.05


@pytest.mark.parametrize("classes", [65, 79, 100, 1000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_greatest_logit_may_be_anywhere(divergence, classes):
    """Also among the last ones, which make no whole step of the loop, and far above what comes first."""
    generator = torch.Generator().manual_seed(classes)
    places = [0, 15, 63, 64, *range(classes - 17, classes)]
    for gap in (20.0, 90.0, 150.0):
        student, teacher = (torch.randn(2 * len(places), classes, generator=generator) for _ in range(2))
        labels = torch.randint(0, classes, (2 * len(places),), generator=generator)
        for row, place in enumerate(places):
            student[row, place] += gap
            teacher[len(places) + row, place] += gap
        assert_matches(student, teacher, labels, temperature=1.0, alpha=0.5, divergence=divergence)
        assert_matches(student, teacher, labels, temperature=4.0, alpha=0.5, divergence=divergence)


@pytest.mark.parametrize("masked", [-1e9, -math.inf, torch.finfo(torch.float32).min])
def test_all_classes_but_the_last_masked(masked):
    student = torch.full((1, 1000), masked)
    student[0, 999] = 3.0
    loss = op(student, torch.zeros(1, 1000), torch.tensor([999]), temperature=1.0, alpha=0.0)
    assert loss.item() == 0.0
