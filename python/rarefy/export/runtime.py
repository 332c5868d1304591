"""What the exporters for single runtimes have in common: their arguments, the file's place, and the comparison."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.export.comparison import (
    HALF,
    NOISE_FACTOR,
    RELATIVE,
    compare_integers,
    finite_values,
    largest,
    noise_of_rounding,
    rms,
)
from rarefy.export.files import check_path, staged
from rarefy.export.lowering import QuantizeDequantize, check_quantizers, lower, without_rounding
from rarefy.export.report import Difference

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, object]

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16})
_RUNTIMES = {"to_openvino": "OpenVINO", "to_executorch": "ExecuTorch", "to_litert": "LiteRT"}


@dataclass(frozen=True)
class Example:
    """What a model is called with: tensors under the names that they get in the file, and arguments that are fixed."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    by_name: bool
    constants: Mapping[str, object]

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(zip(self.names, self.tensors, strict=True))

    def call(self, model: nn.Module) -> object:
        """What the model returns for these inputs."""
        with torch.no_grad():
            if self.by_name:
                return model(**self.named(), **self.constants)
            return model(*self.tensors)


@dataclass(frozen=True)
class Prepared:
    """A copy of a model as a program of integers, and what it must compute."""

    lowered: nn.Module
    example: Example
    expected: list[np.ndarray]  #: the outputs of the model itself
    unrounded: list[np.ndarray]  #: its outputs with activations that are clamped but not rounded


def require(function: str, extra: str, *packages: str) -> None:
    """Raises ImportError, naming the extra, where one of the packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"[{function}] needs {', '.join(missing)}: pip install rarefy[{extra}]")


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Computes in the types of the tensors, whatever surrounds the call: files are made, and run, outside of autocast."""
    with torch.autocast("cpu", enabled=False):
        yield


def check_parameters(function: str, model: nn.Module) -> None:
    """Raises TypeError where a parameter has a type that numpy, and with it the check of the file, does not know."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in _FLOATS:
            raise TypeError(
                f"[{function}] parameters must be float32, float64 or float16, got {_name(parameter.dtype)} at {name}; "
                "call model.float()"
            )


def to_numpy(function: str, what: str, tensor: Tensor) -> np.ndarray:
    """The values of an input or output.

    Raises:
        TypeError: numpy has no such type.
    """
    try:
        return tensor.detach().cpu().numpy()
    except TypeError as error:
        raise TypeError(f"[{function}] {what} must be of a type that numpy has, got {_name(tensor.dtype)}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_example(function: str, example: object) -> Example:
    """The example inputs, checked.

    Raises:
        TypeError: they are something else than a tensor, a sequence of tensors, or tensors and plain values by name.
        ValueError: there is no tensor among them.
    """
    constants: dict[str, object] = {}
    by_name = isinstance(example, Mapping)
    if isinstance(example, Mapping):
        constants = {name: x for name, x in example.items() if x is None or isinstance(x, (bool, int, float, str))}
        names = tuple(str(name) for name in example if name not in constants)
        values = [example[name] for name in names]
    elif isinstance(example, (Tensor, Sequence)) and not isinstance(example, str):
        values = [example] if isinstance(example, Tensor) else list(example)
        names = ("x",) if len(values) == 1 else tuple(f"x_{index}" for index in range(len(values)))
    else:
        raise TypeError(f"[{function}] example_inputs must be tensors, got {type(example).__name__}")
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"[{function}] example_inputs must be tensors, got {type(value).__name__} among them")
    if not values:
        raise ValueError(f"[{function}] example_inputs must hold at least one tensor, got none")
    return Example(names, tuple(value.detach().cpu().contiguous() for value in values), by_name, constants)


def outputs_of(function: str, model: nn.Module, example: Example) -> list[np.ndarray]:
    """The tensors that the model returns, in the order in which they lie in its result."""
    leaves = [leaf for leaf in pytree.tree_leaves(example.call(model)) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"[{function}] the model must return tensors, got {type(leaf).__name__} among them")
    return [to_numpy(function, "outputs", leaf) for leaf in leaves]


def prepare_model(
    function: str,
    model: nn.Module,
    example_inputs: object,
    *,
    unsigned: bool = False,
    weights: Literal["integers", "quantize"] = "integers",
    eight_bits: bool = True,
    formats: bool = False,
) -> Prepared:
    """Checks model and inputs, evaluates a copy of the model, and lowers it.

    Args:
        function: whose error it is.
        model, example_inputs: as the exporter got them.
        unsigned, weights: see `lower`.
        eight_bits: the runtime knows one type of activations, int8, whose limits are those of every range.
        formats: the file is written by `to_onnx`, which holds formats beside plain grids.

    Raises:
        TypeError, ValueError: an argument; a quantizer that cannot be written, or that is not one of whole 8 bits.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{function}] model must be a torch.nn.Module, got {type(model).__name__}")
    check_parameters(function, model)
    example = check_example(function, example_inputs)
    for tensor in example.tensors:
        to_numpy(function, "example_inputs", tensor)
    check_quantizers(function, model, formats)
    model = copy.deepcopy(model).cpu().eval()
    expected = outputs_of(function, model, example)
    lowered = lower(model, unsigned, weights=weights, linear="linear", formats=formats)
    if eight_bits:
        _check_eight_bits(function, lowered)
    with without_rounding(lowered):
        unrounded = outputs_of(function, lowered, example)
    return Prepared(lowered, example, expected, unrounded)


def _check_eight_bits(function: str, lowered: nn.Module) -> None:
    for name, module in lowered.named_modules():
        if isinstance(module, QuantizeDequantize):
            info = torch.iinfo(module.dtype)
            if module.axis is not None or info.bits != 8 or (module.qmin, module.qmax) != (info.min, info.max):
                rule = "activations must have one scale and all 256 integers of 8 bits"
            else:
                continue
            found = f"{module.qmin} to {module.qmax}" + ("" if module.axis is None else f" along axis {module.axis}")
            raise ValueError(f"[{function}] {rule}, got {found} at {name or 'the root'}")
        limits = getattr(module, "limits", None)
        if limits is not None and limits[2] != torch.int8:
            raise ValueError(
                f"[{function}] weights must be signed integers of at most 8 bits, got {limits[2]} at {name or 'the root'}"
            )


@contextlib.contextmanager
def pending(function: str, path: str | os.PathLike[str], suffix: str, *, folder: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it when the block succeeds, removed when it fails.

    Args:
        function: whose error it is.
        path: what the result is called. An existing result is replaced at the end.
        suffix: what the name must end in.
        folder: the result is a folder.

    Raises:
        ValueError: the name ends in something else.
        TypeError, OSError: see `check_path`; or the folder around it cannot be written. Nothing is left then, and what had
            one of the names before is as it was.
    """
    path = check_path(function, path, folder=folder)
    if path.suffix != suffix:
        raise ValueError(f"[{function}] path must end in {suffix}, got {path}")
    with staged(function, path, folder=folder) as stage:  # some formats are several files; they are collected there
        yield stage / path.name
        names = [item.name for item in sorted(stage.folder.iterdir()) if item.name != path.name]
        stage.commit(*names, path.name)  # the named file comes last


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keeps back what converters print about themselves: warnings, and these loggers below errors."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


# ---- comparison -----------------------------------------------------------------------------------------------------


def compare(
    function: str,
    got: Sequence[np.ndarray],
    prepared: Prepared,
    scales: Sequence[float | None],
    *,
    half: bool = False,
) -> tuple[Difference, ...]:
    """Every output of the file against the model's.

    Args:
        function: whose error it is.
        got: the file's outputs.
        prepared: the model's, rounded and not: their distance is the unit of what is allowed.
        scales: of the outputs that are quantized.
        half: the file holds numbers in half precision.

    Raises:
        RuntimeError: a shape, a type or a value differs. Names the output and both numbers.
    """
    if len(got) != len(prepared.expected):
        raise RuntimeError(
            f"[{function}] verification failed: the file has {len(got)} outputs, the model {len(prepared.expected)}"
        )
    differences = []
    where = _RUNTIMES.get(function, function)
    for index, (mine, want, free) in enumerate(zip(got, prepared.expected, prepared.unrounded, strict=True)):
        name = f"output_{index}"
        failed = f"[{function}] verification failed: {name}"
        if mine.shape != want.shape or mine.dtype.kind != want.dtype.kind:
            raise RuntimeError(f"{failed} is {mine.dtype} {mine.shape}, but the model gives {want.dtype} {want.shape}")
        noise = noise_of_rounding(free, want)
        if want.dtype.kind != "f":
            differing, allowed = compare_integers(failed, mine, want, noise)
            gap = mine.astype(np.float64) - want.astype(np.float64)
            differences.append(Difference(name, where, True, (), largest(gap), rms(gap), allowed, None, differing))
            continue
        rounding = HALF if half or want.dtype == np.float16 else 0.0
        mine, want = finite_values(failed, mine, want)
        gap = mine - want
        allowed = NOISE_FACTOR * rms(noise) + (RELATIVE[0] + rounding) * rms(want)
        allowed_max = NOISE_FACTOR * largest(noise) + (RELATIVE[1] + rounding) * largest(want)
        scale = scales[index]
        if scale is not None:  # one integer of a small output is more than the noise of a large one
            allowed, allowed_max = max(allowed, scale), max(allowed_max, 2 * scale)
        if rms(gap) > allowed or largest(gap) > allowed_max * (1 + 1e-5):
            raise RuntimeError(
                f"{failed} differs from the model by {rms(gap):.3g} rms and {largest(gap):.3g} at most "
                f"(allowed {allowed:.3g} and {allowed_max:.3g}; rms of the output {rms(want):.3g})"
            )
        edge = 0.5 * scale if scale else 1e-5 * largest(want)
        differing = float(np.mean(np.abs(gap) > edge)) if gap.size else 0.0
        steps = largest(gap) / scale if scale else None
        differences.append(Difference(name, where, True, (), largest(gap), rms(gap), allowed, steps, differing))
    return tuple(differences)
