"""Learned grids alone: where they start, and their gradients against the papers' formulas in loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.quantization import (
    LSQ,
    PACT,
    TQT,
    FakeQuantizer,
    LearnedBits,
    LSQPlus,
    PerChannel,
    QConfig,
    Scheme,
    calibrate,
    prepare,
)

SIGNED, UNSIGNED = Scheme(bits=4), Scheme(bits=4, symmetric=False)
WEIGHT = Scheme(bits=4, narrow_range=True, granularity=PerChannel(0))
KINDS = {
    "lsq": (LSQ(), LSQ(), UNSIGNED),
    "lsq signed": (LSQ(), LSQ(0.5), SIGNED),
    "lsq+": (LSQPlus(), LSQ(), UNSIGNED),
    "tqt": (TQT(), TQT(), SIGNED),
    "tqt asymmetric": (TQT(), TQT(), UNSIGNED),
    "bits": (LearnedBits(), LearnedBits(), SIGNED),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Where they start -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_lsq_starts_as_in_the_paper(axis: int | None) -> None:
    scheme = Scheme(bits=3) if axis is None else Scheme(bits=3, granularity=PerChannel(axis))
    w = randn(4, 5, 2)
    quantizer = FakeQuantizer(scheme, LSQ(), 1 if axis is None else w.shape[axis], w.shape)
    assert isinstance(quantizer.scale, nn.Parameter)
    quantizer(w)
    rows = [w] if axis is None else list(w.unbind(axis))
    expected = [2 * sum(abs(v) for v in row.flatten().tolist()) / row.numel() / math.sqrt(3) for row in rows]
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert quantizer.calibrated


@pytest.mark.parametrize("observer", [LSQ(), LSQPlus()], ids=str)
def test_asymmetric_grids_start_at_the_range_of_least_error(observer: object) -> None:
    x = randn(64, 8).relu() + 0.1 * randn(64, 8, seed=1)
    quantizer = FakeQuantizer(UNSIGNED, observer)
    y = quantizer(x).detach()
    low, high = torch.ops.rarefy.mse_range(x, None, 0, 15, False)
    scale, zero_point = torch.ops.rarefy.choose_qparams(low, high, 0, 15, False)
    assert torch.equal(quantizer.scale.detach(), scale)
    assert torch.equal(y, torch.ops.rarefy.fake_quantize(x, scale, zero_point, None, 0, 15))


def test_pact_starts_at_the_range_of_least_error() -> None:
    x = randn(64, 8).relu()
    quantizer = FakeQuantizer(UNSIGNED, PACT())
    quantizer(x)
    _, high = torch.ops.rarefy.mse_range(x, None, 0, 15, False)
    torch.testing.assert_close(quantizer.alpha.detach(), high)
    quantizer.settle()
    torch.testing.assert_close(quantizer.scale, high / 15)


@pytest.mark.parametrize("scheme", [SIGNED, UNSIGNED], ids=str)
def test_tqt_has_powers_of_two(scheme: Scheme) -> None:
    x = randn(64, 8) + (0.0 if scheme.symmetric else 1.0)
    quantizer = FakeQuantizer(scheme, TQT())
    y = quantizer(x).detach()
    quantizer.settle()
    scale = quantizer.scale.item()
    assert math.frexp(scale)[0] == 0.5
    assert torch.equal(
        y, torch.ops.rarefy.fake_quantize(x, quantizer.scale, quantizer.zero_point, None, *limits(scheme))
    )
    steps = 8 if scheme.symmetric else 16
    assert scale == 2 ** math.ceil(quantizer.log2_threshold.item()) / steps
    with torch.no_grad():
        quantizer.log2_threshold.fill_(3.0)  # a threshold that is a power of two stays
    quantizer.settle()
    assert quantizer.scale.item() == 8 / steps


def limits(scheme: Scheme) -> tuple[int, int]:
    return scheme.qmin, scheme.qmax


def test_a_batch_that_is_not_finite_starts_nothing() -> None:
    quantizer = FakeQuantizer(UNSIGNED, LSQ())
    with pytest.warns(UserWarning, match="met a batch with NaN"):
        quantizer(torch.tensor([1.0, math.nan]))
    assert quantizer.scale.item() == 1.0
    assert quantizer.skipped.item() == 1
    assert not quantizer.calibrated
    quantizer(randn(8))
    assert quantizer.calibrated
    weight = FakeQuantizer(WEIGHT, LSQ(), 2, (2, 2))
    with pytest.raises(ValueError, match=r"the weight of a layer must be finite, got 1 NaN or infinite values of 4"):
        weight(torch.tensor([[1.0, 2.0], [math.inf, 1.0]]))
    assert weight.skipped.item() == 0


def test_zeros_and_no_elements() -> None:
    quantizer = FakeQuantizer(WEIGHT, LSQ(), 2, (2, 3))
    y = quantizer(torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]]))
    assert quantizer.scale[0].item() == 1.0  # as a range of zero width has
    assert y[0].tolist() == [0.0, 0.0, 0.0]
    empty = FakeQuantizer(UNSIGNED, LSQ())
    assert empty(torch.empty(0, 3)).shape == (0, 3)
    assert not empty.calibrated


def test_calibration_takes_the_mean_of_the_batches() -> None:
    batches = [randn(16, 4, seed=i) * (i + 1) for i in range(3)]
    model = nn.Sequential(nn.Linear(4, 3))
    prepared = prepare(model, QConfig(WEIGHT, SIGNED, observer=LSQ(), weight_observer=LSQ()))
    calibrate(prepared, batches[:2])
    calibrate(prepared, batches[2:])
    quantizer = prepared[0].quant.input
    each = [2 * x.abs().mean().item() / math.sqrt(7) for x in batches]
    assert quantizer.scale.item() == pytest.approx(sum(each) / 3, rel=1e-6)
    assert prepared[0].quant.weight.calibrated
    before = quantizer.scale.item()
    prepared.train()
    prepared(batches[0]).square().sum().backward()
    assert quantizer.scale.grad.abs().item() > 0  # LSQ after calibration
    assert quantizer.scale.item() == before  # which does not start again


# --- Gradients, against the formulas of the papers --------------------------------------------------------------------
def data(low: float = -2.0) -> tuple[Tensor, Tensor]:
    x = (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) * (2.5 - low) + low).requires_grad_()
    return x, randn(6, 5, seed=2)


def backward(quantizer: FakeQuantizer, x: Tensor, g: Tensor) -> None:
    quantizer(x).backward(g)


def test_lsq_gradient() -> None:
    """Esser et al., 2020, equations 3 and 5, section 2.2. Clamping is decided on integers (docs/dev/numerics.md)."""
    x, g = data()
    quantizer = FakeQuantizer(SIGNED, LSQ())
    quantizer(x)
    with torch.no_grad():
        quantizer.scale.fill_(0.2)
    backward(quantizer, x, g)
    total = 0.0
    for v, u in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True):
        r = np.rint(np.float32(v) / np.float32(0.2))
        total += u * (-8 if r < -8 else 7 if r > 7 else r - v / 0.2)
    factor = 1 / math.sqrt(5 * 7)  # of the features of a sample
    assert quantizer.scale.grad.item() == pytest.approx(total * factor, rel=1e-4)


def test_lsq_gradient_scale_of_a_weight() -> None:
    w, g = randn(3, 4, 2), randn(3, 4, 2, seed=1)
    found = []
    for observer in (LSQ(), LSQ(1.0)):
        quantizer = FakeQuantizer(WEIGHT, observer, 3, w.shape)
        backward(quantizer, w, g)
        found.append(quantizer.scale.grad)
    torch.testing.assert_close(found[0], found[1] / math.sqrt(8 * 7))


def test_lsq_plus_gradient() -> None:
    """Bhalgat et al., 2020, equations 6 and 7, with the offset on the grid."""
    x, g = data()
    quantizer = FakeQuantizer(UNSIGNED, LSQPlus(1.0))
    quantizer(x)
    with torch.no_grad():
        quantizer.scale.fill_(0.2)
        quantizer.offset.fill_(-1.0)  # z = 5
    backward(quantizer, x, g)
    dscale = doffset = 0.0
    for v, u in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True):
        place = (v + 1.0) / 0.2
        if place < 0:
            doffset += u
        elif place > 15:
            dscale, doffset = dscale + 15 * u, doffset + u
        else:
            dscale += u * (np.rint(place) - place)
    assert quantizer.scale.grad.item() == pytest.approx(dscale, rel=1e-4)
    assert quantizer.offset.grad.item() == pytest.approx(doffset, rel=1e-5)
    x_hat = quantizer(x).detach()
    expected = ((x.detach() + 1.0) / 0.2).round().clamp(0, 15) * 0.2 - 1.0
    torch.testing.assert_close(x_hat, expected, rtol=1e-5, atol=1e-6)


def test_the_offset_stays_on_the_grid() -> None:
    quantizer = FakeQuantizer(UNSIGNED, LSQPlus())
    x = randn(8, 4)
    quantizer(x)
    for offset, zero_point in ((-0.51, 1), (0.2, 0), (-100.0, 15)):
        with torch.no_grad():
            quantizer.scale.fill_(0.5)
            quantizer.offset.fill_(offset)
        trained = quantizer(x).detach()
        quantizer.settle()
        assert quantizer.zero_point.item() == zero_point
        expected = torch.ops.rarefy.fake_quantize(x, quantizer.scale, quantizer.zero_point, None, 0, 15)
        assert torch.equal(trained, expected)
        with torch.no_grad():
            assert torch.equal(quantizer(x), expected)


def test_pact_gradient() -> None:
    """Choi et al., 2018, equation 3: 0 below alpha, 1 beyond it."""
    x, g = data(low=0.0)
    quantizer = FakeQuantizer(UNSIGNED, PACT())
    quantizer(x)
    with torch.no_grad():
        quantizer.alpha.fill_(1.7)
    backward(quantizer, x, g)
    pairs = list(zip(x.flatten().tolist(), g.flatten().tolist(), strict=True))
    assert quantizer.alpha.grad.item() == pytest.approx(sum(u for v, u in pairs if v >= 1.7), rel=1e-5)
    assert x.grad.flatten().tolist() == [u if v < 1.7 else 0.0 for v, u in pairs]
    with torch.no_grad():  # a difference quotient, where it is smooth: all values beyond alpha
        far = torch.full((4,), 9.0)
        loss = []
        for alpha in (1.5, 1.75):
            quantizer.alpha.fill_(alpha)
            loss.append(quantizer(far).sum().item())
    quantizer.alpha.grad = None
    quantizer(far).sum().backward()
    assert quantizer.alpha.grad.item() == pytest.approx((loss[1] - loss[0]) / 0.25, rel=1e-5)


def test_tqt_gradient() -> None:
    """Jain et al., 2019, equations 6 and 7: s ln 2 times that of the scale."""
    x, g = data()
    quantizer = FakeQuantizer(SIGNED, TQT())
    quantizer(x)
    with torch.no_grad():
        quantizer.log2_threshold.fill_(0.4)  # s = 2 / 8
    backward(quantizer, x, g)
    s, total = 0.25, 0.0
    for v, u in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True):
        r = np.rint(v / s)
        total += u * (-8 if r < -8 else 7 if r > 7 else r - v / s)
    assert quantizer.log2_threshold.grad.item() == pytest.approx(s * math.log(2) * total, rel=1e-4)


def test_gradient_of_a_bit_width() -> None:
    """Uhlich et al., 2020, appendix: the quantizer of bits and greatest value."""
    x, g = data()
    quantizer = FakeQuantizer(Scheme(bits=6), LearnedBits())
    quantizer(x)
    with torch.no_grad():
        quantizer.bits.fill_(3.3)  # rounded to 3: integers of -3 to 3
        quantizer.bound.fill_(1.5)
    backward(quantizer, x, g)
    d, dbits, dbound = 1.5 / 3, 0.0, 0.0
    for v, u in zip(x.flatten().tolist(), g.flatten().tolist(), strict=True):
        if abs(v) > 1.5:
            dbound += u * math.copysign(1.0, v)
        else:
            error = np.rint(v / d) * d - v
            dbound += u * error / 1.5
            dbits -= u * error * 4 * math.log(2) / 3  # 2^(b-1) ln 2 / (2^(b-1) - 1)
    assert quantizer.bits.grad.item() == pytest.approx(dbits, rel=1e-4)
    assert quantizer.bound.grad.item() == pytest.approx(dbound, rel=1e-4)
    x_hat = quantizer(x).detach()
    assert len(x_hat.unique()) <= 7
    torch.testing.assert_close(x_hat, (x.detach() / d).round().clamp(-3, 3) * d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(kind: str, dtype: torch.dtype) -> None:
    observer, _, scheme = KINDS[kind]
    x = randn(6, 5).to(dtype)
    one, other = FakeQuantizer(scheme, observer), FakeQuantizer(scheme, observer)
    y, expected = one(x), other(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected.detach(), rtol=1e-2, atol=1e-6)
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in one.parameters())
