"""Logits of k + 1 outcomes, and the loss on them, against plain float64 formulas."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import rarefy as rf

compact_op = torch.ops.rarefy.compact_logits
dense_op = torch.ops.rarefy.distillation_loss
DIVERGENCES = ["kl", "reverse_kl", "jensen_shannon", "total_variation", "skewed_kl", "skewed_reverse_kl"]


def reference(logits, indices, temperature):
    """The definition, row by row."""
    rows, chosen = logits.double().flatten(0, -2), indices.flatten(0, -2)
    out = []
    for row, index in zip(rows, chosen, strict=True):
        others = [j for j in range(row.numel()) if j not in index.tolist()]
        tail = temperature * torch.logsumexp(row[others] / temperature, 0)
        out.append(torch.cat([row[index], tail.reshape(1)]))
    return torch.stack(out).view(*indices.shape[:-1], -1)


def make(*shape, dtype=torch.float64, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(*shape, generator=g) * spread).to(dtype)
    teacher = (torch.randn(*shape, generator=g) * spread).to(dtype)
    return student, teacher, torch.randint(0, shape[-1], shape[:-1], generator=g)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_compact_logits_match_the_definition(dtype, temperature):
    for shape, k in [((5, 11), 3), ((2, 3, 40), 39), ((4, 2500), 17), ((7, 5), 1), ((3, 6), 6)]:
        logits, other, _ = make(*shape, dtype=dtype)
        indices = other.float().topk(k).indices
        exact = logits.double().requires_grad_()
        ours = logits.clone().requires_grad_()
        out = compact_op(ours, indices, temperature)
        expected = reference(exact, indices, temperature)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tight = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(out.double(), expected, rtol=tight, atol=tight * 10)
        upstream = torch.randn(expected.shape, dtype=torch.float64)
        upstream[..., -1] *= k < shape[-1]  # -inf has no gradient
        grad = torch.autograd.grad(out, ours, upstream.to(out.dtype))[0]
        wanted = torch.autograd.grad(expected, exact, upstream)[0].nan_to_num()
        assert grad.dtype == dtype
        loose = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 10 * tight)
        torch.testing.assert_close(grad.double(), wanted, rtol=loose, atol=loose)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9e3], [0.0, -torch.inf, -torch.inf, -torch.inf]], requires_grad=True)
    out = compact_op(logits, torch.tensor([[0], [0]]), 1.0)
    assert out.tolist() == [[1e4, 9e3], [0.0, -torch.inf]]
    out.backward(torch.ones_like(out))
    assert logits.grad.tolist() == [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]


def test_compact_logits_under_opcheck_and_compile():
    logits, other, _ = make(4, 9, dtype=torch.float32)
    logits.requires_grad_()
    indices = other.topk(3).indices
    torch.library.opcheck(compact_op.default, (logits, indices, 2.0))
    compiled = torch.compile(compact_op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, indices, 2.0), compact_op(logits, indices, 2.0))


def test_compact_logits_refuse_bad_input():
    logits, indices = torch.zeros(3, 5), torch.zeros(3, 2, dtype=torch.int64)
    for error, message, arguments in [
        (TypeError, "indices must be int64, got Int", (logits, indices.int(), 1.0)),
        (ValueError, r"k must be in \[1, 5\], got 6", (logits, torch.zeros(3, 6, dtype=torch.int64), 1.0)),
        (ValueError, r"indices must have the logits' shape without classes", (logits, indices[:2], 1.0)),
        (ValueError, "temperature must be positive", (logits, indices, 0.0)),
        (IndexError, r"indices must be in \[0, 5\), got 0 to 5", (logits, torch.tensor([[0, 5]] * 3), 1.0)),
        (TypeError, "logits must be float32", (logits.int(), indices, 1.0)),
    ]:
        with pytest.raises(error, match=message):
            compact_op(*arguments)


def test_topk_logits_keep_the_largest_and_all_mass():
    logits, *_ = make(4, 6, 100, dtype=torch.float32)
    top = rf.distillation.topk_logits(logits, 10, 2.0)
    assert torch.equal(top.values, logits.topk(10).values)
    assert (top.k, top.classes, top.temperature) == (10, 100, 2.0)
    everything = torch.logsumexp(torch.cat([top.values, top.tail.unsqueeze(-1)], -1) / 2.0, -1)
    torch.testing.assert_close(everything, torch.logsumexp(logits / 2.0, -1))
    assert "k=10 of 100 classes" in repr(top)
    with pytest.raises(ValueError, match=r"k must be in \[1, 100\], got 101"):
        rf.distillation.topk_logits(logits, 101)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_classes_are_the_dense_loss(divergence):
    student, teacher, labels = make(6, 13)
    labels[2] = -100
    weights = torch.rand(6, dtype=torch.float64)
    settings = {"temperature": 3.0, "alpha": 0.7, "divergence": divergence, "skew": 0.2, "label_smoothing": 0.1}
    student.requires_grad_()
    top = rf.distillation.topk_logits(teacher, 13, 3.0)
    for reduction in ("mean", "sum", "none"):
        ours = rf.distillation.top_k_distillation_loss(
            student, top, labels, row_weights=weights, reduction=reduction, **settings
        )
        dense = dense_op(student, teacher, labels, weights, reduction=reduction, **settings)
        torch.testing.assert_close(ours, dense)
        a, b = (torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, dense))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_that_of_k_plus_one_outcomes(divergence):
    student, teacher, labels = make(5, 30)
    labels[1] = -100
    student.requires_grad_()
    top = rf.distillation.topk_logits(teacher, 4, 2.0)
    outcomes = reference(student, top.indices, 2.0)
    valid = (labels != -100).double()
    soft = dense_op(
        outcomes, reference(teacher, top.indices, 2.0), None, valid, temperature=2.0, alpha=1.0, divergence=divergence
    )
    hard = torch.nn.functional.cross_entropy(student, labels)
    expected = 0.6 * soft + 0.4 * hard
    ours = rf.distillation.top_k_distillation_loss(
        student, top, labels, temperature=2.0, alpha=0.6, divergence=divergence
    )
    torch.testing.assert_close(ours, expected)
    # soft's gradient in the outcomes, through the definition of the outcomes
    a = torch.autograd.grad(ours, student, retain_graph=True)[0]
    torch.testing.assert_close(a, torch.autograd.grad(expected, student)[0])


def test_gradcheck():
    student, teacher, labels = make(4, 9)
    top = rf.distillation.topk_logits(teacher, 3, 2.0)
    student.requires_grad_()
    for alpha in (0.0, 0.5, 1.0):
        assert torch.autograd.gradcheck(
            lambda s, alpha=alpha: rf.distillation.top_k_distillation_loss(
                s, top, labels, temperature=2.0, alpha=alpha
            ),
            student,
        )


def test_derivatives_that_do_not_exist_are_errors():
    student, teacher, labels = make(4, 9)
    top = rf.distillation.topk_logits(teacher, 3, 2.0)
    settings = {"temperature": 2.0, "alpha": 0.5}
    weights = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="row_weights must not require a gradient"):
        rf.distillation.top_k_distillation_loss(student, top, labels, row_weights=weights, **settings)
    with fwAD.dual_level():
        dual = fwAD.make_dual(student, torch.ones_like(student))
        with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
            rf.distillation.top_k_distillation_loss(dual, top, labels, **settings)
        with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
            torch.ops.rarefy.compact_logits(dual, top.indices, 2.0)


def test_equal_models_have_no_loss():
    student, *_ = make(5, 40, dtype=torch.float32)
    student.requires_grad_()
    top = rf.distillation.topk_logits(student.detach(), 7, 4.0)
    loss = rf.distillation.top_k_distillation_loss(student, top, temperature=4.0, alpha=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max().item() < 1e-6


def test_a_teacher_that_does_not_fit():
    student, teacher, labels = make(3, 20)
    top = rf.distillation.topk_logits(teacher, 5, 2.0)
    loss = rf.distillation.top_k_distillation_loss
    with pytest.raises(ValueError, match="must be of the loss's temperature 4, got 2"):
        loss(student, top, labels, temperature=4.0, alpha=0.5)
    with pytest.raises(ValueError, match="must have the teacher's 20 classes"):
        loss(student[:, :19], top, labels, temperature=2.0, alpha=0.5)
    with pytest.raises(ValueError, match="labels must be given when alpha is below 1"):
        loss(student, top, temperature=2.0, alpha=0.5)


def test_distillation_loss_takes_top_k_logits():
    student, teacher, labels = make(2, 6, 20)
    weights, mask = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6) > 0.3
    for shift in (False, True):
        loss_fn = rf.distillation.DistillationLoss(3.0, 0.7, divergence="reverse_kl", shift=shift)
        whole = rf.distillation.topk_logits(teacher, 20, 3.0)
        ours = loss_fn(student, whole, labels, row_weights=weights, mask=mask)
        torch.testing.assert_close(ours, loss_fn(student, teacher, labels, row_weights=weights, mask=mask))
    top = rf.distillation.topk_logits(teacher, 5, 3.0)
    expected = rf.distillation.top_k_distillation_loss(student, top, labels, temperature=3.0, alpha=0.7)
    torch.testing.assert_close(rf.distillation.DistillationLoss(3.0, 0.7)(student, top, labels), expected)
    for options, name in [
        ({"standardize": True}, "standardize"),
        ({"vocabulary": "pad"}, "vocabulary"),
        ({"teacher_weights": [1.0]}, "teacher_weights"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be .* for top-k logits of a teacher"):
            rf.distillation.DistillationLoss(3.0, **options)(student, top, labels)
    with pytest.raises(TypeError, match="mask must be bool"):
        rf.distillation.DistillationLoss(3.0)(student, top, labels, mask=weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf])
def test_what_a_row_that_does_not_count_holds_does_not_matter(dtype, held):
    student, teacher, labels = make(6, 20, dtype=dtype)
    labels[4] = -100
    mask = torch.tensor([True, False, True, True, True, False])
    counts = mask & (labels != -100)
    top = rf.distillation.topk_logits(teacher, 3, 2.0)
    results = []
    for value in (0.0, held):
        x = student.clone()
        x[~counts] = value
        x.requires_grad_()
        loss = rf.distillation.DistillationLoss(2.0, 0.6)(x, top, labels, mask=mask)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert torch.count_nonzero(results[1][1][~counts]) == 0


def test_a_class_may_be_there_once():
    student, _, labels = make(3, 5)
    indices = torch.tensor([[0, 1], [1, 0], [2, 2]])
    with pytest.raises(ValueError, match="indices must differ within a row, got 2 twice at row 2"):
        compact_op(student, indices, 1.0)
    top = rf.distillation.TopKLogits(torch.zeros(3, 2), indices, torch.zeros(3), 2.0)
    with pytest.raises(ValueError, match="indices must differ within a row, got 2 twice at row 2"):
        rf.distillation.DistillationLoss(2.0, 0.5)(student, top, labels)
    for rows in (torch.arange(5).expand(3, 5), torch.arange(5).flip(0).expand(3, 5).t()[:2].t()):
        assert compact_op(student, rows, 1.0).shape == (3, rows.shape[1] + 1)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_labels_follow_the_rules_of_the_dense_loss(alpha):
    student, teacher, labels = make(4, 20)
    top = rf.distillation.topk_logits(teacher, 3, 2.0)
    loss_fn = rf.distillation.DistillationLoss(2.0, alpha)
    for teacher_logits in (teacher, top):
        with pytest.raises(IndexError, match=r"labels must be in \[0, 20\) or ignore_index \(-100\), got 20 at row 2"):
            loss_fn(student, teacher_logits, labels.index_fill(0, torch.tensor(2), 20))
        with pytest.raises(IndexError, match="got -1 at row 0"):
            loss_fn(student, teacher_logits, labels.index_fill(0, torch.tensor(0), -1))
        with pytest.raises(TypeError, match="labels must be int64"):
            loss_fn(student, teacher_logits, labels.int())
        with pytest.raises(ValueError, match=r"labels must have the logits' shape without classes, \[4\], got \[1\]"):
            loss_fn(student, teacher_logits, labels[:1])
        masked = torch.tensor([True, True, False, True])
        assert loss_fn(student, teacher_logits, labels.index_fill(0, torch.tensor(2), 20), mask=masked).isfinite()


def test_masks_and_weights_have_the_shape_of_rows():
    student, teacher, labels = make(2, 3, 20)
    weights, mask = torch.rand(2, 3, dtype=torch.float64), torch.tensor([True, False, True])
    for teacher_logits in (teacher, rf.distillation.topk_logits(teacher, 3, 4.0)):
        for shift in (False, True):
            loss_fn = rf.distillation.DistillationLoss(shift=shift)
            message = r"must have the logits' shape without classes, \[2, 3\], got \[3\]"
            with pytest.raises(ValueError, match="mask " + message):
                loss_fn(student, teacher_logits, labels, row_weights=weights, mask=mask)
            with pytest.raises(ValueError, match="mask " + message):
                loss_fn(student, teacher_logits, labels, mask=mask)
            with pytest.raises(ValueError, match="row_weights " + message):
                loss_fn(student, teacher_logits, labels, row_weights=weights[0], mask=mask.expand(2, 3))
            with pytest.raises(ValueError, match="row_weights " + message):
                loss_fn(student, teacher_logits, labels, row_weights=weights[0])
