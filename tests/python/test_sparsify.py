"""Sparse execution where it is faster, and what zeros are worth."""

import copy
import pickle

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.nn import SparseLinear
from rarefy.pruning import measure, sparsify, to_dense
from rarefy.pruning.sparsify import is_two_of_four

QUICK = {"seconds": 1e-3}


@pytest.fixture(autouse=True)
def one_thread():
    """A busy machine makes two threads wait for each other, which hides what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sparse_model(sparsity: float = 0.98, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 10))
    pruner = rf.pruning.MagnitudePruner(model, sparsity)
    pruner.step()
    pruner.finalize()
    return model.eval().to(dtype)


def layers_of(report: rf.pruning.SparsifyReport) -> dict[str, object]:
    return {layer.name: layer for layer in report.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_stay(dtype):
    model, x = sparse_model(dtype=dtype), torch.randn(4, 512).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        sparse, report = sparsify(model, x, **QUICK)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(sparse(x), expected, **tolerance)
    assert all(type(module) is not SparseLinear for module in model)  # a copy was changed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in report.layers:
        assert layer.samples == [4]
        assert layer.sparse == isinstance(sparse.get_submodule(layer.name), SparseLinear)
        assert layer.sparse == (layer.dense_milliseconds >= 1.1 * layer.sparse_milliseconds)
        assert "as fast as dense" in layer.reason
    dense = to_dense(sparse)
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert [type(module) for module in dense] == [type(module) for module in model]


def test_the_measurement_decides():
    """98 % of a large weight at batch 1 is faster sparse on any machine; a gain that nothing reaches leaves all dense."""
    model, x = sparse_model(), torch.randn(1, 512)
    sparse, report = sparsify(model, x, seconds=0.03)
    assert layers_of(report)["2"].sparse
    assert isinstance(sparse[2], SparseLinear)
    same, report = sparsify(model, x, gain=1000.0, **QUICK)
    assert report.sparse == 0
    assert all(type(module) is not SparseLinear for module in same)
    assert "must be 1000 times, are" in report.layers[0].reason
    assert "0 of 3 linear layers are sparse" in str(report)
    assert "<table>" in report._repr_html_()


def test_blocks_are_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024))
    kept = (torch.rand(256, 256) < 0.05).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with torch.no_grad():
        model[0].weight.mul_(kept)
    sparse, report = sparsify(model, torch.randn(64, 1024), blocks=[(4, 4)], gain=1.0, seconds=0.02)
    assert report.layers[0].block == (4, 4)
    if report.layers[0].sparse:
        assert sparse[0].block == (4, 4)
        assert sparse[0].weight_values.shape == (int(kept.sum()) // 16, 4, 4)
    # scattered weights fill no block
    _, report = sparsify(sparse_model(0.9), torch.randn(1, 512), blocks=[(4, 4)], **QUICK)
    assert {layer.reason for layer in report.layers} == {"no block fits its shape and its zeros"}


class Everything(nn.Module):
    """One layer for every reason to stay dense."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.unused = nn.Linear(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda *_: None)
        self.wide = nn.Linear(16, 16, dtype=torch.float64)
        self.subclass = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
        self.full = nn.Linear(16, 16)
        self.pruned = nn.Linear(16, 16)
        self.twice = nn.ModuleList([nn.Linear(16, 16)])
        self.again = self.twice[0]
        with torch.no_grad():
            self.twice[0].weight.mul_(torch.rand(16, 16) < 0.1)

    def forward(self, x):
        for layer in (self.tied, self.hooked, self.subclass, self.full, self.pruned, self.twice[0], self.again):
            x = layer(x)
        return self.wide(x.double())


def test_why_layers_stay_dense():
    torch.manual_seed(0)
    model = Everything()
    rf.pruning.MagnitudePruner(model, 0.5, include=["pruned"])
    _, report = sparsify(model, torch.randn(3, 16), **QUICK)
    reasons = {name: layer.reason for name, layer in layers_of(report).items()}
    assert reasons["tied"] == "its weight is also embedding.weight"
    assert reasons["unused"] == "the example does not run it"
    assert reasons["hooked"] == "it has hooks"
    assert reasons["wide"] == "there are kernels for float32 and bfloat16, not for Double"
    assert reasons["subclass"] == "it is a NonDynamicallyQuantizableLinear, not an nn.Linear"
    assert reasons["full"] == "sparsity 0.000 is below 0.5: not measured"
    assert reasons["pruned"] == "a pruner is at work on it: finalize() it first"
    assert "again" not in reasons
    assert layers_of(report)["twice.0"].samples == [3, 3]


def test_a_module_with_two_names_stays_one():
    torch.manual_seed(0)
    model = Everything()
    model.twice[0] = model.again = nn.Linear(2048, 2048)
    with torch.no_grad():
        model.again.weight.mul_(torch.rand(2048, 2048) < 0.01)
    model.forward = lambda x: model.again(model.twice[0](x))
    sparse, report = sparsify(model, torch.randn(1, 2048), inplace=True, seconds=0.02)
    assert sparse is model
    assert layers_of(report)["twice.0"].sparse
    assert sparse.again is sparse.twice[0]
    assert isinstance(sparse.again, SparseLinear)
    back = to_dense(sparse, inplace=True)
    assert back.again is back.twice[0]
    assert type(back.again) is nn.Linear


def test_the_model_itself_may_be_a_layer():
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048)
    with torch.no_grad():
        model.weight.mul_(torch.rand(2048, 2048) < 0.01)
    x = torch.randn(1, 2048)
    sparse, report = sparsify(model, x, seconds=0.02)
    assert isinstance(sparse, SparseLinear)
    assert torch.equal(to_dense(sparse).weight, model.weight)
    _, report = sparsify(model, x, inplace=True, **QUICK)
    assert report.layers[0].reason == "it is the model itself, which cannot be replaced in place"


def forms(model):
    return [(type(layer), getattr(layer, "block", None)) for layer in model]


def test_copies_and_files(tmp_path):
    sparse, _ = sparsify(sparse_model(), torch.randn(1, 512), seconds=0.02)
    x = torch.randn(3, 512)
    with torch.no_grad():
        for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert torch.equal(other(x), sparse(x))
        state = sparse.state_dict()
        again, _ = sparsify(sparse_model(0.97), torch.randn(1, 512), seconds=0.02)
        if forms(again) == forms(sparse):  # measurements decide
            again.load_state_dict(state)
            assert torch.equal(again(x), sparse(x))
        rf.pruning.save_sparse(sparse, tmp_path / "x")
        assert all(torch.equal(v, state[k]) for k, v in rf.pruning.load_sparse(tmp_path / "x").items())


def test_training_is_refused():
    sparse, _ = sparsify(sparse_model(), torch.randn(1, 512), seconds=0.02)
    with pytest.raises(NotImplementedError, match="is for inference and has no gradient: train the dense model"):
        sparse(torch.randn(2, 512)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.5}, "gain must be at least 1, got 0.5"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"least_sparsity": 1.5}, r"least_sparsity must be in \[0, 1\], got 1.5"),
        ({"blocks": []}, "blocks must not be empty"),
        ({"blocks": [(0, 4)]}, "blocks must have positive sizes, got 0 x 4"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=rf"\[sparsify\] {message}"):
        sparsify(sparse_model(), torch.randn(1, 512), **options)


def test_measure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 512), nn.Linear(512, 10))
    pruner = rf.pruning.MagnitudePruner(model, 0.9, scope="local")
    pruner.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    report = measure(model, x, seconds=0.02, layer_seconds=1e-3)
    kept = [int(model[i].weight.count_nonzero()) for i in (0, 2, 3)]
    assert report.macs == 2 * (36 * model[0].weight.numel() + model[2].weight.numel() + model[3].weight.numel())
    assert report.effective_macs == 2 * (36 * kept[0] + kept[1] + kept[2])
    assert report.file.ratio < 0.2
    assert report.dense_milliseconds > 0
    assert report.layers.sparse == 0  # the pruner is at work
    assert report.sparse_milliseconds == report.dense_milliseconds
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    pruner.finalize()
    report = measure(model, x, seconds=0.02, layer_seconds=1e-3)
    assert all("a pruner" not in layer.reason for layer in report.layers.layers)
    for text in ("bytes on disk", "MACs", "milliseconds", "linear layers are sparse"):
        assert text in str(report)
    assert "<table>" in report._repr_html_()


def test_two_of_four():
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not is_two_of_four(torch.tensor([[1.0, 4, 2, 0]]))
    assert not is_two_of_four(torch.ones(4, 6))


@pytest.mark.cuda
def test_semi_structured_on_cuda(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096)).half().to(cuda)
    with torch.no_grad():
        groups = model[0].weight.unflatten(1, (-1, 4))
        groups.mul_(groups.abs().argsort(2).argsort(2) >= 2)
    x = torch.randn(4096, 4096, device=cuda).half()
    with torch.no_grad():
        expected = model(x)
        sparse, report = sparsify(model, x, gain=1.0, seconds=0.1)
        torch.testing.assert_close(sparse(x), expected, rtol=2e-2, atol=2e-2)
        assert "its weight is not" in layers_of(report)["1"].reason
        back = to_dense(sparse)
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
