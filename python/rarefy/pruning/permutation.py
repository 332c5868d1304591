"""Channel permutation: an order of channels in which N:M masks keep more, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from rarefy import _core
from rarefy._core.graph import Graph
from rarefy._core.pruning import NM, PermutationOptions, PermutationReport, parse_pattern
from rarefy._core.pruning import permute_for_nm as _permute_for_nm
from rarefy.graph.record import call, record
from rarefy.pruning.surgery import OptimizerState, named_tensors, quantizer_cuts


def permute_for_nm(
    model: nn.Module,
    example_inputs: Any,
    pattern: str | NM = "2:4",
    *,
    optimizers: Sequence[Any] | Any = (),
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    escapes: int = 16,
    effort: float = 2e10,
    seed: int = 0,
    tolerance: float | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> PermutationReport:
    """Put channels into an order in which N:M masks keep more of the magnitude, and return what was done.

    >>> report = rf.pruning.permute_for_nm(model, example_inputs, "2:4")  # before pruning
    >>> report.before / report.total, report.after / report.total

    One forward pass is recorded, and channels that can only be moved together are read off it (as ``StructuredPruner``
    does). Their order is searched for by exchanges (Pool & Yu, 2021); producers, consumers, normalizations, gradients and
    optimizer state follow in place: parameters stay the same objects, in the same memory. The outputs are compared, and
    what changes them by more than rounding is put back.

    Args:
        model: changed in place, before it has masks.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        pattern: ``"n:m"`` or ``rf.pruning.NM``.
        optimizers: those that hold the model's parameters; what they keep about them is permuted too.
        include: patterns of the weights whose masks count; default: every ``weight`` of 2 or more dimensions.
        exclude: patterns that are taken out again.
        escapes: attempts of each group of channels to leave a local maximum.
        effort: comparisons that a group may take, about 7e9 a second on one core. The result depends on it, not on time.
        seed: of the random exchanges.
        tolerance: largest difference of the outputs over the largest output; default: 1e-9 for float64, 1e-4 for float32,
            0.05 for 16 bits.
        forward: ``forward(model, example_inputs)`` where ``model(*example_inputs)`` will not do.

    Raises:
        ValueError: an option out of range, a name that is not in the model, weights that are not finite, masks of a
            pruner, a model that does not run. Everything is as it was then.
    """
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM):
        raise ValueError(f"[permute_for_nm] pattern must be N:M, got {parsed!r}")
    options = PermutationOptions(
        parsed, None if include is None else list(include), list(exclude), escapes, effort, seed, tolerance or 0.0
    )
    by_name = named_tensors(model)
    names: dict[int, str] = {}
    for name, tensor in by_name.items():
        names.setdefault(id(tensor), name)
    state = OptimizerState(list(optimizers) if isinstance(optimizers, Iterable) else [optimizers], names).tensors
    tensors = [
        *(_core.graph.NamedTensor(name, value, "parameter") for name, value in model.named_parameters()),
        *(_core.graph.NamedTensor(name, value, "buffer") for name, value in model.named_buffers()),
    ]

    def run() -> tuple[Graph, str]:
        partial = Graph()
        try:
            return record(model, example_inputs, forward or call, partial), ""
        except Exception as error:  # of the model's own code: the transaction reports it
            return partial, f"{type(error).__name__}: {error}".strip()

    return _permute_for_nm(
        run,
        tensors,
        [parameter for parameter, _, _ in state],
        [name for _, name, _ in state],
        [value for _, _, value in state],
        lambda changes: quantizer_cuts(model, by_name, changes),
        options,
    )
