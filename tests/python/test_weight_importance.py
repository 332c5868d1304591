"""Importance of weights from data: mean squared inputs and gradients, by hand."""

import re

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import MSE, FakeQuantizer, Latest, PerChannel, QConfig, Scheme


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.fc = nn.Linear(4, 2)
        self.table = nn.Embedding(3, 2)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name in ("conv", "grouped", "up", "fc"):
            x = x.mean((2, 3)) if name == "fc" else x
            self.seen.setdefault(name, []).append(x.detach())
            x = getattr(self, name)(x)
            if name == "conv":
                x = self.bn(x)
        return x + self.table(torch.tensor([0]))


def make(weight_observer: object = None) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.bn.weight, 0.5, 2.0)
    nn.init.uniform_(model.bn.running_var, 0.5, 2.0)
    config = QConfig(
        weight=Scheme(bits=3, granularity=PerChannel(0)),
        activation=Scheme(symmetric=False),
        weight_observer=weight_observer or MSE(),
    )
    prepared = rf.quantization.prepare(model.eval(), config, torch.randn(1, 3, 8, 8))
    prepared.seen.clear()
    return prepared.train()


LOUDNESS = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1)
DATA = [
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * LOUDNESS,
    2 * torch.ones(1, 3, 8, 8) * LOUDNESS,
]


def weight(model: nn.Module, name: str) -> FakeQuantizer:
    return model.get_submodule(name).quant.weight


def test_mean_squared_inputs() -> None:
    model = make()
    assert rf.quantization.collect_importance(model, DATA) is model
    mean = {}
    for name, tensors in model.seen.items():
        total, count = torch.zeros(tensors[0].shape[1], dtype=torch.float64), 0
        for x in tensors:
            for channel in range(x.shape[1]):
                total[channel] += x[:, channel].double().square().sum()
            count += x.numel() // x.shape[1]
        mean[name] = total / count
    conv, grouped, up, fc = (weight(model, name).importance for name in ("conv", "grouped", "up", "fc"))
    assert conv.dtype is torch.float32
    torch.testing.assert_close(conv.double(), mean["conv"].view(1, 3, 1, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(fc.double(), mean["fc"].view(1, 4), rtol=1e-6, atol=0)
    assert grouped.shape == (6, 2, 1, 1)
    for out in range(6):
        for i in range(2):
            assert grouped[out, i].item() == pytest.approx(mean["grouped"][out // 3 * 2 + i].item())
    assert up.shape == (3, 4, 1, 1)  # by channel: [in / groups, out, ...]
    for i in range(3):
        for out in range(4):
            assert up[i, out].item() == pytest.approx(mean["up"][out // 2 * 3 + i].item())
    assert weight(model, "table").importance is None
    assert model.training
    assert model.bn.training
    assert weight(model, "fc").quantize
    other = make()
    for each in (model, other):
        rf.quantization.calibrate(each, DATA)
    assert not torch.equal(weight(model, "conv").scale, weight(other, "conv").scale)


def test_the_search_is_the_weighted_one() -> None:
    model = make()
    rf.quantization.collect_importance(model, DATA)
    rf.quantization.calibrate(model, DATA)
    for name in ("grouped", "fc"):
        q, w = weight(model, name), model.get_submodule(name).weight.detach()
        low, high = torch.ops.rarefy.mse_range(w, 0, q.qmin, q.qmax, True, importance=q.importance)
        assert torch.equal(q.min_val, low)
        assert torch.equal(q.max_val, high)


def test_mean_squared_gradients() -> None:
    model = make()

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch).square().sum()

    rf.quantization.collect_importance(model, DATA, loss=loss)
    assert all(p.grad is None for p in model.parameters())
    # By hand: the folded weight w f has the gradient g / f.
    torch.manual_seed(0)
    plain = Net().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "quant" not in k})
    factor = plain.bn.weight / (plain.bn.running_var + plain.bn.eps).sqrt()
    expected = dict.fromkeys(("conv", "grouped", "fc"), 0.0)
    for batch in DATA:
        weights = [plain.get_submodule(name).weight for name in expected]
        gradients = torch.autograd.grad(loss(plain, batch), weights)
        for name, gradient in zip(expected, gradients, strict=True):
            if name == "conv":
                gradient = gradient / factor.view(-1, 1, 1, 1)
            expected[name] = expected[name] + gradient.square() / len(DATA)
    for name, values in expected.items():
        torch.testing.assert_close(weight(model, name).importance, values.detach(), rtol=1e-3, atol=1e-5)
    assert weight(model, "up").importance.shape == (3, 4, 2, 2)


def test_a_layer_that_is_called_twice_has_the_gradient_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.fc(x)))

    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(5, 3)
    prepared = rf.quantization.prepare(model, QConfig.int8(weight_observer=MSE()))
    rf.quantization.collect_importance(prepared, [x], loss=lambda m, b: m(b).square().mean())
    (gradient,) = torch.autograd.grad(model(x).square().mean(), [model.fc.weight])
    torch.testing.assert_close(prepared.fc.quant.weight.importance, gradient.square())


def test_errors_leave_everything_as_it_was() -> None:
    model = make()
    collect = rf.quantization.collect_importance
    with pytest.raises(ValueError, match="must have prepared layers"):
        collect(Net(), DATA)
    with pytest.raises(ValueError, match="whose weight has the observer MSE, but has none"):
        collect(make(Latest()), DATA)
    names = "conv.quant.weight, grouped.quant.weight, up.quant.weight, fc.quant.weight"
    for loss in (None, lambda m, b: m(b).sum()):
        with pytest.raises(ValueError, match=re.escape(f"none reached: {names}")):
            collect(model, [], loss=loss)
    with pytest.raises(
        ValueError, match=r"data must be finite, but NaN or infinite values reached: conv\.quant\.weight"
    ):
        collect(model, [torch.full((1, 3, 8, 8), torch.nan)])
    with pytest.raises(ValueError, match=r"loss must give one number as a tensor, got shape \(2, 2\)"):
        collect(model, DATA, loss=lambda m, b: m(b))
    with pytest.raises(ValueError, match="got float"):
        collect(model, DATA, loss=lambda m, b: 1.0)
    with pytest.raises(ValueError, match="one of forward and loss must be given at most"):
        collect(model, DATA, forward=lambda m, b: m(b), loss=lambda m, b: m(b).sum())
    assert weight(model, "fc").importance is None
    assert weight(model, "fc").quantize
    assert model.training
    assert not model.fc._forward_pre_hooks
    assert not weight(model, "fc")._forward_pre_hooks
