"""DKD, NKD, DIST and the squared error of logits against their papers' formulas, in plain numpy loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rarefy.distillation import DIST, DKD, NKD, DistillationLoss, LogitMSE

ops = torch.ops.rarefy
IGNORE = -100
LOSS_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def make(*shape, dtype=torch.float64, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return s.to(dtype), t.to(dtype), labels


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def dkd_reference(s, t, y, temperature=4.0, alpha=1.0, beta=8.0):
    total = 0.0
    for a, b, label in zip(s, t, y, strict=True):
        q, p = softmax(a / temperature), softmax(b / temperature)
        q_rest, p_rest = np.delete(q, label), np.delete(p, label)
        target = kl([p[label], p_rest.sum()], [q[label], q_rest.sum()])
        total += temperature**2 * (alpha * target + beta * kl(p_rest / p_rest.sum(), q_rest / q_rest.sum()))
    return total / len(s)


def nkd_reference(s, t, y, temperature=1.0, gamma=1.5):
    total = 0.0
    for a, b, label in zip(s, t, y, strict=True):
        q_rest, p_rest = (softmax(np.delete(x, label) / temperature) for x in (a, b))
        total -= softmax(b)[label] * math.log(softmax(a)[label])
        total -= gamma * temperature**2 * sum(p * math.log(q) for p, q in zip(p_rest, q_rest, strict=True))
    return total / len(s)


def dist_reference(s, t, y=None, temperature=1.0, beta=1.0, gamma=1.0):
    q, p = (np.array([softmax(row / temperature) for row in x]) for x in (s, t))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (beta * rows + gamma * columns)


def mse_reference(s, t, y=None):
    return ((s - t) ** 2).mean()


CASES = {
    "dkd": (DKD(), dkd_reference),
    "dkd_options": (
        DKD(2.0, alpha=0.5, beta=3.0),
        lambda s, t, y: dkd_reference(s, t, y, temperature=2.0, alpha=0.5, beta=3.0),
    ),
    "nkd": (NKD(), nkd_reference),
    "nkd_options": (NKD(3.0, gamma=0.7), lambda s, t, y: nkd_reference(s, t, y, temperature=3.0, gamma=0.7)),
    "dist": (DIST(), dist_reference),
    "dist_options": (
        DIST(4.0, beta=2.0, gamma=0.5),
        lambda s, t, y: dist_reference(s, t, temperature=4.0, beta=2.0, gamma=0.5),
    ),
    "mse": (LogitMSE(), mse_reference),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("dtype", list(LOSS_TOLERANCE))
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 5), (9, 2)])
def test_follows_the_formula(case, shape, dtype):
    loss_fn, reference = case
    s, t, labels = make(*shape, dtype=dtype)
    loss = loss_fn(s, t, labels)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    a, b = (x.double().reshape(-1, shape[-1]).numpy() for x in (s, t))
    expected = reference(a, b, labels.reshape(-1).numpy())
    assert loss.item() == pytest.approx(expected, rel=LOSS_TOLERANCE[dtype])


def test_gradient(case):
    s, t, labels = make(4, 5)
    assert torch.autograd.gradcheck(lambda x: case[0](x, t, labels), (s.requires_grad_(),))
    labels[1] = IGNORE
    mask = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda x: case[0](x, t, labels, mask=mask), (s,))


def test_zero_where_the_models_agree(case):
    loss_fn, _ = case
    s, _, labels = make(6, 7)
    s.requires_grad_()
    loss = loss_fn(s, s.detach().clone(), labels)
    loss.backward()
    if not isinstance(loss_fn, NKD):
        assert abs(loss.item()) < 1e-13
        assert s.grad.abs().max() < 1e-13
        return
    # NKD is a cross-entropy: left are the teacher's entropies, and the pull of its first term alone.
    assert loss.item() > 0.1
    p = s.detach().softmax(-1)
    label = F.one_hot(labels, 7).double()
    expected = (p * label).sum(-1, keepdim=True) * (p - label) / 6
    torch.testing.assert_close(s.grad, expected)


def test_rows_that_do_not_count(case):
    loss_fn, reference = case
    s, t, labels = make(3, 4, 5)
    labels[0, 1] = labels[2, 2] = IGNORE
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, :2] = False
    valid = (labels != IGNORE) & mask
    expected = reference(s[valid].numpy(), t[valid].numpy(), labels[valid].numpy())
    assert loss_fn(s, t, labels, mask=mask).item() == pytest.approx(expected, rel=1e-10)
    s[~valid], t[~valid] = math.nan, math.inf
    labels[1, 0] = 77  # under the mask
    s.requires_grad_()
    loss = loss_fn(s, t, labels, mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert torch.count_nonzero(s.grad[~valid]) == 0
    assert s.grad.isfinite().all()
    clean = make(6, 5)
    ignored = clean[2][0].item()
    moved = type(loss_fn)(ignore_index=ignored)
    keep = clean[2] != ignored
    assert not keep.all()
    assert moved(*clean).item() == pytest.approx(moved(*(x[keep] for x in clean)).item(), rel=1e-12)


def test_labels_may_be_left_out_where_no_class_is_needed():
    s, t, labels = make(6, 7)
    for loss_fn in (DIST(2.0), LogitMSE()):
        assert torch.equal(loss_fn(s, t), loss_fn(s, t, labels))
        fewer = labels.masked_fill(torch.arange(6) == 0, IGNORE)
        assert not torch.equal(loss_fn(s, t), loss_fn(s, t, fewer))


def test_large_logits_stay_finite(case):
    for dtype in (torch.float32, torch.float64):
        s, t, labels = make(6, 7, dtype=dtype)
        s[0], t[1] = s[0] * 1e4, t[1] * 1e4
        s[2], t[2] = 0.0, 0.0  # no row has a direction
        s.requires_grad_()
        loss = case[0](s, t, labels)
        loss.backward()
        assert loss.isfinite()
        assert s.grad.isfinite().all()


def test_classes_that_are_absent(case):
    """-inf on both sides, as for a padded vocabulary: as if they did not exist."""
    s, t, labels = make(6, 5)
    absent = torch.full((6, 2), -math.inf, dtype=torch.float64)
    wide = torch.cat([s, absent], 1).requires_grad_()
    loss = case[0](wide, torch.cat([t, absent], 1), labels)
    loss.backward()
    assert wide.grad.isfinite().all()
    assert torch.count_nonzero(wide.grad[:, 5:]) == 0
    if isinstance(case[0], DKD | NKD):
        assert loss.item() == pytest.approx(case[0](s, t, labels).item(), rel=1e-12)
    elif isinstance(case[0], LogitMSE):
        assert loss.item() == pytest.approx(case[0](s, t, labels).item() * 5 / 7, rel=1e-12)
    else:
        assert loss.isfinite()


def test_dkd_is_kl_taken_apart():
    """With alpha = 1 and beta = 1 - p_y the two parts are the whole again."""
    s, t, labels = make(1, 6)
    temperature = 3.0
    rest = 1 - (t / temperature).softmax(-1)[0, labels[0]].item()
    whole = DistillationLoss(temperature, 1.0)(s, t)
    assert DKD(temperature, beta=rest)(s, t, labels).item() == pytest.approx(whole.item(), rel=1e-10)


def test_dkd_keeps_small_rests():
    """1 - q_y is summed from its parts: of a student that is sure, 1 - q_y would be 0 and the loss infinite."""
    s, t = torch.tensor([[60.0, 0, 0.5]]), torch.tensor([[2.0, 1, 0]])
    exact = DKD(1.0, beta=0)(s.double(), t.double(), torch.tensor([0])).item()
    assert DKD(1.0, beta=0)(s, t, torch.tensor([0])).item() == pytest.approx(exact, rel=1e-6)


def test_dist_sees_correlation_only():
    _, t, _ = make(8, 6)
    y = t.softmax(-1)
    mixed = (0.5 * y + 0.5 / 6).log()  # the probabilities, shrunk towards the uniform ones
    assert DIST()(mixed, t).item() == pytest.approx(0, abs=1e-12)
    assert DIST()(t.roll(1, 0), t).item() > 0.1
    assert DIST()(-t, t).item() > 1


def test_autocast_and_compile(case):
    s, t, labels = make(6, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case[0](s, t, labels), case[0](s, t, labels).float())
    torch._dynamo.reset()
    compiled = torch.compile(case[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4):
        x, y = s[:rows].clone().requires_grad_(), s[:rows].clone().requires_grad_()
        compiled(x, t[:rows], labels[:rows]).backward()
        case[0](y, t[:rows], labels[:rows]).backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu(case, cuda):
    s, t, labels = make(6, 7, dtype=torch.float32)
    there = case[0](s.to(cuda), t.to(cuda), labels.to(cuda))
    torch.testing.assert_close(there.cpu(), case[0](s, t, labels), rtol=1e-4, atol=1e-5)


def test_wrong_arguments():
    s, t, labels = make(4, 5)
    with pytest.raises(ValueError, match=r"\[dkd_loss\] teacher must have the student's shape \[4, 5\], got \[4, 6\]"):
        DKD()(s, make(4, 6)[1], labels)
    with pytest.raises(ValueError, match=r"\[dkd_loss\] logits must have at least two classes, got shape \[4, 1\]"):
        DKD()(s[:, :1], t[:, :1], labels)
    with pytest.raises(
        ValueError, match=r"\[nkd_loss\] labels must have the logits' shape without classes, \[4\], got"
    ):
        NKD()(s, t, labels[:3])
    with pytest.raises(TypeError, match=r"\[nkd_loss\] labels must be int64, got Int"):
        NKD()(s, t, labels.int())
    with pytest.raises(TypeError, match=r"\[logit_mse_loss\] student must be float32, .*, got Long"):
        LogitMSE()(s.long(), t)
    with pytest.raises(ValueError, match=r"\[logit_mse_loss\] student must not be empty, got shape \[0, 5\]"):
        LogitMSE()(s[:0], t[:0])
    with pytest.raises(ValueError, match=r"\[dist_loss\] there must be at least two rows unless gamma is 0, got 1"):
        DIST()(s[:1], t[:1])
    assert DIST(gamma=0)(s[:1], t[:1]).isfinite()
    with pytest.raises(ValueError, match=r"\[dist_loss\] mask must have shape \[4\], got \[4, 1\]"):
        DIST()(s, t, mask=torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[dkd_loss\] at least one row must count .*, got none"):
        DKD()(s, t, torch.full((4,), IGNORE))
    for wrong in (5, -1):
        labels[2] = wrong
        with pytest.raises(
            IndexError, match=rf"\[dkd_loss\] labels must be in \[0, 5\) or ignore_index, got {wrong} at row 2"
        ):
            DKD()(s, t, labels)


@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda: DKD(0), r"\[DKD\] temperature must be in \[1e-6, 1e6\], got 0"),
        (lambda: DKD(math.nan), r"\[DKD\] temperature must be in \[1e-6, 1e6\], got nan"),
        (lambda: DKD(alpha=-1), r"\[DKD\] alpha must be finite and not negative, got -1"),
        (lambda: NKD(gamma=math.inf), r"\[NKD\] gamma must be finite and not negative, got inf"),
        (lambda: DIST(beta=-0.5), r"\[DIST\] beta must be finite and not negative, got -0.5"),
    ],
)
def test_wrong_options(make_loss, message):
    with pytest.raises(ValueError, match=message):
        make_loss()


def test_repr():
    assert repr(DKD()) == "DKD(temperature=4, alpha=1, beta=8)"
    assert repr(NKD()) == "NKD(temperature=1, gamma=1.5)"
    assert repr(DIST(2)) == "DIST(temperature=2, beta=1, gamma=1)"
    assert repr(LogitMSE()) == "LogitMSE()"


def test_dist_sees_classes_of_small_probability():
    """A confident teacher of a large vocabulary: most columns hold probabilities of 1e-18."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(16, 2000, generator=generator)
    t.scatter_add_(1, torch.randint(0, 2000, (16, 5), generator=generator), torch.full((16, 5), 40.0))
    assert DIST()(t, t).item() == pytest.approx(0, abs=1e-5)
    mask = torch.arange(16) < 12
    assert DIST()(t, t, mask=mask).item() == pytest.approx(0, abs=1e-5)
    s = (t + torch.randn(16, 2000, generator=generator)).requires_grad_()
    loss = DIST()(s, t)
    loss.backward()
    exact = s.detach().double().requires_grad_()
    wanted = DIST()(exact, t.double())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert 0.05 < loss.item() < 0.95
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


def test_dist_takes_equal_probabilities_for_constant():
    """1/3 is rounded and its mean once more: no direction, in a row or in a column."""
    for dtype in (torch.float32, torch.float64):
        for rows, classes in ((7, 3), (11, 37), (3, 1000)):
            s = torch.full((rows, classes), 0.3, dtype=dtype, requires_grad=True)
            loss = DIST()(s, torch.randn(rows, classes, dtype=dtype))
            loss.backward()
            assert loss.item() == 2.0
            assert torch.count_nonzero(s.grad) == 0


def test_nkd_where_the_teacher_rules_the_label_out():
    """0 log 0 = 0: what is left of the loss is that of the other classes."""
    s, t, labels = make(4, 6)
    t[1, labels[1]] = -math.inf
    for student_too in (False, True):
        if student_too:
            s[1, labels[1]] = -math.inf
        x = s.clone().requires_grad_()
        loss = NKD()(x, t, labels)
        loss.backward()
        expected = 0.0
        for row in range(4):
            y = labels[row].item()
            p = t[row].softmax(-1)[y].item()
            rest_s, rest_t = (np.delete(v[row].numpy(), y) for v in (s, t))
            expected -= p * s[row].log_softmax(-1)[y].item() if p > 0 else 0.0
            expected -= 1.5 * sum(a * math.log(b) for a, b in zip(softmax(rest_t), softmax(rest_s), strict=True))
        assert loss.item() == pytest.approx(expected / 4, rel=1e-10)
        assert x.grad.isfinite().all()
