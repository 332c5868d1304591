"""Schemes, configurations, QAT layers, prepare / calibrate / convert."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    FakeQuantizer,
    Latest,
    MinMax,
    MovingAverage,
    PerChannel,
    PerTensor,
    QConfig,
    Scheme,
    calibrate,
    convert,
    prepare,
    prepare_qat,
    report,
    set_state,
)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.add = rf.nn.Add()
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.add(self.bn2(self.conv2(y)), self.shortcut(x)))


class Net(nn.Module):
    """A small residual network with functional ReLU, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.block = Block(8, 12, 2)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x):
        x = self.block(torch.relu(self.bn(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():  # statistics that are not the initial ones
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8) * 2 + 0.5)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, make_batch, classes: int, steps: int = 5, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        x = make_batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(classes, (len(x),))).backward()
        optimizer.step()


def grid(x: torch.Tensor, q: FakeQuantizer) -> torch.Tensor:
    """Fake quantization by the formula, in float32 numpy."""
    shape = [1] * x.dim()
    if q.axis is not None:
        shape[q.axis] = -1
    s = q.scale.numpy().reshape(shape)
    z = q.zero_point.numpy().reshape(shape).astype(np.float32)
    integers = np.clip(np.rint(x.detach().numpy() / s) + z, q.qmin, q.qmax)
    return torch.from_numpy((integers - z) * s)


# --- Scheme and QConfig ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheme", "qmin", "qmax", "dtype"),
    [
        (Scheme(), -128, 127, torch.int8),
        (Scheme(narrow_range=True), -127, 127, torch.int8),
        (Scheme(symmetric=False), 0, 255, torch.uint8),
        (Scheme(bits=4), -8, 7, torch.int8),
        (Scheme(bits=4, symmetric=False), 0, 15, torch.uint8),
        (Scheme(bits=2, narrow_range=True), -1, 1, torch.int8),
        (Scheme(symmetric=True, signed=False), 0, 255, torch.uint8),
        (Scheme(bits=3, symmetric=False, signed=True), -4, 3, torch.int8),
    ],
)
def test_scheme_range(scheme, qmin, qmax, dtype):
    assert (scheme.qmin, scheme.qmax, scheme.dtype) == (qmin, qmax, dtype)


def test_scheme_is_a_value():
    scheme = Scheme(bits=4, granularity=PerChannel(axis=1))
    assert scheme == Scheme(bits=4, granularity=PerChannel(axis=1))
    assert scheme != Scheme(bits=4, granularity=PerTensor())
    assert hash(scheme) == hash(pickle.loads(pickle.dumps(scheme)))
    assert eval(repr(scheme)) == scheme
    assert str(scheme) == "int4 symmetric per-channel(axis=1) [-8, 7]"
    assert copy.deepcopy(MovingAverage(0.5)) == MovingAverage(0.5) != MovingAverage(0.25)


@pytest.mark.parametrize("bits", [1, 0, -3, 17, 32])
def test_scheme_refuses_bits(bits):
    rule = f"[Scheme] bits must be in 2..16 for integers (1 bit is Binary), got {bits}"
    with pytest.raises(ValueError, match=re.escape(rule)):
        Scheme(bits=bits)


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.5, float("nan")])
def test_moving_average_refuses_constant(constant):
    with pytest.raises(ValueError, match=r"\[MovingAverage\] constant must be in \(0, 1\], got"):
        MovingAverage(constant)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": Scheme(symmetric=False)}, "[QConfig] weight must be symmetric and signed"),
        ({"weight": Scheme(granularity=PerChannel(1))}, "[QConfig] weight must be per tensor or per output channel"),
        ({"activation": Scheme()}, "[QConfig] activation needs a weight scheme"),
        (
            {"weight": Scheme(), "activation": Scheme(granularity=PerChannel(0))},
            "[QConfig] activation must be per tensor",
        ),
    ],
)
def test_qconfig_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QConfig(**fields)


# --- FakeQuantizer --------------------------------------------------------------------------------------------------
def test_fake_quantizer_follows_observer():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.5, 4.0])]
    expected = {
        MinMax(): (-3.0, 4.0),
        Latest(): (0.5, 4.0),
        MovingAverage(0.5): ((-1.0 - 3.0) / 2 / 2 + 0.5 / 2, (2.0 + 1.0) / 2 / 2 + 4.0 / 2),
    }
    for observer, (low, high) in expected.items():
        quantizer = FakeQuantizer(Scheme(symmetric=False), observer)
        for batch in batches:
            quantizer(batch)
        assert quantizer.min_val.item() == pytest.approx(low)
        assert quantizer.max_val.item() == pytest.approx(high)
        assert quantizer.scale.item() == pytest.approx((max(high, 0) - min(low, 0)) / 255)


def test_fake_quantizer_observes_in_training_only():
    quantizer = FakeQuantizer(Scheme(symmetric=False), MovingAverage(0.5))
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer.eval()
    x = torch.tensor([0.0, 100.0])
    assert quantizer(x).max().item() == pytest.approx(1.0)
    assert quantizer.max_val.item() == 1.0
    quantizer.train().observe = False
    quantizer(x)
    assert quantizer.max_val.item() == 1.0


def test_fake_quantizer_wants_data_first():
    quantizer = FakeQuantizer(Scheme()).eval()
    with pytest.raises(ValueError, match=r"\[FakeQuantizer\] the quantizer must observe data before it quantizes"):
        quantizer(torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_is_left_out_counted_and_named(bad):
    quantizer = FakeQuantizer(Scheme(symmetric=False), MovingAverage(0.5))
    quantizer.name = "fc.quant.input"
    quantizer(torch.tensor([-1.0, 1.0]))
    before = copy.deepcopy(quantizer.state_dict())
    with pytest.warns(UserWarning, match=r"\[FakeQuantizer\] fc.quant.input met a batch with NaN or infinite values"):
        y = quantizer(torch.tensor([0.0, bad, 2.0]))
    assert y[0] == 0
    assert torch.isnan(y[1]) == (bad != bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        quantizer(torch.tensor([bad]))
    after = quantizer.state_dict()
    assert after.pop("skipped").item() == 2
    assert all(torch.equal(before[k], v) for k, v in after.items())


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_a_quantizer_without_any_finite_batch_is_not_calibrated():
    quantizer = FakeQuantizer(Scheme(symmetric=False))
    assert quantizer(torch.tensor([float("nan"), 7.4])).tolist()[1] == 7.0  # the grid of [0, 0] has steps of 1
    assert not quantizer.calibrated
    with pytest.raises(ValueError, match=r"\[FakeQuantizer\] the quantizer must observe data before it quantizes"):
        quantizer.eval()(torch.ones(3))


def test_a_weight_that_is_not_finite_is_an_error_that_names_its_layer():
    model = prepare_qat(mlp(), QConfig.int8())
    x = torch.randn(4, 6)
    model(x)
    before = copy.deepcopy(model[2].quant.weight.state_dict())
    with torch.no_grad():
        model[2].weight[1, 3] = float("inf")
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"the weight of 2.quant.weight must be finite, got 2 NaN or infinite values of 256"
    ):
        model(x)
    assert all(torch.equal(before[k], v) for k, v in model[2].quant.weight.state_dict().items())


def test_fake_quantizer_refuses_channels():
    with pytest.raises(ValueError, match=r"\[FakeQuantizer\] channels must be at least 1, got 0"):
        FakeQuantizer(Scheme(granularity=PerChannel(0)), channels=0)


# --- prepare --------------------------------------------------------------------------------------------------------
def test_prepare_keeps_names_and_values_and_the_model(net, images):
    before = copy.deepcopy(net.state_dict())
    types = {name: type(module) for name, module in net.named_modules()}
    prepared = prepare_qat(net, QConfig.int8(), images)
    state = prepared.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(".quant." in name for name in set(state) - set(before))
    assert {name: type(module) for name, module in net.named_modules()} == types
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training


def test_inplace_keeps_parameter_objects(net, images):
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    prepared = prepare_qat(net, QConfig.int8(), images, inplace=True)
    assert prepared is net
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    F.cross_entropy(net(images), torch.zeros(4, dtype=torch.long)).backward()
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(not torch.equal(a, p) for a, p in zip(before, parameters, strict=True) if p.grad.abs().sum() > 0)
    assert isinstance(net.stem, rf.nn.ConvBn2d)


def test_flow_folds_fuses_and_places(net, images):
    rows = {layer.name: layer for layer in report(prepare_qat(net, QConfig.int8(), images)).layers}
    assert rows["stem"].kind == rows["block.conv2"].kind == rows["block.shortcut.0"].kind == "ConvBn2d"
    assert "ReLU fused" in rows["stem"].note
    assert "ReLU fused" not in rows["block.conv2"].note
    assert "ReLU fused" in rows["block.add"].note
    assert "output quantized" in rows["block.add"].note  # goes into the pooling, which is float
    assert sum("output quantized" in row.note for row in rows.values()) == 1


def test_a_result_with_an_integer_consumer_is_quantized_there():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y.sigmoid()

    prepared = prepare_qat(Two(), QConfig.int8(), torch.randn(1, 2, 4, 4))
    assert prepared.a.quant.output is None
    assert prepared.b.quant.output is not None
    assert not prepared.a.relu


def test_relu_with_another_consumer_is_not_fused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return torch.relu(y).mean() + y.mean()

    assert not prepare_qat(Two(), QConfig.int8(), torch.randn(1, 2, 4, 4)).a.relu


def test_an_in_place_relu_that_is_fused_still_trains():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.add = nn.Conv2d(2, 2, 1), rf.nn.Add()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.add(self.relu(self.conv(x)), x))

    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    prepared = prepare_qat(Block(), QConfig.int8(), x)
    assert prepared.conv.relu
    assert prepared.add.relu
    apart = copy.deepcopy(prepared)
    apart.relu = nn.ReLU()
    for model in (prepared, apart):
        model(x).square().mean().backward()
    assert prepared.conv.weight.grad.abs().sum() > 0
    assert torch.equal(prepared.conv.weight.grad, apart.conv.weight.grad)


def test_without_example_inputs_nothing_is_folded(net):
    prepared = prepare_qat(net, QConfig.int8())
    assert type(prepared.stem) is rf.nn.Conv2d
    assert type(prepared.bn) is nn.BatchNorm2d
    assert all("folded" not in layer.note and "not calibrated" in layer.note for layer in report(prepared).layers)


def test_shared_batch_norm_is_not_folded():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.b(self.bn(self.a(x))))

    prepared = prepare_qat(Twice(), QConfig.int8(), torch.randn(2, 2, 4, 4))
    assert type(prepared.a) is type(prepared.b) is rf.nn.Conv2d
    assert type(prepared.bn) is nn.BatchNorm2d


def test_overrides_by_name_and_type(net, images):
    four = QConfig(Scheme(bits=4), Scheme(bits=4, symmetric=False))
    config = QConfig.int8(overrides={nn.Conv2d: four, "stem": None, "block.shortcut.*": QConfig.int8()})
    rows = {layer.name: layer for layer in report(prepare_qat(net, config, images)).layers}
    assert rows["stem"].state == "fp32"
    assert rows["stem"].note == "kept in FP32 by the override 'stem'"
    assert rows["block.conv1"].weight.startswith("int4")
    assert rows["block.shortcut.0"].weight.startswith("int8")
    assert rows["classifier"].weight.startswith("int8")


@pytest.mark.parametrize("key", ["clasifier", nn.LSTM])
def test_an_override_that_matches_nothing_is_an_error(net, images, key):
    shown = repr(key) if isinstance(key, str) else key.__name__
    with pytest.raises(ValueError, match=re.escape(f"[prepare_qat] override {shown} must match a layer")):
        prepare_qat(net, QConfig.int8(overrides={key: None}), images)


def test_prepare_refuses(net, images):
    with pytest.raises(
        ValueError, match=r"\[prepare_qat\] the model must have a layer that the configuration quantizes"
    ):
        prepare_qat(nn.Sequential(nn.ReLU()), QConfig.int8())
    with pytest.raises(TypeError, match=r"\[prepare\] config must be a QConfig, got Scheme"):
        prepare(net, Scheme())
    prepared = prepare_qat(net, QConfig.int8(), images)
    with pytest.raises(ValueError, match=r"\[prepare_qat\] layer stem must be floating point, but is already prepared"):
        prepare_qat(prepared, QConfig.int8(), images)
    with pytest.raises(ValueError, match=r"\[prepare_qat\] model must contain its layers, got a single Linear"):
        prepare_qat(nn.Linear(2, 2), QConfig.int8())


def test_a_failing_example_run_leaves_the_model_as_it_was(net):
    modules = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(RuntimeError, match="channels"):
        prepare_qat(net, QConfig.int8(), torch.randn(1, 4, 8, 8), inplace=True)
    assert {name: type(module) for name, module in net.named_modules()} == modules
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_shared_layers_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    model.forward = lambda x: model["b"](model["a"](x))
    prepared = prepare_qat(model, QConfig.int8())
    assert prepared["a"] is prepared["b"][0]
    assert isinstance(prepared["a"], rf.nn.Linear)


def test_unsupported_layers_are_skipped_with_their_reason():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(2, 2), nn.RNN(2, 2), nn.Bilinear(2, 2, 2), nn.Linear(2, 2))
    rows = report(prepare_qat(model, QConfig.int8(), strict=False)).layers
    assert [row.state for row in rows] == ["fp32", "fp32", "fp32", "prepared"]
    assert rows[0].note == "Scaled is a subclass of Linear"
    assert rows[1].note == "RNN is not supported"
    assert rows[2].note == "Bilinear is not supported"


# --- Arithmetic of the layers ---------------------------------------------------------------------------------------
def assert_equals_formula(out, expected, execution):
    """Bit for bit in floating point; in integers the sums are exact, and a float sum is not."""
    if execution == "simulated":
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_linear_equals_the_formula(execution):
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(7, 5)), QConfig.int8(execution=execution))
    x = torch.randn(9, 7)
    model(x)
    model.eval()
    layer = model[0]
    expected = F.linear(grid(x, layer.quant.input), grid(layer.weight, layer.quant.weight), layer.bias)
    assert_equals_formula(model(x), expected, execution)


@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_conv_bn_in_evaluation_equals_folding_and_the_formula(net, images, execution):
    prepared = prepare_qat(net, QConfig.int8(execution=execution), images)
    prepared(images)
    prepared.eval()
    layer, bn = prepared.stem, prepared.bn
    out = layer(images)
    factor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    weight = (layer.weight * factor.view(-1, 1, 1, 1)).detach()
    bias = bn.bias + (layer.bias - bn.running_mean) * factor
    expected = F.conv2d(grid(images, layer.quant.input), grid(weight, layer.quant.weight), bias, padding=1).relu()
    assert_equals_formula(out, expected, execution)


def test_conv_bn_in_training_is_batch_norm(net, images):
    # On a fine grid the layer is convolution + batch normalization: same result, statistics and gradients.
    prepared = prepare_qat(net, QConfig.int8(), images)
    set_state(prepared, quantize=False)
    reference = copy.deepcopy(net)
    for model in (prepared, reference):
        model.train()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
    gradients = dict(prepared.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=2e-3, atol=1e-5)
    state = prepared.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_conv_bn_with_a_dead_channel_stays_finite(net, images):
    with torch.no_grad():
        net.bn.weight[0] = 0.0
        net.stem.weight[1] = 0.0
    prepared = prepare_qat(net, QConfig.int8(), images)
    out = prepared(images)
    F.cross_entropy(out, torch.tensor([0, 1, 2, 3])).backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters())


def test_gradient_is_straight_through_with_clipping():
    layer = prepare_qat(nn.Sequential(nn.Linear(3, 1, bias=False)), QConfig.int8())
    layer(torch.tensor([[0.0, 0.5, 1.0]]))  # range [0, 1] from here on
    set_state(layer, observe=False)
    x = torch.tensor([[-0.5, 0.5, 2.0]], requires_grad=True)
    layer(x).backward(torch.tensor([[3.0]]))
    weight = grid(layer[0].weight, layer[0].quant.weight)
    assert torch.equal(x.grad, 3.0 * weight * torch.tensor([[0.0, 1.0, 0.0]]))


def test_training_learns_and_weights_stay_float(images):
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = prepare_qat(mlp(), QConfig.int8(), x)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.95
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --- calibrate ------------------------------------------------------------------------------------------------------
def test_calibrate_takes_ranges_of_all_batches_in_float():
    torch.manual_seed(0)
    model = prepare(mlp(), QConfig.int8(), torch.randn(2, 6))
    batches = [torch.randn(8, 6) for _ in range(4)]
    reference = mlp()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if ".quant." not in k})
    calibrate(model, [(batch, None) for batch in batches])
    x = torch.cat(batches)
    assert model[0].quant.input.min_val.item() == x.min().item()
    assert model[0].quant.input.max_val.item() == x.max().item()
    assert model.training
    assert (model.eval()(x) - reference(x)).abs().max() < 0.05 * reference(x).abs().max()


def test_prepared_activations_pass_unchanged_until_calibrated():
    model = prepare(nn.Sequential(nn.Linear(4, 4)), QConfig.int8())
    x = torch.randn(3, 4)
    expected = F.linear(
        x,
        grid(model[0].weight, model[0].quant.weight) if model[0].quant.weight.calibrated else model[0].weight,
        model[0].bias,
    )
    torch.testing.assert_close(model(x), expected, atol=0.02, rtol=0.0)
    assert not model[0].quant.input.calibrated


def test_calibrate_refuses_and_restores(net, images):
    with pytest.raises(ValueError, match=r"\[calibrate\] the model must have prepared layers"):
        calibrate(net, [images])
    prepared = prepare(net, QConfig.int8(), images)
    with pytest.raises(ValueError, match=r"\[calibrate\] loader must yield at least one batch, got none"):
        calibrate(prepared, [])
    with pytest.raises(TypeError, match=r"\[calibrate\] a batch must be a tensor, .* got str"):
        calibrate(prepared, ["text"])
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(TypeError, match="got str"):
        calibrate(prepared, [images, "text"])
    after = prepared.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not prepared.stem.quant.input.observe
    assert not prepared.stem.quant.input.quantize
    assert prepared.training


def test_calibrate_names_what_was_not_reached():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, both=False):
            return self.b(self.a(x)) if both else self.a(x)

    model = prepare(Branch(), QConfig.int8())
    with pytest.raises(
        ValueError, match=r"\[calibrate\] every quantizer must see data, but none reached: b.quant.input"
    ):
        calibrate(model, [torch.randn(3, 2)])
    calibrate(model, [{"x": torch.randn(3, 2), "both": True}])
    assert model.b.quant.input.calibrated


# --- convert --------------------------------------------------------------------------------------------------------
def integer_reference(layer, x: torch.Tensor) -> np.ndarray:
    """The layer in exact integer arithmetic (int64), scaled once at the end in float64."""
    quantizer = layer.quant.input
    s, z = quantizer.scale.item(), quantizer.zero_point.item()
    q = np.clip(np.rint(x.numpy() / np.float32(s)) + np.float32(z), quantizer.qmin, quantizer.qmax) - z
    q, w = torch.from_numpy(q).double(), layer.integer_weight.double()
    if isinstance(layer, rf.nn.QuantizedLinear):
        sums = F.linear(q, w)
        shape = (-1,)
    else:
        sums = layer.geometry.convolve(q, w, None)
        shape = (1, -1, *[1] * (sums.dim() - 2))
    out = sums * (s * layer.quant.weight.scale.double()).view(shape)
    if layer.bias is not None:
        out = out + layer.bias.double().view(shape)
    return (out.clamp_min(0) if layer.relu else out).numpy()


ACTIVATIONS = [
    Scheme(symmetric=False),
    Scheme(symmetric=True),
    Scheme(symmetric=True, signed=False),
    Scheme(symmetric=False, signed=True),
    Scheme(bits=5, symmetric=False),
    Scheme(bits=2, symmetric=False),
]
WEIGHTS = [
    Scheme(narrow_range=True, granularity=PerChannel(0)),
    Scheme(),
    Scheme(bits=4, granularity=PerChannel(0)),
    Scheme(bits=2, granularity=PerChannel(0)),
]
LAYERS = {
    "linear": (lambda: nn.Linear(33, 17), (5, 33)),
    "linear_nobias_3d": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 7)),
    "conv_stride_dilation": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False), (2, 4, 11, 9)),
    "conv_grouped": (lambda: nn.Conv2d(8, 12, (1, 3), groups=4), (1, 8, 5, 6)),
    "conv_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (3, 6, 5, 5)),
    "conv_same_even": (lambda: nn.Conv2d(3, 5, (4, 3), padding="same"), (2, 3, 7, 6)),
    "conv_reflect": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, stride=2, padding=2, dilation=2), (2, 5, 13)),
    "conv1d_depthwise": (lambda: nn.Conv1d(6, 6, 5, groups=6, padding="same"), (3, 6, 9)),
    "conv1d_circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (1, 4, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 3, stride=(1, 2, 1), padding=1), (2, 3, 5, 7, 6)),
    "conv3d_grouped": (lambda: nn.Conv3d(4, 6, (1, 3, 2), groups=2, padding="same"), (1, 4, 4, 5, 6)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_integer_execution_equals_integers_and_simulation(kind, weight, activation, relu):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make(), nn.ReLU()) if relu else nn.Sequential(make())
    x = torch.randn(shape) + 0.3
    prepared = calibrate(prepare(model, QConfig(weight, activation), x), [x])
    assert prepared[0].relu == relu
    converted = convert(prepared)
    y = torch.randn(shape) * 1.5  # some values beyond the calibrated range
    out = converted(y)
    exact = integer_reference(converted[0], y)
    scale = np.abs(exact).max() + 1e-6
    np.testing.assert_allclose(out.numpy(), exact, rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(out, prepared.eval()(y), rtol=0, atol=1e-5 * float(scale))
    assert converted[0].integer_weight.dtype == torch.int8
    assert int(converted[0].integer_weight.min()) >= weight.qmin
    assert int(converted[0].integer_weight.max()) <= weight.qmax


def test_converted_network_agrees_with_the_prepared_one(net, images):
    prepared = prepare_qat(net, QConfig.int8(), images)
    train(prepared, lambda: torch.randn(8, 3, 8, 8), 5)
    converted = convert(prepared)
    prepared.eval()
    x = torch.randn(16, 3, 8, 8)
    torch.testing.assert_close(converted(x), prepared(x), rtol=0, atol=1e-4)
    assert {layer.state for layer in report(converted).layers} == {"integer"}
    assert isinstance(converted.bn, nn.Identity)
    assert isinstance(converted.stem, rf.nn.QuantizedConv2d)


def test_converted_state_round_trips(net, images):
    prepared = prepare_qat(net, QConfig.int8(), images)
    train(prepared, lambda: torch.randn(8, 3, 8, 8), 5)
    converted = convert(prepared)
    expected = converted(images)
    assert torch.equal(copy.deepcopy(converted)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(images), expected)
    # Another converted model with other numbers takes these, also after it has packed its own weights.
    torch.manual_seed(9)
    other = prepare_qat(Net(), QConfig.int8(), images)
    train(other, lambda: torch.randn(8, 3, 8, 8), 5)
    other = convert(other)
    assert not torch.equal(other(images), expected)
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(images), expected)


def test_weight_of_a_converted_layer_is_what_its_integers_stand_for(images, net):
    prepared = prepare_qat(net, QConfig.int8(), images)
    train(prepared, lambda: torch.randn(8, 3, 8, 8), 2)
    converted = convert(prepared)
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, rf.nn.QuantizedLayer)}
    assert layers
    state = converted.state_dict()
    for name, layer in layers.items():
        scale = layer.quant.weight.scale.view(-1, *[1] * (layer.integer_weight.dim() - 1))
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, layer.integer_weight * scale)
        assert state[f"{name}.weight"].dtype == layer.integer_weight.dtype == torch.int8
        assert "weight" in dict(layer.named_buffers())
    layer = converted.classifier
    trained = prepared.classifier
    assert torch.equal(layer.weight, trained.quant.weight(trained.weight))
    before = layer.integer_weight
    for value in (layer.weight, None):
        with pytest.raises(AttributeError, match=r"\[QuantizedLinear\] weight is computed from integer_weight"):
            layer.weight = value
    assert layer.integer_weight is before


def test_dequantized_weight_is_a_tensor_to_be_read():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    layer = convert(calibrate(prepare(mlp(), QConfig.int8(), x), [x]))[0]
    numbers = layer.integer_weight.float() * layer.quant.weight.scale[:, None]
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), numbers.shape)
    assert (len(weight), weight.dim(), weight.numel(), weight.size(1)) == (16, 2, 96, 6)
    assert weight.is_floating_point()
    assert isinstance(weight, torch.Tensor)
    for result in (
        weight.detach(),
        weight + 0,
        weight.t().t(),
        weight.data,
        copy.deepcopy(weight),
        weight.to(x),
        weight[:],
    ):
        assert torch.equal(result, numbers)
    assert torch.equal(pickle.loads(pickle.dumps(weight)), numbers)
    assert torch.equal(torch.ops.aten.clone(weight), numbers)
    assert type(weight * 2) is torch.Tensor
    assert weight.tolist() == numbers.tolist()
    np.testing.assert_array_equal(weight.numpy(), numbers.numpy())
    np.testing.assert_array_equal(np.asarray(weight), numbers.numpy())
    assert repr(weight) == repr(numbers)
    assert torch.equal(F.linear(x, weight), F.linear(x, numbers))
    assert torch.equal(x.to(weight), x)
    y = x.clone().requires_grad_()
    F.linear(y, weight).sum().backward()
    torch.testing.assert_close(y.grad, numbers.sum(0).expand(5, 6))
    integers = layer.integer_weight.clone()
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.__imul__(2),
        lambda: weight.__setitem__(0, 1.0),
        lambda: nn.init.zeros_(weight),
        lambda: setattr(weight, "data", numbers),
    ):
        with pytest.raises(
            RuntimeError, match=r"\[DequantizedWeight\] the weight of a converted layer must only be read"
        ):
            write()
    assert torch.equal(layer.integer_weight, integers)


def test_converted_weights_are_packed_again_when_others_take_their_place():
    x = torch.randn(5, 6)
    models = [convert(calibrate(prepare(mlp(), QConfig.int8(), x), [x])) for _ in range(2)]
    expected = models[1](x)
    assert not torch.equal(models[0](x), expected)
    models[0].load_state_dict(models[1].state_dict(), assign=True)
    assert models[0][0].integer_weight.data_ptr() == models[1][0].integer_weight.data_ptr()
    assert torch.equal(models[0](x), expected)
    assert models[0].double().half().float()[0].integer_weight.dtype == torch.int8


def test_weight_only():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    prepared = prepare(mlp(), QConfig(weight=Scheme(bits=4, granularity=PerChannel(0))), x)
    prepared(x)
    converted = convert(prepared)
    torch.testing.assert_close(converted(x), prepared.eval()(x), rtol=0, atol=1e-6)
    assert converted[0].integer_weight.dtype == torch.int8
    assert converted[0].integer_weight.abs().max() <= 8


def test_convert_refuses_and_leaves_the_model(net, images):
    with pytest.raises(ValueError, match=r"\[convert\] the model must have prepared layers"):
        convert(net)
    prepared = prepare_qat(net, QConfig.int8(), images)
    types = [type(module) for module in prepared.modules()]
    message = r"\[convert\] every quantizer must be calibrated .* but these are not: stem.quant.input, .*classifier.quant.input"
    with pytest.raises(ValueError, match=message):
        convert(prepared, inplace=True)
    assert [type(module) for module in prepared.modules()] == types


def test_empty_batch_and_wrong_width_of_a_converted_layer():
    x = torch.randn(5, 6)
    converted = convert(calibrate(prepare(mlp(), QConfig.int8(), x), [x]))
    assert converted(torch.empty(0, 6)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"\[quantized_linear\] input must have 6 features in its last dimension"):
        converted(torch.randn(5, 7))


# --- What surrounds training ----------------------------------------------------------------------------------------
def test_float_checkpoint_loads_into_a_prepared_model(net, images):
    prepared = prepare_qat(Net(), QConfig.int8(), images)
    missing, unexpected = prepared.load_state_dict(net.state_dict(), strict=False)
    assert unexpected == []
    assert all(".quant." in name for name in missing)
    assert torch.equal(prepared.block.conv1.weight, net.block.conv1.weight)


def test_prepared_state_round_trips(net, images):
    prepared = prepare_qat(net, QConfig.int8(), images)
    train(prepared, lambda: torch.randn(8, 3, 8, 8), 5)
    fresh = prepare_qat(Net(), QConfig.int8(), images)
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh.eval()(images), prepared.eval()(images))
    clone = copy.deepcopy(prepared)
    assert clone.stem.bn is clone.bn
    assert clone.stem.bn is not prepared.bn
    assert torch.equal(pickle.loads(pickle.dumps(prepared))(images), prepared(images))


def test_inverse_std():
    variance = torch.rand(7) + 0.1
    assert torch.equal(torch.ops.rarefy.inverse_std(variance, 1e-3), torch.rsqrt(variance + 1e-3))
    torch.library.opcheck(torch.ops.rarefy.inverse_std.default, (variance, 1e-3))


def test_compiles_as_one_graph(net, images):
    prepared = prepare_qat(net, QConfig.int8(), images)
    train(prepared, lambda: torch.randn(8, 3, 8, 8), 5, steps=2)
    prepared.zero_grad()
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        model.train()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
    for (name, a), b in zip(eager.named_parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(eager.state_dict().items(), prepared.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(compiled.eval()(images), eager.eval()(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(net, images, dtype):
    prepared = prepare_qat(net, QConfig.int8(), images)
    with torch.autocast("cpu", dtype=dtype):
        out = prepared(images)
        loss = F.cross_entropy(out.float(), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert out.dtype == dtype
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in prepared.parameters())


def test_conv_bn_as_a_part_of_a_model_from_the_start():
    torch.manual_seed(0)
    model = nn.Sequential(rf.nn.ConvBn2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(6, 3, 5, 5)
    reference = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    reference[0].weight.data.copy_(model[0].weight)
    torch.testing.assert_close(model(x), reference(x))
    assert set(model.state_dict()) == {"0.weight", *(f"0.bn.{k}" for k in reference[1].state_dict())}
    prepared = prepare_qat(model, QConfig.int8())
    prepared(x)
    prepared.eval()
    torch.testing.assert_close(prepared(x), model.eval()(x), rtol=0, atol=0.1)
    torch.testing.assert_close(convert(prepared)(x), prepared(x), rtol=0, atol=1e-5)


def poisoned(batches, *bad):
    for i in bad:
        batches[i] = batches[i].clone()
        batches[i].view(-1)[5] = float("nan")
    return batches


def test_calibrate_leaves_batches_out_that_are_not_finite(net):
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    with pytest.warns(
        UserWarning, match=r"\[calibrate\] batches with NaN or infinite values were left out at: "
    ) as caught:
        model = calibrate(prepare(net, QConfig.int8()), poisoned(list(batches), 1, 2))
    assert len(caught) == 1
    assert "stem.quant.input (2)" in str(caught[0].message)
    expected = calibrate(prepare(net, QConfig.int8()), [batches[0], batches[3]])
    for (name, a), b in zip(expected.state_dict().items(), model.state_dict().values(), strict=True):
        assert name.endswith("skipped") or torch.equal(a, b), name
    assert "2 batches not finite at input" in {row.name: row for row in report(model).layers}["stem"].note


def test_calibrate_wants_a_finite_batch(net):
    model = prepare(net, QConfig.int8())
    before = copy.deepcopy(model.state_dict())
    batches = poisoned([torch.randn(4, 3, 8, 8) for _ in range(2)], 0, 1)
    with pytest.raises(ValueError, match=r"every batch held NaN or infinite values at: stem.quant.input"):
        calibrate(model, batches)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_set_state_switches_everything(net, images):
    prepared = prepare_qat(net, QConfig.int8(), images)
    prepared(images)
    set_state(prepared, observe=False, quantize=False)
    before = copy.deepcopy(prepared.state_dict())
    prepared(images * 100)
    after = prepared.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if ".quant." in k)
    with pytest.raises(ValueError, match=r"\[set_state\] the model must have prepared layers"):
        set_state(net, observe=True)


def test_report_shows_itself(net, images):
    text = repr(report(prepare_qat(net, QConfig.int8(overrides={"classifier": None}), images)))
    assert "block.add" in text
    assert "6 quantized, 1 in FP32" in text or "5 quantized, 1 in FP32" in text
    page = report(prepare_qat(net, QConfig.int8(), images))._repr_html_()
    assert page.count("<tr>") == 7
    assert "batch norm folded" in page
