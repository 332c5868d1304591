"""Linear layers with adapters: over float, int8 and NF4 bases."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf

BASES = ("float", "int8", "nf4")
NORMAL_FLOAT = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4_by_loops(weight, block=64, scale_block=256):
    """Block by block: the largest magnitude, kept in 8 bits around the mean of all; the nearest of sixteen values."""
    w = weight.numpy().astype(np.float32)
    places = [(r, c) for r in range(w.shape[0]) for c in range(0, w.shape[1], block)]
    largest = np.array([np.abs(w[r, c : c + block]).max() for r, c in places], np.float32)
    scale = np.where(largest == 0, np.float32(1), largest)
    mean = np.float32(scale.astype(np.float64).mean())
    back = scale.copy()
    for start in range(0, len(scale), scale_block):
        d = scale[start : start + scale_block] - mean
        greatest = np.abs(d).max()
        step = np.float32(1) if greatest == 0 else np.float32(np.float64(greatest) / 127)
        back[start : start + scale_block] = np.clip(np.rint(d / step), -127, 127).astype(np.float32) * step + mean
    values, out = np.array(NORMAL_FLOAT, np.float32), np.empty_like(w)
    for (r, c), s in zip(places, back, strict=True):
        distance = np.abs((w[r, c : c + block] / s)[:, None] - values[None])
        out[r, c : c + block] = values[distance.argmin(1)] * s
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", [(3, 64), (5, 130), (1, 1), (70, 257), (4, 63)], ids=str)
def test_nf4_is_packed_and_comes_back(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[0] = 0
    codes, scale_codes, steps, mean = torch.ops.rarefy.pack_nf4(weight)
    assert codes.dtype == torch.uint8
    assert codes.shape == (shape[0], (shape[1] + 1) // 2)
    assert scale_codes.dtype == torch.int8
    back = torch.ops.rarefy.unpack_nf4(codes, scale_codes, steps, mean, shape[1])
    torch.testing.assert_close(back, nf4_by_loops(weight), rtol=1e-6, atol=1e-7)
    half = torch.ops.rarefy.unpack_nf4(codes, scale_codes, steps, mean, shape[1], dtype=torch.bfloat16)
    assert torch.equal(half, back.bfloat16())
    torch.library.opcheck(torch.ops.rarefy.unpack_nf4, (codes, scale_codes, steps, mean, shape[1]))


def test_nf4_takes_little_more_than_four_bits():
    packed = torch.ops.rarefy.pack_nf4(torch.randn(256, 1024))
    bits = 8 * sum(t.numel() * t.element_size() for t in packed) / (256 * 1024)
    assert 4.125 <= bits < 4.13


def test_nf4_errors():
    with pytest.raises(
        ValueError, match=r"\[pack_nf4\] weight must have 2 dimensions and no empty one, got shape \[3\]"
    ):
        torch.ops.rarefy.pack_nf4(torch.randn(3))
    with pytest.raises(ValueError, match=r"\[pack_nf4\] weight must be finite"):
        torch.ops.rarefy.pack_nf4(torch.full((2, 2), float("nan")))
    with pytest.raises(TypeError, match=r"\[pack_nf4\] weight must be floating point, got Int"):
        torch.ops.rarefy.pack_nf4(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[pack_nf4\] block and scale_block must be at least 1, got 0 and 256"):
        torch.ops.rarefy.pack_nf4(torch.ones(2, 2), 0)
    packed = torch.ops.rarefy.pack_nf4(torch.randn(2, 10))
    with pytest.raises(ValueError, match=r"\[unpack_nf4\] codes, scales and 12 columns must fit together"):
        torch.ops.rarefy.unpack_nf4(*packed, 12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula_and_only_the_adapters_train(base, bias):
    torch.manual_seed(0)
    linear = nn.Linear(70, 9, bias=bias)
    layer = rf.nn.LoRALinear(linear, rank=4, alpha=6.0, base=base)
    x = torch.randn(5, 3, 70)
    weight = {
        "float": lambda: linear.weight.detach(),
        "int8": lambda: (
            torch.round(linear.weight.detach() / (s := linear.weight.detach().abs().amax(1, True) / 127)) * s
        ),
        "nf4": lambda: nf4_by_loops(linear.weight.detach()),
    }[base]()
    torch.testing.assert_close(layer.base_weight().detach(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-5)  # lora_b is zero
    nn.init.normal_(layer.lora_b)
    expected = F.linear(x, weight, linear.bias) + 1.5 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}
    names = {"float": ["weight"], "int8": ["weight", "weight_scale"]}.get(
        base, [f"weight_{n}" for n in ("codes", "scale_codes", "scale_steps", "scale_mean")]
    )
    assert set(layer.state_dict()) == {*names, "lora_a", "lora_b", *(["bias"] if bias else [])}


@pytest.mark.parametrize("base", BASES)
def test_merging_is_undone_exactly(base):
    torch.manual_seed(0)
    layer = rf.nn.LoRALinear(nn.Linear(70, 9), rank=4, base=base)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 70)
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.is_merged
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    plain = layer.merged()
    assert torch.equal(plain(x), layer(x))
    assert type(plain) is nn.Linear
    assert state.keys() == layer.state_dict().keys()
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    again = rf.nn.LoRALinear(nn.Linear(70, 9), rank=4, base=base)
    again.load_state_dict(state)
    assert torch.equal(again(x), before)


@pytest.mark.parametrize("base", BASES)
def test_a_model_learns_with_its_adapters(base):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    adapted = rf.nn.add_lora(model, rank=4, alpha=8.0, base=base)
    assert all(p.requires_grad == ("lora" in n) for n, p in adapted.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    frozen = {n: v.clone() for n, v in adapted.state_dict().items() if "lora" not in n}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(frozen[n], v) for n, v in adapted.state_dict().items() if "lora" not in n)
    merged = rf.nn.merge_lora(adapted)
    assert [type(m) for m in merged] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-3, atol=1e-3)


def test_dropout_is_of_training_alone_and_types_follow_the_input():
    torch.manual_seed(0)
    layer = rf.nn.LoRALinear(nn.Linear(16, 8), rank=4, dropout=0.5, base="nf4")
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    half = rf.nn.LoRALinear(nn.Linear(16, 8).bfloat16(), rank=4, base="nf4")
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.lora_a.dtype == torch.bfloat16


def test_errors():
    linear = nn.Linear(6, 4)
    for changes, message in (
        ({"rank": 5}, r"rank must be within \[1, 4\], got 5"),
        ({"rank": 0}, r"rank must be within \[1, 4\], got 0"),
        ({"rank": 2, "dropout": 1.0}, r"dropout must be within \[0, 1\), got 1.0"),
        ({"rank": 2, "base": "int4"}, "base must be 'float', 'int8' or 'nf4', got 'int4'"),
    ):
        with pytest.raises(ValueError, match=rf"\[LoRALinear\] {message}"):
            rf.nn.LoRALinear(linear, **changes)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"\[add_lora\] target 'fc' must match a linear layer, but matches none of: 0"):
        rf.nn.add_lora(model, ["fc"], rank=2)
    with pytest.raises(ValueError, match=r"\[add_lora\] model must contain its layers, got a single Linear"):
        rf.nn.add_lora(linear)
    with pytest.raises(ValueError, match=r"\[merge_lora\] the model must contain layers with adapters"):
        rf.nn.merge_lora(model)
