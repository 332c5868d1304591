"""Small dependency structures written out by hand, with a model that they belong to, and Hypothesis strategies."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from rarefy._core.pruning import Cost, Group, Member, Pinned, Structure


def convolutional(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Structure]:
    """A convolution with its norm, one whose channels are flattened to 4 columns each, and a classifier."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, bias=False), nn.Flatten(), nn.Linear(48, 5)
    ).to(dtype)
    nn.init.normal_(model[1].weight)
    first, second = list(range(8)), list(range(12))
    columns = [i // 4 for i in range(48)]
    groups = [
        Group(
            "0.weight",
            8,
            [
                Member("0.weight", 0, "output", first),
                Member("0.bias", 0, "output", first),
                Member("1.weight", 0, "affine", first),
                Member("1.bias", 0, "affine", first),
                Member("1.running_mean", 0, "affine", first),
                Member("1.running_var", 0, "affine", first),
                Member("2.weight", 1, "input", first),
            ],
        ),
        Group("2.weight", 12, [Member("2.weight", 0, "output", second), Member("4.weight", 1, "input", columns)]),
    ]
    costs = [
        Cost(3 * 9 * 16, [[(0, i) for i in first]]),
        Cost(9 * 4, [[(0, i) for i in first], [(1, i) for i in second]]),
        Cost(5, [[(1, unit) for unit in columns]]),
    ]
    return model, Structure(groups, [Pinned("4.weight", 0, 5, "an output of the model")], costs)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@dataclass
class Case:
    """A chain of layers, each a group of its own: widths[i] units of spans[i] rows, read by the next layer."""

    structure: Structure
    shapes: dict[str, tuple[int, ...]]
    scores: list[torch.Tensor]

    @property
    def units(self) -> list[int]:
        return [group.units for group in self.structure.groups]


def chain(widths: list[int], spans: list[int], scores: list[torch.Tensor]) -> Case:
    """Linear layers 7 -> widths[0] * spans[0] -> ... -> 3, each with a bias."""
    sizes = [w * s for w, s in zip(widths, spans, strict=True)]
    shapes, groups, costs = {}, [], []
    for i, (inputs, outputs) in enumerate(zip([7, *sizes], [*sizes, 3], strict=True)):
        shapes |= {f"l{i}.weight": (outputs, inputs), f"l{i}.bias": (outputs,)}
        axes = [[(i - 1, j // spans[i - 1]) if i > 0 else (-1, -1) for j in range(inputs)]]
        axes.append([(i, j // spans[i]) if i < len(widths) else (-1, -1) for j in range(outputs)])
        costs.append(Cost(1.0, axes))
        if i < len(widths):
            own = [j // spans[i] for j in range(outputs)]
            members = [
                Member(f"l{i}.weight", 0, "output", own),
                Member(f"l{i}.bias", 0, "output", own),
                Member(f"l{i + 1}.weight", 1, "input", own),
            ]
            groups.append(Group(f"l{i}.weight", widths[i], members))
    return Case(Structure(groups, [Pinned(f"l{len(widths)}.weight", 0, 3, "an output")], costs), shapes, scores)


@st.composite
def chains(draw: st.DrawFn) -> Case:
    """Chains of 1 to 5 groups with scores that have ties."""
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    spans = [draw(st.sampled_from([1, 1, 2, 4])) for _ in widths]
    scores = [
        torch.tensor(draw(st.lists(st.integers(0, 20), min_size=w, max_size=w)), dtype=torch.float64) / 7
        for w in widths
    ]
    return chain(widths, spans, scores)
