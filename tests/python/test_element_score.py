"""Scores of single weights: every criterion against plain loops, accumulation over passes, types, errors."""

import itertools
import math
import pickle

import pytest
import torch
from strategies import FLOAT_TYPES
from torch import nn

import rarefy as rf

scores = rf.pruning.scores

CRITERIA = [
    scores.Magnitude(1.0),
    scores.Magnitude(2.0),
    scores.Magnitude(3.5),
    scores.Random(7),
    scores.Movement(),
    scores.Taylor(),
    scores.Fisher(),
    scores.Lamp(),
]
WITH_GRADIENTS = [scores.Movement(), scores.Taylor(), scores.Fisher()]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def weight_of(dtype, shape=(5, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def loops(criterion, weight, gradients):
    """The table of element_criterion.h, an element at a time."""
    w = [x.item() for x in weight.flatten()]
    g = [[x.item() for x in gradient.flatten()] for gradient in gradients]
    out = []
    for i, value in enumerate(w):
        if isinstance(criterion, scores.Magnitude):
            out.append(abs(value) ** criterion.p)
        elif isinstance(criterion, scores.Movement):
            out.append(sum(-value * gradient[i] for gradient in g))
        elif isinstance(criterion, scores.Taylor):
            out.append(sum(abs(value * gradient[i]) for gradient in g) / len(g))
        elif isinstance(criterion, scores.Fisher):
            out.append(sum(0.5 * (value * gradient[i]) ** 2 for gradient in g) / len(g))
        else:
            assert isinstance(criterion, scores.Lamp)
            total = sum(v * v for v in w if abs(v) >= abs(value))
            out.append(value * value / total if value else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


def computed(criterion, weight, gradients, name="w"):
    accumulated = None
    if scores.needs_gradients(criterion):
        accumulated = scores.new_accumulator(weight)
        for gradient in gradients:
            scores.accumulate(criterion, weight, gradient, accumulated)
    return scores.element_scores(criterion, name, weight, accumulated, max(len(gradients), 1))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("criterion", [c for c in CRITERIA if not isinstance(c, scores.Random)], ids=str)
def test_scores_are_those_of_plain_loops(criterion, dtype):
    weight = weight_of(dtype)
    weight[2, 3] = 0
    weight[1, 1], weight[4, 0] = 1.5, -1.5  # equal magnitudes
    gradients = [torch.randn_like(weight) for _ in range(3)]
    result = computed(criterion, weight, gradients)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        result.double(), loops(criterion, weight, gradients), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_strides_do_not_matter(criterion):
    weight = weight_of(torch.float32, (4, 6, 3, 3))
    gradient = torch.randn_like(weight)
    expected = computed(criterion, weight, [gradient])
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(computed(criterion, last, [gradient]), expected)
    assert torch.equal(computed(criterion, last, [gradient.to(memory_format=torch.channels_last)]), expected)
    view = torch.randn(6, 4).t()
    assert torch.equal(
        computed(criterion, view, [gradient[:, :, 0, 0]]),
        computed(criterion, view.contiguous(), [gradient[:, :, 0, 0]]),
    )


def test_random_is_a_function_of_seed_name_and_index():
    big = torch.zeros(300, 1000)
    one = scores.element_scores(scores.Random(3), "a", big)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(scores.element_scores(scores.Random(3), "a", big), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(scores.element_scores(scores.Random(3), "a", torch.ones(17)), one.flatten()[:17])
    assert not torch.equal(scores.element_scores(scores.Random(4), "a", big), one)
    assert not torch.equal(scores.element_scores(scores.Random(3), "b", big), one)
    assert one.min() >= 0
    assert one.max() < 1
    assert abs(one.mean().item() - 0.5) < 3 * math.sqrt(1 / 12 / one.numel())
    assert abs(one.var().item() - 1 / 12) < 1e-3
    first = scores.element_scores(scores.Random(3), "a", torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(first.float(), one.flatten()[:4], rtol=0, atol=2**-23)


def test_magnitude_scores_of_blocks_add_up_to_norms():
    weight = weight_of(torch.float64)
    row = scores.element_scores(scores.Magnitude(3.0), "w", weight).sum(1)
    torch.testing.assert_close(row ** (1 / 3), torch.linalg.vector_norm(weight, 3, dim=1))


def test_lamp_makes_tensors_comparable():
    """The largest weight of every tensor has score 1, whatever the tensor's scale."""
    for scale in (1e-3, 1.0, 1e3):
        result = scores.element_scores(scores.Lamp(), "w", weight_of(torch.float32) * scale)
        assert result.max().item() == 1.0
    assert torch.equal(scores.element_scores(scores.Lamp(), "w", torch.zeros(3)), torch.zeros(3))
    assert scores.element_scores(scores.Lamp(), "w", torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "norms"),
    [((4, 6), 6), ((4, 6, 3, 3), 6), ((4, 6, 3, 3), 54), ((4, 6, 3, 3), (4, 6, 3, 3))],
)
def test_activation_spreads_feature_norms(shape, norms):
    statistic = torch.rand(norms)
    result = scores.element_scores(scores.Activation(), "w", torch.randn(shape), statistic)
    for index in itertools.product(*(range(n) for n in shape)):
        if statistic.shape == shape:
            expected = statistic[index]
        elif statistic.numel() == shape[1]:
            expected = statistic[index[1]]
        else:
            expected = statistic.view(shape[1:])[index[1:]]
        assert result[index] == expected


@pytest.mark.parametrize("criterion", WITH_GRADIENTS, ids=str)
def test_a_bad_gradient_adds_nothing(criterion):
    weight = weight_of(torch.float32)
    accumulated = scores.new_accumulator(weight)
    scores.accumulate(criterion, weight, torch.ones_like(weight), accumulated)
    before = accumulated.clone()
    for gradient in (torch.full_like(weight, math.nan), torch.full_like(weight, math.inf)):
        with pytest.raises(ValueError, match=r"\[accumulate\] weights and gradients must be finite"):
            scores.accumulate(criterion, weight, gradient, accumulated)
    with pytest.raises(ValueError, match=r"of its weight's sizes \[5, 7\], got sizes \[7, 5\]"):
        scores.accumulate(criterion, weight, torch.ones(7, 5), accumulated)
    with pytest.raises(ValueError, match=r"accumulated must be of Float"):
        scores.accumulate(criterion, weight, torch.ones_like(weight), accumulated.double())
    assert torch.equal(accumulated, before)


def test_criteria_that_need_no_gradient_accumulate_nothing():
    weight = weight_of(torch.float32)
    accumulated = scores.new_accumulator(weight)
    scores.accumulate(scores.Magnitude(), weight, torch.full_like(weight, math.nan), accumulated)
    assert not accumulated.any()
    assert [scores.needs_gradients(c) for c in CRITERIA] == [False] * 4 + [True] * 3 + [False]


def test_errors():
    weight = weight_of(torch.float32)
    bad = weight.clone()
    bad[1, 2] = math.nan
    for criterion in CRITERIA:
        with pytest.raises(ValueError, match=r"\[element_scores\] weights must be finite, got NaN or infinity in 'fc'"):
            scores.element_scores(criterion, "fc", bad, scores.new_accumulator(weight))
    for criterion in WITH_GRADIENTS:
        with pytest.raises(ValueError, match=r"needs accumulated gradients, got none for 'fc'"):
            scores.element_scores(criterion, "fc", weight)
        with pytest.raises(ValueError, match=r"must have sizes \[5, 7\], got \[7, 5\]"):
            scores.element_scores(criterion, "fc", weight, torch.zeros(7, 5))
        with pytest.raises(ValueError, match="what is accumulated must be finite"):
            scores.element_scores(criterion, "fc", weight, bad)
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        scores.element_scores(scores.Taylor(), "fc", weight, weight, 0)
    with pytest.raises(ValueError, match="needs the norms of input features, got none for 'fc'"):
        scores.element_scores(scores.Activation(), "fc", weight)
    with pytest.raises(ValueError, match=r"one per input of a weight of sizes \[5, 7\], got sizes \[5\]"):
        scores.element_scores(scores.Activation(), "fc", weight, torch.ones(5))
    with pytest.raises(ValueError, match="p must be finite for single weights"):
        scores.element_scores(scores.Magnitude(math.inf), "fc", weight)


def test_movement_is_a_value():
    movement = scores.Movement()
    assert pickle.loads(pickle.dumps(movement)) == movement
    assert repr(movement) == "Movement()"
    assert hash(movement) == hash(scores.Movement())


def test_scores_of_a_model_after_backward():
    """What a training loop does: accumulate after every backward pass."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    accumulated = scores.new_accumulator(layer.weight)
    expected = torch.zeros(3, 4)
    for _ in range(4):
        layer.zero_grad()
        layer(torch.randn(8, 4)).square().sum().backward()
        scores.accumulate(scores.Movement(), layer.weight, layer.weight.grad, accumulated)
        expected -= layer.weight.detach() * layer.weight.grad
    assert not accumulated.requires_grad
    torch.testing.assert_close(scores.element_scores(scores.Movement(), "weight", layer.weight, accumulated), expected)
