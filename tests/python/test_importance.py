"""Importance: every criterion against plain loops, which tensors take part, combination, statistics, errors."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from written_structures import convolutional

import rarefy as rf
from rarefy import _core
from rarefy._core.pruning import Group, Member, Structure

imp = rf.pruning.importance

#: Of each group of convolutional(): tensors and dimensions that take part.
CHOSEN = [[("0.weight", 0), ("1.weight", 0), ("2.weight", 1)], [("2.weight", 0), ("4.weight", 1)]]


def unit_elements(model, structure, group, name, dim):
    """Of each unit: (value, gradient) of every element of its slices."""
    parameter = model.get_parameter(name)
    member = next(m for m in structure.groups[group].members if (m.tensor, m.dim) == (name, dim))
    out = [[] for _ in range(structure.groups[group].units)]
    for index in itertools.product(*(range(n) for n in parameter.shape)):
        unit = member.unit_of_index[index[dim]]
        gradient = 0.0 if parameter.grad is None else parameter.grad[index].item()
        out[unit].append((parameter[index].item(), gradient))
    return out


def reference(model, structure, per_unit, chosen=CHOSEN, reduction="mean", normalize="mean"):
    """Scores by plain loops; per_unit maps a unit's elements to a number."""
    scores = []
    for g, members in enumerate(chosen):
        values = [[per_unit(e) for e in unit_elements(model, structure, g, *member)] for member in members]
        by_unit = list(zip(*values, strict=True))
        combine = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max}[reduction]
        scores.append(normalized([combine(v) for v in by_unit], normalize))
    return scores


def normalized(values, normalize):
    low = min(values) if normalize == "min_max" else 0.0
    divisor = {
        "none": 1.0,
        "mean": sum(values) / len(values),
        "max": max(values),
        "sum": sum(values),
        "min_max": max(values) - min(values),
    }[normalize]
    return [(v - low) / divisor if divisor else 0.0 for v in values]


def check(scores, expected, dtype=torch.float64):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert len(scores) == len(expected)
    for score, values in zip(scores, expected, strict=True):
        assert score.values.dtype == torch.float64
        torch.testing.assert_close(
            score.values, torch.tensor(values, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )


def backward(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().sum().backward()


def p_norm(p):
    if math.isinf(p):
        return lambda elements: max(abs(w) for w, _ in elements)
    return lambda elements: sum(abs(w) ** p for w, _ in elements) ** (1 / p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3.5, math.inf])
def test_magnitude(p, dtype):
    model, structure = convolutional(dtype)
    check(imp.score(structure, model, imp.Magnitude(p)), reference(model, structure, p_norm(p)), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_magnitude_of_low_precision_is_computed_in_float64(dtype):
    model, structure = convolutional(dtype)
    check(imp.score(structure, model, "l2"), reference(model, structure, p_norm(2)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("normalize", ["none", "mean", "max", "sum", "min_max"])
def test_reduction_and_normalization(reduction, normalize):
    model, structure = convolutional()
    scores = imp.score(structure, model, "l1", reduction, normalize)
    check(scores, reference(model, structure, p_norm(1), CHOSEN, reduction, normalize), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("criterion", "per_unit"),
    [
        (imp.Taylor(), lambda elements: abs(sum(w * g for w, g in elements))),
        (imp.Taylor(joint=False), lambda elements: sum(abs(w * g) for w, g in elements)),
        (imp.Fisher(), lambda elements: 0.5 * sum(w * g for w, g in elements) ** 2),
    ],
)
def test_criteria_with_gradients(criterion, per_unit, dtype):
    model, structure = convolutional(dtype)
    backward(model)
    expected = reference(model, structure, per_unit, normalize="none")
    scores = imp.score(structure, model, criterion, normalize="none")
    for score, values in zip(scores, expected, strict=True):
        wanted = torch.tensor(values, dtype=torch.float64)
        # Terms of both signs cancel in a joint sum.
        atol = (1e-12 if dtype == torch.float64 else 1e-5) * wanted.abs().max().item()
        torch.testing.assert_close(score.values, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=atol)


def test_fisher_accumulator_takes_the_mean_over_passes():
    model, structure = convolutional(torch.float64)
    fisher = imp.FisherAccumulator(model, structure)
    with pytest.raises(ValueError, match=r"update\(\) must run at least once"):
        fisher.scores()
    passes = []
    for seed in range(3):
        backward(model, seed)
        fisher.update()
        passes.append(imp.score(structure, model, imp.Fisher(), normalize="none"))
    assert fisher.batches == 3
    for g, score in enumerate(imp.score(structure, model, fisher, normalize="none")):
        mean = sum(scores[g].values for scores in passes) / 3
        torch.testing.assert_close(score.values, mean, rtol=1e-12, atol=0)


def test_fisher_accumulator_adds_nothing_on_an_error():
    model, structure = convolutional()
    fisher = imp.FisherAccumulator(model, structure)
    backward(model)
    fisher.update()
    before = [score.values.clone() for score in fisher.scores()]
    model[4].weight.grad = None
    with pytest.raises(ValueError, match=r"must have a gradient.*4\.weight"):
        fisher.update()
    assert fisher.batches == 1
    assert all(torch.equal(a, b.values) for a, b in zip(before, fisher.scores(), strict=True))


def test_geometric_median():
    model, structure = convolutional()
    expected = []
    for g, name in enumerate(["0.weight", "2.weight"]):
        rows = [[w for w, _ in e] for e in unit_elements(model, structure, g, name, 0)]
        distances = [sum(math.dist(a, b) for b in rows) for a in rows]
        expected.append(normalized(distances, "mean"))
    check(imp.score(structure, model, imp.GeometricMedian()), expected)


def test_geometric_median_of_equal_filters_is_zero():
    model, structure = convolutional()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(1, 3, 3, 3).expand(8, 3, 3, 3))
    values = imp.score(structure, model, imp.GeometricMedian(), normalize="none")[0].values
    assert values.abs().max() < 1e-6


def test_batch_norm_scale_leaves_groups_without_one():
    model, structure = convolutional()
    first, second = imp.score(structure, model, imp.BatchNormScale(), normalize="none")
    torch.testing.assert_close(first.values, model[1].weight.detach().abs().double())
    assert second.values is None
    assert second.reason == "no normalization with a scale"
    lonely = Structure([structure.groups[1]])
    with pytest.raises(ValueError, match="at least one group must have a score, got no normalization"):
        imp.score(lonely, model, imp.BatchNormScale())


def test_lamp():
    model, structure = convolutional()
    expected = []
    for values in reference(model, structure, p_norm(2), normalize="none"):
        expected.append([v * v / sum(o * o for o in values if o >= v) for v in values])
    check(imp.score(structure, model, imp.Lamp()), expected, torch.float32)


def test_lamp_of_equal_and_zero_units():
    group = Group("w", 4, [Member("w", 0, "output", [0, 1, 2, 3])])
    weight = torch.tensor([[0.0], [2.0], [1.0], [2.0]])
    (score,) = _core.pruning.importance(Structure([group]), {"w": weight}, imp.Lamp())
    assert score.values.tolist() == [0.0, 0.5, 1 / 9, 0.5]


def test_random_depends_on_nothing_but_seed_and_name():
    model, structure = convolutional()
    first = imp.score(structure, model, imp.Random(7))
    torch.manual_seed(99)
    again = imp.score(Structure(structure.groups[::-1]), model, imp.Random(7))[::-1]
    assert all(torch.equal(a.values, b.values) for a, b in zip(first, again, strict=True))
    other = imp.score(structure, model, imp.Random(8))
    assert not torch.equal(first[0].values, other[0].values)
    many = Structure([Group("many", 20_000, [])])
    (score,) = _core.pruning.importance(many, {}, imp.Random(1))
    assert score.values.min() >= 0
    assert score.values.max() < 1
    assert abs(score.values.mean() - 0.5) < 0.01
    assert score.values.unique().numel() == 20_000


def test_activation_statistics():
    model, structure = convolutional()
    model.eval()
    batches = [torch.randn(n, 3, 6, 6) for n in (2, 5)]
    with imp.ActivationStatistics(model) as statistics:
        for batch in batches:
            model(batch)
    assert not any(module._forward_hooks for module in model.modules())
    x = torch.cat(batches)
    outputs = {"0.weight": model[0](x)}
    outputs["1.weight"] = model[1](outputs["0.weight"])
    outputs["2.weight"] = model[2](outputs["1.weight"])
    means = {name: out.detach().double().abs().mean((0, 2, 3)) for name, out in outputs.items()}
    for name, mean in means.items():
        torch.testing.assert_close(statistics.statistics[name, 0], mean, rtol=1e-5, atol=1e-6)
    first, second = imp.score(structure, model, statistics, normalize="none")
    torch.testing.assert_close(first.values, (means["0.weight"] + means["1.weight"]) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.values, means["2.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "key", "dims"),
    [
        (nn.Linear(4, 6), (2, 3, 4), ("weight", 0), (0, 1)),
        (nn.Conv1d(4, 6, 3), (4, 9), ("weight", 0), (1,)),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), ("weight", 0), (0, 2)),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), ("weight", 1), (0, 2, 3)),
        (nn.LayerNorm(4), (2, 3, 4), ("weight", 0), (0, 1)),
    ],
)
def test_activation_channels_of_layers(module, shape, key, dims):
    x = torch.randn(shape)
    with imp.ActivationStatistics(module) as statistics:
        output = module(x)
    assert list(statistics.statistics) == [key]
    torch.testing.assert_close(statistics.statistics[key], output.detach().double().abs().mean(dims), rtol=1e-5, atol=0)


def test_custom():
    model, structure = convolutional()
    scores = imp.score(structure, model, lambda group: torch.arange(group.units), normalize="none")
    assert [s.values.tolist() for s in scores] == [list(range(8)), list(range(12))]
    with pytest.raises(ValueError, match=r"scores of group 0\.weight must be 1-D with 8 values.*got sizes \[3\]"):
        imp.score(structure, model, lambda group: torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores must be finite.*0\.weight"):
        imp.score(structure, model, lambda group: torch.full((group.units,), math.nan))
    with pytest.raises(ZeroDivisionError):
        imp.score(structure, model, lambda group: 1 / 0)


def test_units_of_several_rows_and_other_groups_indices():
    weight = torch.arange(12.0).reshape(6, 2)
    member = Member("w", 0, "output", [1, -1, 0, 0, -1, 1])
    structure = Structure([Group("w", 2, [member])])
    (score,) = _core.pruning.importance(structure, {"w": weight}, imp.Magnitude(1), normalization="none")
    assert score.values.tolist() == [4 + 5 + 6 + 7, 0 + 1 + 10 + 11]


def test_a_group_of_vectors_alone_is_scored_by_them():
    structure = Structure([Group("shift", 3, [Member("shift", 0, "affine", [0, 1, 2])])])
    (score,) = _core.pruning.importance(
        structure, {"shift": torch.tensor([1.0, -2.0, 3.0])}, imp.Magnitude(1), normalization="none"
    )
    assert score.values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "requires copy"])
def test_layouts(layout):
    model, structure = convolutional()
    expected = imp.score(structure, model, "l1")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        if layout == "channels_last":
            changed.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            changed[4].weight.data = model[4].weight.data.t().contiguous().t()
        else:
            changed[2].weight.data = model[2].weight.data.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    check(imp.score(structure, changed, "l1"), [s.values.tolist() for s in expected], torch.float32)


def test_large_weights_do_not_overflow():
    structure = Structure([Group("w", 2, [Member("w", 0, "output", [0, 1])])])
    (score,) = _core.pruning.importance(
        structure, {"w": torch.tensor([[3e30, 4e30], [0.0, 1e30]])}, imp.Magnitude(2), normalization="none"
    )
    torch.testing.assert_close(score.values, torch.tensor([5e30, 1e30], dtype=torch.float64))


def test_scores_do_not_depend_on_threads():
    torch.manual_seed(0)
    weight = torch.randn(700, 1300)
    structure = Structure([Group("w", 1300, [Member("w", 1, "input", list(range(1300)))])])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_core.pruning.importance(structure, {"w": weight}, imp.Magnitude(2))[0].values)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "taylor", "lamp", "random", "geometric_median"])
@pytest.mark.parametrize("name", ["0.bias", "2.weight"])
def test_values_that_are_not_finite_are_named(bad, criterion, name):
    model, structure = convolutional()
    with torch.no_grad():
        model.get_parameter(name).flatten()[1] = bad
    with pytest.raises(ValueError, match=f"finite, got NaN or infinity in {name}"):
        imp.score(structure, model, criterion)


def test_errors():
    model, structure = convolutional()
    with pytest.raises(ValueError, match=r"must have a gradient.*got none for 0\.weight"):
        imp.score(structure, model, "taylor")
    backward(model)
    model[2].weight.grad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"gradients must be finite.*2\.weight"):
        imp.score(structure, model, "taylor")
    with pytest.raises(ValueError, match=r"must be one of l1, l2, linf.*got 'l3'"):
        imp.score(structure, model, "l3")
    with pytest.raises(TypeError, match="a criterion, a name or a callable, got int"):
        imp.score(structure, model, 3)
    with pytest.raises(ValueError, match="mean, sum, max, got 'min'"):
        imp.score(structure, model, "l1", "min")
    with pytest.raises(ValueError, match="none, mean, max, sum, min_max, got 'x'"):
        imp.score(structure, model, "l1", "mean", "x")
    other = nn.Sequential(nn.Conv2d(3, 9, 3))
    with pytest.raises(ValueError, match=r"0\.weight must have 8 slices along dimension 0"):
        imp.score(structure, other)
    for p in (0, -1, math.nan):
        with pytest.raises(ValueError, match="p must be positive"):
            imp.Magnitude(p)


@pytest.mark.parametrize(
    "criterion",
    [imp.Magnitude(2), imp.BatchNormScale(), imp.Taylor(False), imp.Fisher(), imp.GeometricMedian(), imp.Activation(),
     imp.Lamp(), imp.Random(5)],
)  # fmt: skip
def test_criteria_are_values(criterion):
    assert pickle.loads(pickle.dumps(criterion)) == criterion
    assert copy.deepcopy(criterion) == criterion
    assert eval(repr(criterion), vars(imp)) == criterion
    assert len({criterion, copy.copy(criterion)}) == 1


def test_structure_prints():
    _, structure = convolutional()
    text = repr(structure)
    assert "2 groups with 20 units, 1 pinned dimensions" in text
    assert "4.weight[1] input, 48 slices" in text
    assert "an output of the model" in text
    html = structure._repr_html_()
    assert html.count("<tr>") == 4
    assert "4.weight[1] input" in html
    assert repr(structure.costs[1]) == "Cost: 36 x 8 x 12 (node -1)"
    with pytest.raises(ValueError, match="output, input, affine, got 'row'"):
        Member("w", 0, "row", [0])
