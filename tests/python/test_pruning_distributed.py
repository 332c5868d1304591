"""Two gloo processes: the same masks and weights in both under DDP; what FSDP does not do is said."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from masks import masks_of, put_masks, stray
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rarefy.pruning import MagnitudePruner, PolynomialSchedule
from rarefy.pruning.enforce import OptimizerHook, check_masks, guard, masked_parameters, same_on_all_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 3))


def batches(rank: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6, 9, generator=generator) * (rank * 3 + 1) for _ in range(steps)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Each of these runs in both processes; what it returns comes back to the test.
def broadcast(rank: int) -> dict[str, Tensor]:
    model = mlp()
    put_masks(model, seed=rank, apply=False)
    masks = [model[0].weight_mask_bits, model[2].weight_mask_bits]
    own = [mask.clone() for mask in masks]
    same_on_all_ranks(masks)
    return {"own0": own[0], "own1": own[1], "got0": masks[0], "got1": masks[1]}


def broadcast_in_a_group(rank: int) -> dict[str, Tensor]:
    """A group of one process and none: nothing is sent. The second process is the first of the reversed pair's group."""
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    mask = torch.full((8,), rank + 1, dtype=torch.uint8)
    same_on_all_ranks([mask], alone)
    return {"mask": mask}


def with_ddp(rank: int) -> dict[str, Tensor]:
    """Different batches; gradients are reduced, and so weights and the masks from them are equal."""
    model = mlp()
    parallel = DistributedDataParallel(model)
    pruner = MagnitudePruner(model, 0.7, schedule=PolynomialSchedule(0, 6, 2))
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    for batch in batches(rank, 8):
        optimizer.zero_grad()
        F.cross_entropy(parallel(batch), torch.arange(6) % 3).backward()
        optimizer.step()
        pruner.step()
    assert stray(model) == 0
    return state_of(model)


def with_own_scores(rank: int) -> dict[str, Tensor]:
    """Masks that differ (each process draws its own) until they are shared, in the hook of the optimizer."""
    model = mlp()
    put_masks(model, kept=1.1)
    guard(model)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    steps = []

    def after(_: object) -> bool:
        steps.append(1)
        if len(steps) != 3:
            return False
        other = mlp()
        put_masks(other, kept=0.4, seed=10 + rank)
        for i in (0, 2):
            model[i].weight_mask_bits.copy_(other[i].weight_mask_bits)
        same_on_all_ranks([model[i].weight_mask_bits for i in (0, 2)])
        return True

    OptimizerHook(optimizer, lambda: masked_parameters(model), after=after)
    for batch in batches(rank, 6):
        optimizer.zero_grad()
        F.cross_entropy(parallel(batch), torch.arange(6) % 3).backward()
        optimizer.step()
    assert stray(model) == 0
    assert sum(int((~kept).sum()) for _, kept in masks_of(model).values()) > 80
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"'module\.0\.weight' must be zero where its mask prunes"):
        parallel.state_dict()
    for parameter, kept in masks_of(model).values():
        parameter.data[~kept] = 0
    return state_of(model)


def with_fsdp(rank: int) -> dict[str, Tensor]:
    """Shards of weights have no masks: an error that says what to do, before and after sharding."""
    model = mlp()
    put_masks(model)
    fully_shard(model[0])
    with pytest.raises(ValueError, match=r"'0\.weight' must be a plain tensor, got DTensor: weights that are sharded"):
        check_masks(model)
    return {}


WORK = (broadcast, broadcast_in_a_group, with_ddp, with_own_scores, with_fsdp)


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


def test_masks_of_the_first_process_are_sent(run):
    first, second = run(broadcast)
    assert not torch.equal(first["own0"], second["own0"])
    for i in range(2):
        assert torch.equal(first[f"got{i}"], first[f"own{i}"])
        assert torch.equal(second[f"got{i}"], first[f"own{i}"])


def test_nothing_is_sent_in_a_group_of_one(run):
    first, second = run(broadcast_in_a_group)
    assert first["mask"].unique().tolist() == [1]
    assert second["mask"].unique().tolist() == [2]


def test_nothing_is_sent_without_processes():
    mask = torch.full((8,), 3, dtype=torch.uint8)
    same_on_all_ranks([mask])
    same_on_all_ranks([])
    assert mask.unique().tolist() == [3]


def test_masks_under_ddp(run):
    first, second = run(with_ddp)
    assert_equal(first, second)
    zeros = sum(int((first[f"{i}.weight"] == 0).sum()) for i in (0, 2))
    assert zeros == round(0.7 * (9 * 17 + 17 * 3))


def test_masks_that_processes_draw_for_themselves(run):
    assert_equal(*run(with_own_scores))


def test_sharded_weights_are_refused(run):
    run(with_fsdp)
