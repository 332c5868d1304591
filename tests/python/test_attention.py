"""``rarefy.nn.MultiheadAttention`` beside torch's, and beside a loop over heads where torch has none."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import rarefy as rf

BATCH, TARGET, SOURCE, WIDTH, HEADS = 3, 5, 4, 12, 2


def as_ours(attention: nn.MultiheadAttention) -> rf.nn.MultiheadAttention:
    """The same parameters in a module of ours."""
    ours = rf.nn.MultiheadAttention(
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        attention.in_proj_bias is not None,
        attention.bias_k is not None,
        attention.add_zero_attn,
        attention.kdim,
        attention.vdim,
        attention.batch_first,
        dtype=torch.float64,
    )
    ours.load_state_dict(attention.state_dict())
    return ours.train(attention.training)


def randomized(attention):
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return attention


def inputs(kind, widths, batch_first):
    """Query, key and value: one tensor, two, or three; in the order that the module takes."""

    def draw(length, width):
        x = torch.randn(length, BATCH, width, dtype=torch.float64)
        return x.transpose(0, 1).contiguous() if batch_first else x

    if kind == "self":
        x = draw(TARGET, WIDTH)
        return x, x, x
    key = draw(SOURCE, widths[0])
    return draw(TARGET, WIDTH), key, key if kind == "memory" else draw(SOURCE, widths[1])


def masks(kind, target, source):
    """attn_mask and key_padding_mask of a kind; no row is masked entirely."""
    attn = torch.rand(target, source) < 0.3
    attn[:, 0] = False
    per_head = torch.rand(BATCH * HEADS, target, source) < 0.3
    per_head[:, :, 0] = False
    padding = torch.rand(BATCH, source) < 0.3
    padding[:, 0] = False
    return {
        "none": (None, None),
        "bool": (attn, None),
        "per head": (per_head, None),
        "padding": (None, padding),
        "both": (attn, padding),
        "floating": (torch.randn(target, source, dtype=torch.float64), torch.randn(BATCH, source, dtype=torch.float64)),
    }[kind]


MASKS = ("none", "bool", "per head", "padding", "both", "floating")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_computes_what_torch_computes(kind, mask):
    flags = itertools.product([False, True], repeat=5)
    for seed, (bias, add_bias_kv, add_zero_attn, batch_first, separate) in enumerate(flags):
        if separate and kind != "three":
            continue
        torch.manual_seed(seed)
        widths = (7, 9) if separate else (WIDTH, WIDTH)
        reference = nn.MultiheadAttention(
            WIDTH,
            HEADS,
            dropout=0.25,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=widths[0],
            vdim=widths[1],
            batch_first=batch_first,
            dtype=torch.float64,
        )
        ours = as_ours(randomized(reference))
        query, key, value = inputs(kind, widths, batch_first)
        attn_mask, padding = masks(mask, TARGET, TARGET if kind == "self" else SOURCE)
        for training, need_weights, average in itertools.product([True, False], repeat=3):
            results = []
            for module in (reference.train(training), ours.train(training)):
                torch.manual_seed(99)  # of the dropout
                module.zero_grad()
                y, weights = module(query, key, value, padding, need_weights, attn_mask, average)
                (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
                results.append((y, weights, {name: p.grad for name, p in module.named_parameters()}))
            (y, weights, grads), (y_, weights_, grads_) = results
            torch.testing.assert_close(y_, y, rtol=1e-10, atol=1e-12)
            assert (weights is None) == (weights_ is None) == (not need_weights)
            if weights is not None:
                torch.testing.assert_close(weights_, weights, rtol=1e-10, atol=1e-12)
            assert grads.keys() == grads_.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grads_[name], grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch_and_causal(need_weights, batch_first):
    reference = randomized(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, dtype=torch.float64)).eval()
    ours = as_ours(reference)
    x, memory = torch.randn(TARGET, WIDTH).double(), torch.randn(SOURCE, WIDTH).double()
    per_head = torch.randn(HEADS, TARGET, SOURCE).double()
    per_head[..., 0] = 1
    padding = torch.tensor([False, True, False, False])
    for arguments in (
        {},
        {"attn_mask": per_head},
        {"attn_mask": per_head < 0, "key_padding_mask": padding, "average_attn_weights": False},
    ):
        expected = reference(x, memory, memory, need_weights=need_weights, **arguments)
        found = ours(x, memory, memory, need_weights=need_weights, **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    x = torch.randn(BATCH, TARGET, WIDTH).double()
    causal = torch.ones(x.shape[1 if batch_first else 0], x.shape[1 if batch_first else 0], dtype=torch.bool).triu(1)
    padding = torch.zeros(x.shape[0 if batch_first else 1], causal.shape[0], dtype=torch.bool)
    padding[0, -1] = True
    for extra in ({}, {"key_padding_mask": padding}):
        expected = reference(x, x, x, need_weights=need_weights, attn_mask=causal, is_causal=True, **extra)
        found = ours(x, x, x, need_weights=need_weights, attn_mask=causal, is_causal=True, **extra)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def by_hand(attention, x, mask):
    """One head after the other."""
    h, k, v = attention.num_heads, attention.head_dim, attention.v_head_dim
    q_weight, k_weight, v_weight = attention.in_proj_weight.split([h * k, h * k, h * v])
    q_bias, k_bias, v_bias = attention.in_proj_bias.split([h * k, h * k, h * v])
    heads = []
    for i in range(h):
        q = x @ q_weight[i * k : (i + 1) * k].T + q_bias[i * k : (i + 1) * k]
        key = x @ k_weight[i * k : (i + 1) * k].T + k_bias[i * k : (i + 1) * k]
        value = x @ v_weight[i * v : (i + 1) * v].T + v_bias[i * v : (i + 1) * v]
        heads.append(torch.softmax(attention.scale * q @ key.transpose(-1, -2) + mask, -1) @ value)
    return torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize(("heads", "head_dim", "v_head_dim"), [(1, 5, 5), (3, 2, 7), (5, 4, 1)])
def test_heads_of_any_width(heads, head_dim, v_head_dim):
    attention = rf.nn.MultiheadAttention(
        WIDTH, heads, batch_first=True, head_dim=head_dim, v_head_dim=v_head_dim, scale=0.3, dtype=torch.float64
    )
    randomized(attention)
    x = torch.randn(BATCH, TARGET, WIDTH, dtype=torch.float64)
    mask = torch.randn(TARGET, TARGET, dtype=torch.float64)
    expected = by_hand(attention, x, mask)
    for need_weights in (True, False):
        y, _ = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x, x, x)[0], attention(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layers_call_it_in_evaluation():
    """Their own path reads the weights as those of heads that add up to the width."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    for block in encoder.layers:
        block.self_attn = rf.nn.MultiheadAttention(WIDTH, 3, batch_first=True, head_dim=2, dtype=torch.float64)
    x = torch.randn(BATCH, TARGET, WIDTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, TARGET, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad(), pytest.raises(ValueError, match="must not be nested tensors: set use_nested_tensor = False"):
        encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    calls = []
    for block in encoder.layers:
        block.self_attn.forward = lambda *args, _f=block.self_attn.forward, **kw: calls.append(1) or _f(*args, **kw)
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    torch.testing.assert_close(y, encoder(x, src_key_padding_mask=padding), rtol=1e-12, atol=1e-12)
    assert y.shape == x.shape


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] num_heads must divide embed_dim"):
        rf.nn.MultiheadAttention(10, 3)
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] sizes must be at least 1"):
        rf.nn.MultiheadAttention(10, 3, head_dim=0)
    attention = rf.nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(TARGET, BATCH, WIDTH)
    with pytest.raises(ValueError, match="attn_mask must be given where is_causal"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\), got \(5, 4\)"):
        attention(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(3, 5\), got \(5, 3\)"):
        attention(x, x, x, key_padding_mask=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="must all have 3 dimensions, or 2 without a batch, got 3, 2 and 2"):
        attention(x, x[0], x[0])
    with pytest.raises(TypeError, match=r"attn_mask must be bool or floating point, got torch.int64"):
        attention(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
