"""Tensors as formats store them: the way back is what simulating gives, bit for bit; sizes; codes of the standards."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from format_reference import MINIFLOATS, values_of
from strategies import FLOAT_TYPES
from test_formats import data

from rarefy.quantization import (
    MX,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    Minifloat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizedTensorParts,
    Scheme,
    Ternary,
    quantize_to,
)

ops = torch.ops.rarefy

SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=4, granularity=PerGroup(5)),
    Scheme(bits=4, symmetric=False, granularity=PerGroup(5, 0)),
    Scheme(bits=3, granularity=PerChannel(0)),
    Scheme(bits=11, granularity=PerBlock(2, 3)),
    Scheme(bits=16, symmetric=False, granularity=PerToken()),
    Scheme(format=Minifloat.e4m3()),
    Scheme(format=Minifloat.e5m2(), granularity=PerChannel(1), power_of_two=True),
    Scheme(format=Minifloat.e2m3(), granularity=PerGroup(4)),
    Scheme(format=Minifloat(3, 4, 5, "ieee")),
    *(Scheme(format=MX(element)) for element in (*MINIFLOATS, "int8")),
    Scheme(format=MX("e2m1"), granularity=PerGroup(3, 0)),
    Scheme(format=NVFP4()),
    Scheme(format=NF4()),
    Scheme(format=NF4(True, 3), granularity=PerGroup(8)),
    Scheme(format=Codebook(16), granularity=PerChannel(0)),
    Scheme(format=Codebook(5)),
    Scheme(format=Binary(), granularity=PerChannel(0)),
    Scheme(format=Ternary(), granularity=PerGroup(7)),
]


def simulated(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What the format makes of x with the scales that x itself gives."""
    scale = zero = torch.empty(0)
    if isinstance(scheme.format, Codebook):
        scale = ops.kmeans_codebook(x, scheme.format.entries, scheme.block_axis, scheme.block)
    elif scheme.needs_range:
        scale, zero = ops.scheme_qparams(x, scheme.to_json())
        if scheme.is_plain:
            return ops.fake_quantize(x, scale, zero, scheme.axis, scheme.qmin, scheme.qmax)
    return ops.simulate(x, scale, zero, scheme.to_json())


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip(scheme, dtype):
    for shape in [(6, 37), (1, 1), (4, 3, 10)]:
        x = data(shape, dtype)
        parts = quantize_to(x, scheme)
        back = parts.dequantize()
        assert back.dtype is dtype
        expected = simulated(x, scheme)
        assert torch.equal(back, expected)
        assert torch.equal(torch.signbit(back), torch.signbit(expected))
        # From the parts alone, as a file would hold them.
        again = QuantizedTensorParts(Scheme.from_json(scheme.to_json()), list(shape), dtype, parts.tensors)
        assert torch.equal(again.dequantize(), back)
        assert torch.equal(
            quantize_to(x.t().contiguous().t() if x.dim() == 2 else x, scheme).tensors["data"].view(torch.uint8),
            parts.tensors["data"].view(torch.uint8),
        )


@pytest.mark.parametrize(
    ("scheme", "bits_each"),
    [
        (Scheme(bits=4, granularity=PerGroup(128)), 4 + 32 / 128),
        (Scheme(format=NF4()), 4 + 32 / 64),
        (Scheme(format=NF4(True)), 4 + 8 / 64 + 32 / (64 * 256)),
        (Scheme(format=MX("e4m3")), 8 + 8 / 32),
        (Scheme(format=MX("e2m3")), 6 + 8 / 32),
        (Scheme(format=NVFP4()), 4 + 8 / 16),
        (Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0)), 8 + 32 / 1024),
        (Scheme(format=Codebook(16)), 4),
        (Scheme(format=Binary()), 1),
        (Scheme(format=Ternary()), 2),
    ],
    ids=str,
)
def test_bytes(scheme, bits_each):
    x = torch.randn(256, 1024)
    assert quantize_to(x, scheme).nbytes == pytest.approx(x.numel() * bits_each / 8, abs=72)


def test_codes_are_those_of_the_standards():
    x = torch.tensor([[448.0, -1.5, 2.0**-9, 0.0, -0.0, 3.0] + [1.0] * 26])
    parts = quantize_to(x, Scheme(format=MX("e4m3")))
    assert parts.tensors["scale"].tolist() == [[127]]
    assert parts.tensors["data"].dtype is torch.float8_e4m3fn
    assert torch.equal(parts.tensors["data"].float(), x)
    for name, kind in (
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
    ):
        numbers = np.array(values_of(*MINIFLOATS[name]), np.float32)
        numbers = np.concatenate([numbers, -numbers])
        preset = getattr(Minifloat, name)()
        data_ = quantize_to(torch.from_numpy(numbers), Scheme(format=preset), torch.ones(1)).tensors["data"]
        bits = np.unpackbits(data_.numpy(), bitorder="little")[: len(numbers) * preset.bits].reshape(-1, preset.bits)
        codes = (bits * (1 << np.arange(preset.bits))).sum(1)
        assert np.array_equal(codes, numbers.astype(kind).view(np.uint8))
    # int8: two's complement of multiples of 1/64. int4: the first value in the low half of the byte, counted from qmin.
    block = torch.full((1, 32), -1.0)
    assert quantize_to(block, Scheme(format=MX("int8"))).tensors["data"].view(torch.int8).tolist() == [-64] * 32
    four = quantize_to(torch.tensor([-7.0, 5.0]), Scheme(bits=4, granularity=PerGroup(2)))
    assert four.tensors["data"].tolist() == [1 + 13 * 16]


def test_scales_that_were_observed_are_kept():
    x = torch.randn(4, 8)
    scale = torch.full((4, 2), 0.3)
    scheme = Scheme(bits=4, granularity=PerGroup(4))
    parts = quantize_to(x, scheme, scale)
    expected = ops.fake_quantize_group(x, scale, torch.zeros(4, 2, dtype=torch.int32), -1, [4], -8, 7)
    assert torch.equal(parts.dequantize(), expected)
    assert "bytes)" in repr(parts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize_to(torch.tensor([1.0, torch.nan]), Scheme()),
            "[quantize_to] input must be finite, got NaN or infinity",
        ),
        (
            lambda: quantize_to(torch.ones(2), Scheme(rounding="stochastic")),
            "[quantize_to] stored values are rounded to nearest, got int8",
        ),
        (
            lambda: QuantizedTensorParts(Scheme(), [2], torch.float32, {}).dequantize(),
            "[dequantize] parts of int8 symmetric per-tensor [-128, 127] must have 'data', got none",
        ),
        (
            lambda: QuantizedTensorParts(
                Scheme(), [2], torch.float32, {"data": torch.zeros(3, dtype=torch.uint8), "scale": torch.ones(1)}
            ).dequantize(),
            "[dequantize] data must have 2 bytes for shape [2], got 3",
        ),
        (
            lambda: QuantizedTensorParts(
                Scheme(), [1], torch.float32, {"data": torch.zeros(1, dtype=torch.uint8)}
            ).dequantize(),
            "must have 'scale', got none",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_empty():
    assert PerTensor() == Scheme(bits=5).granularity
    assert quantize_to(torch.empty(0, 4), Scheme(bits=5)).dequantize().shape == (0, 4)
