"""Embedding, TransposedLinear, Mul, Cat; tied weights and shared modules."""

import copy
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    PerChannel,
    QConfig,
    Scheme,
    calibrate,
    convert,
    prepare,
    prepare_qat,
    report,
    set_state,
)


def grid(x: torch.Tensor, q) -> torch.Tensor:
    """Fake quantization by the formula, in float32 numpy."""
    shape = [1] * x.dim()
    if q.axis is not None:
        shape[q.axis] = -1
    s, z = q.scale.numpy().reshape(shape), q.zero_point.numpy().reshape(shape).astype(np.float32)
    return torch.from_numpy((np.clip(np.rint(x.detach().numpy() / s) + z, q.qmin, q.qmax) - z) * s)


# --- Embedding ------------------------------------------------------------------------------------------------------
PER_TENSOR = QConfig(Scheme(), Scheme(symmetric=False))


@pytest.mark.parametrize("config", [QConfig.int8(), QConfig(Scheme(bits=3, granularity=PerChannel(0))), PER_TENSOR])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 4), (2, 1, 3)], ids=str)
def test_embedding_equals_the_formula(config, shape):
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Embedding(11, 7, padding_idx=2)), config)
    layer = model[0]
    weight = layer.weight.detach().abs().amax(1, keepdim=True)
    if config is PER_TENSOR:
        weight = weight.max().expand_as(weight)
    bound = layer.quant.weight.qmax
    rows = torch.round(layer.weight.detach() / (weight / bound).clamp_min(2**-60)) * (weight / bound)
    indices = torch.randint(0, 11, shape)
    torch.testing.assert_close(model(indices).detach(), rows[indices], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(indices).detach(), grid(layer.weight, layer.quant.weight)[indices], rtol=0, atol=0)
    converted = convert(model)
    assert torch.equal(converted(indices), model.eval()(indices))
    assert converted[0].integer_weight.dtype == torch.int8
    assert converted[0].integer_weight.shape == (11, 7)


def test_embedding_gradient_is_that_of_the_rows():
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Embedding(6, 4, padding_idx=0)), QConfig.int8())
    indices = torch.tensor([[0, 1, 1], [3, 1, 0]])
    upstream = torch.randn(2, 3, 4)
    model(indices).backward(upstream)
    reference = nn.Embedding(6, 4, padding_idx=0)
    reference(indices).backward(upstream)
    torch.testing.assert_close(model[0].weight.grad, reference.weight.grad)


def test_embedding_ranges_follow_the_rows_until_frozen():
    model = prepare_qat(nn.Sequential(nn.Embedding(4, 3)), QConfig.int8())
    quantizer = model[0].quant.weight
    assert quantizer.calibrated
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    before = quantizer.scale.clone()
    model(torch.tensor([1, 1]))
    assert torch.equal(quantizer.scale / before, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    set_state(model, observe=False)
    frozen = model(torch.tensor([0, 1]))
    assert torch.equal(quantizer.scale / before, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(frozen, grid(model[0].weight, quantizer)[:2])
    set_state(model, quantize=False)
    assert torch.equal(model(torch.tensor([0, 1])), model[0].weight[:2])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm is not supported: it rewrites the weight in forward"),
        ({"sparse": True}, "sparse gradients are not supported"),
    ],
)
def test_embedding_is_refused_with_its_reason(options, reason):
    prepared = prepare_qat(nn.Sequential(nn.Embedding(4, 3, **options), nn.Linear(3, 2)), QConfig.int8(), strict=False)
    assert type(prepared[0]) is nn.Embedding
    assert report(prepared).skipped[0].note == reason


def test_embedding_refuses_a_nan_row():
    model = prepare_qat(nn.Sequential(nn.Embedding(4, 3)), QConfig.int8())
    with torch.no_grad():
        model[0].weight[2, 1] = float("nan")
    model(torch.tensor([0, 1]))  # not looked up
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"\[choose_qparams\]"):
        model(torch.tensor([0, 2]))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k != "0.weight")


# --- Hugging Face's Conv1D -----------------------------------------------------------------------------------------------
@pytest.fixture
def conv1d_type(monkeypatch):
    """``transformers.pytorch_utils.Conv1D`` itself, or a class of that name and behaviour."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        module = types.ModuleType("transformers.pytorch_utils")

        class Conv1D(nn.Module):
            def __init__(self, nf: int, nx: int) -> None:
                super().__init__()
                self.nf, self.nx = nf, nx
                self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.02), nn.Parameter(torch.zeros(nf))

            def forward(self, x):
                return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)

        Conv1D.__module__, Conv1D.__qualname__ = module.__name__, "Conv1D"
        module.Conv1D = Conv1D
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Conv1D


def test_transposed_linear_is_linear_of_the_transpose(conv1d_type):
    torch.manual_seed(0)
    layer = conv1d_type(5, 9)
    nn.init.normal_(layer.bias)
    reference = nn.Linear(9, 5)
    with torch.no_grad():
        reference.weight.copy_(layer.weight.t())
        reference.bias.copy_(layer.bias)
    model = prepare_qat(nn.Sequential(layer), QConfig.int8())
    reference = prepare_qat(nn.Sequential(reference), QConfig.int8())
    assert type(model[0]) is rf.nn.TransposedLinear
    assert model[0].weight.shape == (9, 5)
    assert model[0].quant.weight.axis == 1
    assert (model[0].nf, model[0].nx) == (5, 9)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(model[0].quant.weight.scale, reference[0].quant.weight.scale)
    (model(x) ** 2).mean().backward()
    (reference(x) ** 2).mean().backward()
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad.t())
    converted = convert(model)
    assert converted[0].integer_weight.shape == (9, 5)
    assert torch.equal(converted[0].integer_weight.t(), convert(reference)[0].integer_weight)
    torch.testing.assert_close(converted(x), model.eval()(x), rtol=0, atol=1e-6)
    assert torch.equal(converted(x), convert(reference)(x))


def test_transposed_linear_weight_only(conv1d_type):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(conv1d_type(5, 9)), QConfig(weight=Scheme(bits=4, granularity=PerChannel(0))))
    x = torch.randn(4, 9)
    torch.testing.assert_close(convert(model)(x), model(x), rtol=0, atol=1e-6)


# --- Mul and Cat ------------------------------------------------------------------------------------------------------
class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mul = rf.nn.Mul()

    def forward(self, a, b):
        return torch.relu(self.mul(a, b))


def test_mul_equals_the_formula():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5), torch.rand(4, 1)
    model = Gate()
    assert torch.equal(model(a, b), torch.relu(a * b))
    prepared = prepare_qat(model, QConfig.int8(), (a, b))
    assert prepared.mul.relu
    prepared(a, b)
    quant = prepared.mul.quant
    expected = torch.relu(grid(a, quant.input0) * grid(b, quant.input1))
    assert torch.equal(prepared.eval()(a, b), expected)
    assert torch.equal(convert(prepared)(a, b), expected)


class Join(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cat = rf.nn.Cat(dim)

    def forward(self, *xs):
        return self.cat(*xs)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_cat_shares_one_grid(dim, count):
    torch.manual_seed(0)
    sizes = [[2, 3, 5] for _ in range(count)]
    for i, size in enumerate(sizes):
        size[dim] += i
    xs = [torch.randn(size) * (i + 1) for i, size in enumerate(sizes)]
    assert torch.equal(Join(dim)(*xs), torch.cat(xs, dim))
    prepared = prepare_qat(Join(dim), QConfig.int8(), tuple(xs))
    out = prepared(*xs)
    quantizer = prepared.cat.quant.input
    joined = torch.cat(xs, dim)
    assert quantizer.min_val.item() == joined.min().item()
    assert quantizer.max_val.item() == joined.max().item()
    assert torch.equal(out, torch.cat([grid(x, quantizer) for x in xs], dim))
    integers = torch.cat([quantizer.quantize_to_integer(x) for x in xs], dim)
    assert torch.equal((integers.float() - quantizer.zero_point) * quantizer.scale, out)
    assert "dim=" in repr(prepared.cat)


def test_mul_and_cat_need_an_activation_scheme():
    model = nn.Sequential(nn.Linear(2, 2))
    model.mul, model.cat = rf.nn.Mul(), rf.nn.Cat()
    skipped = report(prepare_qat(model, QConfig(weight=Scheme()))).skipped
    assert {row.name: row.note for row in skipped} == dict.fromkeys(
        ("mul", "cat"), "the configuration quantizes weights only"
    )


def test_calibration_of_mul_and_cat():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mul, self.cat = rf.nn.Mul(), rf.nn.Cat(1)

        def forward(self, x):
            return self.cat(self.mul(x, x), x)

    x = torch.randn(4, 6)
    prepared = prepare(Both(), QConfig.int8())
    assert torch.equal(prepared(x), Both()(x))
    calibrate(prepared, [x, 2 * x])
    assert prepared.cat.quant.input.max_val.item() == (2 * x).square().max().item()


# --- Tied and shared ------------------------------------------------------------------------------------------------
class Language(nn.Module):
    """Embedding and head over one Parameter, and a block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.block(torch.tanh(self.block(self.embedding(ids)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_tied_weights_stay_one_parameter(inplace):
    torch.manual_seed(0)
    model = Language()
    given = model.embedding.weight
    prepared = prepare_qat(model, QConfig.int8(), torch.tensor([[1, 2]]), inplace=inplace)
    assert prepared.embedding.weight is prepared.head.weight
    assert (prepared.embedding.weight is given) == inplace
    assert len(list(prepared.parameters())) == 3
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    F.cross_entropy(prepared(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    assert prepared.embedding.weight is prepared.head.weight
    assert copy.deepcopy(prepared).embedding.weight is not prepared.head.weight
    clone = copy.deepcopy(prepared)
    assert clone.embedding.weight is clone.head.weight
    prepared(ids)
    prepared.eval()
    converted = convert(prepared)
    assert torch.equal(converted.embedding.integer_weight, converted.head.integer_weight)
    torch.testing.assert_close(converted(ids), prepared(ids), rtol=0, atol=1e-5)


def test_a_type_override_reaches_embeddings():
    config = QConfig.int8(overrides={nn.Embedding: None})
    prepared = prepare_qat(Language(), config)
    assert type(prepared.embedding) is nn.Embedding
    assert type(prepared.head) is rf.nn.Linear
    assert prepared.embedding.weight is prepared.head.weight


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    prepared = prepare_qat(Language(), QConfig.int8())
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prepared(ids)
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for a, b in zip(eager.parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for (name, a), b in zip(eager.state_dict().items(), prepared.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_overrides_name_what_could_match():
    with pytest.raises(ValueError, match=re.escape("override 'heads' must match a layer that can be quantized")):
        prepare_qat(Language(), QConfig.int8(overrides={"heads": None}))
