"""FeatureLoss and layer_map: losses as terms of an objective over captured layers."""

import functools
from dataclasses import dataclass

import pytest
import torch

from rarefy.distillation import (
    AffinityMimicking,
    FeatureLoss,
    HiddenCosine,
    Hint,
    LayerCapture,
    MiniLMRelations,
    layer_map,
)
from rarefy.distillation import Outputs as AllOutputs
from rarefy.distillation.terms import expand_paths


def Outputs(features):
    """What a model returned, of which only layers are asked for."""
    return AllOutputs(features=features)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_loss_between_two_layers():
    s, t = rand(2, 3, 4), rand(2, 3, 6, seed=1)
    term = FeatureLoss("encoder.0", "encoder.1", Hint(4, 6))
    assert term.student_layers == ("encoder.0",)
    assert term.teacher_layers == ("encoder.1",)
    loss = term(Outputs({"encoder.0": s, "other": None}), Outputs({"encoder.1": t}), (s, t))
    assert torch.equal(loss, term.loss(s, t))
    assert sorted(term.state_dict()) == ["loss.adapter.bias", "loss.adapter.weight"]
    assert repr(term).startswith("FeatureLoss(\n  encoder.0 <- encoder.1\n  (loss): Hint(")


def test_a_function_is_a_loss_too():
    term = FeatureLoss("a", "b", lambda s, t: (s - t).abs().mean())
    s, t = rand(3, 4), rand(3, 4, seed=1)
    assert torch.equal(term(Outputs({"a": s}), Outputs({"b": t}), None), (s - t).abs().mean())


def test_what_to_take_of_an_output():
    @dataclass
    class ModelOutput:
        hidden: torch.Tensor

    s, t = rand(3, 4), rand(3, 4, seed=1)
    expected = HiddenCosine()(s, t)
    for output_s, output_t, options in (
        ((s, None), (t, 1), {"select": 0}),
        ({"x": s}, {"x": t}, {"select": "x"}),
        (ModelOutput(s), ModelOutput(t), {"select": "hidden"}),
        ((1, s), {"h": t}, {"select": 1, "teacher_select": "h"}),
        ((s,), (t,), {"select": lambda output: output[-1]}),
        (s, (t,), {"select": 0}),  # a tensor is taken as it is
    ):
        term = FeatureLoss("a", "b", HiddenCosine(), **options)
        assert torch.equal(term(Outputs({"a": output_s}), Outputs({"b": output_t}), None), expected)
    with pytest.raises(
        TypeError,
        match=r"\[FeatureLoss\] student layer 'a' must return one tensor where select is not given, got a tuple of 2",
    ):
        FeatureLoss("a", "b", HiddenCosine())(Outputs({"a": (s, s)}), Outputs({"b": t}), None)
    with pytest.raises(TypeError, match=r"\[FeatureLoss\] select must give a tensor for teacher layer 'b', got int"):
        FeatureLoss("a", "b", HiddenCosine(), select=1)(Outputs({"a": (1, s)}), Outputs({"b": (t, 1)}), None)


def test_masks_from_the_batch():
    s, t = rand(2, 3, 4), rand(2, 3, 4, seed=1)
    attention_mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = HiddenCosine()(s, t, attention_mask.bool())
    student, teacher = Outputs({"a": s}), Outputs({"b": t})
    term = FeatureLoss("a", "b", HiddenCosine(), mask_key="attention_mask")
    assert torch.equal(term(student, teacher, {"attention_mask": attention_mask}), expected)
    assert torch.equal(term(student, teacher, {"attention_mask": attention_mask.bool()}), expected)
    assert not torch.equal(expected, HiddenCosine()(s, t))
    positional = FeatureLoss("a", "b", HiddenCosine(), mask_key=1)
    assert torch.equal(positional(student, teacher, ("ids", attention_mask)), expected)
    with pytest.raises(KeyError, match=r"mask_key 'attention_mask' must be in the batch, got \['ids'\]"):
        term(student, teacher, {"ids": s})
    with pytest.raises(TypeError, match=r"mask_key 'attention_mask' must name a tensor of the batch, got list"):
        term(student, teacher, {"attention_mask": [1, 1]})
    for batch in ((s, t), None, s):
        with pytest.raises(
            TypeError, match=r"\[FeatureLoss\] mask_key 'attention_mask' needs a batch that has it, got a"
        ):
            term(student, teacher, batch)


def test_several_layers_at_once():
    s, t = [rand(2, 3, 4, seed=i) for i in range(3)], [rand(2, 3, 8, seed=i + 5) for i in range(3)]
    names = ["query", "key", "value"]
    term = FeatureLoss(names, names, MiniLMRelations(2))
    student, teacher = (Outputs(dict(zip(names, x, strict=True))) for x in (s, t))
    assert torch.equal(term(student, teacher, None), MiniLMRelations(2)(s, t))
    assert term.student_layers == ("query", "key", "value")
    pair = [x[:, 0] for x in s[:2]], [x[:, 0] for x in t[:2]]
    towers = FeatureLoss(("image", "text"), ("visual", "text"), AffinityMimicking())
    student = Outputs(dict(zip(("image", "text"), pair[0], strict=True)))
    teacher = Outputs(dict(zip(("visual", "text"), pair[1], strict=True)))
    assert torch.equal(towers(student, teacher, None), AffinityMimicking()(*pair))


def test_a_layer_that_was_not_captured():
    term = FeatureLoss("a", "b", HiddenCosine())
    with pytest.raises(KeyError, match=r"\[FeatureLoss\] teacher layer 'b' must be captured, got a, c"):
        term(Outputs({"a": rand(2, 3)}), Outputs({"c": 1, "a": 2}), None)
    with pytest.raises(
        TypeError, match=r"\[FeatureLoss\] student_layer must be a path or a sequence of paths, got \[\]"
    ):
        FeatureLoss([], "b", HiddenCosine())
    with pytest.raises(TypeError, match=r"\[FeatureLoss\] loss must be callable, got str"):
        FeatureLoss("a", "b", "mse")


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("fc", ["fc"]),
        ("layer.{0..2}", ["layer.0", "layer.1", "layer.2"]),
        ("layer.{1..5..2}.out", ["layer.1.out", "layer.3.out", "layer.5.out"]),
        ("{a,b}.{9..10}", ["a.9", "a.10", "b.9", "b.10"]),
        (["x", "y.{3..3}"], ["x", "y.3"]),
    ],
)
def test_patterns(pattern, paths):
    assert expand_paths(pattern) == paths


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a.{0..2", "braces must be paired, got 'a.{0..2'"),
        ("a.{}", r"braces must hold a..b, a..b..step or words x,y, got {} in"),
        ("a.{3}", r"braces must hold a..b"),
        ("a.{2..0}", r"a range must go up by a step of 1 or more, got {2..0} in"),
        ("a.{0..4..0}", r"a range must go up by a step of 1 or more"),
    ],
)
def test_wrong_patterns(pattern, message):
    with pytest.raises(ValueError, match=r"\[layer_map\] " + message):
        layer_map(pattern, "b", Hint)


def pairs(terms):
    return {name: (*term.student_layers, *term.teacher_layers) for name, term in terms.items()}


def test_layer_maps():
    uniform = layer_map("encoder.layer.{0..2}", "encoder.layer.{0..5}", Hint, select=0, mask_key="mask")
    assert pairs(uniform) == {
        "encoder_layer_0": ("encoder.layer.0", "encoder.layer.1"),
        "encoder_layer_1": ("encoder.layer.1", "encoder.layer.3"),
        "encoder_layer_2": ("encoder.layer.2", "encoder.layer.5"),
    }
    assert all(term.select == 0 and term.mask_key == "mask" for term in uniform.values())
    assert len({id(term.loss) for term in uniform.values()}) == 3
    even = layer_map("s.{0..2}", "t.{0..4..2}", HiddenCosine)
    assert [names[1] for names in pairs(even).values()] == ["t.0", "t.2", "t.4"]
    stages = layer_map(["layer1", "layer2"], ["features.4", "features.9"], functools.partial(Hint, loss="cosine"))
    assert pairs(stages) == {"layer1": ("layer1", "features.4"), "layer2": ("layer2", "features.9")}
    assert stages["layer1"].loss.loss == "cosine"
    torch.nn.ModuleDict(uniform)  # names that a container of modules takes


def test_wrong_layer_maps():
    with pytest.raises(ValueError, match=r"must be as many as student layers or a multiple, got 5 for 3"):
        layer_map("a.{0..2}", "b.{0..4}", Hint)
    with pytest.raises(ValueError, match=r"got 0 for 1"):
        layer_map("a", [], Hint)
    with pytest.raises(ValueError, match=r"student layers must be distinct, got a more than once"):
        layer_map(["a", "a"], ["b", "c"], Hint)
    with pytest.raises(TypeError, match=r"make_loss must make a loss for each pair .*, got a module Hint"):
        layer_map("a", "b", Hint())


def test_adapters_of_a_map_are_trained():
    """Two layers at once, each with its adapter, in an ordinary loop."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    teacher = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 6))
    terms = layer_map("{0..1}", "{0..1}", Hint)
    x = rand(32, 5)

    def objective():
        ours = [path for term in terms.values() for path in term.student_layers]
        theirs = [path for term in terms.values() for path in term.teacher_layers]
        with LayerCapture(student, ours) as s, LayerCapture(teacher, theirs) as t:
            student(x)
            with torch.no_grad():
                teacher(x)
            outputs = Outputs(dict(s.features)), Outputs(dict(t.features))
        return sum(term(*outputs, x) for term in terms.values())

    first = objective().item()  # the lazy adapters take their sizes
    parameters = [*student.parameters(), *(p for term in terms.values() for p in term.parameters())]
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    assert objective().item() < 0.1 * first
