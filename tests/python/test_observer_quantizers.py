"""Observers in fake quantizers and models: calibration, training, compilation, conversion, saved statistics."""

import copy
import dataclasses
import pickle
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
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
    PerChannel,
    QConfig,
    Scheme,
    calibrate,
    convert,
    load_statistics,
    prepare,
    prepare_qat,
    save_statistics,
    set_state,
)

ops = torch.ops.rarefy
GATHERING = [
    Histogram(256),
    Histogram(256, "kl"),
    Histogram(256, None),
    Histogram(256, "mse", 2.4),
    Percentile(99.0, 256),
    SQNR(3.0, 256),
    MeanNoOutliers(batches=8),
    MeanNoOutliers(quantile=0.1),
]
SCHEMES = [
    Scheme(8, symmetric=False),
    Scheme(8),
    Scheme(4, narrow_range=True),
    Scheme(8, symmetric=False, granularity=PerChannel(1)),
]
WEIGHTS = [Latest(), MSE(), MSE(norm=2.4, steps=20, bins=0), HalfQuadratic()]


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6 + i, 4, generator=generator) * (i + 1) - 0.3 for i in range(count)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def calibrated(observer: object, **changes: object) -> nn.Module:
    config = QConfig.int8(observer=observer, **changes)
    return calibrate(prepare(mlp(), config), batches())


def expected_range(observer: object, scheme: Scheme, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By the operators, from all the data at once."""
    rows = 1 if scheme.axis is None else data[0].shape[scheme.axis]
    grid = scheme.qmin, scheme.qmax, scheme.symmetric
    if isinstance(observer, MeanNoOutliers):
        dims = (0, 1) if scheme.axis is None else (0,)
        ends = [torch.full((1024, rows), e) for e in (torch.inf, -torch.inf)]
        low = torch.stack([b.amin(dims).reshape(rows) for b in data])
        high = torch.stack([b.amax(dims).reshape(rows) for b in data])
        ops.record_ranges(*ends, torch.zeros(3, dtype=torch.int64), low, high)
        sigma = None if observer.quantile is not None else observer.sigma or 3.0
        return ops.mean_range(*ends, sigma, observer.quantile)
    state = (
        torch.zeros(rows, observer.bins, dtype=torch.int64),
        torch.full((rows,), torch.inf),
        -torch.full((rows,), torch.inf),
    )
    ops.histogram_observe(torch.cat(data), *state, torch.zeros(1, dtype=torch.int64), scheme.axis)
    if isinstance(observer, Histogram):
        method, parameter = observer.search or "minmax", observer.norm
    elif isinstance(observer, Percentile):
        method, parameter = "percentile", observer.percentile
    else:
        method, parameter = "sqnr", observer.clip_weight
    return ops.choose_range_from_histogram(*state, method, parameter, *grid)


# --- One quantizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", GATHERING, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_calibration_then_rounding(observer: object, scheme: Scheme) -> None:
    quantizer = FakeQuantizer(scheme, observer, channels=4).eval()
    quantizer.quantize = False
    data = batches()
    for batch in data:
        assert quantizer(batch) is batch
    quantizer.observe, quantizer.quantize = False, True
    x = data[0]
    y = quantizer(x)
    low, high = expected_range(observer, scheme, data)
    assert torch.equal(quantizer.min_val, low)
    assert torch.equal(quantizer.max_val, high)
    scale, zero_point = ops.choose_qparams(low, high, scheme.qmin, scheme.qmax, scheme.symmetric)
    assert torch.equal(y, ops.fake_quantize(x, scale, zero_point, scheme.axis, scheme.qmin, scheme.qmax))
    assert quantizer.calibrated


@pytest.mark.parametrize("observer", GATHERING, ids=str)
def test_training_rounds_with_what_was_seen_so_far(observer: object) -> None:
    scheme = Scheme(8, symmetric=False)
    quantizer = FakeQuantizer(scheme, observer)
    data = batches()
    for i, batch in enumerate(data):
        x = batch.clone().requires_grad_()
        y = quantizer(x)
        low, high = expected_range(observer, scheme, data[: i + 1])
        grid = ops.choose_qparams(low, high, 0, 255, False)
        assert torch.equal(y, ops.fake_quantize(batch, *grid, None, 0, 255))
        y.sum().backward()
        inside = (batch / grid[0]).round() + grid[1]
        assert torch.equal(x.grad, ((inside >= 0) & (inside <= 255)).float())


@pytest.mark.parametrize("observer", GATHERING, ids=str)
def test_batches_that_are_not_finite_are_left_out_counted_and_named(observer: object) -> None:
    quantizer = FakeQuantizer(Scheme(8, symmetric=False), observer)
    quantizer.name = "fc.quant.input"
    bad = torch.tensor([[1.0, float("nan")]])
    with pytest.warns(UserWarning, match=re.escape("fc.quant.input met a batch with NaN or infinite values")):
        y = quantizer(bad)
    assert y[0, 1].isnan()
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (1.0, 0)
    assert not quantizer.calibrated
    data = batches(2)
    quantizer(data[0])
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(bad)
    assert quantizer.skipped.item() == 2
    assert all(torch.equal(v, state[k]) for k, v in quantizer.state_dict().items() if k != "skipped")


@pytest.mark.parametrize("observer", WEIGHTS, ids=str)
@pytest.mark.parametrize("scheme", [Scheme(4, narrow_range=True, granularity=PerChannel(0)), Scheme(8)], ids=str)
def test_weights(observer: object, scheme: Scheme) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.distributions.StudentT(3.0).sample((6, 50)))
    quantizer = FakeQuantizer(scheme, observer, channels=6).eval()
    assert quantizer.is_weight
    error = (quantizer(weight) - weight).pow(2).sum()
    plain = FakeQuantizer(scheme, Latest(), channels=6).eval()
    if isinstance(observer, MSE) and observer.norm == 2.0:
        assert error <= (plain(weight) - weight).pow(2).sum()
        low, high = ops.mse_range(weight, scheme.axis, scheme.qmin, scheme.qmax, True)
        assert torch.equal(quantizer.min_val, low)
        assert torch.equal(quantizer.max_val, high)
    if isinstance(observer, HalfQuadratic):
        assert error.sqrt().isfinite()
        scale, zero_point = ops.half_quadratic_qparams(weight, scheme.axis, scheme.qmin, scheme.qmax, True)
        assert torch.equal(quantizer.scale, scale)
        assert torch.equal(quantizer.zero_point, zero_point)
        torch.testing.assert_close(quantizer.max_val, scale * (scheme.qmax - zero_point))
    quantizer(weight).sum().backward()
    assert weight.grad.unique().tolist() in ([0.0, 1.0], [1.0])
    # Searched again when the values change, and only then.
    before = quantizer.scale.clone()
    with torch.no_grad():
        weight.mul_(2)
    quantizer(weight)
    torch.testing.assert_close(quantizer.scale, before * 2)
    quantizer.name = "fc.quant.weight"
    with torch.no_grad():
        weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=re.escape("the weight of fc.quant.weight must be finite, got 1 NaN or infinite values of 300")
    ):
        quantizer(weight)


def test_a_weight_is_searched_once_for_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(3, 8))
    quantizer = FakeQuantizer(Scheme(8), MSE())
    quantizer(weight)
    versions = quantizer.scale._version
    quantizer(weight)
    assert quantizer.scale._version == versions
    quantizer(weight * 1.0)  # another tensor
    assert quantizer.scale._version > versions
    versions = quantizer.scale._version
    quantizer(weight)
    assert quantizer.scale._version > versions
    copied = copy.deepcopy(quantizer)
    copied(weight)
    assert torch.equal(copied.scale, quantizer.scale)


def test_importance_moves_the_range() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 400)
    weight[:, 0] = 20.0
    quantizer = FakeQuantizer(Scheme(4, narrow_range=True), MSE())
    quantizer(weight)
    narrow = quantizer.max_val.item()
    quantizer.importance = torch.tensor([1000.0] + [1.0] * 399)
    quantizer(weight.clone())
    assert quantizer.max_val.item() > narrow
    assert "importance" not in quantizer.state_dict()


@pytest.mark.parametrize("observer", [*GATHERING, *WEIGHTS], ids=str)
def test_values_of_observers(observer: object) -> None:
    assert pickle.loads(pickle.dumps(observer)) == observer
    assert copy.deepcopy(observer) == observer
    assert hash(copy.copy(observer)) == hash(observer)
    assert eval(repr(observer)) == observer
    assert len({*GATHERING, *WEIGHTS, observer}) == len(GATHERING) + len(WEIGHTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Histogram(8), "[Histogram] bins must be in 16..65536, got 8"),
        (lambda: Histogram(search="entropy"), "[Histogram] search must be 'mse', 'kl' or None, got 'entropy'"),
        (lambda: Histogram(norm=0.5), "[Histogram] norm must be in [1, 8], got 0.5"),
        (lambda: Percentile(50.0), "[Percentile] percentile must be in (50, 100], got 50"),
        (lambda: SQNR(0.5), "[SQNR] clip_weight must be finite and at least 1, got 0.5"),
        (lambda: MeanNoOutliers(sigma=1.0, quantile=0.1), "[MeanNoOutliers] one of sigma and quantile must be set"),
        (lambda: MeanNoOutliers(sigma=0.0), "[MeanNoOutliers] sigma must be finite and positive, got 0"),
        (lambda: MeanNoOutliers(quantile=0.5), "[MeanNoOutliers] quantile must be in [0, 0.5), got 0.5"),
        (lambda: MeanNoOutliers(batches=7), "[MeanNoOutliers] batches must be even and in 2..65536, got 7"),
        (lambda: MSE(steps=0), "[MSE] steps must be in 1..10000, got 0"),
        (lambda: HalfQuadratic(norm=2.0), "[HalfQuadratic] norm must be in (0, 1], got 2"),
        (
            lambda: QConfig.int8(observer=MSE()),
            "[QConfig] observer must gather over batches (for least error: Histogram), got MSE(",
        ),
        (
            lambda: QConfig.int8(weight_observer=MinMax()),
            "[QConfig] weight_observer must be Latest, MSE, HalfQuadratic, LSQ, TQT or LearnedBits, got MinMax()",
        ),
    ],
)
def test_errors_of_observers(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- Models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", GATHERING, ids=str)
def test_a_model_is_calibrated_and_converted(observer: object) -> None:
    model = calibrated(observer)
    quantizer = model[0].quant.input
    low, high = expected_range(observer, quantizer.scheme, batches())
    assert torch.equal(quantizer.min_val, low)
    assert torch.equal(quantizer.max_val, high)
    x = batches()[0]
    scores = model(x)
    integer = convert(model)
    assert torch.allclose(integer(x), scores, atol=1e-5)
    assert not any("statistics" in name for name in integer.state_dict())
    assert any("statistics" in name for name in model.state_dict())


def test_the_range_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    choose = rf.quantization.range_statistics.RangeStatistics.choose
    monkeypatch.setattr(
        rf.quantization.range_statistics.RangeStatistics,
        "choose",
        lambda self, *a: calls.append(self) or choose(self, *a),
    )
    calibrated(Histogram())
    assert len(calls) == 2  # quantizers


def test_statistics_add_up_over_calibrations() -> None:
    once = calibrated(Histogram(256))
    twice = prepare(mlp(), QConfig.int8(observer=Histogram(256)))
    calibrate(calibrate(twice, batches()[:2]), batches()[2:])
    for name, value in once[0].quant.input.state_dict().items():
        assert torch.equal(value, twice[0].quant.input.state_dict()[name]), name


def test_a_failed_calibration_changes_nothing() -> None:
    model = calibrated(Histogram(256))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TypeError):
        calibrate(model, [*batches(2), "no batch"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].quant.input.quantize


def test_every_batch_bad_is_an_error_and_some_a_warning() -> None:
    bad = torch.full((2, 4), float("nan"))
    with pytest.raises(ValueError, match=re.escape("every batch held NaN or infinite values at: 0.quant.input")):
        calibrate(prepare(mlp(), QConfig.int8(observer=Histogram())), [bad])
    with pytest.warns(UserWarning, match=re.escape("0.quant.input (1)")):
        calibrate(prepare(mlp(), QConfig.int8(observer=Histogram())), [bad, *batches()])


def test_set_state_alone_calibrates_too() -> None:
    model = prepare(mlp(), QConfig.int8(observer=Percentile(99.0, 256))).eval()
    set_state(model, observe=True, quantize=False)
    for batch in batches():
        model(batch)
    set_state(model, observe=False, quantize=True)
    expected = calibrated(Percentile(99.0, 256))
    assert torch.equal(model(batches()[0]), expected(batches()[0]))


@pytest.mark.parametrize("observer", [Histogram(256), MeanNoOutliers(batches=8)], ids=str)
def test_checkpoints_in_the_middle_of_a_calibration(observer: object) -> None:
    model = prepare(mlp(), QConfig.int8(observer=observer)).eval()
    set_state(model, observe=True, quantize=False)
    for batch in batches():
        model(batch)
    other = prepare(mlp(), QConfig.int8(observer=observer)).eval()
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        set_state(m, observe=False, quantize=True)
    assert torch.equal(other(batches()[0]), model(batches()[0]))
    assert torch.equal(other[0].quant.input.scale, model[0].quant.input.scale)


@pytest.mark.parametrize("observer", [*GATHERING[:2], GATHERING[6]], ids=str)
@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_qat_with_statistics(observer: object, execution: str) -> None:
    config = dataclasses.replace(QConfig.int8(observer=observer, weight_observer=MSE()), execution=execution)
    model = prepare_qat(mlp(), config)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(8):
        for batch in batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), (batch[:, 0] > 0).long())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    model.eval()
    assert torch.allclose(convert(model)(batches()[0]), model(batches()[0]), atol=1e-5)


@pytest.mark.parametrize("observer", [Histogram(256), Percentile(99.0, 256), MeanNoOutliers(batches=8)], ids=str)
def test_compiled_training_is_that_of_eager(observer: object) -> None:
    eager = FakeQuantizer(Scheme(8, symmetric=False), observer)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, backend="aot_eager")
    for batch in batches():
        x, y = (batch.clone().requires_grad_() for _ in range(2))
        a, b = eager(x), step(y)
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(x.grad, y.grad)
    for name, value in eager.state_dict().items():
        assert torch.equal(value, compiled.state_dict()[name]), name


def test_compiled_weights() -> None:
    torch.compiler.reset()  # what other tests compiled counts towards the limit of variants
    for observer in WEIGHTS:
        eager = FakeQuantizer(Scheme(4, narrow_range=True, granularity=PerChannel(0)), observer, channels=3)
        compiled = copy.deepcopy(eager)
        weight = nn.Parameter(torch.randn(3, 40))
        step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(step(weight), eager(weight))
            with torch.no_grad():
                weight.mul_(1.5)


def test_weights_of_conversions() -> None:
    for observer in WEIGHTS:
        model = calibrate(prepare(mlp(), QConfig.int8(weight_observer=observer)), batches())
        x = batches()[0]
        assert torch.allclose(convert(model)(x), model(x), atol=1e-5)


# --- Saved statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Histogram(256), Histogram(256)),
        (Histogram(256), Histogram(256, "kl")),
        (Histogram(256), Percentile(99.0, 256)),
        (Percentile(99.0, 256), SQNR(1.0, 256)),
        (SQNR(2.0, 256), MinMax()),
        (MinMax(), MinMax()),
        (MinMax(), MovingAverage()),
        (MovingAverage(0.5), MovingAverage(0.5)),
        (MeanNoOutliers(batches=8), MeanNoOutliers(sigma=1.0, batches=8)),
        (MeanNoOutliers(batches=8), MinMax()),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [Scheme(8, symmetric=False), Scheme(4), Scheme(8)], ids=str)
def test_another_search_without_data(saved: object, loaded: object, activation: Scheme, tmp_path: Path) -> None:
    save_statistics(calibrated(saved), tmp_path / "statistics.safetensors")
    model = prepare(mlp(), QConfig.int8(observer=loaded, activation=activation))
    assert load_statistics(model, tmp_path / "statistics.safetensors") is model
    with_data = calibrated(loaded if not isinstance(loaded, MovingAverage) else saved, activation=activation)
    x = batches()[0]
    assert torch.equal(model(x), with_data(x))
    if not isinstance(loaded, MovingAverage):
        # And calibration goes on from there.
        for m in (model, with_data):
            calibrate(m, [batches()[0] * 100])
        assert torch.equal(model(x), with_data(x))


def test_errors_of_saved_statistics(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(ValueError, match=re.escape("[save_statistics] the model must have prepared layers")):
        save_statistics(mlp(), path)
    with pytest.raises(ValueError, match=re.escape("but these have not: 0.quant.input, 2.quant.input")):
        save_statistics(prepare(mlp(), QConfig.int8()), path)
    assert not path.exists()
    save_statistics(calibrated(Histogram(256)), path)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "must have a histogram of 2048 bins, got the statistics of Histogram(bins=256, search='mse', norm=2)"
        ),
    ):
        load_statistics(prepare(mlp(), QConfig.int8(observer=Percentile())), path)
    with pytest.raises(
        ValueError, match=re.escape("must have the ranges of up to 1024 batches, got the statistics of Histogram(")
    ):
        load_statistics(prepare(mlp(), QConfig.int8(observer=MeanNoOutliers())), path)
    other = prepare(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), QConfig.int8(observer=Histogram(256)))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape("missing: [1.quant.input], unexpected: [2.quant.input]")):
        load_statistics(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=re.escape("[load_safetensors]")):
        load_statistics(prepare(mlp(), QConfig.int8(observer=Histogram(256))), path)
    with pytest.raises(RuntimeError, match="cannot"):
        load_statistics(prepare(mlp(), QConfig.int8(observer=Histogram(256))), tmp_path / "none")
    rf_file = tmp_path / "weights.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"x": torch.ones(3)}, rf_file)
    with pytest.raises(
        ValueError, match=re.escape("must be a file that save_statistics has written, but has no description")
    ):
        load_statistics(prepare(mlp(), QConfig.int8()), rf_file)


def test_ranges_of_many_batches_are_no_running_range(tmp_path: Path) -> None:
    model = prepare(mlp(), QConfig.int8(observer=MeanNoOutliers(batches=2)))
    save_statistics(calibrate(model, batches()), tmp_path / "s")
    with pytest.raises(
        ValueError, match=re.escape("0.quant.input must have the ranges of all batches for a running range, got every")
    ):
        load_statistics(prepare(mlp(), QConfig.int8(observer=MinMax())), tmp_path / "s")


# --- C++ ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", GATHERING, ids=str)
def test_cpp_calibrates_to_the_same_state(observer: object, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """rarefy_parity --observe: C++ goes on with Python's statistics, and Python with those of C++."""
    program = request.config.rootpath / "build" / "dev" / "tests" / "cpp" / "rarefy_parity"
    if not program.exists():
        pytest.skip("rarefy_parity is not built (-DRAREFY_BUILD_TESTS=ON)")
    torch_save = pytest.importorskip("safetensors.torch").save_file
    load = pytest.importorskip("safetensors.torch").load_file
    x = batches()
    first = FakeQuantizer(Scheme(8, symmetric=False), observer).eval()
    first.quantize = False
    for batch in x[:2]:
        first(batch)
    torch_save(first.state_dict(), tmp_path / "first")
    torch_save({f"x{i}": batch for i, batch in enumerate(x[2:])}, tmp_path / "data")
    subprocess.run(
        [program, "--observe", str(observer), tmp_path / "first", tmp_path / "data", tmp_path / "out"],
        check=True,
        timeout=60,
    )
    for batch in x[2:]:
        first(batch)
    assert first.calibrated
    got = load(tmp_path / "out")
    assert got.keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, got[name]), name
    second = FakeQuantizer(Scheme(8, symmetric=False), observer).eval()
    second.load_state_dict(got)
    second.observe = first.observe = False
    second.quantize = first.quantize = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(second(x[0]), first(x[0]))
