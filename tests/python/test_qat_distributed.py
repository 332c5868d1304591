"""Two gloo processes: ranges over all of them, DDP, FSDP2."""

import copy
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rarefy.quantization import MinMax, MovingAverage, QConfig, calibrate, prepare, prepare_qat

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def quantizers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".quant." in name}


def train(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), torch.arange(len(batch)) % 3).backward()
        optimizer.step()


# Each of these runs in both processes; what it returns comes back to the test.
def extremes(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8(observer=MinMax()))
    model(torch.full((2, 4), 1.0 if rank == 0 else 100.0))
    return quantizers(model)


def extremes_alone(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8(observer=MinMax()), sync_observers=False)
    model(torch.full((2, 4), 1.0 if rank == 0 else 100.0))
    return quantizers(model)


def averaged(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8(observer=MovingAverage(0.25)))
    for step in range(4):
        model(torch.linspace(-1 - rank, 2 + rank, 8).reshape(2, 4) * (step + 1))
    return quantizers(model)


def not_finite(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8(observer=MinMax()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.full((2, 4), 5.0 if rank == 0 else float("nan")))  # one process: the other's range counts
        after_one = quantizers(model)
        model(torch.full((2, 4), float("inf")))  # both: nothing counts
    return {"one." + k: v for k, v in after_one.items()} | quantizers(model)


def with_ddp(rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(prepare_qat(mlp(), QConfig.int8()))
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(6, 4, generator=generator) * (rank * 9 + 1) for _ in range(3)]
    train(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    return dict(model.state_dict())


def with_own_group(rank: int) -> dict[str, Tensor]:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    model = prepare_qat(mlp(), QConfig.int8(observer=MinMax()), process_group=alone)
    clone = copy.deepcopy(model)
    assert clone[0].quant.input.sync.group is alone
    clone(torch.full((2, 4), 1.0 if rank == 0 else 100.0))
    return quantizers(clone)


def calibrated(rank: int) -> dict[str, Tensor]:
    model = prepare(mlp(), QConfig.int8())
    batches = [torch.full((2, 4), 1.0)] if rank == 0 else [torch.full((2, 4), -7.0), torch.full((2, 4), 100.0)]
    calibrate(model, batches)
    result = quantizers(model)
    calibrate(model, batches if rank else [])  # a process may have none
    return result


def with_fsdp(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8())
    whole = copy.deepcopy(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(7)) for _ in range(3)]
    train(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    train(whole, batches, torch.optim.SGD(whole.parameters(), 0.1))
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)
    assert not any(hasattr(value, "full_tensor") for name, value in model.state_dict().items() if ".quant." in name)
    return state


def with_fsdp_mixed_precision(rank: int) -> dict[str, Tensor]:
    model = prepare_qat(mlp(), QConfig.int8())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mp_policy=policy)
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(rank)) * (1 + rank) for _ in range(3)]
    train(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    assert model(batches[0]).dtype == torch.bfloat16
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


WORK = (
    extremes, extremes_alone, averaged, not_finite, with_ddp, with_own_group, calibrated, with_fsdp,
    with_fsdp_mixed_precision,
)  # fmt: skip


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, dict[str, Tensor] | str] = {}
    for work in WORK:
        try:
            results[work.__name__] = work(rank)
        except Exception:  # told by the test that it belongs to
            results[work.__name__] = traceback.format_exc()
    dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[Callable], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Gives what a function gave in both processes, which start once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def results_of(work: Callable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for rank, results in enumerate(both):
            if isinstance(results[work.__name__], str):
                pytest.fail(f"in process {rank}: {results[work.__name__]}")
        return both[0][work.__name__], both[1][work.__name__]

    return results_of


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_ranges_are_those_of_all_processes(run):
    first, second = run(extremes)
    assert_equal(first, second)
    assert (first["0.quant.input.min_val"].item(), first["0.quant.input.max_val"].item()) == (1.0, 100.0)
    assert first["0.quant.input.scale"].item() == pytest.approx(100 / 255)


def test_without_sharing_ranges_differ(run):
    first, second = run(extremes_alone)
    assert (first["0.quant.input.max_val"].item(), second["0.quant.input.max_val"].item()) == (1.0, 100.0)


def test_moving_averages_follow_the_union_of_the_batches(run):
    first, second = run(averaged)
    assert_equal(first, second)
    low, high = -2.0, 3.0
    for step in range(1, 4):
        low, high = 0.75 * low - 0.25 * 2 * (step + 1), 0.75 * high + 0.25 * 3 * (step + 1)
    assert first["0.quant.input.min_val"].item() == pytest.approx(low)
    assert first["0.quant.input.max_val"].item() == pytest.approx(high)


def test_a_batch_that_is_not_finite_in_one_process_adds_nothing_and_counts_in_all(run):
    first, second = run(not_finite)
    assert_equal(first, second)
    for prefix, skipped in (("one.", 1), ("", 2)):
        assert first[prefix + "0.quant.input.max_val"].item() == 5.0
        assert first[prefix + "0.quant.input.skipped"].item() == skipped


def test_ddp_keeps_weights_and_quantizers_equal(run):
    first, second = run(with_ddp)
    assert_equal(first, second)
    assert not torch.equal(first["module.0.weight"], mlp()[0].weight)


def test_a_group_of_its_own(run):
    first, second = run(with_own_group)
    assert (first["0.quant.input.max_val"].item(), second["0.quant.input.max_val"].item()) == (1.0, 100.0)


def test_calibration_merges_ranges_of_unequal_loaders(run):
    first, second = run(calibrated)
    assert_equal(first, second)
    assert (first["0.quant.input.min_val"].item(), first["0.quant.input.max_val"].item()) == (-7.0, 100.0)


def test_fsdp2_trains_like_the_whole_model(run):
    assert_equal(*run(with_fsdp))


def test_fsdp2_with_mixed_precision(run):
    first, second = run(with_fsdp_mixed_precision)
    assert_equal(first, second)
    assert first["0.weight"].dtype == torch.float32
