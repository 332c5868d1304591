"""Two gloo processes: statistics over all of them are those of all the data at once."""

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from rarefy.quantization import (
    SQNR,
    Histogram,
    MeanNoOutliers,
    MinMax,
    Percentile,
    QConfig,
    calibrate,
    prepare,
    prepare_qat,
)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
OBSERVERS = [
    Histogram(256),
    Histogram(256, "kl"),
    Percentile(99.0, 256),
    SQNR(1.0, 256),
    MeanNoOutliers(batches=8),
    MinMax(),
]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(rank: int) -> list[Tensor]:
    """One batch more in the second process, and much wider ones."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 4, generator=generator) * (rank * 20 + i + 1) for i in range(3 + rank)]


def first_input(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model[0].quant.input.state_dict().items()}


# Each of these runs in both processes; what it returns comes back to the test.
def calibrated(rank: int) -> list[dict[str, Tensor]]:
    return [first_input(calibrate(prepare(mlp(), QConfig.int8(observer=o)), batches(rank))) for o in OBSERVERS]


def calibrated_twice(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for observer in OBSERVERS:
        model = prepare(mlp(), QConfig.int8(observer=observer))
        calibrate(model, batches(rank)[:1])
        calibrate(model, batches(rank)[1:])
        found.append(first_input(model))
    return found


def trained(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for observer in OBSERVERS:
        model = prepare_qat(mlp(), QConfig.int8(observer=observer))
        for batch in batches(rank)[:3]:
            model(batch).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.full((2, 4), float("nan")) if rank else torch.zeros(2, 4))
        found.append(first_input(model))
    return found


def failing(rank: int) -> list[dict[str, Tensor]]:
    model = calibrate(prepare(mlp(), QConfig.int8(observer=Histogram(256))), batches(rank))
    before = first_input(model)
    with pytest.raises(TypeError):
        calibrate(model, [*batches(rank), "no batch"])
    return [before, first_input(model)]


WORK = (calibrated, calibrated_twice, trained, failing)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results: dict[str, object] = {}
    for work in WORK:
        try:
            results[work.__name__] = work(rank)
        except Exception:
            results[work.__name__] = traceback.format_exc()
    dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[Callable], list[dict[str, Tensor]]]:
    """Gives what a function gave in both processes, which start once for all tests and must agree."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def results_of(work: Callable) -> list[dict[str, Tensor]]:
        first, second = (results[work.__name__] for results in both)
        for result in (first, second):
            if isinstance(result, str):
                pytest.fail(result)
        for a, b in zip(first, second, strict=True):
            for name, value in a.items():
                assert torch.equal(value, b[name]), name
        return [dict(state) for state in first]

    return results_of


def alone(data: list[Tensor]) -> list[dict[str, Tensor]]:
    return [first_input(calibrate(prepare(mlp(), QConfig.int8(observer=o)), data)) for o in OBSERVERS]


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], skipped: int = 0) -> None:
    for observer, a, b in zip(OBSERVERS, found, expected, strict=True):
        assert a.pop("skipped").item() == skipped
        b.pop("skipped")
        for name, value in b.items():
            if isinstance(observer, MeanNoOutliers) and "batch" in name and value.is_floating_point():
                assert torch.equal(value.sort(0)[0], a[name].sort(0)[0])  # in the order of the processes
            else:
                assert torch.equal(value, a[name]), (observer, name)


@pytest.mark.parametrize("body", [calibrated, calibrated_twice], ids=lambda f: f.__name__)
def test_calibration_is_that_of_all_data(body: Callable, run: Callable) -> None:
    assert_equal(run(body), alone(batches(0) + batches(1)))


def test_every_training_step_counts_the_batches_of_all(run: Callable) -> None:
    """As one batch; one that is not finite in one process adds nothing, and is counted in both."""
    together = [torch.cat(pair) for pair in zip(batches(0)[:3], batches(1)[:3], strict=True)]
    assert_equal(run(trained), alone([*together, torch.zeros(2, 4)]), skipped=1)


def test_a_failed_calibration_changes_nothing(run: Callable) -> None:
    before, after = run(failing)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
