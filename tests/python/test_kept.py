"""Calibration does everything once: weights are folded and rounded once, a shared input is observed once, to the same bits."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rarefy as rf
from rarefy.nn.kept import Kept, keeping
from rarefy.quantization import (
    MSE,
    SQNR,
    FakeQuantizer,
    HalfQuadratic,
    Histogram,
    Latest,
    MeanNoOutliers,
    MinMax,
    MovingAverage,
    Percentile,
    QConfig,
    Scheme,
)

OBSERVERS = [MinMax(), MovingAverage(), Histogram(), Histogram(search="kl"), Percentile(), SQNR(), MeanNoOutliers()]


class Counting(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


class Block(nn.Module):
    """A residual block whose input two convolutions share, one of them with groups and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.side = nn.Conv2d(8, 16, 1, stride=2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.side(x))


class Everything(nn.Module):
    """A layer of each kind that keeps weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.block = Block()
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.rnn = nn.LSTM(8, 6, bidirectional=True)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.table = nn.Embedding(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.block(self.stem(x)))
        steps, _ = self.rnn(x.flatten(2).movedim(2, 0))
        return self.query(steps) + self.key(steps) * self.value(steps) + self.table(torch.arange(4)).sum()


def make(observer: object = None, weight_observer: object = None, example: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Everything()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    config = QConfig.int8(observer=observer or MinMax(), weight_observer=weight_observer or Latest())
    return rf.quantization.prepare(model.eval(), config, torch.randn(2, 3, 16, 16) if example else None)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + i, 3, 16, 16, generator=generator) for i in range(count)]


def activations(model: nn.Module) -> list[FakeQuantizer]:
    return [m for m in model.modules() if isinstance(m, FakeQuantizer) and not m.is_weight]


@torch.no_grad()
def calibrate_slowly(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """Every quantizer observes every tensor, every weight is folded and rounded for every batch."""
    for quantizer in activations(model):
        quantizer.observe, quantizer.quantize = True, False
    for batch in data:
        model(batch)
    for quantizer in activations(model):
        assert quantizer.calibrated
        quantizer.observe, quantizer.quantize = False, True
    return model


@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_the_state_is_that_of_the_slow_way(observer: object) -> None:
    fast, slow = make(observer), make(observer)
    rf.quantization.calibrate(fast, batches())
    calibrate_slowly(slow, batches())
    got, expected = fast.state_dict(), slow.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(fast(x), slow(x))
    converted = rf.quantization.convert(fast), rf.quantization.convert(slow)
    assert torch.equal(converted[0](x), converted[1](x))


@pytest.mark.parametrize("weight_observer", [MSE(), HalfQuadratic()], ids=str)
def test_weights_are_searched_once(weight_observer: object) -> None:
    fast, slow = make(None, weight_observer), make(None, weight_observer)
    name = "rarefy::mse_range" if isinstance(weight_observer, MSE) else "rarefy::half_quadratic_qparams"
    weights = sum(m.is_weight and m._searches for m in fast.modules() if isinstance(m, FakeQuantizer))
    with Counting() as counting:
        rf.quantization.calibrate(fast, batches())
    assert counting.calls[name] == weights - 1  # the table's rows are observed as they are looked up
    calibrate_slowly(slow, batches())
    for key, tensor in slow.state_dict().items():
        assert torch.equal(fast.state_dict()[key], tensor), key


def test_each_weight_is_rounded_once_and_a_shared_input_observed_once() -> None:
    model = make(Histogram())
    with Counting() as counting:
        rf.quantization.calibrate(model, batches(4))
    # Of the 4 convolutions, the transposed one, 4 weights of the LSTM and 3 linear layers.
    assert counting.calls["rarefy::observe_fake_quantize"] == 12
    # stem, conv1, conv2, up, input and two hidden states of the LSTM, query; side, key and value share theirs.
    shared = {"block.side", "key", "value"}
    assert counting.calls["rarefy::histogram_observe"] == 4 * (len(activations(model)) - len(shared))
    for name in shared:
        assert int(model.get_submodule(name).quant.input.statistics.hist.sum()) > 0
    assert all(m._kept is None for m in model.modules() if isinstance(m, rf.nn.QuantizableLayer))
    assert all(q.observed_once is None for q in activations(model))


def test_quantizers_that_have_seen_different_tensors_stay_apart() -> None:
    """``key`` sees one tensor more than ``query``: from then on it observes for itself."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.query(x) + self.key(x)
            return y + self.key(10 * x) if x.shape[0] == 3 else y

    torch.manual_seed(0)
    data = [torch.randn(n, 4) for n in (2, 3, 2, 3, 5)]
    prepared = rf.quantization.prepare(Uneven(), QConfig.int8(observer=Histogram()))
    slow = copy.deepcopy(prepared)
    rf.quantization.calibrate(prepared, data)
    calibrate_slowly(slow, data)
    for key, tensor in slow.state_dict().items():
        assert torch.equal(prepared.state_dict()[key], tensor), key
    assert int(prepared.key.quant.input.statistics.hist.sum()) > int(prepared.query.quant.input.statistics.hist.sum())


def test_quantizers_of_different_grids_observers_and_pasts_stay_apart() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x) + self.d(x)

    config = QConfig(
        weight=Scheme(),
        activation=Scheme(symmetric=False),
        observer=MinMax(),
        overrides={
            "b": QConfig(weight=Scheme(), activation=Scheme(symmetric=False), observer=Percentile(90.0)),
            "c": QConfig(weight=Scheme(), activation=Scheme(bits=4), observer=MinMax()),
        },
    )
    prepared = rf.quantization.prepare(Three(), config)
    with torch.no_grad():  # d has seen something before
        prepared.d.quant.input.observe = True
        prepared.d.quant.input(torch.tensor([-100.0, 100.0]))
    rf.quantization.calibrate(prepared, [torch.randn(64, 4)])
    a, b, c, d = (getattr(prepared, name).quant.input for name in "abcd")
    assert d.max_val.item() == 100.0
    assert a.max_val.item() < 10.0
    assert torch.equal(a.min_val, c.min_val)
    assert c.scale.item() > a.scale.item()
    assert b.max_val.item() < a.max_val.item()


def test_a_tensor_that_is_written_to_is_another_one() -> None:
    class Rewriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(5))

    prepared = rf.quantization.prepare(Rewriting(), QConfig.int8())
    rf.quantization.calibrate(prepared, [torch.linspace(-1, 1, 8).view(2, 4)])
    assert prepared.a.quant.input.max_val.item() == 1.0
    assert prepared.b.quant.input.max_val.item() == 5.0


def test_kept_results_follow_what_they_were_made_from() -> None:
    kept, made = Kept(), []
    weight, bias = torch.ones(3), torch.zeros(3)

    def make_one() -> int:
        made.append(len(made))
        return made[-1]

    assert [kept.get("w", (weight, None), make_one) for _ in range(3)] == [0, 0, 0]
    assert kept.get("v", (weight, None), make_one) == 1
    weight.add_(1)
    assert kept.get("w", (weight, None), make_one) == 2
    assert kept.get("w", (weight, bias), make_one) == 3
    assert kept.get("w", (weight.clone(), bias), make_one) == 4
    with torch.inference_mode():
        frozen = torch.ones(2)
    assert [kept.get("i", (frozen,), make_one) for _ in range(2)] == [5, 6]


def test_a_weight_that_changes_during_a_calibration_is_rounded_again() -> None:
    torch.manual_seed(0)
    prepared = rf.quantization.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), QConfig.int8())
    x = torch.randn(8, 4)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        model[0].weight.mul_(3.0)

    slow = copy.deepcopy(prepared)
    rf.quantization.calibrate(prepared, [x, x], forward=forward)
    for quantizer in activations(slow):
        quantizer.observe, quantizer.quantize = True, False
    with torch.no_grad():
        slow(x)
        slow[0].weight.mul_(3.0)
        slow(x)
    assert torch.equal(prepared[1].quant.input.max_val, slow[1].quant.input.max_val)


def test_a_compiled_model_is_calibrated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(2, 3, 8, 8)
    prepared = rf.quantization.prepare(model.eval(), QConfig.int8(), x)
    slow = calibrate_slowly(copy.deepcopy(prepared), [x, 2 * x])
    compiled = torch.compile(prepared, backend="eager")
    rf.quantization.calibrate(prepared, [x, 2 * x], forward=lambda _, batch: compiled(batch))
    for key, tensor in slow.state_dict().items():
        torch.testing.assert_close(prepared.state_dict()[key], tensor, msg=key)


def test_an_error_in_a_calibration_leaves_nothing_kept() -> None:
    prepared = make()

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        rf.quantization.calibrate(prepared, batches(), forward=forward)
    assert all(m._kept is None for m in prepared.modules() if isinstance(m, rf.nn.QuantizableLayer))
    assert all(q.observed_once is None and not q.observe for q in activations(prepared))


# --- Layouts ------------------------------------------------------------------------------------------------------------


def test_layouts_change_the_last_bits_alone() -> None:
    """With example inputs convolutions choose their layout, and may sum in another order."""
    chosen, slow = make(example=True), make(example=True)
    assert chosen._rarefy_runs_channels_last
    weights = {n: p.stride() for n, p in chosen.named_parameters()}
    rf.quantization.calibrate(chosen, batches())
    calibrate_slowly(slow, batches())
    assert {n: p.stride() for n, p in chosen.named_parameters()} == weights
    for (name, tensor), expected in zip(chosen.state_dict().items(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_large_maps_are_computed_channels_last_and_small_ones_contiguous() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = self.large(x)
            b = self.small(a)
            layouts.append([a.is_contiguous(), b.is_contiguous()])
            return self.head(b.amax((2, 3)))

    layouts: list[list[bool]] = []
    x = torch.randn(2, 3, 18, 18)
    prepared = rf.quantization.prepare(Net(), QConfig.int8(), x)
    layouts.clear()
    rf.quantization.calibrate(prepared, [x, x.contiguous(memory_format=torch.channels_last)])
    assert layouts == [[False, True]] * 2  # 16x16 positions; 4x4
    prepared(x)
    assert layouts[-1] == [True, True]


def test_a_model_that_refuses_the_layout_keeps_its_own() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).view(x.shape[0], -1))

    x = torch.randn(2, 3, 8, 8)
    prepared = rf.quantization.prepare(Viewing(), QConfig.int8(), x)
    assert not prepared._rarefy_runs_channels_last
    rf.quantization.calibrate(prepared, [x])
    assert prepared.conv.weight.is_contiguous()


def test_keeping_is_off_outside() -> None:
    layer = make().block.conv2
    with keeping([layer], channels_last=True):
        assert layer._kept is not None
        assert layer._kept.layout(torch.ones(1, 2, 8, 8), (1, 1)) is torch.channels_last
        assert layer._kept.layout(torch.ones(1, 2, 8, 8), (2, 2)) is torch.contiguous_format
        assert layer._kept.layout(torch.ones(2, 8, 8), (1, 1)) is None
    assert layer._kept is None
