"""permute_for_nm: the same outputs in another order, and never less that N:M keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from structures import STRUCTURES
from torch import nn

import rarefy as rf
from rarefy._core.pruning import (
    GroupOrder,
    PermutationOptions,
    find_nm_permutation,
    find_structure,
    nm_kept_magnitude,
    reorders,
)
from rarefy.graph.record import record
from rarefy.pruning import NM, permute_for_nm


def kept_by_loops(weight: torch.Tensor, n: int, m: int) -> float:
    total = 0.0
    for line in weight.detach().movedim(1, -1).reshape(-1, weight.shape[1]).abs().double().tolist():
        for begin in range(0, len(line), m):
            total += sum(sorted(line[begin : begin + m], reverse=True)[:n])
    return total


def cluster(model: nn.Module) -> nn.Module:
    """Let columns of much and of little magnitude stand together, which N:M does badly on."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                size = parameter.shape[1]
                parameter.mul_(torch.linspace(1.5, -1.5, size).exp().view(1, size, *[1] * (parameter.dim() - 2)))
    return model


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                nn.Conv2d(24, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 16, 7),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = (f(x).view(b, t, 4, w // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, w))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


IMAGE = (2, 3, 8, 8)
MODELS = {
    "chain": (chain, IMAGE, "2:4"),
    "residual": (Residual, IMAGE, "2:4"),
    "grouped": (grouped, IMAGE, "2:4"),
    "transformer": (Transformer, (2, 5, 32), "2:4"),
    "transformer 1:4": (Transformer, (2, 5, 32), "1:4"),
    "residual 2:5": (Residual, IMAGE, NM(2, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_keeps_outputs_and_more_magnitude(name):
    build, shape, pattern = MODELS[name]
    torch.manual_seed(0)
    model = cluster(build())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    model.eval()
    x = torch.randn(shape)
    before, state = model(x), copy.deepcopy(model.state_dict())
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    report = permute_for_nm(model, x, pattern)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identities
    assert report.attempts == 1
    assert any(group.order for group in report.groups)
    parsed = rf.pruning.parse_pattern(pattern)
    for group in report.groups:
        assert bool(group.order) != bool(group.reason)
        assert group.after >= group.before
        if group.order:
            assert sorted(group.order) == list(range(group.units))
            after = sum(kept_by_loops(model.state_dict()[w], parsed.n, parsed.m) for w in group.weights)
            assert after == pytest.approx(group.after, rel=1e-6)
    assert report.after > 1.01 * report.before
    # every tensor holds what it held, in another order
    for key, value in model.state_dict().items():
        assert torch.equal(value.flatten().sort().values, state[key].flatten().sort().values)
    # and masks keep what the report says
    weights = {
        name: p for name, p in model.named_parameters()
        if name.endswith("weight") and p.dim() > 1 and not rf._core.pruning.misfit(parsed, p.shape)
    }  # fmt: skip
    masks = rf.pruning.choose_masks(weights, 1 - parsed.n / parsed.m, pattern=parsed)
    kept = sum(float((w.detach().abs() * rf.pruning.unpack_mask(masks[k], w.shape)).sum()) for k, w in weights.items())
    assert kept == pytest.approx(report.after, rel=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_computes_the_same(name):
    structure = STRUCTURES[name]
    model, inputs = structure.build(), structure.make_inputs()
    before = structure.forward(model, inputs)
    report = permute_for_nm(model, inputs, "1:2", include=["*"], tolerance=1e-9)
    torch.testing.assert_close(structure.forward(model, inputs), before, rtol=1e-9, atol=1e-9)
    assert report.after >= report.before * (1 - 1e-12)


def test_most_structures_are_permuted():
    permuted = failed = 0
    for structure in STRUCTURES.values():
        report = permute_for_nm(structure.build(), structure.make_inputs(), "1:2", include=["*"])
        permuted += any(group.order for group in report.groups)
        failed += any("computes something else" in group.reason for group in report.groups)
    assert permuted >= len(STRUCTURES) // 2
    assert failed <= 3


def test_no_order_lowers_what_is_kept():
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 11), nn.Tanh(), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 3))
        weights = [model[2].weight, model[4].weight]
        before = [kept_by_loops(w, 2, 4) for w in weights]
        report = permute_for_nm(model, torch.randn(2, 4), "2:4", escapes=seed % 5, seed=seed)
        for weight, kept in zip(weights, before, strict=True):
            assert kept_by_loops(weight, 2, 4) >= kept * (1 - 1e-6)
        assert report.after == pytest.approx(sum(kept_by_loops(w, 2, 4) for w in [model[0].weight, *weights]), rel=1e-6)


def test_result_depends_on_the_options_alone():
    torch.manual_seed(0)
    model = cluster(Residual())
    x = torch.randn(IMAGE)
    threads = torch.get_num_threads()
    states = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            again = copy.deepcopy(model)
            permute_for_nm(again, x)
            states.append(again.state_dict())
        finally:
            torch.set_num_threads(threads)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_isas_agree(restore_instruction_set):
    from conftest import available_instruction_sets

    torch.manual_seed(0)
    model, x = cluster(Residual()), torch.randn(IMAGE)
    orders = []
    for name in available_instruction_sets():
        rf._core.set_instruction_set(name)
        orders.append([group.order for group in permute_for_nm(copy.deepcopy(model), x).groups])
    assert all(order == orders[0] for order in orders)


def test_search_is_nearly_exact_on_small_weights():
    """Against all 35 ways of standing eight columns in two groups of four."""
    from itertools import combinations

    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        weight = model[2].weight
        best = max(
            kept_by_loops(weight[:, [*first, *(i for i in range(8) if i not in first)]], 2, 4)
            for first in combinations(range(8), 4)
        )
        permute_for_nm(model, torch.randn(2, 3), "2:4", include=["2"])
        assert kept_by_loops(weight, 2, 4) >= 0.999 * best


def test_effort_bounds_the_search():
    torch.manual_seed(0)
    model, x = cluster(nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 64))), torch.randn(2, 4)
    little = permute_for_nm(copy.deepcopy(model), x, effort=1e6)
    much = permute_for_nm(copy.deepcopy(model), x)
    assert little.before == much.before <= little.after <= much.after


def test_gradients_and_optimizer_state_follow():
    torch.manual_seed(0)
    model, x = cluster(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))), torch.randn(4, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    reference, x2 = copy.deepcopy((model, optimizer.state_dict())), torch.randn(4, 6)
    report = permute_for_nm(model, x, optimizers=optimizer)
    assert report.groups[0].order

    plain = reference[0]
    other = torch.optim.Adam(plain.parameters())
    other.load_state_dict(reference[1])
    for net, opt in ((model, optimizer), (plain, other)):
        opt.zero_grad()
        net(x2).square().sum().backward()
        opt.step()
    torch.testing.assert_close(model(x), plain(x))
    order = list(report.groups[0].order)
    torch.testing.assert_close(model[0].weight, plain[0].weight[order])
    torch.testing.assert_close(model[2].weight.grad, plain[2].weight.grad[:, order])


def test_shared_weights_move_once():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(x + self.down(F.relu(self.up(x))))

    model, tokens = cluster(Tied()), torch.randint(0, 50, (2, 7))
    before = model(tokens)
    report = permute_for_nm(model, tokens)
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    assert report.after > report.before
    assert model.head.weight is model.embed.weight


def test_prepared_model_goes_on_training():
    """What the fake quantizers have seen of each channel follows it, whether or not the recorded run uses it."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = rf.quantization.prepare(cluster(chain()), rf.quantization.QConfig.int8(), x)
    model.train()
    for _ in range(2):
        model(x)
    model.eval()
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = permute_for_nm(model, x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    order = list({group.name: group for group in report.groups}["0.weight"].order)
    assert order
    for name in ("scale", "zero_point", "min_val", "max_val"):
        key = f"0.quant.weight.{name}"
        assert torch.equal(model.state_dict()[key], state[key][order]), name


def test_structure_and_reorders():
    torch.manual_seed(0)
    model, x = cluster(chain()).eval(), torch.randn(IMAGE)
    structure = find_structure(record(model, x))
    names, values = zip(*model.named_parameters(), strict=True)
    report = find_nm_permutation(structure, list(names), list(values), PermutationOptions(NM(2, 4)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    changes = reorders(structure, report)
    changed = {(tensor, dim) for tensor, dim, _ in changes}
    assert ("0.weight", 0) in changed
    assert ("3.weight", 1) in changed
    assert ("1.running_var", 0) in changed
    for tensor, dim, source in changes:
        state[tensor] = state[tensor].index_select(dim, torch.tensor(source))
    again = chain().eval()
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(isinstance(group, GroupOrder) for group in report.groups)
    assert "keeps" in repr(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kept_magnitude(dtype):
    for shape in ((5, 12), (4, 7, 3, 3)):
        weight = torch.randn(shape).to(dtype)
        assert nm_kept_magnitude(weight, NM(2, 4)) == pytest.approx(kept_by_loops(weight, 2, 4), rel=1e-6)
        assert nm_kept_magnitude(weight, NM(3, 5)) == pytest.approx(kept_by_loops(weight, 3, 5), rel=1e-6)


def test_errors_change_nothing():
    torch.manual_seed(0)
    model, x = cluster(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))), torch.randn(4, 6)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"\[permute_for_nm\] pattern must be N:M, got Row\(\)"):
        permute_for_nm(model, x, "row")
    with pytest.raises(ValueError, match=r"escapes must not be negative, got -1"):
        permute_for_nm(model, x, escapes=-1)
    with pytest.raises(ValueError, match=r"the model must run on its example inputs: RuntimeError: mat1 and mat2"):
        permute_for_nm(model, torch.randn(4, 5))
    with pytest.raises(ValueError, match="nothing"):
        permute_for_nm(model, x, include=["nothing"])
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in '2\.weight'"):
        permute_for_nm(model, x)
    with torch.no_grad():
        model[2].weight.copy_(state["2.weight"])
    rf.pruning.MagnitudePruner(model, 0.5)
    with pytest.raises(
        ValueError, match=r"0\.weight must have no mask of a MagnitudePruner: permute first, prune second"
    ):
        permute_for_nm(model, x)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)


def test_what_does_not_follow_is_put_back():
    """A model that looks at the order of one group behind the recording's back: the other group is permuted alone."""

    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.biases = self.a.bias.detach().numpy().tolist()

        def forward(self, x):
            as_it_was = self.a.bias.detach().numpy().tolist() == self.biases
            h = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(h if as_it_was else 2 * h)))

    torch.manual_seed(0)
    model, x = cluster(Sneaky()), torch.randn(4, 6)
    model.biases = model.a.bias.detach().numpy().tolist()
    state, before = copy.deepcopy(model.state_dict()), model(x)
    report = permute_for_nm(model, x)
    torch.testing.assert_close(model(x), before)
    groups = {group.name: group for group in report.groups}
    assert report.attempts == 3
    assert "the model computes something else in another order" in groups["a.weight"].reason
    assert groups["a.weight"].before == groups["a.weight"].after
    assert groups["b.weight"].after > groups["b.weight"].before
    assert torch.equal(model.a.weight, state["a.weight"])
    assert torch.equal(model.c.weight, state["c.weight"][:, list(groups["b.weight"].order)])
    assert report.after > report.before
