"""Contrastive representation distillation against the paper's critic, in plain loops; its memories and negatives."""

import math

import numpy as np
import pytest
import torch

from rarefy.distillation import ContrastiveRepresentation, FeatureLoss

ops = torch.ops.rarefy


def make(batch=4, features=3, samples=9, negatives=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    memory = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    index = torch.randperm(samples, generator=generator)[:batch]
    drawn = torch.randint(samples, (batch, negatives), generator=generator)
    return anchor, torch.nn.functional.normalize(memory, dim=-1), index, drawn


def reference(anchor, memory, index, negatives, temperature, normalizer=1.0):
    """Equations 17 to 19 of the paper: h = e^(g.g / T) / (e^(g.g / T) + N / M)."""
    total = 0.0
    for a, i, others in zip(anchor, index, negatives, strict=True):

        def h(j, a=a):
            e = math.exp(float(a @ memory[j]) / temperature) / normalizer
            return e / (e + negatives.shape[1] / len(memory))

        total -= math.log(h(i)) + sum(math.log(1 - h(j)) for j in others)
    return total / len(anchor)


def module(**options):
    torch.manual_seed(1)
    options = {"features": 4, "negatives": 6} | options
    return ContrastiveRepresentation(12, 5, 7, **options)


def batch(seed=0, size=3):
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(size, 5, generator=generator), torch.randn(size, 7, generator=generator)
    return s, t, torch.randperm(12, generator=generator)[:size]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_follows_the_formula(temperature):
    anchor, memory, index, negatives = make()
    loss, normalizer = ops.contrastive_loss(anchor, memory, index, negatives, temperature=temperature)
    arrays = [x.numpy() for x in (anchor, memory, index, negatives)]
    assert loss.item() == pytest.approx(reference(*arrays, temperature), rel=1e-10)
    assert normalizer.item() == 0
    single, _ = ops.contrastive_loss(anchor.float(), memory.float(), index, negatives, temperature=temperature)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(loss.item(), rel=1e-5)
    low, _ = ops.contrastive_loss(anchor.bfloat16(), memory.float(), index, negatives, temperature=temperature)
    assert low.dtype == torch.float32


def test_the_normalizer_is_estimated_once():
    anchor, memory, index, negatives = make()
    arrays = [x.numpy() for x in (anchor, memory, index, negatives)]
    places = np.concatenate([arrays[2][:, None], arrays[3]], 1)
    scores = np.exp([[a @ arrays[1][j] / 0.5 for j in row] for a, row in zip(arrays[0], places, strict=True)])
    expected = scores.mean() * len(memory)
    unknown = torch.tensor(math.inf)
    loss, normalizer = ops.contrastive_loss(anchor, memory, index, negatives, temperature=0.5, log_normalizer=unknown)
    assert normalizer.item() == pytest.approx(math.log(expected), rel=1e-10)
    assert loss.item() == pytest.approx(reference(*arrays, 0.5, expected), rel=1e-10)
    _, kept = ops.contrastive_loss(
        anchor * 2, memory, index, negatives, temperature=0.5, log_normalizer=torch.tensor(0.25)
    )
    assert kept.item() == 0.25


def test_gradient():
    anchor, memory, index, negatives = make()
    anchor.requires_grad_()

    def loss(x):
        return ops.contrastive_loss(x, memory, index, negatives, temperature=0.5)[0]

    assert torch.autograd.gradcheck(loss, (anchor,))
    memory.requires_grad_()
    loss(anchor).backward()
    assert memory.grad is None


def test_agreement_lowers_the_loss_but_not_to_zero():
    """What holds here in the place of "zero where the models agree"."""
    memory = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    index = torch.arange(9)
    negatives = ops.contrastive_negatives(index, torch.tensor(0), 20, 9, 0)

    def loss(anchor, temperature=0.1):
        return ops.contrastive_loss(anchor, memory, index, negatives, temperature=temperature)[0].item()

    agreed = loss(memory)
    assert agreed > 0
    for shift in range(1, 9):
        assert loss(memory.roll(shift, 0)) > agreed + 1
    apart = torch.eye(9)  # all others at a right angle: what is left is the critic's constant
    value = ops.contrastive_loss(apart, apart, index, negatives, temperature=0.01)[0].item()
    assert value == pytest.approx(20 * math.log(1 + 9 / 20), rel=1e-5)


def test_large_similarities_stay_finite():
    anchor, memory, index, negatives = make()
    anchor = (anchor * 1e4).requires_grad_()
    loss, _ = ops.contrastive_loss(anchor, memory, index, negatives, temperature=0.07)
    loss.backward()
    assert loss.isfinite()
    assert anchor.grad.isfinite().all()


def test_negatives_are_others_evenly_and_anew_at_each_step():
    index = torch.tensor([0, 5, 9, 5])
    first = ops.contrastive_negatives(index, torch.tensor(0), 20_000, 10, 3)
    assert first.shape == (4, 20_000)
    for row, own in zip(first, index.tolist(), strict=True):
        counts = torch.bincount(row, minlength=10)
        assert counts[own] == 0
        others = counts[torch.arange(10) != own].double()
        expected = 20_000 / 9
        assert ((others - expected).square() / expected).sum() < 32  # chi-squared of 8 degrees, 1 in 10,000
    assert torch.equal(first, ops.contrastive_negatives(index, torch.tensor(0), 20_000, 10, 3))
    assert not torch.equal(first[1], first[3])
    for step, seed in ((1, 3), (0, 4), (0, 3 + 2**40)):
        other = ops.contrastive_negatives(index, torch.tensor(step), 20_000, 10, seed)
        assert (other == first).double().mean() == pytest.approx(1 / 9, abs=0.01)
    assert ops.contrastive_negatives(torch.tensor([1, 0]), torch.tensor(2), 4, 2, 0).tolist() == [[0] * 4, [1] * 4]
    far = ops.contrastive_negatives(torch.tensor([0]), torch.tensor(2**40), 1000, 2**31 - 1, -1)
    assert far.min() > 0
    assert far.max() > 2**31 * 0.99


def test_the_module_is_the_sum_of_both_directions():
    loss_fn = module(variant="paper")
    s, t, index = batch()
    arrays = []
    for x, layer in ((s, loss_fn.student_embedding), (t, loss_fn.teacher_embedding)):
        arrays.append(torch.nn.functional.normalize(layer(x), dim=-1).detach().double().numpy())
    memories = [m.double().numpy().copy() for m in (loss_fn.teacher_memory, loss_fn.student_memory)]
    negatives = ops.contrastive_negatives(index, loss_fn.step, 6, 12, 0).numpy()
    expected = sum(reference(a, m, index.numpy(), negatives, 0.07) for a, m in zip(arrays, memories, strict=True))
    assert loss_fn(s, t, index).item() == pytest.approx(expected, rel=1e-4)
    # The memories took up the batch, half and half.
    for memory, before, fresh in zip(
        (loss_fn.teacher_memory, loss_fn.student_memory), memories, reversed(arrays), strict=True
    ):
        for row, value in zip(index.tolist(), fresh, strict=True):
            mixed = 0.5 * before[row] + 0.5 * value
            np.testing.assert_allclose(memory[row].numpy(), mixed / np.linalg.norm(mixed), rtol=1e-5, atol=1e-6)
            before[row] = memory[row].numpy()
        np.testing.assert_allclose(memory.numpy(), before, rtol=1e-6)


def test_gradients_flow_to_student_and_embeddings_and_not_to_the_teacher():
    loss_fn = module()
    s, t, index = batch()
    first, second = s.clone().requires_grad_(), s.clone().requires_grad_()
    teacher = t.clone().requires_grad_()
    (loss_fn(first, teacher, index) + loss_fn(second, teacher, index)).backward()  # memories change in between
    assert teacher.grad is None
    for x in (first.grad, second.grad, *(p.grad for p in loss_fn.parameters())):
        assert x.isfinite().all()
        assert x.abs().max() > 0
    assert not torch.equal(first.grad, second.grad)


def test_evaluation_changes_nothing():
    loss_fn = module().eval()
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    s, t, index = batch()
    assert torch.equal(loss_fn(s, t, index), loss_fn(s, t, index))
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_loaded_state_continues_where_it_was(variant):
    straight, resumed = module(variant=variant), module(variant=variant, seed=0)
    straight(*batch(0))
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(straight(*batch(1)), resumed(*batch(1)))
    assert straight.step == 2
    assert straight.log_normalizers.isfinite().all()
    assert (straight.log_normalizers == 0).all() == (variant == "paper")
    again = module(variant=variant)
    again(*batch(0))
    assert torch.equal(again.log_normalizers, straight.log_normalizers)
    other = module(seed=1)
    assert not torch.equal(other.student_memory, module().student_memory)
    assert not torch.equal(other.student_memory, other.teacher_memory)


def test_training_aligns_student_and_teacher():
    """The student learns which sample is which from a teacher of another width."""
    torch.manual_seed(0)
    hidden = torch.randn(12, 5)
    teacher_features = hidden @ torch.randn(5, 7)
    inputs = hidden @ torch.randn(5, 5)
    student = torch.nn.Linear(5, 5)
    loss_fn = module(temperature=0.2, negatives=11, features=8)
    optimizer = torch.optim.Adam([*student.parameters(), *loss_fn.parameters()], 0.02)
    losses = []
    for _ in range(150):
        index = torch.randperm(12)[:6]
        loss = loss_fn(student(inputs[index]), teacher_features[index], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    with torch.no_grad():
        s = ops.embed_features(student(inputs), *loss_fn.student_embedding.parameters())
        t = ops.embed_features(teacher_features, *loss_fn.teacher_embedding.parameters())
    cosines = s @ t.T
    same, others = cosines.diag().mean(), cosines[~torch.eye(12, dtype=torch.bool)].mean()
    assert same > 0.5
    assert others < 0.2


def test_compiles():
    torch._dynamo.reset()
    eager, loss_fn = module(), module()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        s, t, index = batch(seed)
        s.requires_grad_()
        compiled(s, t, index).backward()
        other = s.detach().clone().requires_grad_()
        eager(other, t, index).backward()
        torch.testing.assert_close(s.grad, other.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(loss_fn.state_dict()[name], value)


def test_as_a_term():
    class Outputs:
        def __init__(self, value):
            self.features = {"pool": value}

    s, t, index = batch()
    term = FeatureLoss("pool", "pool", module(), index_key="index")
    expected = module()(s, t, index)
    assert torch.equal(term(Outputs(s), Outputs(t), {"index": index}), expected)


def test_wrong_arguments():
    loss_fn = module()
    s, t, index = batch()
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    with pytest.raises(IndexError, match=r"\[contrastive_loss\] index must be in \[0, 12\), got 12"):
        loss_fn(s, t, torch.tensor([0, 12, 3]))
    with pytest.raises(TypeError, match=r"\[contrastive_negatives\] index must be int64, got Int"):
        loss_fn(s, t, index.int())
    with pytest.raises(
        ValueError, match=r"\[contrastive_loss\] index and negatives must have one row per anchor, 3, got 2"
    ):
        loss_fn(s, t, index[:2])
    with pytest.raises(ValueError, match=r"\[embed_features\] x must have 5 features per sample, got shape \[3, 7\]"):
        loss_fn(t, t, index)
    with pytest.raises(ValueError, match=r"\[contrastive_loss\] temperature must be positive and finite, got 0"):
        ops.contrastive_loss(*make(), temperature=0.0)
    with pytest.raises(ValueError, match=r"\[update_memory_\] momentum must be in \[0, 1\), got 1"):
        ops.update_memory_(loss_fn.student_memory, index, s, 1.0)
    with pytest.raises(ValueError, match=r"\[contrastive_negatives\] size must be in \[2, 2\^31\), got 1"):
        ops.contrastive_negatives(index, torch.tensor(0), 3, 1, 0)
    assert all(torch.equal(value, before[name]) for name, value in loss_fn.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_size": 1}, r"dataset_size must be in \[2, 2\^31\), got 1"),
        ({"teacher_features": 0}, "teacher_features must be at least 1, got 0"),
        ({"negatives": 0}, "negatives must be at least 1, got 0"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"variant": "both"}, "variant must be one of 'paper', 'code', got 'both'"),
    ],
)
def test_wrong_options(options, message):
    arguments = {"dataset_size": 10, "student_features": 4, "teacher_features": 4} | options
    with pytest.raises(ValueError, match=r"\[ContrastiveRepresentation\] " + message):
        ContrastiveRepresentation(**arguments)
