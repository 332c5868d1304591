"""Noise in place of rounding: what is drawn, which gradient passes, where it ends (evaluation, conversion, files)."""

import copy
import re

import pytest
import torch
from format_reference import scale_shape
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    LSQ,
    MX,
    NF4,
    Codebook,
    FakeQuantizer,
    Latest,
    Minifloat,
    MinMax,
    Noise,
    PerBlock,
    PerChannel,
    PerGroup,
    PerToken,
    QConfig,
    Scheme,
    calibrate,
    convert,
    prepare,
    prepare_qat,
    report,
)

noise_of = torch.ops.rarefy.quantization_noise
LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def rounded(x, scheme):
    scale, zero_point = torch.ops.rarefy.scheme_qparams(x, scheme.with_noise(None).to_json())
    # Smaller steps than the range wants, so that some values are clamped.
    scale = scale if scheme.dynamic else scale * 0.7
    return torch.ops.rarefy.simulate(x, scale, zero_point, scheme.to_json()), scale


def step_at(index, shape, scale, scheme):
    """The scale of one element, by the definition of its granularity."""
    axis, block = scheme.block_axis, scheme.block
    if axis is None:
        return scale.item()
    axis %= len(shape)
    assert tuple(scale.shape) == scale_shape(shape, axis, block)
    if not block:
        return scale[index[axis]].item()
    at = list(index)
    at[axis] //= block[-1]
    if len(block) == 2:
        at[axis - 1] //= block[0]
    return scale[tuple(at)].item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", [None, PerChannel(1), PerGroup(4), PerGroup(3, 0), PerBlock(2, 3)], ids=str)
@pytest.mark.parametrize("noise", [Noise(0.3), Noise(uniform=True), Noise(0.5, uniform=True)], ids=repr)
def test_values_against_a_plain_loop(noise, granularity, dtype, layout):
    scheme = Scheme(bits=4, granularity=granularity, noise=noise)
    x = LAYOUTS[layout](torch.randn(5, 7, dtype=torch.float64).to(dtype))
    y, scale = rounded(x, scheme)
    torch.manual_seed(5)
    got = noise_of(x, y, scale, scheme.to_json())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(5)
    drawn = torch.rand_like(x, dtype=wide) if noise.uniform else None
    kept = torch.rand_like(x, dtype=wide) if noise.share < 1 else None
    assert got.dtype == dtype
    clamped = moved = 0
    for index in torch.cartesian_prod(torch.arange(5), torch.arange(7)).tolist():
        index = tuple(index)
        given, expected = x[index].item(), y[index].item()
        step = step_at(index, x.shape, scale, scheme)
        if noise.uniform and abs(given - expected) > step / 2:
            clamped += 1
        elif noise.uniform:
            expected = given + step * (drawn[index].item() - 0.5)
        if kept is not None and kept[index].item() >= noise.share:
            expected = given
        moved += expected != y[index].item()
        tolerance = 1e-14 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps * max(abs(expected), step)
        assert got[index].item() == pytest.approx(expected, abs=tolerance)
    assert moved
    assert not noise.uniform or clamped


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=3, symmetric=False),
        Scheme(granularity=PerToken()),
        Scheme(format=Minifloat.e4m3()),
        Scheme(format=MX("e2m1")),
        Scheme(format=NF4()),
        Scheme(bits=4, rounding="stochastic", seed=1),
        Scheme(bits=4, power_of_two=True),
    ],
    ids=str,
)
def test_share_of_every_format(scheme):
    torch.manual_seed(1)
    x = torch.randn(64, 64)
    noisy = FakeQuantizer(scheme.with_noise(Noise(0.25)), MinMax())
    plain = FakeQuantizer(scheme, MinMax())
    y, expected = noisy(x), plain(x)
    is_rounded, is_left = y == expected, y == x
    assert bool((is_rounded | is_left).all())
    changed = expected != x
    part = (is_rounded & changed).sum() / changed.sum()
    assert abs(float(part) - 0.25) < 0.03
    assert not torch.equal(noisy(x), y)
    plain(x)  # stochastic rounding counts its calls
    assert torch.equal(noisy.eval()(x), plain.eval()(x))
    noisy.train().quantize = False
    assert torch.equal(noisy(x), x)


def test_uniform_noise_has_the_error_of_rounding():
    torch.manual_seed(2)
    quantizer = FakeQuantizer(Scheme(bits=5, noise=Noise(uniform=True)), MinMax())
    x = torch.randn(400, 500)
    step = (quantizer(x) - x).div(quantizer.scale)
    assert step.abs().max() <= 0.5001
    assert abs(float(step.mean())) < 0.003
    assert float(step.var()) == pytest.approx(1 / 12, rel=0.01)


def test_gradients():
    torch.manual_seed(3)
    x = torch.linspace(-2, 2, 401).requires_grad_()
    scale, zero_point = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
    inside = (x.detach().abs() <= 0.75).float()  # of [-8, 7] steps; 0.8 below
    inside[x.detach().lt(0) & (x.detach() >= -0.849)] = 1
    for noise in (Noise(0.4), Noise(uniform=True)):
        scheme = Scheme(bits=4, noise=noise)
        y = torch.ops.rarefy.fake_quantize(x, scale, zero_point, None, -8, 7)
        z = noise_of(x, y, scale, scheme.to_json())
        (grad,) = torch.autograd.grad(z.sum(), x)
        left = (z == x).detach() & (y != x).detach() & (not noise.uniform)
        sure = (x.detach() - 0.75).abs().minimum((x.detach() + 0.85).abs()) > 0.001  # ends by the ulp aside
        assert torch.equal(grad[sure], torch.where(left, 1.0, inside)[sure])
        assert int(left.sum()) > 0 or noise.uniform


def test_a_learned_scale_learns_from_what_is_rounded():
    torch.manual_seed(4)
    x = torch.randn(2000)
    quantizer = FakeQuantizer(Scheme(bits=4, noise=Noise(0.5)), LSQ(gradient_scale=1.0))
    quantizer(x)  # starts
    y = quantizer(x)
    (grad,) = torch.autograd.grad(y.sum(), quantizer.scale)
    s = quantizer.scale.item()
    q = (x / s).round()
    of_each = torch.where(q < -8, -8.0, torch.where(q > 7, 7.0, q - x / s))
    is_rounded = (y != x) | (of_each == 0)
    assert grad.item() == pytest.approx(float(of_each[is_rounded.detach()].sum()), rel=1e-4)
    assert float(is_rounded.float().mean()) == pytest.approx(0.5, abs=0.05)


def test_within_torch():
    x = torch.randn(6, 12, requires_grad=True)
    for scheme in (
        Scheme(bits=4, granularity=PerGroup(5), noise=Noise(uniform=True)),
        Scheme(bits=4, granularity=PerBlock(4, 5), noise=Noise(0.4, True)),
        Scheme(bits=4, granularity=PerChannel(0), noise=Noise(0.4)),
    ):
        y, scale = rounded(x.detach(), scheme)
        arguments = (x, y.requires_grad_(), scale, scheme.to_json())
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(torch.ops.rarefy.quantization_noise.default, arguments, test_utils=checks)
    model = prepare_qat(nn.Sequential(nn.Linear(12, 4)), noisy_int8())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)


def test_empty_and_not_finite():
    scheme = Scheme(bits=4, noise=Noise(0.5, uniform=True))
    y = noise_of(torch.empty(0, 3), torch.empty(0, 3), torch.ones(1), scheme.to_json())
    assert y.shape == (0, 3)
    x = torch.tensor([float("nan"), float("inf"), 1.0])
    y = torch.ops.rarefy.fake_quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, -8, 7)
    for _ in range(5):
        z = noise_of(x, y, torch.ones(1), scheme.to_json())
        assert z[0].isnan()
        assert z[1].item() in (7.0, float("inf"))


def test_recomputed_activations_draw_the_same():
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), noisy_int8())
    x = torch.randn(4, 8)
    model(x)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(6)
        given = x.clone().requires_grad_()
        again = copy.deepcopy(model)
        y = (
            torch.utils.checkpoint.checkpoint(
                again, given, use_reentrant=False, context_fn=rf.quantization.checkpoint_context
            )
            if recompute
            else again(given)
        )
        y.square().sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)


# --- Models ----------------------------------------------------------------------------------------------------------


def noisy_int8(noise=None, bits=8):
    noise = Noise(0.5) if noise is None else noise
    weight = Scheme(bits=bits, narrow_range=True, granularity=PerChannel(0), noise=noise)
    return QConfig(weight=weight, activation=Scheme(symmetric=False))


class Net(nn.Module):
    def __init__(self, recurrent=True):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.gru = nn.GRU(24, 24, batch_first=True) if recurrent else None
        self.fc = nn.Linear(24, 4)

    def forward(self, tokens):
        x = torch.relu(self.norm(self.conv(self.embedding(tokens).transpose(1, 2))))
        x = x.transpose(1, 2)
        return self.fc((x if self.gru is None else self.gru(x)[0]).mean(1))


CONFIGS = {
    "share": noisy_int8(),
    "uniform": noisy_int8(Noise(uniform=True)),
    "activations": QConfig(
        weight=Scheme(narrow_range=True, granularity=PerChannel(0), noise=Noise(0.5)),
        activation=Scheme(symmetric=False, noise=Noise(0.5, uniform=True)),
    ),
    "groups": QConfig(weight=Scheme(bits=4, granularity=PerGroup(8, 1), noise=Noise(0.5))),
    "codebook": QConfig(weight=Scheme(format=Codebook(16), noise=Noise(0.5))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_train_with_noise_and_convert_without(name, tmp_path):
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 10, (4, 6)), torch.tensor([0, 1, 2, 3])
    recurrent = CONFIGS[name].weight.is_plain  # what recurrent layers take
    model = prepare_qat(Net(recurrent), CONFIGS[name], tokens)
    assert "noise(share" in repr(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    expected = model(tokens)
    assert torch.equal(expected, model(tokens))
    converted = convert(copy.deepcopy(model))
    assert torch.allclose(converted(tokens), expected, atol=1e-5)
    assert "noise" not in repr(converted)
    assert "noise" not in repr(report(converted))
    rf.quantization.save_quantized(converted, tmp_path / "saved")
    again = rf.quantization.load_quantized(Net(recurrent), tmp_path / "saved")
    assert torch.equal(again(tokens), converted(tokens))


def test_integers_after_noise():
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    model = prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), noisy_int8(), x)
    model(x)
    assert all("simulated: noise is added in floating point" in row.note for row in report(model).layers)
    converted = convert(model.eval())
    assert [row.state for row in report(converted).layers] == ["integer"] * 2


@pytest.mark.parametrize("state", ["prepared", "converted"])
def test_files_hold_no_noise(state, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    model = prepare_qat(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), CONFIGS["activations"], x)
    model(x)
    model.eval()
    if state == "converted":
        model = convert(model)
    rf.export.to_onnx(model, x, tmp_path / "model.onnx")  # verifies itself in ONNX Runtime


def test_calibration_has_no_noise():
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    plain = nn.Sequential(nn.Linear(8, 4)).eval()
    ranges = []
    noisy = noisy_int8()
    exact = QConfig(weight=noisy.weight.with_noise(None), activation=noisy.activation, execution="simulated")
    for config in (noisy, exact):
        model = prepare(copy.deepcopy(plain), config, x)
        calibrate(model, [x])
        ranges.append(model(x))
    assert torch.equal(*ranges)


REFUSALS = {
    "the share of noise must be in (0, 1], got 0": (0.0, False, {}),
    "the share of noise must be in (0, 1], got 1.5": (1.5, True, {}),
    "the share of noise must be in (0, 1], got nan": (float("nan"), True, {}),
    "the share of noise must be below 1, which rounds every value as without noise, or uniform must be true, got share 1 "
    "and uniform false": (1.0, False, {}),
    "uniform noise is for integers with an observed scale, got dynamic nf4": (1.0, True, {"format": NF4()}),
    "uniform noise is for integers with an observed scale, got dynamic int8": (1.0, True, {"granularity": PerToken()}),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    share, uniform, more = REFUSALS[message]
    with pytest.raises(ValueError, match=re.escape(f"[Scheme] {message}") + "$"):
        Scheme(noise=Noise(share, uniform), **more)
    with pytest.raises(ValueError, match=re.escape(f"[Scheme] {message}") + "$"):
        Scheme(**more).with_noise(Noise(share, uniform))


def test_more_refusals():
    with pytest.raises(ValueError, match=re.escape("[FakeQuantizer] LSQ") + ".*must have no uniform noise"):
        FakeQuantizer(Scheme(noise=Noise(uniform=True)), LSQ())
    with pytest.raises(ValueError, match="cannot execute in integers: noise is added in floating point"):
        prepare_qat(
            nn.Sequential(nn.Linear(4, 4)),
            QConfig(weight=CONFIGS["share"].weight, activation=Scheme(), execution="integer"),
        )
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=re.escape("[quantization_noise] the scheme must have noise, got int8")):
        noise_of(x, x, torch.ones(1), Scheme().to_json())
    with pytest.raises(
        ValueError, match=re.escape("[quantization_noise] rounded must have the shape of x, [2, 3], got [3]")
    ):
        noise_of(x, x[0], torch.ones(1), Scheme(noise=Noise(0.5)).to_json())
    channels = Scheme(granularity=PerChannel(1), noise=Noise(uniform=True)).to_json()
    rule = "[quantization_noise] scale must have 3 values for per-channel(axis=1) and shape [2, 3], got 2"
    with pytest.raises(ValueError, match=re.escape(rule)):
        noise_of(x, x, torch.ones(2), channels)
    with pytest.raises(ValueError, match="must not have the key 'part' in noise"):
        Scheme.from_json('{"noise": {"part": 1}}')


def test_an_observer_of_weights_sees_all_values():
    torch.manual_seed(0)
    w = torch.randn(4, 6)
    noisy, plain = (
        FakeQuantizer(Scheme(bits=4, granularity=PerChannel(0), noise=noise), Latest(), 4)
        for noise in (Noise(0.1), None)
    )
    noisy(w), plain(w)
    for name in ("scale", "zero_point", "min_val", "max_val"):
        assert torch.equal(getattr(noisy, name), getattr(plain, name))
