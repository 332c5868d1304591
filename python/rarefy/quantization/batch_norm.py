"""Statistics of batch normalization: freezing them, and computing them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import nn
from tqdm.auto import tqdm

from rarefy import nn as rnn
from rarefy._batches import feed

_BatchNorm = nn.modules.batchnorm._BatchNorm


def folded_batch_norms(function: str, model: nn.Module) -> list[rnn.FoldedBatchNorm]:
    """The batch normalizations that are folded into convolutions, of which there must be one."""
    folded = [module for module in model.modules() if isinstance(module, rnn.FoldedBatchNorm)]
    if not folded:
        raise ValueError(
            f"[{function}] the model must have a batch normalization that is folded into a convolution; "
            f"prepare_qat folds them when it is given example_inputs"
        )
    return folded


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Fix the statistics of the batch normalizations that are folded into convolutions, while training goes on.

    A frozen one normalizes with its running statistics, as in evaluation, and does not move them, so that training sees the
    weights that will be deployed; gamma and beta still train. Usual in the last epochs. Stays until it is undone, whatever
    ``train()`` and ``eval()`` say.

    Args:
        model: prepared, with folded batch normalizations.
        frozen: False lets the statistics follow the data again.

    Raises:
        ValueError: the model has no folded batch normalization.
    """
    for module in folded_batch_norms("freeze_batch_norm", model):
        module.frozen = frozen


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    loader: Iterable[object],
    batches: int | None = None,
    *,
    forward: Callable[[nn.Module, object], object] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Compute the running statistics of every batch normalization anew: the plain average over batches.

    The moving average of training mixes in weights that are gone. Here all batches meet the weights as they are; every
    batch normalization normalizes with its batch's statistics, and everything else is in evaluation mode: no dropout, no
    quantizer moves. Folded weights stay those of the old statistics until the end. Frozen ones take part.

    Args:
        model: any module with batch normalizations that keep running statistics, prepared or not.
        loader: batches, of the kinds that ``calibrate`` takes.
        batches: how many to take at most; None takes all.
        forward: ``forward(model, batch)`` feeds other kinds of batches.
        progress: show a progress bar.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: batches < 1, no batch normalization, no batch, or one that no batch reached (they are named). Then, and
            when the data or the model raises, everything is as it was.
    """
    if batches is not None and batches < 1:
        raise ValueError(f"[reestimate_batch_norm] batches must be at least 1, got {batches}")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError("[reestimate_batch_norm] the model must have a batch normalization with running statistics")
    modes = {module: module.training for module in model.modules()}
    before = {
        name: (
            bn.momentum,
            getattr(bn, "frozen", False),
            [buffer.clone() for buffer in (bn.running_mean, bn.running_var, bn.num_batches_tracked)],
        )
        for name, bn in norms.items()
    }
    sums = {name: [torch.zeros_like(s, dtype=torch.float64) for s in before[name][2][:2]] for name in norms}
    counts = dict.fromkeys(norms, 0)

    def put(bn: nn.Module, values: list[torch.Tensor]) -> None:
        for buffer, value in zip((bn.running_mean, bn.running_var, bn.num_batches_tracked), values, strict=True):
            buffer.copy_(value)

    def restore() -> None:
        for name, bn in norms.items():
            momentum, frozen, statistics = before[name]
            bn.momentum = momentum
            if isinstance(bn, rnn.FoldedBatchNorm):
                bn.frozen = frozen
            put(bn, statistics)

    try:
        model.eval()
        for bn in norms.values():
            # Without momentum, batch norm averages over its calls since num_batches_tracked was 0.
            bn.training, bn.momentum = True, None
            if isinstance(bn, rnn.FoldedBatchNorm):
                bn.frozen = False
        seen = 0
        for batch in tqdm(islice(loader, batches), desc="batch norm", disable=not progress):
            for bn in norms.values():
                bn.num_batches_tracked.zero_()
            feed("reestimate_batch_norm", model, batch, forward)
            seen += 1
            for name, bn in norms.items():
                if bn.num_batches_tracked.item() > 0:
                    for total, value in zip(sums[name], (bn.running_mean, bn.running_var), strict=True):
                        total += value
                    counts[name] += 1
                put(bn, before[name][2])  # what is folded in, for the next batch
        if seen == 0:
            raise ValueError("[reestimate_batch_norm] loader must yield at least one batch, got none")
        missed = [name for name, count in counts.items() if count == 0]
        if missed:
            raise ValueError(
                f"[reestimate_batch_norm] every batch normalization must see data, but none reached: {', '.join(missed)}"
            )
    finally:
        restore()
        for module, training in modes.items():
            module.training = training
    for name, bn in norms.items():
        put(bn, [*(total / counts[name] for total in sums[name]), torch.tensor(counts[name])])
    return model
