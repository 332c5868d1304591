"""Two gloo processes train as one: equal gradients, metrics of both, one writer of checkpoints."""

import itertools
import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from rarefy.distillation import Callbacks, DistillationLoss, DistillationTrainer, Selection

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)),
        nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(48, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)
    y[3:11] = -100  # one part of four rows without valid ones, others with fewer
    return x, y


def train(rank: int, processes: int, folder: Path) -> dict:
    """Each process takes its rows of every batch of 24, in two parts."""
    student, teacher = models()
    wrapped = DistributedDataParallel(student) if processes > 1 else student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9)
    x, y = data()
    size = 24 // processes // 2
    parts = [slice(begin + 24 // processes * rank + size * k, begin + 24 // processes * rank + size * (k + 1))
             for begin in (0, 24) for k in range(2)]  # fmt: skip
    batches = [(x[part], y[part]) for part in parts]
    steps = []
    trainer = DistillationTrainer(
        wrapped, teacher, optimizer, DistillationLoss(3.0, 0.5), accumulate=2, max_grad_norm=1.0,
        selection=Selection("accuracy"), callbacks=Callbacks(lambda step, loss: steps.append(loss)),
    )  # fmt: skip
    history = trainer.fit(batches, 3, progress=False, evaluate=batches, checkpoint=folder)
    return {
        "student": student.state_dict(),
        "history": [(e.loss, e.evaluation.loss, e.evaluation.accuracy) for e in history],
        "best": trainer.best_epoch,
        "steps": steps,
    }


def noisy(rank: int, folder: Path, stop: int | None) -> dict:
    """With dropout: every process has random numbers of its own."""
    torch.manual_seed(rank)
    student, teacher = models()
    student.insert(2, nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    x, y = data()
    sampler = DistributedSampler(TensorDataset(x, y), seed=3)
    loader = DataLoader(sampler.dataset, batch_size=6, sampler=sampler)
    steps = []

    def on_step(step: int, loss: float) -> None:
        steps.append((step, loss))

    trainer = DistillationTrainer(
        DistributedDataParallel(student), teacher, optimizer, DistillationLoss(), callbacks=Callbacks(on_step)
    )
    if stop is not None:
        calls = itertools.count()

        def killed(module: nn.Module, arguments: object) -> None:
            if module.training and next(calls) == stop:
                raise KeyboardInterrupt

        student.register_forward_pre_hook(killed)
    try:
        trainer.fit(loader, 3, progress=False, checkpoint=folder, checkpoint_every=1)
    except KeyboardInterrupt:
        dist.barrier()  # the first process has written
    return {"steps": steps, "history": [e.loss for e in trainer.history], "student": student.state_dict()}


def resumed(rank: int, folder: Path) -> dict:
    whole = noisy(rank, folder / "whole", None)
    parts = [noisy(rank, folder / "parts", 6), noisy(rank, folder / "parts", None)]
    return {"whole": whole, "parts": parts}


def process(rank: int, work: str, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    try:
        result = resumed(rank, Path(folder)) if work == "resumed" else train(rank, 2, Path(folder) / "run")
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still drop Python objects while the interpreter ends, which aborts it


def run(work: str, folder: Path) -> list[dict]:
    mp.spawn(process, (work, str(folder)), nprocs=2)
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for result in results:
        assert "error" not in result, result["error"]
    return results


def test_two_processes_go_on_to_the_same_bits(tmp_path):
    results = run("resumed", tmp_path)
    assert results[0]["whole"]["steps"] != results[1]["whole"]["steps"]
    for result in results:
        whole, (first, second) = result["whole"], result["parts"]
        assert len(first["steps"]) == 6
        assert first["steps"] + second["steps"] == whole["steps"]
        assert second["history"] == whole["history"]
        for name, value in whole["student"].items():
            assert torch.equal(second["student"][name], value), name


def test_two_processes_train_as_one(tmp_path):
    results = run("train", tmp_path)
    one = train(0, 1, tmp_path / "alone")
    for name, value in one["student"].items():
        assert torch.equal(results[0]["student"][name], results[1]["student"][name])
        torch.testing.assert_close(results[0]["student"][name], value, rtol=1e-4, atol=1e-6)
    assert results[0]["history"] == results[1]["history"]
    for got, expected in zip(results[0]["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert results[0]["best"] == one["best"]
    mean = [(a + b) / 2 for a, b in zip(results[0]["steps"], results[1]["steps"], strict=True)]
    assert mean == pytest.approx(one["steps"], rel=1e-5)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert set(saved["student"]) == set(one["student"])  # without the prefix of DistributedDataParallel
