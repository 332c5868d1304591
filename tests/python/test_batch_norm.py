"""Folded batch normalization: training at rate 0 against calibration, evaluation by hand, freezing, re-estimation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    MinMax,
    QConfig,
    calibrate,
    convert,
    freeze_batch_norm,
    prepare,
    prepare_qat,
    reestimate_batch_norm,
)


class Net(nn.Module):
    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dim == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.conv1, self.bn1 = conv(3, 8, 3, padding="same", bias=False), norm(8)
        self.conv2, self.bn2 = conv(8, 6, 3, groups=2), norm(6)
        self.alone = norm(6)  # after an addition: not folded
        self.add, self.fc = rf.nn.Add(), nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.alone(self.add(y, y.tanh()))
        return self.fc(y.flatten(2).mean(2))


def data(dim: int, seed: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 3, 9) if dim == 1 else (6, 3, 7, 5)
    return [torch.randn(shape, generator=generator) * 1.5 + 0.2 for _ in range(count)]


@pytest.fixture(params=[1, 2])
def dim(request) -> int:
    return request.param


@pytest.fixture
def net(dim) -> Net:
    torch.manual_seed(0)
    model = Net(dim)
    with torch.no_grad():
        for x in data(dim, 1):
            model(x)
        for bn in (model.bn1, model.bn2):
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
    return model


def train_at_rate_zero(model: nn.Module, batches: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
        optimizer.step()


def test_training_at_rate_zero_equals_calibration(net, dim):
    """With one observer, statistics frozen and ranges of the same run, training moves nothing that calibration does not."""
    batches = data(dim, 2)
    config = QConfig.int8(observer=MinMax())
    trained = prepare_qat(net, config, batches[0])
    freeze_batch_norm(trained)
    trained.alone.eval()
    # Training quantizes while it observes, calibration observes floats: give both the ranges of calibration.
    calibrated = calibrate(prepare(net, config, batches[0]), batches)
    ranges = {name: value for name, value in calibrated.state_dict().items() if ".quant." in name}
    trained.load_state_dict(ranges, strict=False)
    rf.quantization.set_state(trained, observe=False)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    train_at_rate_zero(trained, batches)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]), name
    rf.quantization.set_state(trained, observe=True)
    x = data(dim, 3)[0]
    trained.eval(), calibrated.eval()
    assert torch.equal(trained(x), calibrated(x))
    a, b = convert(trained), convert(calibrated)
    assert torch.equal(a(x), b(x))
    for name, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], value), name


def test_a_single_layer_at_rate_zero_observes_what_calibration_does(dim):
    """Of a layer fed with data the ranges themselves agree: nothing before it is quantized in one and not in the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3) if dim == 1 else nn.Conv2d(3, 4, 3), nn.Flatten(2))
    config, batches = QConfig.int8(observer=MinMax()), data(dim, 2)
    trained = prepare_qat(model, config)
    optimizer = torch.optim.SGD(trained.parameters(), 0.0)
    for x in batches:
        trained(x).square().mean().backward()
        optimizer.step()
    calibrated = calibrate(prepare(model, config), batches)
    trained.eval(), calibrated.eval()
    assert torch.equal(trained(batches[0]), calibrated(batches[0]))
    for name, value in calibrated.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name
    a, b = convert(trained), convert(calibrated)
    assert torch.equal(a[0].weight, b[0].weight)
    assert torch.equal(a(batches[1]), b(batches[1]))


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_evaluation_equals_folding_by_hand(net, dim, execution):
    """Bit for bit in floating point; in integers the sums are exact, which those of the formula are not."""
    batches = data(dim, 2)
    prepared = prepare_qat(net, QConfig.int8(execution=execution), batches[0])
    train_at_rate_zero(prepared, batches)
    prepared.eval()
    x = batches[0]
    out = prepared(x)
    convolve = F.conv1d if dim == 1 else F.conv2d

    def fake_quantize(value, quantizer):
        shape = [1] * value.dim()
        if quantizer.axis is not None:
            shape[quantizer.axis] = -1
        s, z = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
        return ((value / s).round() + z).clamp(quantizer.qmin, quantizer.qmax).sub(z) * s

    def folded(conv, bn, value):
        factor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        weight = conv.weight * factor.view(-1, *[1] * (dim + 1))
        bias = conv.bias - bn.running_mean if conv.bias is not None else -bn.running_mean
        weight = fake_quantize(weight, conv.quant.weight)
        padding = 1 if conv.padding == "same" else conv.padding
        value = fake_quantize(value, conv.quant.input)
        return convolve(value, weight, bn.bias + bias * factor, 1, padding, 1, conv.groups)

    with torch.no_grad():
        y = F.relu(folded(prepared.conv2, prepared.bn2, F.relu(folded(prepared.conv1, prepared.bn1, x))))
        quant = prepared.add.quant
        y = fake_quantize(y, quant.input0) + fake_quantize(y.tanh(), quant.input1)
        if quant.output is not None:
            y = fake_quantize(y, quant.output)
        y = prepared.alone(y).flatten(2).mean(2)
        fc = prepared.fc
        expected = F.linear(fake_quantize(y, fc.quant.input), fake_quantize(fc.weight, fc.quant.weight), fc.bias)
    if execution == "simulated":
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


# --- freeze_batch_norm ------------------------------------------------------------------------------------------------
def test_frozen_training_is_the_same_in_integers(net, dim):
    x = data(dim, 3)[0]
    gradients = []
    for execution in ("simulated", "integer"):
        prepared = prepare_qat(net, QConfig.int8(execution=execution), x)
        prepared(x)
        freeze_batch_norm(prepared)
        prepared.zero_grad()
        prepared(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in prepared.named_parameters()})
    for name, expected in gradients[0].items():
        limit = 1e-4 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=limit, msg=name)


def test_frozen_statistics_stay_and_gamma_trains(net, dim):
    prepared = prepare_qat(net, QConfig.int8(), data(dim, 2)[0])
    freeze_batch_norm(prepared)
    prepared.train()
    statistics = prepared.bn1.running_mean.clone(), prepared.bn1.running_var.clone()
    moving = prepared.alone.running_mean.clone()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    gamma, beta = prepared.bn1.weight.detach().clone(), prepared.bn1.bias.detach().clone()
    F.cross_entropy(prepared(data(dim, 2)[0]), torch.arange(6) % 4).backward()
    optimizer.step()
    assert torch.equal(prepared.bn1.running_mean, statistics[0])
    assert torch.equal(prepared.bn1.running_var, statistics[1])
    assert prepared.bn1.num_batches_tracked == net.bn1.num_batches_tracked
    assert not torch.equal(prepared.bn1.weight, gamma)
    assert not torch.equal(prepared.bn1.bias, beta)
    assert not torch.equal(prepared.alone.running_mean, moving)  # not folded: not touched
    assert copy.deepcopy(prepared).bn1.frozen
    freeze_batch_norm(prepared, False)
    prepared(data(dim, 2)[1])
    assert not torch.equal(prepared.bn1.running_mean, statistics[0])


def test_frozen_training_computes_what_evaluation_does(net, dim):
    x = data(dim, 2)[0]
    prepared = prepare_qat(net, QConfig.int8(), x)
    prepared(x)
    rf.quantization.set_state(prepared, observe=False)
    freeze_batch_norm(prepared)
    prepared.alone.eval()
    training = prepared(x)
    assert torch.equal(training, prepared.eval()(x))


def test_frozen_conv_bn_before_prepare():
    torch.manual_seed(0)
    model = nn.Sequential(rf.nn.ConvBn2d(3, 4, 3))
    x = data(2, 1)[0]
    model(x)
    freeze_batch_norm(model)
    frozen = model.train()(x)
    assert torch.equal(frozen, model.eval()(x))


def test_freeze_refuses_a_model_without_folding(net, dim):
    with pytest.raises(
        ValueError, match=r"\[freeze_batch_norm\] the model must have a batch normalization that is folded"
    ):
        freeze_batch_norm(prepare_qat(net, QConfig.int8()))


# --- reestimate_batch_norm ------------------------------------------------------------------------------------------------
def test_reestimated_statistics_are_the_plain_average(net, dim):
    batches = data(dim, 5, 5)
    reestimate_batch_norm(net, batches)
    inputs: list[torch.Tensor] = []
    with torch.no_grad():
        for x in batches:
            inputs.append(net.conv1(x))
    axes = [0, *range(2, dim + 2)]
    mean = torch.stack([y.double().mean(axes) for y in inputs]).mean(0)
    var = torch.stack([y.double().var(axes, unbiased=True) for y in inputs]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.bn1.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert net.bn1.num_batches_tracked == 5
    assert net.bn1.momentum == 0.1
    assert net.training


def test_reestimation_of_a_prepared_model_keeps_everything_else(net, dim):
    batches = data(dim, 5, 6)
    prepared = prepare_qat(net, QConfig.int8(), batches[0])
    train_at_rate_zero(prepared, batches[:1])
    freeze_batch_norm(prepared)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    assert reestimate_batch_norm(prepared, iter(batches), batches=3) is prepared
    moved = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    # A weight's own range follows the weight at every forward: that of the last training step was older.
    moved = {name for name in moved if ".quant.weight." not in name}
    assert moved == {
        f"{bn}.{name}"
        for bn in ("bn1", "bn2", "alone")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert prepared.bn1.num_batches_tracked == 3
    assert prepared.bn1.frozen
    assert prepared.training
    # Quantized layers: the statistics of what the convolution gives, with the weight that was folded before.
    reference = prepare_qat(net, QConfig.int8(), batches[0])
    reference.load_state_dict(before)
    reference.eval()
    factor = reference.conv1._factor()
    weight = reference.conv1.quant.weight(reference.conv1.weight * factor.view(-1, *[1] * (dim + 1)))
    y = [
        reference.conv1._compute(reference.conv1.quant.input(x), weight, None) / factor.view(1, -1, *[1] * dim)
        for x in batches[:3]
    ]
    mean = torch.stack([value.double().mean([0, *range(2, dim + 2)]) for value in y]).mean(0)
    torch.testing.assert_close(prepared.bn1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)


def test_reestimation_refuses_and_restores(net, dim):
    batches = data(dim, 5, 2)
    prepared = prepare_qat(net, QConfig.int8(), batches[0])
    prepared(batches[0])
    prepared.conv1.eval()  # a mode of its own
    before = {name: value.clone() for name, value in prepared.state_dict().items() if ".quant.weight." not in name}
    modes = {name: module.training for name, module in prepared.named_modules()}
    bad = batches[1].clone()[:, :2]
    cases = [
        (([],), ValueError, r"\[reestimate_batch_norm\] loader must yield at least one batch, got none"),
        ((batches, 0), ValueError, r"\[reestimate_batch_norm\] batches must be at least 1, got 0"),
        ((["text"],), TypeError, r"\[reestimate_batch_norm\] a batch must be a tensor, .* got str"),
        (([batches[0], bad],), ValueError, "3 channels, got shape"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            reestimate_batch_norm(prepared, *arguments)
        assert {name: module.training for name, module in prepared.named_modules()} == modes
        assert all(torch.equal(prepared.state_dict()[name], value) for name, value in before.items())
        assert prepared.bn1.momentum == 0.1
    with pytest.raises(ValueError, match="must have a batch normalization with running statistics"):
        reestimate_batch_norm(nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="every batch normalization must see data, but none reached: bn1, bn2, alone"):
        reestimate_batch_norm(prepared, batches, forward=lambda model, x: x)


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_a_weight_that_is_not_finite_is_counted_in_the_weight(net, dim, execution):
    x = data(dim, 4)[0]
    prepared = prepare_qat(net, QConfig.int8(execution=execution), x)
    with torch.no_grad():
        prepared.conv1.weight[0, 0] = torch.nan
    count = prepared.conv1.weight[0, 0].numel()
    message = (
        rf"conv1\.quant\.weight must be finite, got {count} NaN or infinite values of {prepared.conv1.weight.numel()}"
    )
    with pytest.raises(ValueError, match=message):
        prepared(x)
