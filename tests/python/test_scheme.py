"""The one value type for formats: fields, refusals by name, text, JSON, pickles, shapes of scales."""

import copy
import json
import pickle
import re

import pytest
import torch
from format_reference import MINIFLOATS, scale_shape, values_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarefy.quantization import (
    MX,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    Integer,
    Minifloat,
    Noise,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QConfig,
    Scheme,
    Ternary,
)

SCHEMES = {
    "int8 symmetric per-tensor [-128, 127]": Scheme(),
    "int4 symmetric per-group(128, axis=-1) [-8, 7]": Scheme(bits=4, granularity=PerGroup()),
    "uint4 asymmetric per-block(2, 3) [0, 15]": Scheme(bits=4, symmetric=False, granularity=PerBlock(2, 3)),
    "int8 symmetric per-token [-128, 127] dynamic": Scheme(granularity=PerToken()),
    "int12 symmetric per-tensor [-2048, 2047] power-of-two": Scheme(bits=12, power_of_two=True),
    "int8 symmetric per-tensor [-128, 127] stochastic(seed=7) pass-through": Scheme(
        rounding="stochastic", seed=7, straight_through="pass"
    ),
    "int4 symmetric per-tensor [-8, 7] noise(share=0.1)": Scheme(bits=4, noise=Noise(0.1)),
    "int4 symmetric per-tensor [-8, 7] noise(share=1, uniform)": Scheme(bits=4, noise=Noise(uniform=True)),
    "e4m3 per-channel(axis=0)": Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0)),
    "e5m2 per-tensor dynamic": Scheme(format=Minifloat.e5m2(), dynamic=True),
    "e3m4 bias 5 ieee unsaturated per-tensor": Scheme(format=Minifloat(3, 4, 5, "ieee", False)),
    "mx e2m3 per-group(32, axis=1)": Scheme(format=MX("e2m3"), granularity=PerGroup(32, 1)),
    "mx int8 per-group(32, axis=-1)": Scheme(format=MX("int8")),
    "nvfp4 per-group(16, axis=-1)": Scheme(format=NVFP4()),
    "nf4 per-group(64, axis=-1)": Scheme(format=NF4()),
    "nf4 double-quantized(256) per-group(64, axis=-1)": Scheme(format=NF4(True)),
    "codebook(16) per-channel(axis=0)": Scheme(format=Codebook(16), granularity=PerChannel(0)),
    "binary per-tensor": Scheme(format=Binary()),
    "ternary(0.7) per-channel(axis=0)": Scheme(format=Ternary(), granularity=PerChannel(0)),
}


@pytest.mark.parametrize("text", SCHEMES)
def test_text_json_pickle_and_repr(text):
    scheme = SCHEMES[text]
    assert str(scheme) == text
    assert Scheme.from_json(scheme.to_json()) == scheme
    json.loads(scheme.to_json())
    assert pickle.loads(pickle.dumps(scheme)) == copy.deepcopy(scheme) == scheme
    assert hash(copy.deepcopy(scheme)) == hash(scheme)
    assert eval(repr(scheme)) == scheme
    assert [other for other in SCHEMES.values() if other == scheme] == [scheme]


def test_widths_follow_the_format():
    widths = {str(s): s.bits for s in SCHEMES.values() if not isinstance(s.format, Integer)}
    assert [w for name, w in widths.items() if name.startswith("mx e2m3")] == [6]
    assert widths["nf4 per-group(64, axis=-1)"] == 4
    assert widths["binary per-tensor"] == 1
    assert Scheme(format=Codebook(17)).bits == 5
    assert Scheme(format=Codebook(2)).bits == 1


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloat_presets(name):
    e, m, bias, specials = MINIFLOATS[name]
    preset = getattr(Minifloat, name)()
    assert preset == Minifloat(e, m, bias, specials)
    assert preset.greatest == values_of(e, m, bias, specials)[-1]
    assert str(preset) == name


REFUSALS = {
    "bits must be in 2..16 for integers (1 bit is Binary), got 1": {"bits": 1},
    "bits must be 4 for nf4, got 8": {"bits": 8, "format": NF4()},
    "minifloat has no zero point: symmetric must be true, got false": {"format": Minifloat.e4m3(), "symmetric": False},
    "binary has no zero point: symmetric must be true, got false": {"format": Binary(), "symmetric": False},
    "mx is signed: signed must be true, got false": {"format": MX(), "signed": False},
    "narrow_range is for integers, got nf4": {"format": NF4(), "narrow_range": True},
    "per-token scales follow from each tensor: dynamic must be true, got false": {
        "granularity": PerToken(),
        "dynamic": False,
    },
    "dynamic scales must be per tensor, group, block or token, got per-channel(axis=0)": {
        "granularity": PerChannel(0),
        "dynamic": True,
    },
    "nvfp4 has a scale per block: granularity must be PerGroup, got per-tensor": {
        "format": NVFP4(),
        "granularity": PerTensor(),
    },
    "mx takes its scales from the tensor itself: dynamic must be true, got false": {"format": MX(), "dynamic": False},
    "the size of a group must be at least 1, got 0": {"format": MX(), "granularity": PerGroup(0)},
    "a block must have at least 1 row and column, got 0 by 4": {"granularity": PerBlock(0, 4)},
    "power_of_two needs a fixed zero point: symmetric must be true, got false": {
        "power_of_two": True,
        "symmetric": False,
    },
    "power_of_two is for integers and minifloats, got mx e4m3": {"format": MX(), "power_of_two": True},
    "stochastic rounding is for integers and minifloats, got nf4": {"format": NF4(), "rounding": "stochastic"},
    "rounding must be 'nearest_even' or 'stochastic', got 'up'": {"rounding": "up"},
    "straight_through must be 'clipped' or 'pass', got 'none'": {"straight_through": "none"},
    "seed must not be negative, got -1": {"seed": -1},
    "a codebook must have 2 to 256 entries, got 257": {"format": Codebook(257)},
    "a codebook must be per tensor, channel or group, got per-block(128, 128)": {
        "format": Codebook(),
        "granularity": PerBlock(),
    },
    "a codebook stays: dynamic must be false, got true": {"format": Codebook(), "dynamic": True},
    "the threshold of ternary must be in (0, 100), got 0": {"format": Ternary(0.0)},
    "scale_block must be at least 1, got 0": {"format": NF4(True, 0)},
    "exponent_bits must be in 1..7, got 8": {"format": Minifloat(8, 0)},
    "mantissa_bits must be in 0..6, got 7": {"format": Minifloat(1, 7)},
    "a minifloat must have at most 8 bits, got 9": {"format": Minifloat(4, 4)},
    "a minifloat without NaN and infinity must saturate, got saturate false": {
        "format": Minifloat(2, 1, saturate=False)
    },
    "a minifloat must have an exponent for numbers beside NaN and infinity, got 1 exponent bits, 2 mantissa bits and "
    "specials ieee": {"format": Minifloat(1, 2, specials="ieee")},
    "the bias must keep a minifloat's numbers within 2^-120 and 2^101, got -100": {"format": Minifloat(4, 3, -100)},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_impossible_combinations_are_refused_by_name(message):
    with pytest.raises(ValueError, match=re.escape(f"[Scheme] {message}") + "$"):
        Scheme(**REFUSALS[message])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if not isinstance(s.format, Integer)], ids=str)
@pytest.mark.parametrize("attribute", ["qmin", "qmax", "dtype"])
def test_formats_without_integers_say_so(scheme, attribute):
    with pytest.raises(
        ValueError, match=rf"\[Scheme\] {attribute} is of .*integers, which {re.escape(str(scheme).split(' ')[0])}"
    ):
        getattr(scheme, attribute)


def test_unknown_names():
    with pytest.raises(
        ValueError, match=re.escape("[MX] element must be e4m3, e5m2, e3m2, e2m3, e2m1 or int8, got 'e9'")
    ):
        MX("e9")
    with pytest.raises(ValueError, match=re.escape("[Minifloat] specials must be none, nan or ieee, got 'inf'")):
        Minifloat(4, 3, specials="inf")


@pytest.mark.parametrize(
    ("json_text", "message"),
    [
        ("", "must be JSON with '{'"),
        ("[]", "must be JSON with '{'"),
        ('{"bits": 8.5}', "must have a number at bits, got 8.5"),
        ('{"symmetric": 1}', "must have true or false at symmetric, got 1"),
        ('{"format": {"kind": "int9000"}}', "must have a known format, got 'int9000'"),
        ('{"granularity": {"kind": "per_atom"}}', "must have a known granularity, got 'per_atom'"),
        ('{"granularity": {"kind": "per_group", "lenght": 3}}', "must not have the key 'lenght'"),
        ('{"colour": 1}', "must not have the key 'colour'"),
        ('{"rounding": "up"}', "must have the rounding nearest_even or stochastic, got 'up'"),
        ('{"bits": 8} x', "must end after its object"),
        ('{"bits": 1}', "bits must be in 2..16"),
        ('{"bits": 4, "format": {"kind": "nf4"}}', "takes its scales from the tensor itself"),
    ],
)
def test_json_that_is_no_scheme(json_text, message):
    with pytest.raises(ValueError, match=r"\[Scheme\].*" + re.escape(message)):
        Scheme.from_json(json_text)


def granularities():
    size = st.integers(1, 200)
    return st.one_of(
        st.just(PerTensor()),
        st.integers(0, 3).map(PerChannel),
        st.builds(PerGroup, size, st.integers(-3, 3)),
        st.builds(PerBlock, size, size),
        st.just(PerToken()),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(2, 16),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    granularities(),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_every_integer_scheme_survives_json(bits, symmetric, signed, narrow, granularity, stochastic, seed):
    scheme = Scheme(
        bits=bits,
        symmetric=symmetric,
        signed=signed,
        narrow_range=narrow,
        granularity=granularity,
        rounding="stochastic" if stochastic else "nearest_even",
        seed=seed,
    )
    assert Scheme.from_json(scheme.to_json()) == scheme
    if stochastic:
        assert eval(repr(scheme)) == scheme


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 7), st.integers(0, 6), st.integers(-3, 70), st.sampled_from(["none", "nan", "ieee"]))
def test_every_minifloat_is_refused_or_survives_json(e, m, bias, specials):
    try:
        scheme = Scheme(format=Minifloat(e, m, bias, specials))
    except ValueError:
        with pytest.raises(ValueError, match=r"\[Scheme\]"):
            Scheme(format=Minifloat(e, m, bias, specials))
        return
    assert Scheme.from_json(scheme.to_json()) == scheme
    assert scheme.format.greatest == values_of(e, m, bias, specials)[-1]


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 7), (5, 4, 3, 160), (1, 1)])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(1), PerGroup(3), PerGroup(4, 0), PerBlock(2, 3), PerToken()]
)
def test_shape_of_scales(shape, granularity):
    scheme = Scheme(granularity=granularity)
    axis = scheme.block_axis
    assert tuple(scheme.scale_shape(shape)) == scale_shape(shape, axis, scheme.block)


def test_granularity_that_does_not_fit():
    with pytest.raises(
        ValueError, match=re.escape("[Scheme] per-group(2, axis=3) must be of an axis of the tensor, got shape [4, 4]")
    ):
        Scheme(granularity=PerGroup(2, 3)).scale_shape([4, 4])
    with pytest.raises(ValueError, match=re.escape("[Scheme] blocks must be of two axes, got shape [4]")):
        Scheme(granularity=PerBlock(2, 2)).scale_shape([4])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QConfig.int8_dynamic(), "scales per-token have no integer kernels"),
        (QConfig.int4_weight_only(), "the input stays in floating point"),
        (QConfig.fp8(), "e4m3 has no integer kernels"),
        (QConfig.mxfp8(), "mx e4m3 has no integer kernels"),
        (QConfig.nvfp4(), "nvfp4 has no integer kernels"),
        (QConfig.nf4(), "the input stays in floating point"),
    ],
)
def test_presets_say_why_they_are_simulated(config, reason):
    assert config.why_not_integer() == reason


def test_presets():
    assert str(QConfig.int4_weight_only(32).weight) == "int4 symmetric per-group(32, axis=1) [-8, 7]"
    assert QConfig.int4_weight_only().activation is None
    assert str(QConfig.int8_dynamic().activation) == "int8 symmetric per-token [-128, 127] dynamic"
    assert str(QConfig.nf4().weight) == "nf4 double-quantized(256) per-group(64, axis=1)"
    assert QConfig.fp8(gradient_dtype=torch.bfloat16).gradient_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": Scheme(granularity=PerToken())}, "weight must not be per token"),
        (
            {"weight": Scheme(), "activation": Scheme(granularity=PerGroup(4))},
            "activation must be per tensor, or dynamic where more values than one share its scales",
        ),
        ({"weight": Scheme(), "activation": Scheme(format=NF4())}, "nf4 is for weights, got the activation nf4"),
        ({"weight": Scheme(), "activation": Scheme(format=Binary())}, "binary is for weights"),
        ({"weight": Scheme(symmetric=False)}, "weight must be symmetric and signed"),
    ],
)
def test_configurations_that_no_layer_executes(fields, message):
    with pytest.raises(ValueError, match=re.escape(f"[QConfig] {message}")):
        QConfig(**fields)


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_targets_refuse_formats_by_name(target):
    profile = QConfig(target=target).profile
    for config in (QConfig.nvfp4(), QConfig.mxfp8(), QConfig.nf4()):
        reason = profile.why_not(config.weight, config.activation, "Linear")
        assert reason.startswith(f"{target} holds weights as integers with one observed scale per tensor or channel")
        assert reason.endswith(f", got {config.weight}")
