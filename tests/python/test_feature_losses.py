"""Losses on features, relations and embeddings against their papers' formulas, in plain numpy loops."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import rarefy as rf
from rarefy.distillation import (
    AffinityMimicking,
    AttentionMaps,
    AttentionTransfer,
    ContrastiveKL,
    EmbeddingMSE,
    FeatureAdapter,
    HiddenCosine,
    Hint,
    MiniLMRelations,
    ProbabilisticKnowledgeTransfer,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)

CLASSES = (
    AffinityMimicking, AttentionMaps, AttentionTransfer, ContrastiveKL, EmbeddingMSE, FeatureAdapter, HiddenCosine, Hint,
    MiniLMRelations, ProbabilisticKnowledgeTransfer, RelationalAngle, RelationalDistance, SimilarityPreserving,
)  # fmt: skip
ops = torch.ops.rarefy
#: Of loss and gradient, relative to their largest value; inputs in 16 bits are exact, the gradient is rounded to them.
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# References ----------------------------------------------------------------------------------------------------------


def huber(d):
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def cosine(a, b):
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def tokens(x, axis):
    """Feature vectors, by sample, of [batch, ...] with features at `axis`."""
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])


def kept(x, mask, axis=-1):
    """The feature vectors of all positions that count."""
    flat = tokens(x, axis).reshape(-1, x.shape[axis])
    return flat if mask is None else flat[mask.reshape(-1)]


def hint_reference(s, t, mask=None, loss="mse", axis=-1):
    total, count = 0.0, 0
    for a, b in zip(kept(s, mask, axis), kept(t, mask, axis), strict=True):
        if loss == "cosine":
            total += 1 - cosine(a, b)
        else:
            total += np.mean([(x - y) ** 2 if loss == "mse" else huber(x - y) for x, y in zip(a, b, strict=True)])
        count += 1
    return total / count


def attention_transfer_reference(s, t, mask=None, variant="paper", power=2, axis=1):
    distances, squares = [], []
    for b in range(s.shape[0]):
        maps = []
        for x in (s, t):
            positions = tokens(x, axis)[b]
            if mask is not None:
                positions = positions[mask[b].reshape(-1)]
            q = np.array([sum(abs(v) ** power for v in position) for position in positions])
            maps.append(q / math.sqrt(sum(q * q)))
        difference = maps[0] - maps[1]
        distances.append(math.sqrt(sum(difference * difference)))
        squares += list(difference * difference)
    return np.mean(distances if variant == "paper" else squares)


def flat(x, mask):
    x = x.copy()
    if mask is not None:
        x[~mask] = 0
    return x.reshape(x.shape[0], -1)


def similarity_reference(s, t, mask=None):
    grams = []
    for x in (flat(s, mask), flat(t, mask)):
        gram = np.array([[float(a @ b) for b in x] for a in x])
        grams.append(np.array([row / math.sqrt(sum(row * row)) for row in gram]))
    return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2


def distance_reference(s, t, mask=None):
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    relations = []
    for x in (flat(s, mask), flat(t, mask)):
        d = [math.sqrt(((x[i] - x[j]) ** 2).sum()) for i, j in pairs]
        relations.append([v / (sum(d) / len(d)) for v in d])
    return np.mean([huber(a - b) for a, b in zip(*relations, strict=True)])


def angle_reference(s, t, mask=None):
    n = len(s)
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
    relations = []
    for x in (flat(s, mask), flat(t, mask)):
        relations.append([cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triples])
    return np.mean([huber(a - b) for a, b in zip(*relations, strict=True)])


def pkt_reference(s, t, mask=None):
    n = len(s)
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        rows = []
        for x in (flat(t, mask), flat(s, mask)):
            k = [(cosine(x[i], x[j]) + 1) / 2 for j in others]
            rows.append([v / sum(k) for v in k])
        total += kl(*rows)
    return total / n


def relation_reference(s, t, mask=None, heads=2):
    values = []
    for b in range(s.shape[0]):
        valid = np.arange(s.shape[1]) if mask is None else np.flatnonzero(mask[b])
        for h in range(heads):
            rows = []
            for x in (t, s):
                width = x.shape[2] // heads
                part = x[b][valid][:, h * width : (h + 1) * width]
                rows.append([softmax(np.array([a @ c for c in part]) / math.sqrt(width)) for a in part])
            values += [kl(p, q) for p, q in zip(*rows, strict=True)]
    return np.mean(values)


def map_reference(s, t, mask=None, loss="mse", scores=False):
    values = []
    for b in range(s.shape[0]):
        valid = np.arange(s.shape[2]) if mask is None else np.flatnonzero(mask[b])
        for h in range(s.shape[1]):
            for i in valid:
                a, c = s[b, h, i][valid], t[b, h, i][valid]
                if loss == "mse":
                    values += list((a - c) ** 2)
                else:
                    values.append(kl(softmax(c), softmax(a)) if scores else kl(c, a))
    return np.mean(values)


def contrastive_kl_reference(s, t, temperature=1.0):
    by_image = np.mean([kl(softmax(p / temperature), softmax(q / temperature)) for p, q in zip(t, s, strict=True)])
    by_text = np.mean([kl(softmax(p / temperature), softmax(q / temperature)) for p, q in zip(t.T, s.T, strict=True)])
    return temperature**2 * (by_image + by_text)


def affinity_reference(s, t, scale):
    affinities = [np.array([[scale * cosine(i, j) for j in text] for i in image]) for image, text in (s, t)]
    return contrastive_kl_reference(*affinities)


def embedding_reference(s, t, normalize=True):
    total = 0.0
    for a, b in zip(s, t, strict=True):
        if normalize:
            a, b = a / math.sqrt(a @ a), b / math.sqrt(b @ b)
        total += ((a - b) ** 2).sum()
    return total / len(s)


# One table of losses ----------------------------------------------------------------------------------------------------


class Case:
    """A loss on two tensors, its reference, and shapes of student and teacher. `same`: shapes must be equal."""

    def __init__(self, loss, reference, student, teacher=None, positions=None, squash=False):
        self.loss, self.reference = loss, reference
        self.student, self.teacher = student, teacher or student
        self.positions = positions  # of the mask
        self.squash = squash  # inputs are probabilities

    def make(self, dtype=torch.float64, seed=0):
        s, t = rand(*self.student, seed=seed), rand(*self.teacher, seed=seed + 100)
        if self.squash:
            s, t = s.softmax(-1), t.softmax(-1)
        return s.to(dtype), t.to(dtype)

    def mask(self):
        mask = torch.rand(*self.positions, generator=torch.Generator().manual_seed(7)) < 0.7
        mask[:, :2] = True
        return mask


partial = functools.partial
CASES = {
    "hint_mse": Case(ops.hint_loss, hint_reference, (3, 5, 7), positions=(3, 5)),
    "hint_smooth_l1": Case(
        partial(ops.hint_loss, loss="smooth_l1"), partial(hint_reference, loss="smooth_l1"), (3, 5, 7), positions=(3, 5)
    ),
    "hint_cosine": Case(
        partial(ops.hint_loss, loss="cosine"), partial(hint_reference, loss="cosine"), (3, 5, 7), positions=(3, 5)
    ),
    "hint_image": Case(
        partial(ops.hint_loss, loss="cosine"),
        partial(hint_reference, loss="cosine", axis=1),
        (2, 6, 3, 4),
        positions=(2, 3, 4),
    ),
    "hint_rows": Case(ops.hint_loss, hint_reference, (4, 9)),
    "attention_paper": Case(
        ops.attention_transfer_loss, attention_transfer_reference, (3, 5, 4, 3), (3, 8, 4, 3), positions=(3, 4, 3)
    ),
    "attention_code": Case(
        partial(ops.attention_transfer_loss, variant="code"),
        partial(attention_transfer_reference, variant="code"),
        (3, 5, 4, 3),
        (3, 8, 4, 3),
        positions=(3, 4, 3),
    ),
    "attention_tokens": Case(
        partial(ops.attention_transfer_loss, power=3.0),
        partial(attention_transfer_reference, power=3, axis=2),
        (3, 6, 5),
        (3, 6, 2),
        positions=(3, 6),
    ),
    "similarity": Case(ops.similarity_preserving_loss, similarity_reference, (5, 4, 3), (5, 4, 6), positions=(5, 4)),
    "distance": Case(ops.relational_distance_loss, distance_reference, (6, 4, 3), (6, 4, 6), positions=(6, 4)),
    "angle": Case(ops.relational_angle_loss, angle_reference, (5, 4, 3), (5, 4, 6), positions=(5, 4)),
    "pkt": Case(ops.probabilistic_transfer_loss, pkt_reference, (6, 4, 3), (6, 4, 5), positions=(6, 4)),
    "relations": Case(
        lambda s, t, mask=None: ops.attention_relation_loss(s, t, mask, 2),
        relation_reference,
        (3, 5, 4),
        (3, 5, 6),
        positions=(3, 5),
    ),
    "maps_mse": Case(ops.attention_map_loss, map_reference, (2, 3, 5, 5), positions=(2, 5)),
    "maps_kl": Case(
        partial(ops.attention_map_loss, loss="kl"),
        partial(map_reference, loss="kl"),
        (2, 3, 5, 5),
        positions=(2, 5),
        squash=True,
    ),
    "maps_kl_scores": Case(
        partial(ops.attention_map_loss, loss="kl", scores=True),
        partial(map_reference, loss="kl", scores=True),
        (2, 3, 5, 5),
        positions=(2, 5),
    ),
    "contrastive_kl": Case(
        partial(ops.contrastive_kl_loss, temperature=2.0), partial(contrastive_kl_reference, temperature=2.0), (5, 4)
    ),
    "affinity": Case(
        lambda s, t: ops.affinity_mimicking_loss(
            *s.unbind(1), *t.unbind(1), torch.tensor(5.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
        ),
        lambda s, t: affinity_reference((s[:, 0], s[:, 1]), (t[:, 0], t[:, 1]), 5.0),
        (5, 2, 4),
        (5, 2, 7),
    ),
    "embedding": Case(ops.embedding_mse_loss, embedding_reference, (5, 4)),
    "embedding_plain": Case(
        partial(ops.embedding_mse_loss, normalize=False), partial(embedding_reference, normalize=False), (5, 4)
    ),
}
MASKED = [name for name, case in CASES.items() if case.positions is not None]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=MASKED)
def masked(request) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("dtype", list(LOSS_TOLERANCE))
def test_follows_the_formula(case, dtype):
    s, t = case.make(dtype)
    loss = case.loss(s.requires_grad_(), t)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = case.reference(s.detach().double().numpy(), t.double().numpy())
    assert loss.item() == pytest.approx(expected, rel=20 * LOSS_TOLERANCE[dtype], abs=LOSS_TOLERANCE[dtype])
    exact = s.detach().double().requires_grad_()
    case.loss(exact, t.double()).backward()
    (loss * 1.0).backward()
    assert s.grad.dtype == dtype
    tolerance = GRADIENT_TOLERANCE[dtype]
    size = exact.grad.abs().max().item()
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * size)


def test_a_mask_leaves_positions_out_whatever_they_hold(masked):
    s, t = masked.make()
    mask = masked.mask()
    assert not mask.all()
    expected = masked.reference(s.numpy(), t.numpy(), mask.numpy())
    assert masked.loss(s, t, mask).item() == pytest.approx(expected, rel=1e-10)
    for x in (s, t):
        axes = [x.shape[: mask.ndim] == mask.shape, x.ndim == 4 and x.shape[0:1] + x.shape[2:] == mask.shape]
        if axes[0]:
            x[~mask] = math.nan
        elif axes[1]:
            x.movedim(1, -1)[~mask] = math.nan
        else:  # attention maps [batch, heads, tokens, tokens]
            x.transpose(1, 2)[~mask] = math.nan
            x.permute(0, 3, 1, 2)[~mask] = math.nan
    assert s.isnan().any()
    s.requires_grad_()
    loss = masked.loss(s, t, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert s.grad.isfinite().all()
    assert (s.grad[s.isnan()] == 0).all()


def test_all_true_is_no_mask(masked):
    s, t = masked.make()
    everything = torch.ones_like(masked.mask())
    assert masked.loss(s, t, everything).item() == pytest.approx(masked.loss(s, t).item(), rel=1e-12)


def test_gradient(case):
    s, t = case.make()
    assert torch.autograd.gradcheck(case.loss, (s.requires_grad_(), t))


def test_gradient_under_a_mask(masked):
    s, t = masked.make()
    mask = masked.mask()
    assert torch.autograd.gradcheck(lambda x: masked.loss(x, t, mask), (s.requires_grad_(),))


def test_zero_where_the_teacher_equals_the_student(case):
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        s, _ = case.make(dtype)
        loss = case.loss(s.requires_grad_(), s.detach().clone())
        loss.backward()
        assert abs(loss.item()) <= tolerance
        assert s.grad.isfinite().all()
        # Of probabilities the gradient is the same for all of a row: no way for a sum of 1 to go.
        gradient = s.grad - s.grad.mean(-1, keepdim=True) if case.squash else s.grad
        assert gradient.abs().max() <= 30 * tolerance
    other = case.make(seed=3)[0]
    if case.student == case.teacher:
        assert case.loss(other, s.detach().double()).item() > 1e-3


def test_no_gradient_flows_to_the_teacher(case):
    s, t = case.make()
    case.loss(s.requires_grad_(), t.requires_grad_()).backward()
    assert t.grad is None
    assert s.grad is not None
    assert not case.loss(s.detach(), t).requires_grad


def test_layout_does_not_matter(case):
    s, t = case.make()
    strided = torch.stack([s, s + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert case.loss(strided, t).item() == pytest.approx(case.loss(s, t).item(), rel=1e-12)
    if s.ndim == 4:
        last = s.to(memory_format=torch.channels_last)
        assert case.loss(last, t).item() == pytest.approx(case.loss(s, t).item(), rel=1e-12)


def test_zero_vectors_have_finite_gradients(case):
    """Dead channels, padding that nobody masked, samples that coincide."""
    for dtype in (torch.float32, torch.float64):
        s, t = case.make(dtype)
        if case.squash:
            s = torch.zeros_like(s)
        else:
            s[0] = 0
        for student, teacher in ((s, t), (torch.zeros_like(s), t), (s, torch.zeros_like(t)), (0 * s, 0 * t)):
            x = student.clone().requires_grad_()
            loss = case.loss(x, teacher)
            loss.backward()
            assert loss.isfinite()
            assert x.grad.isfinite().all()
            assert x.grad.abs().max() < 1e3 or case.squash  # a probability of 0 is far from what it should be


def test_nan_is_seen(case):
    s, t = case.make()
    for x in (s, t):
        before = x.view(-1)[3].item()
        x.view(-1)[3] = math.nan
        assert case.loss(s, t).isnan()
        x.view(-1)[3] = before


def test_autocast_computes_in_float32(case):
    s, t = case.make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.loss(s, t)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, case.loss(s, t))


def test_compiles_as_one_graph_and_for_every_batch(case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: case.loss(s, t) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for repeat in (1, 2):
        s, t = (torch.cat([x] * repeat) if repeat == 1 else torch.cat([x, x + 0.5]) for x in case.make())
        s.requires_grad_()
        eager = s.detach().clone().requires_grad_()
        loss = compiled(s, t)
        loss.backward()
        expected = case.loss(eager, t) * 2
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(s.grad, eager.grad)


def test_exports(case):
    class Module(torch.nn.Module):
        def forward(self, s, t):
            return case.loss(s, t)

    s, t = case.make()
    program = torch.export.export(Module(), (s, t))
    torch.testing.assert_close(program.module()(s, t), case.loss(s, t))


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu(case, cuda):
    s, t = case.make(torch.float32)
    there = s.to(cuda).requires_grad_()
    loss = case.loss(there, t.to(cuda))
    loss.backward()
    here = s.requires_grad_()
    expected = case.loss(here, t)
    expected.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5)


# Invariances --------------------------------------------------------------------------------------------------------------


def rotation(width, seed=5):
    return torch.linalg.qr(rand(width, width, seed=seed))[0]


@pytest.mark.parametrize("name", ["attention_paper", "attention_code", "similarity", "distance", "angle", "pkt"])
def test_does_not_change_with_scale(name):
    case = CASES[name]
    s, t = case.make()
    expected = case.loss(s, t).item()
    for a, b in ((3.0, 1.0), (1.0, 0.01), (1e-5, 1e5)):
        assert case.loss(s * a, t * b).item() == pytest.approx(expected, rel=1e-9)
    assert case.loss(s[..., :2] * 3, s[..., :2]).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("name", ["similarity", "distance", "angle", "pkt"])
def test_does_not_change_with_rotation(name):
    loss = CASES[name].loss
    s, t = rand(6, 5), rand(6, 7, seed=1)
    expected = loss(s, t).item()
    assert loss(s @ rotation(5), t @ rotation(7)).item() == pytest.approx(expected, rel=1e-9)
    assert loss(s @ rotation(5), s).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_does_not_change_with_translation(name):
    loss = CASES[name].loss
    s, t = rand(6, 5), rand(6, 7, seed=1)
    assert loss(s + rand(5, seed=2), t + 3).item() == pytest.approx(loss(s, t).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["distance", "angle", "similarity", "pkt"])
def test_does_not_change_with_the_order_of_the_batch(name):
    loss = CASES[name].loss
    s, t = rand(6, 5), rand(6, 7, seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert loss(s[order], t[order]).item() == pytest.approx(loss(s, t).item(), rel=1e-9)
    assert loss(s[order], t).item() != pytest.approx(loss(s, t).item(), rel=1e-3)


def test_attention_transfer_sees_where_and_not_what():
    s = rand(3, 5, 4, 4)
    assert ops.attention_transfer_loss(s[:, torch.tensor([3, 0, 4, 1, 2])] * -1, s).item() == pytest.approx(
        0, abs=1e-14
    )
    assert ops.attention_transfer_loss(s.flip(-1), s).item() > 0.05


def test_samples_that_coincide():
    """Distances and angles of equal points: no direction, no gradient, and the others still count."""
    s, t = rand(5, 4), rand(5, 6, seed=1)
    s[1] = s[0]
    s.requires_grad_()
    for loss in (ops.relational_distance_loss, ops.relational_angle_loss, ops.probabilistic_transfer_loss):
        (gradient,) = torch.autograd.grad(loss(s, t), s)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-4
    opposite = torch.stack([rand(4), -rand(4), rand(4, seed=3)]).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.probabilistic_transfer_loss(opposite, t[:3]), opposite)
    assert gradient.isfinite().all()


def test_relations_do_not_see_padding_nor_the_number_of_heads():
    s, t = rand(2, 6, 8), rand(2, 6, 12, seed=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    expected = ops.attention_relation_loss(s[:, :4], t[:, :4], None, 4).item()
    assert ops.attention_relation_loss(s, t, mask, 4).item() == pytest.approx(expected, rel=1e-12)
    nothing = torch.stack([mask[0], torch.zeros(6, dtype=torch.bool)])  # one sequence is padding alone
    s.requires_grad_()
    loss = ops.attention_relation_loss(s, t, nothing, 4)
    loss.backward()
    assert loss.item() == pytest.approx(ops.attention_relation_loss(s[:1, :4], t[:1, :4], None, 4).item(), rel=1e-12)
    assert torch.count_nonzero(s.grad[1]) == 0
    assert s.grad.isfinite().all()


def test_causal_maps():
    """Scores of -inf: a probability of 0 on both sides."""
    upper = torch.ones(5, 5, dtype=torch.bool).triu(1)
    s, t = (rand(2, 3, 5, 5, seed=i).masked_fill(upper, -math.inf) for i in range(2))
    s.requires_grad_()
    loss = ops.attention_map_loss(s, t, loss="kl", scores=True)
    loss.backward()
    assert s.grad.isfinite().all()
    probabilities = ops.attention_map_loss(s.softmax(-1), t.softmax(-1), loss="kl")
    assert loss.item() == pytest.approx(probabilities.item(), rel=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_the_square_of_causal_scores(padded):
    """-inf on both sides is no difference; on one side it is infinitely large."""
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    s, t = (rand(2, 3, 5, 5, seed=i) for i in range(2))
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]]) if padded else None
    expected = ops.attention_map_loss(s * lower, t * lower, mask, scores=True).item()
    s, t = (x.masked_fill(~lower, -math.inf) for x in (s, t))
    s.requires_grad_()
    loss = ops.attention_map_loss(s, t, mask, scores=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert s.grad.isfinite().all()
    assert torch.count_nonzero(s.grad[:, :, ~lower]) == 0
    assert ops.attention_map_loss(s, rand(2, 3, 5, 5), mask, scores=True).item() == math.inf


@pytest.mark.parametrize("name", ["attention_paper", "attention_code", "similarity", "distance", "angle", "pkt"])
@pytest.mark.parametrize("factor", [1e-4, 1e-9, 1e-14, 1e12])
def test_does_not_change_with_scale_in_float32(name, factor):
    case = CASES[name]
    s, t = case.make(torch.float32)
    values = []
    for a in (1.0, factor):
        x = (s * a).requires_grad_()
        loss = case.loss(x, t)
        loss.backward()
        values.append((loss.detach(), x.grad * a))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(values[1][1], values[0][1], rtol=1e-3, atol=1e-6)


def test_affinity_mimicking_differs_from_its_papers_cross_entropy_by_a_constant():
    torch.manual_seed(0)
    image, text = rand(6, 4).requires_grad_(), rand(6, 4, seed=1)
    t_image, t_text = rand(6, 9, seed=2), rand(6, 9, seed=3)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)

    def affinity(i, j, factor):
        return factor * torch.nn.functional.normalize(i, dim=-1) @ torch.nn.functional.normalize(j, dim=-1).T

    student, teacher = affinity(image, text, scale), affinity(t_image, t_text, 7.0)
    paper = sum(
        torch.nn.functional.cross_entropy(s, t.softmax(-1)) for s, t in ((student, teacher), (student.T, teacher.T))
    )
    entropy = sum(torch.distributions.Categorical(logits=t).entropy().mean() for t in (teacher, teacher.T))
    ours = AffinityMimicking(teacher_scale=7.0)((image, text), (t_image, t_text), student_scale=scale)
    assert ours.item() == pytest.approx((paper - entropy).item(), rel=1e-10)
    expected = torch.autograd.grad(paper, (image, scale))
    for gradient, other in zip(torch.autograd.grad(ours, (image, scale)), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert ContrastiveKL()(student, teacher).item() == pytest.approx(ours.item(), rel=1e-10)


# Modules ------------------------------------------------------------------------------------------------------------------


def test_modules_are_the_operators():
    s, t = rand(4, 6, 8), rand(4, 6, 8, seed=1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    for module, op in (
        (HiddenCosine(), partial(ops.hint_loss, loss="cosine")),
        (AttentionTransfer("code", power=1), partial(ops.attention_transfer_loss, variant="code", power=1.0)),
        (SimilarityPreserving(), ops.similarity_preserving_loss),
        (RelationalDistance(), ops.relational_distance_loss),
        (RelationalAngle(), ops.relational_angle_loss),
        (ProbabilisticKnowledgeTransfer(), ops.probabilistic_transfer_loss),
    ):
        assert torch.equal(module(s, t, mask), op(s, t, mask))
        assert not torch.equal(module(s, t), op(s, t, mask))
        assert module.state_dict() == {}
        assert type(module).__name__ in repr(module)
    three = MiniLMRelations(2, weights=(1, 0, 0.5))((s, s * math.nan, t), (t, t, s * 2), mask)
    expected = ops.attention_relation_loss(s, t, mask, 2) + 0.5 * ops.attention_relation_loss(t, s * 2, mask, 2)
    assert three.item() == pytest.approx(expected.item(), rel=1e-12)
    maps = rand(2, 3, 5, 5), rand(2, 3, 5, 5, seed=1)
    module = AttentionMaps("kl", scores=True)
    assert torch.equal(module(*maps), ops.attention_map_loss(*maps, loss="kl", scores=True))
    assert repr(module) == "AttentionMaps(loss=kl, scores=True)"
    plain = EmbeddingMSE(normalize=False)
    assert torch.equal(plain(s[0], t[0]), ops.embedding_mse_loss(s[0], t[0], normalize=False))


@pytest.mark.parametrize("shapes", [((3, 5, 4), (3, 5, 7)), ((3, 4, 5, 6), (3, 7, 5, 6)), ((3, 4), (3, 7))])
@pytest.mark.parametrize("lazy", [False, True])
def test_hint_learns_the_adapter(shapes, lazy):
    torch.manual_seed(0)
    student, teacher = rand(*shapes[0], dtype=torch.float32), rand(*shapes[1], seed=1, dtype=torch.float32)
    hint = Hint() if lazy else Hint(4, 7)
    before = hint(student, teacher)
    assert {name: list(p.shape) for name, p in hint.state_dict().items()} == {
        "adapter.weight": [7, 4],
        "adapter.bias": [7],
    }
    axis = 1 if student.ndim == 4 else -1
    by_hand = (student.movedim(axis, -1) @ hint.adapter.weight.T + hint.adapter.bias).movedim(-1, axis)
    torch.testing.assert_close(hint.adapter(student, teacher), by_hand)
    torch.testing.assert_close(before, (by_hand - teacher).square().mean())
    # The teacher is a linear function of the student: the adapter finds it.
    rule = rand(4, 7, seed=3, dtype=torch.float32)
    target = (student.movedim(axis, -1) @ rule + 1).movedim(-1, axis)
    optimizer = torch.optim.Adam(hint.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        hint(student, target).backward()
        optimizer.step()
    assert hint(student, target).item() < 1e-3
    if student.ndim > 2 or student.shape[0] > 4:
        torch.testing.assert_close(hint.adapter.weight, rule.T, rtol=0.1, atol=0.1)


def test_hint_gradcheck_with_its_adapter():
    hint = Hint(4, 3, loss="smooth_l1").double()
    s, t = rand(2, 3, 4).requires_grad_(), rand(2, 3, 3, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, True]])

    def loss(s, weight, bias):
        return torch.func.functional_call(hint, {"adapter.weight": weight, "adapter.bias": bias}, (s, t, mask))

    parameters = [p.detach().clone().requires_grad_() for p in (hint.adapter.weight, hint.adapter.bias)]
    assert torch.autograd.gradcheck(loss, (s, *parameters))


def test_what_is_masked_does_not_reach_the_adapter():
    hint = Hint(4, 3)
    s, t = rand(2, 3, 4, dtype=torch.float32), rand(2, 3, 3, seed=1, dtype=torch.float32)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    expected = hint(s, t, mask)
    s[~mask] = math.nan
    loss = hint(s, t, mask)
    loss.backward()
    assert torch.equal(loss, expected)
    assert hint.adapter.weight.grad.isfinite().all()


def test_a_lazy_adapter_takes_shape_type_and_state():
    hint = Hint()
    assert "sizes of the first call" in repr(hint)
    hint(rand(2, 3, 4), rand(2, 3, 5))
    assert hint.adapter.weight.dtype == torch.float64
    assert "FeatureAdapter(4 -> 5)" in repr(hint)
    fresh = Hint().double()
    fresh.load_state_dict(hint.state_dict())
    assert torch.equal(fresh.adapter.weight, hint.adapter.weight)
    optimizer = torch.optim.SGD((untouched := Hint()).parameters(), 0.1)
    with pytest.raises(ValueError, match="teacher must be given at the first call"):
        untouched.adapter(rand(2, 3, 4))
    untouched(rand(2, 3, 4, dtype=torch.float32), rand(2, 3, 5, dtype=torch.float32)).backward()
    before = untouched.adapter.weight.detach().clone()
    optimizer.step()  # the Parameter objects are those that the optimizer was given
    assert not torch.equal(untouched.adapter.weight, before)


def test_an_adapter_runs_in_the_type_of_autocast():
    adapter = FeatureAdapter(4, 3)
    x = rand(2, 5, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter(x).dtype == torch.bfloat16
    assert adapter(x.bfloat16()).dtype == torch.float32
    loss = Hint(4, 3)(x.half(), rand(2, 5, 3, dtype=torch.float16))
    assert loss.dtype == torch.float32


def test_embedding_adapter():
    module = EmbeddingMSE(4, 6)
    s, t = rand(5, 4, dtype=torch.float32), rand(5, 6, dtype=torch.float32)
    torch.testing.assert_close(module(s, t), ops.embedding_mse_loss(module.adapter(s), t))
    assert sorted(module.state_dict()) == ["adapter.bias", "adapter.weight"]
    assert repr(module).startswith("EmbeddingMSE(\n  normalize=True")


def test_modules_compile():
    hint = Hint(4, 3)
    s, t = rand(2, 5, 4, dtype=torch.float32), rand(2, 5, 3, dtype=torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(torch.compile(hint, fullgraph=True, backend="aot_eager")(s, t, mask), hint(s, t, mask))


# Errors -------------------------------------------------------------------------------------------------------------------


def test_wrong_types_and_shapes():
    s, t = rand(3, 5, 4), rand(3, 5, 4, seed=1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(
        TypeError, match=r"\[hint_loss\] student must be float32, float64, bfloat16 or float16, got Long"
    ):
        ops.hint_loss(s.long(), t)
    with pytest.raises(TypeError, match=r"\[hint_loss\] teacher must be float32, .*, got Long"):
        ops.hint_loss(s, t.long())
    with pytest.raises(
        ValueError, match=r"\[hint_loss\] teacher must have the student's shape \[3, 5, 4\], got \[3, 5, 5\]"
    ):
        ops.hint_loss(s, rand(3, 5, 5))
    with pytest.raises(ValueError, match=r"\[hint_loss\] student and teacher must have one batch size, got shapes"):
        ops.hint_loss(s, t[:2])
    with pytest.raises(ValueError, match=r"\[hint_loss\] student must not be empty, got shape \[0, 5, 4\]"):
        ops.hint_loss(s[:0], t[:0])
    with pytest.raises(ValueError, match=r"\[hint_loss\] student must have at least 2 dimensions, got shape \[4\]"):
        ops.hint_loss(s[0, 0], t[0, 0])
    with pytest.raises(ValueError, match=r"loss must be one of 'mse', 'smooth_l1', 'cosine', got 'l1'"):
        ops.hint_loss(s, t, loss="l1")
    with pytest.raises(ValueError, match=r"axis must be one of the features' axes, 1 to 2, got 0"):
        ops.hint_loss(s, t, axis=0)
    with pytest.raises(TypeError, match=r"mask must be bool \(true counts\), got Long"):
        ops.hint_loss(s, t, mask.long())
    with pytest.raises(ValueError, match=r"mask must have shape \[3, 5\], got \[3, 4\]"):
        ops.hint_loss(s, t, mask[:, :4])
    with pytest.raises(ValueError, match=r"\[hint_loss\] mask must have a true element, got none"):
        ops.hint_loss(s, t, ~mask)
    with pytest.raises(
        ValueError, match=r"teacher must have the student's positions, got shapes \[3, 5, 4\] and \[3, 6, 4\]"
    ):
        ops.attention_transfer_loss(s, rand(3, 6, 4))
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0.5"):
        ops.attention_transfer_loss(s, t, power=0.5)
    with pytest.raises(ValueError, match=r"\[relational_angle_loss\] the batch must have at least 3 samples, got 2"):
        ops.relational_angle_loss(s[:2], t[:2])
    for op in (ops.similarity_preserving_loss, ops.relational_distance_loss, ops.probabilistic_transfer_loss):
        with pytest.raises(ValueError, match=r"the batch must have at least 2 samples, got 1"):
            op(s[:1], t[:1])
        with pytest.raises(
            ValueError, match=r"a mask is for features \[batch, positions, \.\.\.\], got shape \[3, 5\]"
        ):
            op(s[..., 0], t[..., 0], mask)
    with pytest.raises(ValueError, match=r"width must be a multiple of 3 relation heads, got 4"):
        ops.attention_relation_loss(s, t, None, 3)
    with pytest.raises(ValueError, match=r"relation_heads must be at least 1, got 0"):
        ops.attention_relation_loss(s, t, None, 0)
    with pytest.raises(ValueError, match=r"with equal tokens, got \[3, 5, 4\] and \[3, 6, 4\]"):
        ops.attention_relation_loss(s, rand(3, 6, 4), None, 2)
    with pytest.raises(ValueError, match=r"maps must have shape \[batch, heads, tokens, tokens\], got \[2, 3, 4, 5\]"):
        ops.attention_map_loss(rand(2, 3, 4, 5), rand(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"logits must have shape \[images, texts\], got \[3, 5, 4\]"):
        ops.contrastive_kl_loss(s, t)
    with pytest.raises(ValueError, match=r"temperature must be in \[1e-6, 1e6\], got 0"):
        ops.contrastive_kl_loss(s[0], t[0], temperature=0.0)
    with pytest.raises(ValueError, match=r"image and text embeddings must have one shape .* got \[5, 4\] and \[5, 3\]"):
        AffinityMimicking()((s[0], s[0, :, :3]), (t[0], t[0]))
    with pytest.raises(ValueError, match=r"student_scale must be a scalar, got shape \[2\]"):
        AffinityMimicking()((s[0], s[1]), (t[0], t[1]), student_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight must have shape \[out, 4\] .*, got \[3, 5\]"):
        ops.adapt_features(s, rand(3, 5))
    with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, width\], got \[3, 5, 4\]"):
        ops.embedding_mse_loss(s, t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Hint(4),
            r"\[FeatureAdapter\] student_features and teacher_features must be given together, got only stu",
        ),
        (lambda: Hint(4, 0), r"\[FeatureAdapter\] teacher_features must be at least 1, got 0"),
        (lambda: Hint(loss="l1"), r"\[Hint\] loss must be one of 'mse', 'smooth_l1', 'cosine', got 'l1'"),
        (
            lambda: AttentionTransfer("both"),
            r"\[AttentionTransfer\] variant must be one of 'paper', 'code', got 'both'",
        ),
        (lambda: AttentionTransfer(power=0), r"\[AttentionTransfer\] power must be at least 1, got 0"),
        (lambda: MiniLMRelations(0), r"\[MiniLMRelations\] relation_heads must be at least 1, got 0"),
        (lambda: MiniLMRelations(2, weights=(0, 0, 0)), r"weights must be three finite numbers >= 0"),
        (
            lambda: MiniLMRelations(2)(rand(2, 3, 4), rand(2, 3, 4)),
            r"student must be query, key and value, got one tensor",
        ),
        (lambda: AttentionMaps("l2"), r"\[AttentionMaps\] loss must be one of 'mse', 'kl', got 'l2'"),
        (lambda: ContrastiveKL(0), r"\[ContrastiveKL\] temperature must be in \[1e-6, 1e6\], got 0"),
        (lambda: AffinityMimicking(-1), r"\[AffinityMimicking\] student_scale must be positive and finite, got -1"),
        (
            lambda: AffinityMimicking()(rand(2, 3), rand(2, 3)),
            r"\[AffinityMimicking\] student must be image and text embeddings, got one tensor",
        ),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_name_is_exported():
    names = [module.__name__ for module in (*CLASSES, rf.distillation.FeatureLoss, rf.distillation.layer_map)]
    assert set(names) <= set(rf.distillation.__all__)
    assert all(getattr(rf.distillation, name).__name__ == name for name in names)


def test_no_valid_position_in_a_graph_is_nan():
    """Where values are not looked at, the mean over nothing says so."""
    compiled = torch.compile(ops.hint_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(rand(2, 3, 4), rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert isinstance(loss, Tensor)
    assert loss.isnan()


def test_opcheck():
    x, y = rand(4, 3, 6), rand(4, 3, 6, seed=1)
    rows = x[:, 0].clone(), y[:, 0].clone()
    mask = torch.ones(4, 3, dtype=torch.bool)
    maps, labels, index = rand(2, 2, 3, 3), torch.tensor([0, 5, 2, 1]), torch.tensor([3, 0, 7, 1])
    memory, step, scale = rand(9, 6), torch.tensor(2), torch.tensor(3.0)
    negatives = ops.contrastive_negatives(index, step, 5, 9, 0)
    for op, arguments, options in (
        (ops.hint_loss, (x, y, mask), {"loss": "cosine"}),
        (ops.clear_masked, (x, mask), {}),
        (ops.attention_transfer_loss, (x, y, mask), {"variant": "code"}),
        (ops.adapt_features, (x, rand(2, 6), rand(2)), {}),
        (ops.similarity_preserving_loss, (x, y, mask), {}),
        (ops.relational_distance_loss, (x, y, mask), {}),
        (ops.relational_angle_loss, (x, y, mask), {}),
        (ops.probabilistic_transfer_loss, (x, y, mask), {}),
        (ops.attention_relation_loss, (x, y, mask, 2), {}),
        (ops.attention_map_loss, (maps, maps + 1, mask[:2]), {"loss": "kl", "scores": True}),
        (ops.contrastive_kl_loss, rows, {"temperature": 2.0}),
        (ops.affinity_mimicking_loss, (*rows, *rows, scale, scale), {}),
        (ops.embedding_mse_loss, rows, {}),
        (ops.contrastive_loss, (rows[0], memory, index, negatives), {"temperature": 0.5, "log_normalizer": scale}),
        (ops.contrastive_negatives, (index, step, 5, 9, 0), {}),
        (ops.embed_features, (x, rand(2, 18), rand(2)), {}),
        (ops.update_memory_, (memory, index, rows[0], 0.5), {}),
        (ops.initial_memory, (5, 4, 0, 1), {}),
        (ops.dkd_loss, (*rows, labels, mask[:, 0]), {}),
        (ops.nkd_loss, (*rows, labels, mask[:, 0]), {}),
        (ops.dist_loss, (*rows, labels), {}),
        (ops.logit_mse_loss, (*rows, labels), {}),
    ):
        arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
        if isinstance(arguments[0], Tensor) and arguments[0].is_floating_point() and op is not ops.update_memory_:
            arguments[0].requires_grad_()
        torch.library.opcheck(op.default, arguments, options)
