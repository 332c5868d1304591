"""rarefy::relu and rarefy.nn.ReLU: torch's values and gradients, one bit saved per element."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import available_instruction_sets
from torch import nn

import rarefy as rf
from rarefy import _core
from rarefy.quantization import QConfig, convert, prepare, prepare_qat

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0,), (1,), (63,), (64,), (65,), (217, 256), (5, 4, 3, 160), (1, 1296)]


def bits(mask: torch.Tensor, n: int) -> torch.Tensor:
    return ((mask[:, None] >> torch.arange(8)) & 1).flatten()[:n].bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_mask(device, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.numel() > 8:
        special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, -1e-30], dtype=dtype)
        x.view(-1)[:7] = special
    y, mask = torch.ops.rarefy.relu_mask(x.to(device))
    torch.testing.assert_close(y.cpu(), torch.relu(x), rtol=0, atol=0, equal_nan=True)
    assert mask.numel() == (x.numel() + 63) // 64 * 8
    flat = x.flatten()
    assert torch.equal(bits(mask.cpu(), x.numel()), ~(flat <= 0))
    assert not ((mask.cpu()[:, None] >> torch.arange(8)) & 1).flatten()[x.numel() :].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_torchs(device, layout, inplace):
    torch.manual_seed(0)
    base = torch.randn(3, 5, 7, 9, device=device)
    view = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(1, 3),
        "sliced": lambda t: t[:, ::2],
    }[layout]
    gradients, results = [], []
    for function in (rf.nn.ReLU(inplace), nn.ReLU(inplace)):
        leaf = base.clone().requires_grad_()
        x = view(leaf * 2)
        y = function(x)
        assert (y is x) == inplace
        (y * y.detach().sin()).sum().backward()
        gradients.append(leaf.grad)
        results.append(y.detach())
    assert torch.equal(*results)
    assert torch.equal(*gradients)


def test_saves_one_bit_per_element():
    saved = []
    x = torch.randn(64, 64, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
        rf.nn.ReLU()(x)
    assert saved == [64 * 64 // 8]


def test_inplace_is_seen_by_autograd():
    x = torch.randn(8, requires_grad=True) * 1
    y = x.sin()
    torch.ops.rarefy.relu_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    leaf = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch.ops.rarefy.relu_(leaf)


def test_gradcheck():
    x = torch.tensor([-1.0, 2.0, 0.5, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.rarefy.relu, (x,))
    assert torch.autograd.gradgradcheck(lambda t: torch.ops.rarefy.relu(t) ** 3, (x,))


def test_instruction_sets_agree(restore_instruction_set):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    results = []
    for name in available_instruction_sets():
        _core.set_instruction_set(name)
        results.append(torch.ops.rarefy.relu_mask(x))
    for y, mask in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(mask, results[0][1])


def test_opcheck():
    for x in (torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)):
        torch.library.opcheck(torch.ops.rarefy.relu.default, (x,))
    torch.library.opcheck(torch.ops.rarefy.relu_mask.default, (torch.randn(3, 70),))


@pytest.mark.parametrize("function", ["relu", "relu_", "relu_mask"])
def test_refuses_integers(function):
    with pytest.raises(TypeError, match=r"\[relu_?\] input must be float32, .* got Long"):
        getattr(torch.ops.rarefy, function)(torch.arange(3))


# --- In models ------------------------------------------------------------------------------------------------------
def network(inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.LayerNorm(4), nn.ReLU(inplace), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_prepare_qat_swaps_and_keeps_numbers(inplace):
    x = torch.randn(2, 2, 6, 6)
    prepared = prepare_qat(network(inplace), QConfig.int8(), x)
    assert type(prepared[1]) is type(prepared[3]) is rf.nn.ReLU
    assert prepared[1].inplace == inplace
    reference = copy.deepcopy(prepared)
    reference[1], reference[3] = nn.ReLU(), nn.ReLU()
    for model in (prepared, reference):
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    for a, b in zip(prepared.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert type(prepare(network(inplace), QConfig.int8())[1]) is nn.ReLU
    assert torch.equal(pickle.loads(pickle.dumps(prepared)).eval()(x), prepared.eval()(x))
    torch.testing.assert_close(convert(prepared)(x), prepared(x), rtol=0, atol=1e-5)


def test_a_fused_result_comes_back_as_it_is():
    x = torch.randn(2, 2, 6, 6)
    prepared = prepare_qat(network(False), QConfig.int8(), x)
    assert prepared[0].relu
    y = prepared[0](x)
    assert prepared[1](y) is y
    z = prepared[1](y.tanh())  # another tensor: rectified again
    assert z is not y
    with torch.no_grad():
        y -= 1.0  # written to: the mark no longer holds
    assert prepared[1](y).min() == 0
    assert y.min() < 0


def test_compiles_as_one_graph():
    x = torch.randn(2, 2, 6, 6)
    prepared = prepare_qat(network(True), QConfig.int8(), x)
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    for a, b in zip(eager.parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_inference_mode():
    x = torch.randn(2, 2, 6, 6)
    prepared = prepare_qat(network(True), QConfig.int8(), x)
    prepared(x)
    prepared.eval()
    expected = prepared(x)
    with torch.inference_mode():
        assert torch.equal(prepared(x), expected)
