"""What the zeros of a model are worth: bytes on disk, multiply-accumulates, measured time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rarefy import _core
from rarefy._core.graph import count_costs
from rarefy._core.pruning import SparseReport
from rarefy.graph.record import call, evaluation, record
from rarefy.pruning.sparse_file import sparse_size
from rarefy.pruning.sparsify import BLOCKS, sparsify


def measure(
    model: nn.Module,
    example_inputs: object,
    *,
    seconds: float = 0.5,
    gain: float = 1.1,
    layer_seconds: float = 0.05,
    least_sparsity: float = 0.5,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
) -> SparseReport:
    """Measure a pruned model, dense beside sparse. The model stays as it is.

    Args:
        model: any module; pruned, or while it is being pruned.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments, of the size that the
            model will be used with.
        seconds: to time the two models for, in turn.
        gain, layer_seconds, least_sparsity, blocks: as in ``sparsify``, whose model is the sparse one.

    Returns:
        Bytes dense and compressed; multiply-accumulates, and those whose weight is not zero; milliseconds dense and with the
        linear layers sparse that are faster so.
    """
    graph = record(model, example_inputs)
    sparse, layers = sparsify(
        model, example_inputs, gain=gain, seconds=layer_seconds, least_sparsity=least_sparsity, blocks=blocks
    )
    cuda = next((p.device for p in model.parameters() if p.is_cuda), None)

    def run(which: nn.Module) -> None:
        call(which, example_inputs)
        if cuda is not None:
            torch.cuda.synchronize(cuda)

    with evaluation(model), evaluation(sparse):
        milliseconds = _core.pruning.compare_times(lambda: run(model), lambda: run(sparse), seconds)
    if layers.sparse == 0:  # the same model twice
        milliseconds = (milliseconds[0], milliseconds[0])
    macs = count_costs(graph).total.macs
    return SparseReport(sparse_size(model), macs, _core.pruning.effective_macs(graph), milliseconds, layers)
