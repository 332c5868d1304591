"""Which elements of which weights a mask prunes: patterns, scopes and exact sparsities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rarefy._core.pruning import (
    NM,
    Block,
    Candidate,
    Column,
    Filter,
    Head,
    MaskChoice,
    Row,
    Unstructured,
    parse_pattern,
)
from rarefy._core.pruning import choose_masks as _choose_masks

Pattern = Unstructured | NM | Block | Row | Column | Filter | Head


def choose_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Literal["local", "global", "erk"] = "global",
    pattern: str | Pattern = "unstructured",
    scores: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    layers: Mapping[str, float] | None = None,
    regrow: bool = False,
) -> dict[str, Tensor]:
    """Return the packed masks of weights that prune a fraction of their elements.

    >>> masks = rf.pruning.choose_masks({"fc.weight": model.fc.weight}, 0.5, pattern="4x1")
    >>> kept = rf.pruning.unpack_mask(masks["fc.weight"], model.fc.weight.shape)

    Args:
        weights: by name. Nothing of them is changed.
        sparsity: fraction of the elements to prune, in [0, 1); for ``"n:m"`` at most 1 - n / m, where the masks are N:M.
        scope: ``"global"`` compares all weights, ``"local"`` prunes the same fraction of each, ``"erk"`` fractions by
            the Erdos-Renyi-Kernel rule (arXiv:1911.11134).
        pattern: ``"unstructured"``, ``"2:4"``, ``"4x1"`` (blocks), ``"row"``, ``"column"``, ``"filter"``, ``"head:64"``,
            or one of the classes.
        scores: of the same shapes as the weights: the higher is kept. A weight without one has its magnitudes.
        masks: packed; what they prune stays pruned and counts.
        layers: own sparsities of weights that a name or pattern (``*``, ``?``) of a parameter or module names.
        regrow: ignore ``masks``, so that what they prune competes again.

    Raises:
        ValueError: a number out of range, a name that is not in ``weights``, a weight that cannot have the pattern, NaN.
    """
    for what, given in (("scores", scores), ("masks", masks)):
        unknown = [name for name in given or {} if name not in weights]
        if unknown:
            raise ValueError(f"[choose_masks] {what} must be of the weights, got {unknown[0]!r}")
    candidates = [
        Candidate(name, weight, (scores or {}).get(name), (masks or {}).get(name)) for name, weight in weights.items()
    ]
    choice = MaskChoice(sparsity, scope, parse_pattern(pattern), list((layers or {}).items()), regrow)
    return dict(zip(weights, _choose_masks(candidates, choice), strict=True))


def pack_mask(kept: Tensor) -> Tensor:
    """Return the packed mask of a bool tensor: element i in contiguous order is bit i % 8 of byte i // 8; True is kept."""
    return torch.ops.rarefy.pack_mask(kept)


def unpack_mask(mask: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the bool tensor of a packed mask: True is kept."""
    return torch.ops.rarefy.unpack_mask(mask, shape)
