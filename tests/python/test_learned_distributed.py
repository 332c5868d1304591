"""Two gloo processes start a learned grid alike, from the mean of their ranges, and stay equal under DDP."""

import math
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

from rarefy.quantization import LSQ, LSQPlus, QConfig, Scheme, calibrate, prepare, prepare_qat

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
SYMMETRIC = QConfig.int8(activation=Scheme(bits=4), observer=LSQ(), weight_observer=LSQ())
ASYMMETRIC = QConfig.int8(observer=LSQPlus(), weight_observer=LSQ())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(rank: int, number: int = 0) -> Tensor:
    return torch.randn(5 + rank, 4, generator=torch.Generator().manual_seed(rank)) * (3 * rank + 1) * (number + 1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# Each of these runs in both processes; what it returns comes back to the test.
def started(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), SYMMETRIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.full((2, 4), math.nan) if rank else batch(0))  # nobody starts
    waiting = model[0].quant.input.calibrated
    model(batch(rank))
    return {**state_of(model), "waiting": torch.tensor(waiting)}


def calibrated(rank: int) -> dict[str, Tensor]:
    model = calibrate(prepare(mlp(), SYMMETRIC), [batch(rank, i) for i in range(1 + rank)])
    return state_of(model)


def trained(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), ASYMMETRIC)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    for i in range(3):
        optimizer.zero_grad()
        wrapped(batch(rank, i)).square().mean().backward()
        optimizer.step()
    return state_of(model)


WORK = (started, calibrated, trained)


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
def run(tmp_path_factory) -> Callable[[Callable], dict[str, Tensor]]:
    """Gives what a function gave in both processes, which must agree."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def result_of(work: Callable) -> dict[str, Tensor]:
        first, second = (results[work.__name__] for results in both)
        for result in (first, second):
            if isinstance(result, str):
                pytest.fail(result)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        return first

    return result_of


def start_of(x: Tensor) -> float:
    return 2 * x.abs().mean().item() / math.sqrt(7)


def test_the_first_batch(run: Callable) -> None:
    state = run(started)
    assert not state["waiting"]
    assert state["0.quant.input.skipped"].item() == 1
    expected = (start_of(batch(0)) + start_of(batch(1))) / 2
    assert state["0.quant.input.scale"].item() == pytest.approx(expected, rel=1e-5)


def test_calibration(run: Callable) -> None:
    state = run(calibrated)
    second = (start_of(batch(1, 0)) + start_of(batch(1, 1))) / 2
    expected = (start_of(batch(0)) + second) / 2
    assert state["0.quant.input.scale"].item() == pytest.approx(expected, rel=1e-5)


def test_training(run: Callable) -> None:
    state = run(trained)
    assert bool(state["0.quant.input.offset"].isfinite().all())
    alone = prepare_qat(mlp(), ASYMMETRIC)
    alone(batch(0))
    assert not torch.equal(state["2.quant.input.scale"], alone[2].quant.input.scale)
