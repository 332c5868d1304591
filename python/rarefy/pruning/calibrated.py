"""One-shot pruning with calibration data: Wanda, SparseGPT and the exact refit of what a mask keeps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rarefy import _core
from rarefy._core.pruning import NM, CalibrationReport, RefitOptions, Unstructured
from rarefy.pruning.calibration_data import Data, Forward, as_batches, find_layers, make_stages
from rarefy.pruning.masks import unpack_mask


@dataclass(frozen=True)
class CalibrationResult:
    """Masks, and what was done to each weight. Prints as a table."""

    masks: dict[str, Tensor]  #: bool, True = kept, by name of the weight
    report: CalibrationReport

    def __repr__(self) -> str:
        return repr(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def _prune(
    function: str,
    model: nn.Module,
    loader: Iterable[object],
    method: Any,
    *,
    refit: RefitOptions | None,
    layers: Mapping[str, float] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    blocks: Sequence[str] | None,
    propagate: bool,
    float64: bool,
    errors: bool,
    forward: Forward | None,
    progress: bool,
) -> CalibrationResult:
    found, left_alone = find_layers(function, model, include, exclude)
    data = Data(function, model, as_batches(function, loader), forward)
    stages = make_stages(function, model, found, data, propagate, blocks)
    with tqdm(total=len(found), desc=function, unit="layer", disable=not progress) as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        masks, report = _core.pruning.prune_calibrated(
            stages, method, refit, list((layers or {}).items()), propagate, float64, errors, done
        )
    missed = [f"{other.name} ({other.reason})" for other in report.left_alone]
    skipped = [f"{tensor.name} ({tensor.skipped})" for tensor in report.tensors if tensor.skipped]
    report.add_left_alone(left_alone)
    if missed:
        warnings.warn(f"[{function}] not pruned: {', '.join(missed)}", stacklevel=3)
    if skipped:
        warnings.warn(f"[{function}] batches with NaN or infinity left out at: {', '.join(skipped)}", stacklevel=3)
    return CalibrationResult(masks, report)


def _refit_options(function: str, refit: bool | RefitOptions) -> RefitOptions | None:
    if isinstance(refit, RefitOptions):
        return refit
    if not isinstance(refit, bool):
        raise TypeError(f"[{function}] refit must be a bool or RefitOptions, got {type(refit).__name__}")
    return RefitOptions() if refit else None


def wanda(
    model: nn.Module,
    loader: Iterable[object],
    sparsity: float | None = None,
    pattern: str | Unstructured | NM = "unstructured",
    *,
    refit: bool | RefitOptions = False,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
    propagate: bool = True,
    float64: bool = False,
    errors: bool = True,
    forward: Forward | None = None,
    progress: bool = False,
) -> CalibrationResult:
    """Prune the weights of smallest ``|w| * ||x||`` within each output, in place (Wanda, arXiv:2306.11695).

    >>> result = rf.pruning.wanda(model, loader, sparsity=0.5)
    >>> result  # a table; result.masks says what was pruned

    Args:
        errors: gather whole Hessians to report errors, which Wanda itself does not need; with False, and without refit,
            norms alone are gathered.

    Everything else is as of ``sparse_gpt``.
    """
    method = _core.pruning.WandaOptions(sparsity, _core.pruning.parse_pattern(pattern))
    return _prune(
        "wanda",
        model,
        loader,
        method,
        refit=_refit_options("wanda", refit),
        layers=layers,
        include=include,
        exclude=exclude,
        blocks=blocks,
        propagate=propagate,
        float64=float64,
        errors=errors,
        forward=forward,
        progress=progress,
    )


def sparse_gpt(
    model: nn.Module,
    loader: Iterable[object],
    sparsity: float | None = None,
    pattern: str | Unstructured | NM = "unstructured",
    *,
    refit: bool | RefitOptions = False,
    block: int = 128,
    damping: float = 0.01,
    max_damping: float = 1.0,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
    propagate: bool = True,
    float64: bool = False,
    forward: Forward | None = None,
    progress: bool = False,
) -> CalibrationResult:
    """Prune layer by layer and make up for it with what is kept, in place (SparseGPT, arXiv:2301.00774).

    >>> result = rf.pruning.sparse_gpt(model, loader, pattern="2:4", refit=True)
    >>> pruner = rf.pruning.Pruner.from_masks(model, result.masks)  # holds the zeros in training

    Weights of linear layers and convolutions; the model runs in evaluation mode, and modes and hooks are put back. When
    anything raises, all weights are as they were. Memory beside the model: the Hessians of one stage, 4 * features²
    bytes per layer, and a copy of the weights for that case; ``result.report.peak_bytes`` has the sum.

    Args:
        model: pruned in place.
        loader: calibration batches, some hundreds of samples. A tensor is the model's input; of a tuple or list the
            first element is; a dict is keyword arguments. Gone through once per stage; an iterator is kept as a list.
        sparsity: fraction of zeros in every weight, in [0, 1), exact; default 0.5, and 1 - n / m for n:m.
        pattern: ``"unstructured"`` or ``"2:4"``, any n:m, along the inputs.
        refit: refit the kept weights by least squares at once, with the same statistics: about 40 % less error, for one
            factorization per row (see ``refit``). ``RefitOptions`` sets its damping.
        block: columns whose masks are chosen together.
        damping: added to the Hessian's diagonal, as a fraction of its mean; grows tenfold up to ``max_damping`` while the
            Hessian is not positive definite.
        layers: own sparsities by patterns of names; the first that fits counts.
        include, exclude: patterns of parameter or module names, as of ``MagnitudePruner``.
        blocks: names of modules whose layers are pruned together, from one run of the data; default: the entries of
            outermost ``ModuleList``\\ s. Layers outside of blocks are stages of their own.
        propagate: True: a stage sees what the pruned stages before it give. False: all see what the dense model gives,
            in one run, and all statistics are in memory at once.
        float64: statistics and solutions in float64.
        forward: ``forward(model, batch)`` feeds other kinds of batches.
        progress: show a progress bar.

    Returns:
        Masks by name, and a report with the relative error ``||(W - W') X||² / ||W X||²`` of each layer. A layer that no
        finite batch reached is left alone, with a warning.

    Raises:
        ValueError: options out of range, a weight that cannot have the pattern or is not finite, unknown names, no batch,
            no layer that a finite batch reaches, a Hessian that is not positive definite at ``max_damping``.
    """
    method = _core.pruning.SparseGptOptions(sparsity, _core.pruning.parse_pattern(pattern), block, damping, max_damping)
    return _prune(
        "sparse_gpt",
        model,
        loader,
        method,
        refit=_refit_options("sparse_gpt", refit),
        layers=layers,
        include=include,
        exclude=exclude,
        blocks=blocks,
        propagate=propagate,
        float64=float64,
        errors=True,
        forward=forward,
        progress=progress,
    )


def refit(
    model: nn.Module,
    loader: Iterable[object],
    masks: Mapping[str, Tensor],
    *,
    dense: nn.Module | Mapping[str, Tensor] | None = None,
    damping: float = 1e-4,
    max_damping: float = 1.0,
    blocks: Sequence[str] | None = None,
    propagate: bool = True,
    float64: bool = False,
    forward: Forward | None = None,
    progress: bool = False,
) -> CalibrationResult:
    """Give the weights that masks keep the values that come nearest to the dense layer's outputs, in place.

    >>> dense = copy.deepcopy(model)
    >>> ...  # prune and train as you like
    >>> rf.pruning.refit(model, loader, masks, dense=dense)

    Exact least squares per row, for masks of any pattern; what masks prune becomes zero. The time is that of one
    Cholesky factorization of the kept columns per row.

    Args:
        masks: by name of the weight: bool of its shape, True = kept, or packed as pruners keep them.
        dense: whose outputs are fitted: a model with the same names, or weights by name; default: the model's own weights
            as they are, which must not have been zeroed yet.
        damping, max_damping: as of ``sparse_gpt``; damping draws towards the dense weights, not towards zero.

    Everything else is as of ``sparse_gpt``.

    Raises:
        ValueError: as ``sparse_gpt``; masks that are empty, fit no weight or leave zeros to be fitted to.
    """
    if not masks:
        raise ValueError("[refit] masks must name at least one weight, got none")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"[refit] every name in masks must be that of a parameter, got {name!r}")
        kept[name] = unpack_mask(mask, parameters[name].shape) if mask.dtype == torch.uint8 else mask
    source = dict(dense.named_parameters(remove_duplicate=False)) if isinstance(dense, nn.Module) else (dense or {})
    missing = [name for name in masks if dense is not None and name not in source]
    if missing:
        raise ValueError(f"[refit] dense must have every weight that has a mask, got none for {', '.join(missing)}")
    method = _core.pruning.MaskRefit(
        kept, {name: source[name].detach() for name in masks if name in source}, RefitOptions(damping, max_damping)
    )
    return _prune(
        "refit",
        model,
        loader,
        method,
        refit=None,
        layers=None,
        include=list(masks),
        exclude=(),
        blocks=blocks,
        propagate=propagate,
        float64=float64,
        errors=True,
        forward=forward,
        progress=progress,
    )
