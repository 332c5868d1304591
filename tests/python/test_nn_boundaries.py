"""Normalizations, activation functions and attention between quantizers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    QConfig,
    calibrate,
    convert,
    load_quantized,
    prepare,
    prepare_qat,
    report,
    save_quantized,
)

KINDS = {
    "LayerNorm": (nn.LayerNorm, (6,)),
    "GroupNorm": (nn.GroupNorm, (2, 6)),
    "RMSNorm": (nn.RMSNorm, (6,)),
    "GELU": (nn.GELU, ("tanh",)),
    "SiLU": (nn.SiLU, ()),
    "Hardswish": (nn.Hardswish, ()),
    "Softmax": (nn.Softmax, (-1,)),
}


def grid(x, q):
    s, z = q.scale.numpy(), q.zero_point.numpy().astype(np.float32)
    return torch.from_numpy((np.clip(np.rint(x.detach().numpy() / s) + z, q.qmin, q.qmax) - z) * s)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [None, "qnn"])
def test_the_result_is_on_a_grid_and_the_input_where_the_target_wants_it(kind, target, tmp_path):
    torch.manual_seed(0)
    of_torch, arguments = KINDS[kind]
    model = nn.Sequential(nn.Linear(6, 6), of_torch(*arguments), nn.Linear(6, 3))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    before = prepare_qat(model, QConfig.int8(target=target))
    assert type(before[1]) is of_torch  # torch's own types stay as they are
    swapped = rf.nn.with_boundaries(model)
    assert type(swapped[1]) is getattr(rf.nn, kind)
    x = torch.randn(4, 6)
    assert torch.equal(swapped(x), model(x))
    prepared = prepare_qat(swapped, QConfig.int8(target=target), x)
    layer = prepared[1]
    assert set(layer.quant._modules) == ({"output"} if target is None else {"input", "output"})
    prepared(x)
    prepared.eval()
    hidden = prepared[0](x)
    inside = hidden if target is None else grid(hidden, layer.quant.input)
    expected = of_torch.forward(model[1], inside.detach())
    torch.testing.assert_close(layer(hidden).detach(), grid(expected, layer.quant.output), rtol=1e-6, atol=1e-6)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in model[1].named_parameters()]
    row = report(prepared).layers[1]
    assert row.kind == kind
    assert "computed in floating point" in row.note
    converted = convert(prepared, x)
    with torch.no_grad():
        y = converted(x)
        torch.testing.assert_close(y, prepared(x), rtol=1e-4, atol=1e-4)
        save_quantized(converted, tmp_path / "model")
        fresh = rf.nn.with_boundaries(nn.Sequential(nn.Linear(6, 6), of_torch(*arguments), nn.Linear(6, 3)))
        assert torch.equal(load_quantized(fresh, tmp_path / "model")(x), y)


def test_with_boundaries_says_what_it_does_not_know():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU())
    only = rf.nn.with_boundaries(model, (nn.GELU,))
    assert [type(m) for m in only] == [nn.Linear, nn.LayerNorm, rf.nn.GELU]
    assert type(model[2]) is nn.GELU
    assert type(rf.nn.with_boundaries(model, inplace=True)[1]) is rf.nn.LayerNorm
    with pytest.raises(ValueError, match=r"\[with_boundaries\] kinds must be of LayerNorm, .*Softmax, got Tanh"):
        rf.nn.with_boundaries(model, (nn.Tanh,))
    with pytest.raises(ValueError, match=r"\[with_boundaries\] model must contain its layers, got a single GELU"):
        rf.nn.with_boundaries(nn.GELU())
    weights = prepare_qat(
        rf.nn.with_boundaries(nn.Sequential(nn.Linear(2, 2), nn.GELU())), QConfig(QConfig.int8().weight)
    )
    assert not weights[1].prepared


class Heads(nn.Module):
    """Attention of two heads, with the products as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attention, self.out = nn.Linear(8, 24), rf.nn.SDPA(), nn.Linear(8, 8)

    def forward(self, x, mask=None, causal=False, scale=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2).flatten(2))


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "truth": {"mask": torch.tensor([[True, False, True], [True, True, False], [False, True, True]])},
    "numbers": {"mask": torch.tensor([[0.0, -1.0, 0.5]] * 3)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("case", MASKS)
def test_attention_equals_the_formula(case):
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(2, 3, 8)
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    options = MASKS[case]
    expected = F.scaled_dot_product_attention(
        q, k, v, options.get("mask"), 0.0, options.get("causal", False), scale=options.get("scale")
    )
    assert torch.equal(
        model.attention(q, k, v, options.get("mask"), 0.0, options.get("causal", False), options.get("scale")), expected
    )
    prepared = calibrate(prepare(model, QConfig.int8()), [x], forward=lambda m, b: m(b, **options)).eval()
    quant = prepared.attention.quant
    assert set(quant._modules) == {"query", "key", "probabilities", "value"}
    q, k, v = (t.detach() for t in prepared.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4))
    scores = grid(q, quant.find("query")) @ grid(k, quant.find("key")).transpose(-2, -1) * options.get("scale", 0.5)
    if options.get("causal"):
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    mask = options.get("mask")
    if mask is not None:
        scores = scores + (mask if mask.is_floating_point() else torch.zeros(3, 3).masked_fill(~mask, float("-inf")))
    by_hand = grid(scores.softmax(-1), quant.find("probabilities")) @ grid(v, quant.find("value"))
    got = prepared.attention(q, k, v, mask, 0.0, options.get("causal", False), options.get("scale"))
    torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-5)
    converted = convert(prepared)
    assert type(converted.attention) is rf.nn.SDPA
    torch.testing.assert_close(converted(x, **options), prepared(x, **options), rtol=1e-4, atol=1e-4)
    assert "no integer product of two activations" in {r.name: r for r in report(converted).layers}["attention"].note


def test_attention_trains_and_comes_back_from_a_folder(tmp_path):
    torch.manual_seed(0)
    model, x = prepare_qat(Heads(), QConfig.int8()), torch.randn(2, 3, 8)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    converted = convert(model)
    save_quantized(converted, tmp_path / "heads")
    with torch.no_grad():
        assert torch.equal(load_quantized(Heads(), tmp_path / "heads")(x), converted(x))
    with pytest.raises(ValueError, match=r"\[SDPA\] attn_mask must not be given beside is_causal"):
        model(x, mask=torch.zeros(3, 3), causal=True)
