"""Layers whose grids are learned: training, state, copies, graphs, checkpointing, conversion."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rarefy as rf
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
    convert,
    prepare,
    prepare_qat,
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


def config_of(kind: str) -> QConfig:
    observer, weight_observer, activation = KINDS[kind]
    return QConfig(weight=WEIGHT, activation=activation, observer=observer, weight_observer=weight_observer)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 16, 5))


def train(model: nn.Module, steps: int = 3, lr: float = 0.01) -> Tensor:
    optimizer = torch.optim.Adam(rf.quantization.parameter_groups(model), lr)
    for step in range(steps):
        loss = F.cross_entropy(model(randn(6, 2, 8, 8, seed=step)), torch.arange(6) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def learned_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".quant." in name}


# --- Modules ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_grid_and_conversion_keeps_it(kind: str) -> None:
    model = prepare_qat(network(), config_of(kind), randn(2, 2, 8, 8))
    keys = set(model.state_dict())
    names = {name.rpartition(".")[2] for name in learned_of(model)}
    assert {f"0.quant.{side}.scale" for side in ("input", "weight")} <= keys
    model(randn(6, 2, 8, 8))
    started = {name: p.detach().clone() for name, p in learned_of(model).items()}
    train(model)
    moved = {name for name, p in learned_of(model).items() if not torch.equal(p, started[name])}
    assert {name.rpartition(".")[2] for name in moved} == names
    model.eval()
    x = randn(6, 2, 8, 8, seed=9)
    with torch.no_grad():
        simulated = model(x)
    converted = convert(model)
    assert not list(learned_of(converted))
    assert {name.rpartition(".")[2] for name in converted.state_dict()} >= {"scale", "zero_point"}
    assert "integer" in repr(rf.quantization.report(converted))
    torch.testing.assert_close(converted(x), simulated, rtol=1e-4, atol=1e-4)
    assert learned_of(model)  # the prepared model goes on
    train(model, 1)


def test_pact_after_relus() -> None:
    ends = QConfig(Scheme(bits=8, narrow_range=True, granularity=PerChannel(0)), Scheme(bits=8, symmetric=False))
    config = QConfig(WEIGHT, UNSIGNED, observer=PACT(), weight_observer=LSQ(), overrides={"0": ends})
    model = prepare_qat(network(), config, randn(2, 2, 8, 8))
    train(model)
    alphas = [p for name, p in learned_of(model).items() if name.endswith("alpha")]
    penalty = rf.quantization.pact_penalty(model)
    torch.testing.assert_close(penalty.detach(), sum(a.detach().square().sum() for a in alphas))
    model.zero_grad()
    penalty.backward()
    for alpha in alphas:
        torch.testing.assert_close(alpha.grad, 2 * alpha.detach())
    x = randn(6, 2, 8, 8, seed=9)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(convert(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_pact_and_bits_refuse_negative_values() -> None:
    for observer in (PACT(), LearnedBits()):
        quantizer = FakeQuantizer(UNSIGNED, observer)
        with pytest.raises(ValueError, match=r"must have values that are not negative.* got -0\.5"):
            quantizer(torch.tensor([-0.5, 1.0]))
        assert not quantizer.calibrated
    assert rf.quantization.pact_penalty(network()).item() == 0.0


@pytest.mark.parametrize("kind", ["lsq", "lsq+"])
def test_a_scale_stays_positive(kind: str) -> None:
    """A step beyond 0 does not count: the magnitude is the scale, and what others read is positive."""
    observer, _, scheme = KINDS[kind]
    x = randn(6, 5)
    quantizer = FakeQuantizer(scheme, observer)
    quantizer(x)
    reference = copy.deepcopy(quantizer)
    with torch.no_grad():
        quantizer.scale.neg_()
    y, expected = quantizer(x), reference(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(quantizer.scale.grad, -reference.scale.grad)  # the step that leads away from 0 is the same
    quantizer.settle()
    assert torch.equal(quantizer.scale, reference.scale)
    with torch.no_grad():
        quantizer.scale.zero_()
    assert bool(quantizer(x).isfinite().all())
    quantizer.settle()
    assert quantizer.scale.item() == 2.0**-60


def test_a_learning_rate_that_is_too_high_keeps_scales_positive() -> None:
    model = prepare_qat(network(), config_of("lsq"), randn(2, 2, 8, 8))
    model(randn(6, 2, 8, 8))
    optimizer = torch.optim.SGD(rf.quantization.parameter_groups(model, quantizer_lr=50.0), 1e-4)
    negative = False
    for step in range(4):
        model(randn(6, 2, 8, 8, seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        negative |= any(bool((p < 0).any()) for p in learned_of(model).values())
    assert negative
    converted = convert(model)
    for name, value in converted.state_dict().items():
        if name.endswith("scale"):
            assert bool((value > 0).all()), name
    assert bool(converted(randn(2, 2, 8, 8)).isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_resuming(kind: str, tmp_path) -> None:
    whole = prepare_qat(network(), config_of(kind), randn(2, 2, 8, 8))
    half = copy.deepcopy(whole)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (whole, half)]

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            F.cross_entropy(model(randn(6, 2, 8, 8, seed=step)), torch.arange(6) % 5).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(whole, optimizers[0], range(4))
    steps(half, optimizers[1], range(2))
    torch.save([half.state_dict(), optimizers[1].state_dict()], tmp_path / "half.pt")
    other = prepare_qat(network(), config_of(kind), randn(2, 2, 8, 8))
    optimizer = torch.optim.Adam(other.parameters(), 0.01)
    state, optimizer_state = torch.load(tmp_path / "half.pt")
    other.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    steps(other, optimizer, range(2, 4))
    for (name, a), b in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_converted_models_are_saved(kind: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = prepare_qat(network(), config_of(kind), randn(2, 2, 8, 8))
    train(model)
    converted = convert(model)
    rf.quantization.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = rf.quantization.load_quantized(network(), tmp_path / "model.safetensors")
    x = randn(4, 2, 8, 8)
    assert torch.equal(loaded(x), converted(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_graphs_start_and_train_alike(kind: str) -> None:
    torch._dynamo.reset()
    observer, _, scheme = KINDS[kind]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    config = QConfig(WEIGHT, scheme, observer=observer, weight_observer=KINDS[kind][1])
    eager = prepare_qat(layers, config)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x = randn(7, 5, seed=step)
        losses = []
        for run, net in ((eager, eager), (compiled, model)):
            loss = run(x).square().sum()
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
        torch.testing.assert_close(losses[0], losses[1])
    for net in (eager, model):
        for quantizer in net.modules():
            if isinstance(quantizer, FakeQuantizer):
                quantizer.settle()  # scales that follow from parameters, which graphs leave alone
    for (name, a), b in zip(eager.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert model[0].quant.input.calibrated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    plain = prepare_qat(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), config_of(kind))
    other = copy.deepcopy(plain)
    x, again = randn(7, 5).requires_grad_(), randn(7, 5).requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(other, again, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, again.grad)
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_meta(kind: str) -> None:
    with torch.device("meta"):
        model = prepare_qat(nn.Sequential(nn.Linear(5, 4)), config_of(kind))
        assert model(torch.empty(7, 5)).shape == (7, 4)
    real = prepare_qat(nn.Sequential(nn.Linear(5, 4)), config_of(kind))
    real(randn(7, 5))
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(randn(3, 5)), real(randn(3, 5)))
    assert set(dict(model.named_parameters())) == set(dict(real.named_parameters()))


def test_embedding() -> None:
    config = QConfig(WEIGHT, SIGNED, observer=LSQ(), weight_observer=LSQ())
    model = prepare_qat(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), config)
    model(torch.arange(4)).sum().backward()
    scale = model[0].quant.weight.scale
    assert scale.shape == (9,)
    assert bool((scale.grad[:4] != 0).all())
    assert not scale.grad[4:].any()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(convert(model)(torch.arange(9)), model(torch.arange(9)), rtol=1e-5, atol=1e-5)


def test_switches() -> None:
    """``quantize`` off passes values on; ``observe`` off keeps a grid from starting, and no more."""
    quantizer = FakeQuantizer(UNSIGNED, LSQ())
    x = randn(6, 5)
    quantizer.observe = False
    with pytest.raises(ValueError, match="must observe data before it quantizes"):
        quantizer(x)
    quantizer.observe = True
    quantizer(x)
    quantizer.observe = False
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None
    quantizer.quantize = False
    assert quantizer(x) is x


def test_statistics_in_a_file(tmp_path) -> None:
    config = QConfig(WEIGHT, SIGNED, observer=LSQ(), weight_observer=LSQ())
    model = calibrate(prepare(network(), config, randn(2, 2, 8, 8)), [randn(4, 2, 8, 8)])
    rf.quantization.save_statistics(model, tmp_path / "s.safetensors")
    other = prepare(network(), config, randn(2, 2, 8, 8))
    rf.quantization.load_statistics(other, tmp_path / "s.safetensors")
    assert torch.equal(other[0].quant.input.scale, model[0].quant.input.scale)


# --- Parameters for optimizers and losses -----------------------------------------------------------------------------
def test_parameter_groups() -> None:
    model = prepare_qat(network(), config_of("lsq+"), randn(2, 2, 8, 8))
    network_, quantizers = rf.quantization.parameter_groups(model, quantizer_lr=0.5)
    assert {id(p) for p in quantizers["params"]} == {id(p) for p in learned_of(model).values()}
    assert len(network_["params"]) + len(quantizers["params"]) == len(list(model.parameters()))
    optimizer = torch.optim.SGD([network_, quantizers], 0.1, weight_decay=0.01)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.01), (0.5, 0.0)]
    assert "lr" not in rf.quantization.parameter_groups(model)[1]
    assert len(rf.quantization.parameter_groups(network())) == 1


def test_model_size() -> None:
    plain = network()
    count = sum(p.numel() for p in plain.parameters())
    assert rf.quantization.model_size_bits(plain).item() == 32 * count
    weights = [p for p in plain.parameters() if p.dim() > 1]
    in_weights = sum(p.numel() for p in weights)
    fixed = prepare_qat(plain, QConfig(WEIGHT), randn(2, 2, 8, 8))
    assert rf.quantization.model_size_bits(fixed).item() == 32 * (count - in_weights) + 4 * in_weights
    model = prepare_qat(plain, config_of("bits"), randn(2, 2, 8, 8))
    with torch.no_grad():
        model[0].quant.weight.bits.fill_(2.6)
    size = rf.quantization.model_size_bits(model)
    expected = 32 * (count - in_weights) + 4 * (in_weights - weights[0].numel()) + 3 * weights[0].numel()
    assert size.item() == expected
    size.backward()
    assert model[0].quant.weight.bits.grad.item() == weights[0].numel()


def test_bits_give_way_to_a_budget_and_conversion_fixes_them() -> None:
    torch.manual_seed(0)
    weight = Scheme(bits=8, granularity=PerChannel(0))
    activation = Scheme(bits=8, symmetric=True)
    config = QConfig(weight, activation, observer=LearnedBits(3), weight_observer=LearnedBits())
    model = prepare_qat(network(), config, randn(2, 2, 8, 8))
    optimizer = torch.optim.Adam(rf.quantization.parameter_groups(model, quantizer_lr=0.2), 1e-3)
    sizes = []
    for step in range(30):
        size = rf.quantization.model_size_bits(model)
        sizes.append(size.item())
        task = F.cross_entropy(model(randn(6, 2, 8, 8, seed=step)), torch.arange(6) % 5)
        optimizer.zero_grad()
        (task + size / sizes[0]).backward()
        optimizer.step()
    assert sizes[-1] < 0.7 * sizes[0]
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, FakeQuantizer):
            lowest = 2 if quantizer.is_weight else 3
            assert lowest - 0.5 < quantizer.bits.item() < 8.5, name
    model.eval()
    x = randn(6, 2, 8, 8, seed=9)
    with torch.no_grad():
        simulated = model(x)
    converted = convert(model)
    schemes = [q.scheme for q in converted.modules() if isinstance(q, FakeQuantizer)]
    assert min(scheme.bits for scheme in schemes) < 8
    assert not [p for name, p in converted.named_parameters() if "bits" in name]
    torch.testing.assert_close(converted(x), simulated, rtol=1e-4, atol=1e-4)


# --- Errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_observer": LSQPlus()}, "LSQPlus(gradient_scale=None) is for activations"),
        ({"weight_observer": PACT()}, "PACT() is for activations, got a weight"),
        ({"activation": SIGNED, "observer": PACT()}, "PACT() must have an asymmetric unsigned grid from 0, per tensor"),
        ({"activation": SIGNED, "observer": LSQPlus()}, "must have an asymmetric grid, got"),
        (
            {"activation": Scheme(bits=8, signed=True, symmetric=False), "observer": LearnedBits()},
            "must have a symmetric signed grid, or an asymmetric unsigned one from 0",
        ),
        (
            {"weight": Scheme(bits=3), "weight_observer": LearnedBits(4)},
            "of at most 8 bits and no fewer than its lowest",
        ),
        ({"weight": QConfig.fp8().weight, "weight_observer": LSQ()}, "must have a plain grid of integers"),
        ({"weight_observer": rf.quantization.MinMax()}, "weight_observer must be Latest, MSE, HalfQuadratic, LSQ, TQT"),
    ],
)
def test_impossible_configurations(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QConfig(**{"weight": WEIGHT, "activation": UNSIGNED, **fields})


def test_values() -> None:
    for value in (LSQ(), LSQ(0.5), LSQPlus(0.1), PACT(), TQT(), LearnedBits(3)):
        assert copy.deepcopy(value) == value
        assert eval(repr(value), vars(rf.quantization)) == value
        assert hash(copy.copy(value)) == hash(value)
    assert LSQ() != LSQ(1.0)
    with pytest.raises(ValueError, match=r"\[LSQ\] gradient_scale must be finite and positive, got 0"):
        LSQ(0.0)
    with pytest.raises(ValueError, match=r"\[LearnedBits\] lowest must be in 2..8, got 1"):
        LearnedBits(1)


def test_integer_execution_is_refused_by_name() -> None:
    config = config_of("lsq")
    assert config.why_not_integer() == (
        "LSQ(gradient_scale=None) trains its grid, whose gradient is that of simulated execution"
    )
    with pytest.raises(ValueError, match=r"cannot execute in integers: LSQ\(gradient_scale=None\) trains its grid"):
        prepare_qat(network(), dataclasses.replace(config, execution="integer"), randn(2, 2, 8, 8))
    report = repr(rf.quantization.report(prepare_qat(network(), config, randn(2, 2, 8, 8))))
    assert "simulated: LSQ(gradient_scale=None) trains its grid" in report


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.GRUCell(4, 3)], ids=lambda m: type(m).__name__)
def test_recurrent_layers_refuse(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"\[{type(layer).__name__}\] must have observers of ranges .* got LSQ"):
        prepare_qat(nn.Sequential(layer), config_of("lsq"))


def test_export_follows_the_parameters(tmp_path) -> None:
    pytest.importorskip("onnx")
    for kind in ("lsq", "bits"):
        model = prepare_qat(network(), config_of(kind), randn(2, 2, 8, 8))
        train(model)
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = rf.export.to_onnx(model, randn(2, 2, 8, 8), tmp_path / f"{kind}.onnx")
        assert result is not None
