"""Calibrated pruning of models: which layers see what, propagation, transactions, reports, errors."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy import _core

core = _core.pruning


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, two blocks in a ModuleList, a head."""

    def __init__(self, width=12):
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))


LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
WEIGHTS = [f"{name}.weight" for name in LAYERS]


def make_net():
    torch.manual_seed(0)
    return Net()


def loader(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, (6, 7), generator=generator) for _ in range(count)]


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding="same"),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def images(count=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.zeros(8)) for _ in range(count)]


METHODS = {
    "wanda": rf.pruning.wanda,
    "sparse_gpt": rf.pruning.sparse_gpt,
    "refit": lambda model, data, *args, **options: rf.pruning.sparse_gpt(model, data, *args, refit=True, **options),
}


def by_hand(model, data, module_names, solve, refresh):
    """Prunes modules in order, each with the inputs that it gets; refresh: after which the model runs anew."""
    captured = {}

    def run():
        for name in module_names:
            captured[name] = []
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: captured[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
            )
            for name in module_names
        ]
        with torch.no_grad():
            model.eval()
            for batch in data:
                model(batch)
        for handle in handles:
            handle.remove()

    for name in module_names:
        if name in refresh or not captured:
            run()
        x = torch.cat(captured[name]).double()
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(solve(weight, x.t() @ x / len(x)))


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_stages_see_what_the_model_gives_them(method, propagate):
    """Against the same methods on inputs that were captured by hand, block by block."""
    model, expected = make_net(), make_net()
    data = loader()
    result = METHODS[method](model, data, 0.5, propagate=propagate, float64=True)

    def solve(weight, hessian):
        if method == "wanda":
            return core.wanda_weight(
                weight, hessian.diagonal().sqrt(), core.WandaOptions(0.5, core.parse_pattern("unstructured"))
            )[0]
        options = core.SparseGptOptions(0.5, core.parse_pattern("unstructured"), 128, 0.01, 1.0)
        pruned, mask, *_ = core.sparse_gpt_weight(weight, hessian, options)
        return core.refit_weight(weight, mask, hessian, core.RefitOptions())[0] if method == "refit" else pruned

    by_hand(expected, data, LAYERS, solve, {"blocks.0.up", "blocks.1.up", "head"} if propagate else set())
    assert list(result.masks) == sorted(WEIGHTS)
    for name in LAYERS:
        own, other = model.get_submodule(name).weight, expected.get_submodule(name).weight
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        mask = result.masks[f"{name}.weight"]
        assert int((~mask).sum()) == mask.numel() // 2
        assert not own[~mask].any()
    for name, parameter in make_net().named_parameters():
        if name not in WEIGHTS:
            assert torch.equal(model.get_parameter(name), parameter)


def test_the_model_keeps_modes_hooks_gradients_and_parameters():
    model = make_net()
    model(loader()[0]).sum().backward()
    model.blocks[1].eval()
    identities = [id(p) for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rf.pruning.sparse_gpt(model, loader(), 0.5)
    assert [id(p) for p in model.parameters()] == identities
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_convolutions(method):
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    result = METHODS[method](model, images(), 0.5)
    assert set(result.masks) == {"0.weight", "3.weight", "8.weight"}
    assert [t.name for t in result.report.tensors] == ["0.weight", "3.weight", "8.weight"]
    rounded = 14 / 27 if method == "wanda" else 0.5  # of 27 inputs in each row
    assert [t.sparsity for t in result.report.tensors] == [pytest.approx(rounded), 0.5, 0.5]
    assert {o.name: o.reason for o in result.report.left_alone}["5.weight"] == (
        "not the weight of a linear layer or convolution alone: ConvTranspose2d"
    )
    assert result.report.tensors[0].samples == 3 * 8 * 36
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "5.weight", "0.bias"):
        assert torch.equal(model.state_dict()[key], before[key])
    nm = convolutional()
    four = METHODS[method](nm, images(), pattern="2:4", include=["3", "8"])
    assert (four.masks["3.weight"].sum(1) == 2).all()
    assert (four.masks["8.weight"].view(4, 4, 4).sum(2) == 2).all()
    assert torch.equal(nm[0].weight, before["0.weight"])


@pytest.mark.parametrize("method", ["sparse_gpt", "refit"])
def test_outputs_are_nearer_than_those_of_magnitude(method):
    torch.manual_seed(0)
    dense = convolutional().eval()
    x = images(6)
    pruned, magnitude = copy.deepcopy(dense), copy.deepcopy(dense)
    METHODS[method](pruned, x, 0.5)
    with torch.no_grad():
        for i in (0, 3, 8):
            weight = magnitude[i].weight
            threshold = weight.abs().flatten().kthvalue(weight.numel() // 2).values
            weight.mul_(weight.abs() > threshold)
        target = torch.cat([dense(b) for b, _ in x])
        errors = [(torch.cat([m(b) for b, _ in x]) - target).square().sum().item() for m in (pruned, magnitude)]
    assert errors[0] < 0.6 * errors[1]


def test_refit_of_given_masks_fits_the_dense_weights():
    dense = make_net()
    model = copy.deepcopy(dense)
    data = loader()
    pruned = rf.pruning.wanda(model, data, 0.6)
    with pytest.raises(ValueError, match=r"what the mask prunes must not be zero .* in 'blocks.0.up.weight'"):
        rf.pruning.refit(model, data, pruned.masks)
    packed = {name: rf.pruning.pack_mask(mask) for name, mask in pruned.masks.items()}
    result = rf.pruning.refit(model, data, packed, dense=dense)
    assert result.report.method == "refit"
    for name, mask in pruned.masks.items():
        assert torch.equal(result.masks[name], mask)
        assert not model.get_parameter(name)[~mask].any()
    for own, other in zip(result.report.tensors, pruned.report.tensors, strict=True):
        assert own.name == other.name
        assert own.error < other.error
    # On the dense model itself, and with dense weights by name: the first layer sees the same inputs.
    again, fourth = copy.deepcopy(dense), copy.deepcopy(model)
    rf.pruning.refit(again, data, pruned.masks)
    rf.pruning.refit(fourth, data, pruned.masks, dense=dict(dense.named_parameters()))
    for other in (again, fourth):
        torch.testing.assert_close(other.blocks[0].up.weight, model.blocks[0].up.weight)
        assert all(not other.get_parameter(name)[~mask].any() for name, mask in pruned.masks.items())


def test_refit_at_once_is_refit_after():
    model, other = make_net(), make_net()
    result = rf.pruning.sparse_gpt(model, loader(), 0.5, refit=True, propagate=False)
    masks = rf.pruning.sparse_gpt(copy.deepcopy(other), loader(), 0.5, propagate=False).masks
    assert all(torch.equal(result.masks[name], mask) for name, mask in masks.items())
    rf.pruning.refit(other, loader(), masks, propagate=False)
    for name in WEIGHTS:
        torch.testing.assert_close(model.get_parameter(name), other.get_parameter(name))
    assert result.report.method == "sparse_gpt, unstructured, refit"


def test_layers_have_their_own_sparsities():
    model = make_net()
    result = rf.pruning.sparse_gpt(
        model, loader(), 0.5, layers={"blocks.0.*": 0.75, "head": 0.0, "blocks.*": 0.25}, exclude=["blocks.1.up"]
    )
    assert {t.name: t.sparsity for t in result.report.tensors} == {
        "blocks.0.up.weight": 0.75,
        "blocks.0.down.weight": 0.75,
        "blocks.1.down.weight": 0.25,
        "head.weight": 0.0,
    }
    assert torch.equal(model.head.weight, make_net().head.weight)
    assert result.report.pruned == 432 + 72


def test_blocks_can_be_named():
    """One stage for both blocks: the second sees what the dense first gives."""
    model, expected = make_net(), make_net()
    rf.pruning.sparse_gpt(model, loader(), 0.5, blocks=["blocks"])
    rf.pruning.sparse_gpt(expected, loader(), 0.5, propagate=False)
    for name in WEIGHTS[:4]:
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name))
    assert not torch.equal(model.head.weight, expected.head.weight)
    with pytest.raises(ValueError, match="every name in blocks must be that of a module, got 'nowhere'"):
        rf.pruning.sparse_gpt(model, loader(), 0.5, blocks=["nowhere"])


MASK = torch.ones(1)


class Counting(Net):
    """Counts how often it runs from its beginning; hands its blocks what `extra` gives beside x."""

    def __init__(self, extra):
        torch.manual_seed(0)
        super().__init__()
        self.extra, self.runs = extra, 0
        for block in self.blocks:
            block.forward = lambda x, *_, own=block.forward, **__: own(x)

    def forward(self, tokens):
        self.runs += 1
        x = self.embedding(tokens)
        rest = self.extra(tokens)
        for block in self.blocks:
            x = block(x, **rest)
        return self.head(x)


@pytest.mark.parametrize(
    ("extra", "chained"),
    [
        (lambda tokens: {}, True),
        (lambda tokens: {"mask": None, "scale": 2.0}, True),
        (lambda tokens: {"mask": MASK}, True),
        (lambda tokens: {"cache": object()}, False),  # may have a state
    ],
)
def test_inputs_of_a_chain_of_blocks_are_kept(extra, chained):
    """The model is not run from its beginning for a block whose input is the output of the one before."""
    model = Counting(extra)
    rf.pruning.sparse_gpt(model, loader(4), 0.5)
    expected = make_net()
    rf.pruning.sparse_gpt(expected, loader(4), 0.5)
    for name in WEIGHTS:
        torch.testing.assert_close(model.get_parameter(name), expected.get_parameter(name))
    # One look at the first batch; then four batches each for the first block, the second unless chained, and the head.
    assert model.runs == 1 + 4 + (0 if chained else 4) + 4


def test_kinds_of_batches():
    batches = loader()
    results = []
    for data, forward in (
        (batches, None),
        ([(b, 1) for b in batches], None),
        ([{"tokens": b} for b in batches], None),
        (iter(batches), None),
        ([{"a": b} for b in batches], lambda model, batch: model(batch["a"])),
    ):
        model = make_net()
        rf.pruning.sparse_gpt(model, data, 0.5, forward=forward)
        results.append(model.head.weight.detach())
    assert all(torch.equal(r, results[0]) for r in results)
    with pytest.raises(TypeError, match=r"\[sparse_gpt\] a batch must be a tensor"):
        rf.pruning.sparse_gpt(make_net(), ["text"], 0.5)


def test_a_shared_weight_is_pruned_once_with_all_its_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = Twice()
    weight = model.a.weight.detach().clone()
    x = torch.randn(40, 6)
    result = rf.pruning.sparse_gpt(model, [x], 0.5, float64=True)
    assert list(result.masks) == ["a.weight"]
    assert result.report.tensors[0].samples == 80
    seen = torch.cat([x, torch.relu(x @ weight.t())]).double()
    options = core.SparseGptOptions(0.5, core.parse_pattern("unstructured"), 128, 0.01, 1.0)
    expected = core.sparse_gpt_weight(weight, seen.t() @ seen / 80, options)[0]
    torch.testing.assert_close(model.a.weight.detach(), expected)


def test_a_weight_shared_with_an_embedding_is_left_alone():
    model = make_net()
    model.head = nn.Linear(12, 20)
    model.head.weight = model.embedding.weight
    result = rf.pruning.wanda(model, loader(), 0.5)
    reasons = {o.name: o.reason for o in result.report.left_alone}
    assert reasons["embedding.weight"] == "not the weight of a linear layer or convolution alone: Embedding"
    assert reasons["head.weight"] == "the same tensor as embedding.weight"


def test_layers_that_no_data_reaches():
    model = make_net()
    model.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"\[wanda\] not pruned: unused.weight \(no input reached it\)"):
        result = rf.pruning.wanda(model, loader(), 0.5)
    assert "unused.weight" not in result.masks
    assert {o.name: o.reason for o in result.report.left_alone}["unused.weight"] == "no input reached it"
    with pytest.raises(ValueError, match=r"some layer must see a finite batch, got none: unused.weight"):
        rf.pruning.wanda(model, loader(), 0.5, include=["unused"])


def test_batches_that_are_not_finite_are_counted_and_named():
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    other.load_state_dict(model.state_dict())
    good, bad = torch.randn(30, 4), torch.full((30, 4), math.nan)
    with pytest.warns(UserWarning, match=r"batches with NaN or infinity left out at: 0.weight \(1\)"):
        result = rf.pruning.sparse_gpt(model, [good, bad], 0.5)
    rf.pruning.sparse_gpt(other, [good], 0.5)
    assert torch.equal(model[0].weight, other[0].weight)
    assert result.report.tensors[0].skipped == 1
    assert "1 batches with NaN or infinity left out" in result.report.tensors[0].note


def test_the_report():
    model = make_net()
    result = rf.pruning.sparse_gpt(model, loader(1), 0.5)
    report = result.report
    assert report.method == "sparse_gpt, unstructured"
    assert [t.name for t in report.tensors] == WEIGHTS
    first = report.tensors[0]
    assert (first.shape, first.elements, first.pruned, first.samples) == ((24, 12), 288, 144, 42)
    assert 0 < first.error < 0.5
    assert first.damping == 0.01
    assert first.seconds > 0
    assert report.sparsity == 0.5
    assert report.elements == 4 * 288 + 60
    hessians = 4 * (12 * 12 + 24 * 24)  # of the second block, beside the weights of the first
    assert report.peak_bytes == hessians + 4 * 2 * 288
    text = repr(result)
    assert text.startswith("CalibrationReport: sparse_gpt, unstructured: sparsity 0.5000 of 1212 weights")
    assert re.search(r"^blocks\.1\.down\.weight +12x24 +0\.5000 +0\.\d{5} +0\.01 +42 ", text, re.MULTILINE)
    assert "\n  embedding.weight (240 elements): not the weight of a linear layer" in text.partition("left alone:")[2]
    assert result._repr_html_().count("<tr>") == 1 + 5 + 1 + len(report.left_alone)
    assert "12 features" in rf.pruning.sparse_gpt(make_net(), [loader()[0][:1, :5]], 0.5).report.tensors[0].note


def test_wanda_without_errors_gathers_norms_alone():
    model, other = make_net(), make_net()
    lean = rf.pruning.wanda(model, loader(), 0.5, errors=False)
    full = rf.pruning.wanda(other, loader(), 0.5)
    assert all(torch.equal(lean.masks[name], full.masks[name]) for name in WEIGHTS)
    assert all(t.error is None for t in lean.report.tensors)
    assert all(t.error > 0 for t in full.report.tensors)
    assert lean.report.peak_bytes < full.report.peak_bytes
    assert " - " in repr(lean)


def test_scores_by_activation():
    model = convolutional()
    data = images()
    activation = rf.pruning.scores.activation(model, data)
    wanda = rf.pruning.scores.wanda(model, data)
    assert set(activation) == {"0.weight", "3.weight", "8.weight"}
    x = torch.cat([b for b, _ in data])
    unfolded = nn.functional.unfold(x, 3, padding=1).movedim(1, 2).reshape(-1, 27)
    torch.testing.assert_close(activation["0.weight"][5].flatten(), unfolded.square().mean(0).sqrt())
    for name, score in wanda.items():
        torch.testing.assert_close(score, activation[name] * model.get_parameter(name).detach().abs())
    # Pruned within each output, these are the masks of wanda.
    first = rf.pruning.wanda(model, data, 0.5, include=["0"]).masks["0.weight"]
    for row, mask in zip(wanda["0.weight"].flatten(1), first.flatten(1), strict=True):
        assert set(row.sort().indices[: int((~mask).sum())].tolist()) == set((~mask).nonzero().flatten().tolist())


# ---- failures --------------------------------------------------------------------------------------------------------


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before, modes):
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("propagate", [True, False])
def test_a_failure_half_way_leaves_the_model_as_it_was(propagate):
    """The data ends with an error in the last stage, when the first is pruned already."""
    model = make_net()
    before, modes = state(model), [m.training for m in model.modules()]

    class Breaking:
        runs = 0

        def __iter__(self):
            Breaking.runs += 1
            yield from loader()
            if Breaking.runs == (4 if propagate else 3):
                raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        rf.pruning.sparse_gpt(model, Breaking(), 0.5, propagate=propagate)
    assert_untouched(model, before, modes)


def test_a_failing_solution_leaves_the_model_as_it_was(monkeypatch):
    model = make_net()
    before, modes = state(model), [m.training for m in model.modules()]
    done = []

    def stop(self, *_):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("rarefy.pruning.calibrated.tqdm.update", stop)
    with pytest.raises(KeyboardInterrupt):
        rf.pruning.sparse_gpt(model, loader(), 0.5)
    assert len(done) == 3
    assert_untouched(model, before, modes)


def test_errors_change_nothing():
    model = make_net()
    before, modes = state(model), [m.training for m in model.modules()]
    data = loader()
    gpt = rf.pruning.sparse_gpt
    for call, kind, message in (
        (lambda: gpt(model, [], 0.5), ValueError, r"\[sparse_gpt\] loader must yield at least one batch, got none"),
        (lambda: gpt(model, data, 1.0), ValueError, r"sparsity must be in \[0, 1\), got 1"),
        (lambda: gpt(model, data, pattern="2:1"), ValueError, "n < m"),
        (lambda: gpt(model, data, pattern="row"), ValueError, "pattern must be unstructured or n:m, got 'row'"),
        (lambda: gpt(model, data, pattern="2:32"), ValueError, r"'blocks.0.up.weight': NM\(n=2, m=32\) needs 32"),
        (lambda: gpt(model, data, 0.5, include=["nowhere"]), ValueError, "got 'nowhere'"),
        (lambda: gpt(model, data, 0.5, include="head"), TypeError, "include must be a list of names, got the string"),
        (lambda: gpt(model, data, 0.5, include=["embedding"]), ValueError, "needs at least one weight of a linear"),
        (lambda: gpt(model, data, 0.5, layers={"nowhere": 0.1}), ValueError, "every name in layers .* got 'nowhere'"),
        (lambda: gpt(model, data, 0.5, layers={"head": 1.5}), ValueError, r"sparsity must be in \[0, 1\), got 1.5"),
        (lambda: gpt(model, data, 0.5, refit=0.5), TypeError, "refit must be a bool or RefitOptions, got float"),
        (lambda: gpt(model, data, 0.5, damping=-1), ValueError, "0 <= damping <= max_damping"),
        (lambda: rf.pruning.refit(model, data, {}), ValueError, "masks must name at least one weight"),
        (lambda: rf.pruning.refit(model, data, {"x": torch.ones(1)}), ValueError, "that of a parameter, got 'x'"),
        (
            lambda: rf.pruning.refit(model, data, {"head.weight": torch.ones(5, 12)}),
            ValueError,
            r"the mask of 'head.weight' must be bool of sizes \[5, 12\], got Float",
        ),
        (
            lambda: rf.pruning.refit(model, data, {"head.weight": torch.ones(5, 11, dtype=torch.bool)}),
            ValueError,
            r"the mask of 'head.weight' must be bool of sizes \[5, 12\], got Bool and \[5, 11\]",
        ),
        (
            lambda: rf.pruning.refit(model, data, {"embedding.weight": torch.ones(20, 12, dtype=torch.bool)}),
            ValueError,
            "needs at least one weight of a linear layer",
        ),
        (
            lambda: rf.pruning.refit(model, data, {"head.weight": torch.ones(5, 12, dtype=torch.bool)}, dense={"y": 1}),
            ValueError,
            "dense must have every weight that has a mask, got none for head.weight",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
        assert_untouched(model, before, modes)


def test_weights_that_are_not_finite():
    """Before any batch runs."""
    model = make_net()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    runs = []
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in 'head.weight'"):
        rf.pruning.wanda(model, loader(), 0.5, forward=lambda m, b: (runs.append(1), m(b)))
    assert len(runs) == 1  # the look at the order of layers


# ---- with pruners ----------------------------------------------------------------------------------------------------


def test_a_pruner_holds_calibrated_masks_in_training():
    model = make_net()
    result = rf.pruning.sparse_gpt(model, loader(), pattern="2:4", exclude=["head"])
    pruner = rf.pruning.Pruner.from_masks(model, result.masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model.blocks[0].up.weight.detach().clone()
    for batch in loader():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert not torch.equal(model.blocks[0].up.weight, before)
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name).ne(0), mask)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_pruner_takes_scores_of_a_model(scope):
    model = convolutional().eval()
    scores = rf.pruning.scores.wanda(model, images())
    include = [name.removesuffix(".weight") for name in scores]
    weights = {name: model.get_parameter(name).detach().clone() for name in scores}
    pruner = rf.pruning.Pruner(model, 0.5, scope=scope, criterion=scores, include=include)
    pruner.step()
    masks = rf.pruning.choose_masks(weights, 0.5, scope=scope, scores=scores)
    for name, mask in masks.items():
        kept = rf.pruning.unpack_mask(mask, weights[name].shape)
        assert torch.equal(model.get_parameter(name), weights[name] * kept)


# ---- torch's and transformers' own layers ----------------------------------------------------------------------------


def test_torch_transformer_layers():
    """Their fused path, which calls no module, is left while layers are watched."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.warns(UserWarning, match="no input reached it"):
        result = rf.pruning.sparse_gpt(model, [torch.randn(8, 10, 16)], 0.5)
    assert sorted(result.masks) == [f"layers.{i}.linear{j}.weight" for i in range(2) for j in (1, 2)]
    reasons = {o.name: o.reason for o in result.report.left_alone}
    assert reasons["layers.0.self_attn.out_proj.weight"] == "no input reached it"


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    dense = copy.deepcopy(model).eval()
    batches = [{"input_ids": torch.randint(40, (4, 12))} for _ in range(3)]
    result = rf.pruning.sparse_gpt(model, batches, pattern="2:4", refit=True, exclude=["lm_head"])
    assert len(result.masks) == 3 * 7
    assert result.report.sparsity == 0.5
    other = copy.deepcopy(dense)
    rf.pruning.wanda(other, batches, pattern="2:4", exclude=["lm_head"])
    with torch.no_grad():
        target = dense(**batches[0]).logits
        errors = [(m.eval()(**batches[0]).logits - target).square().mean().item() for m in (model, other)]
    assert errors[0] < errors[1]
    # Without a cache of keys and values, which is a state, the inputs of blocks are kept.
    runs, third = [], copy.deepcopy(dense)
    third.model.embed_tokens.register_forward_pre_hook(lambda *_: runs.append(1))
    again = rf.pruning.wanda(
        third, batches, pattern="2:4", exclude=["lm_head"], forward=lambda m, batch: m(**batch, use_cache=False)
    )
    assert len(runs) == 1 + 3
    for name, mask in again.masks.items():
        assert (mask != (other.get_parameter(name) != 0)).double().mean() < 0.01
