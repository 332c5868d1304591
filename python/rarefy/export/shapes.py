"""Which axes of a file's inputs may have any size, and inputs of other sizes to try it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Axes = tuple[dict[int, str], ...]  # per input: the names of its free axes

BATCH = "batch"


def free_axes(inputs: list[Tensor], names: list[str], dynamic_batch: bool, dynamic_shapes: Any) -> Axes:
    """The free axes of every input.

    Args:
        inputs: the example.
        names: of the inputs.
        dynamic_batch: the first axis of every input is free, and called "batch" where `dynamic_shapes` says nothing else.
        dynamic_shapes: names by axis: by input name, or one mapping (or None) per input.

    Raises:
        TypeError, ValueError: they do not fit the inputs.
    """
    axes: list[dict[int, str]] = [{} for _ in inputs]
    for index, given in _by_input(names, dynamic_shapes):
        for axis, name in given.items():
            if isinstance(axis, bool) or not isinstance(axis, int) or not isinstance(name, str) or not name:
                raise TypeError(
                    "[to_onnx] dynamic_shapes must map axes (integers) to names, "
                    f"got {axis!r}: {name!r} for {names[index]!r}"
                )
            dims = inputs[index].dim()
            if not -dims <= axis < dims:
                raise ValueError(
                    f"[to_onnx] dynamic_shapes must name axes that exist, got axis {axis} of {names[index]!r}, "
                    f"which has {dims}"
                )
            axes[index][axis % dims] = name
    if dynamic_batch:
        batched = [x for x, named in zip(inputs, axes, strict=True) if named.get(0, BATCH) == BATCH]
        if len({x.shape[:1] for x in batched}) > 1 or any(x.dim() == 0 or x.shape[0] == 0 for x in batched):
            raise ValueError(
                "[to_onnx] dynamic_batch needs inputs that share the size of their first dimension, at least 1, got shapes "
                f"{', '.join(str(tuple(x.shape)) for x in inputs)} (dynamic_batch=False fixes all sizes)"
            )
        for named in axes:
            named.setdefault(0, BATCH)
    sizes: dict[str, int] = {}
    for index, named in enumerate(axes):
        for axis, name in named.items():
            size = inputs[index].shape[axis]
            if sizes.setdefault(name, size) != size or size == 0:
                raise ValueError(
                    "[to_onnx] dynamic_shapes: axes of one name must have one size, at least 1, "
                    f"got {size} for {name!r} in {names[index]!r} and {sizes[name]} in the first input that has it"
                )
    return tuple(dict(sorted(named.items())) for named in axes)


def _by_input(names: list[str], given: Any) -> Iterator[tuple[int, Mapping[int, str]]]:
    if given is None:
        return
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise ValueError(f"[to_onnx] dynamic_shapes must name inputs ({', '.join(names)}), got {name!r}")
        pairs = [(names.index(name), axes) for name, axes in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(names):
            raise ValueError(
                f"[to_onnx] dynamic_shapes must hold one mapping for each of {len(names)} inputs, got {given!r}"
            )
        pairs = list(enumerate(given))
    else:
        raise TypeError(f"[to_onnx] dynamic_shapes must be mappings of axes to names, got {given!r}")
    for index, axes in pairs:
        if axes is not None and not isinstance(axes, Mapping):
            raise TypeError(f"[to_onnx] dynamic_shapes must map axes to names, got {axes!r} for {names[index]!r}")
        if axes is not None:
            yield index, axes


def sizes_of(inputs: list[Tensor], axes: Axes) -> tuple[tuple[str, int], ...]:
    """The sizes of the free axes, by name."""
    sizes: dict[str, int] = {}
    for x, named in zip(inputs, axes, strict=True):
        for axis, name in named.items():
            sizes.setdefault(name, x.shape[axis])
    return tuple(sizes.items())


def resized(inputs: list[Tensor], axes: Axes, sizes: Mapping[str, int]) -> list[Tensor]:
    """The inputs with free axes of other sizes: their slices repeated, or the first of them."""
    result = []
    for x, named in zip(inputs, axes, strict=True):
        for axis, name in named.items():
            size = x.shape[axis]
            if sizes.get(name, size) != size:
                x = x.index_select(axis, torch.arange(sizes[name]) % size)
        result.append(x)
    return result


def traceable(inputs: list[Tensor], axes: Axes) -> list[Tensor]:
    """The inputs with at least two slices along every free axis: torch.export takes a size of 1 for a constant."""
    return resized(inputs, axes, {name: 2 for name, size in sizes_of(inputs, axes) if size == 1})


def other_sizes(size: int, name: str) -> list[int]:
    """Sizes to try a free axis at: one more of a batch; of others one that keeps what divides the size, then neighbours."""
    if name == BATCH:
        return [size + 1]
    half = [size // 2] if size % 2 == 0 and size >= 4 else []
    return [*half, *([size - 1] if size > 2 else []), size + 1, 2 * size]
