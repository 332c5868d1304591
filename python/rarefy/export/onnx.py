"""ONNX files with QuantizeLinear and DequantizeLinear, verified before they get their name."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy._core.quantization import target_names, target_profile
from rarefy.export.decompose import decomposing_where_needed
from rarefy.export.lowering import check_quantizers, lower, without_rounding
from rarefy.export.report import ExportReport

if TYPE_CHECKING:
    import numpy as np

_LARGEST_FILE = 2**31 - 1  # of one protobuf message


def to_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
) -> ExportReport:
    """Writes the model as an ONNX file that computes in integers what `prepare_qat` or `prepare` quantized.

    The file holds the trained integers of the weights (int8, DequantizeLinear), QuantizeLinear and DequantizeLinear
    around activations, and float biases; batch norms are folded. Placement follows what the target's kernels fuse: for
    ONNX Runtime on x86, activations are uint8 (an int8 zero point z is written as z + 128, which changes no value) and
    clipping activations are absorbed by the quantizer behind them. A model without quantizers gives a float file.

    The model is evaluated in evaluation mode on a copy; it is not changed, whatever happens.

    Args:
        model: any module; parts that are not quantized are exported in float.
        example_inputs: what the model is called with: a tensor, a sequence of tensors, or tensors by argument name.
            Truth values, numbers, strings and None by argument name (`use_cache=False`) are fixed in the file.
        path: the file to write. It is written under another name in the same folder and renamed when all checks passed.
        target: the runtime: "onnxruntime", "openvino", "tensorrt" or "qnn". None: the one that the model was prepared for, and
            "onnxruntime" when none was chosen.
        opset: version of the ONNX operator set, 13 or more, and 21 or more for 16-bit activations; 21 unless given, 19 for
            TensorRT. From 21 on 4-bit weights of layers with a float input take half a byte.
        dynamic_batch: the file takes any size of the first dimension, which all inputs must share.
        input_names, output_names: names in the file; by default input (input_0, ... if several) or the argument names,
            and output (output_0, ...).
        verify: run the ONNX checker, and the file in ONNX Runtime with optimizations off and on against the eager
            model, on the example and on one more batch size. Without it only the checker runs.

    Returns:
        What is in the file, which operators the runtime executes in integers, and how far its outputs are from the
        model's.

    Raises:
        ImportError: the packages of `rarefy[onnx]` are missing.
        TypeError, ValueError: an argument; quantizers that have seen no data, are switched off, or have a scale that is
            not positive.
        OSError: the path cannot be written.
        RuntimeError: the model cannot be translated, or the file does not compute what the model computes.
            In every case no file is left, and one that had the name before is as it was.
    """
    start = time.perf_counter()
    _require("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    import onnx

    from rarefy.export import onnx_graph, onnx_opset, onnx_targets, onnx_verify, targets

    if not isinstance(model, nn.Module):
        raise TypeError(f"[to_onnx] model must be a torch.nn.Module, got {type(model).__name__}")
    target = targets.chosen_target(model) if target is None else target
    if target not in target_names():
        raise ValueError(f"[to_onnx] target must be one of {', '.join(target_names())}, got {target!r}")
    profile = target_profile(target)
    wide = targets.needs_wide_types(model)
    opset = onnx_opset.choose_opset("to_onnx", opset, profile, onnx.defs.onnx_opset_version(), wide)
    inputs, keywords, constants = _check_inputs(example_inputs)
    batch = _check_batch(inputs) if dynamic_batch else None
    input_names = _names("input_names", input_names, keywords or _numbered("input", len(inputs)), len(inputs))
    check_quantizers("to_onnx", model)
    targets.check_target("to_onnx", model, profile)

    with _reserved(path) as temporary:
        model = _with_constants(copy.deepcopy(model).cpu().eval(), constants)
        cases = [(batch, inputs)]
        if batch is not None and verify:
            more = batch + 1
            cases.append((more, [x[torch.arange(more) % batch] for x in inputs]))
        expected = [_run(model, case, keywords) for _, case in cases]
        output_names = _names("output_names", output_names, _numbered("output", len(expected[0])), len(expected[0]))

        lowered = lower(model, unsigned=profile.unsigned_activations)
        overflow = targets.pairwise_overflow(lowered)
        program_opset = max(opset, onnx_opset.EXPORTER_OPSET)
        program = _translate(lowered, inputs, keywords, batch, program_opset, input_names, output_names)
        onnx_graph.tidy(program.model)
        onnx_targets.place(program.model, profile)
        onnx_opset.lower_opset(program.model, opset)
        proto = program.model_proto
        file_size = proto.ByteSize()
        if file_size > _LARGEST_FILE:
            raise ValueError(f"[to_onnx] one ONNX file holds up to {_LARGEST_FILE} bytes, got a model of {file_size}")
        onnx.save(proto, temporary)
        onnx.checker.check_model(os.fspath(temporary), full_check=True)

        operators, differences = (), ()
        if verify:
            operators = onnx_verify.check_operators(temporary, proto)
            runs = [
                (size, [x.numpy() for x in tensors], want)
                for (size, tensors), want in zip(cases, expected, strict=True)
            ]
            with without_rounding(lowered):
                unrounded = _run(lowered, inputs, keywords)
            rounds_itself = any("MatMulNBits" in operator.runtime for operator in operators)
            differences = onnx_verify.compare_outputs(temporary, proto, runs, unrounded, rounds_itself)
        os.replace(temporary, path)

    return ExportReport(
        path=Path(path),
        bytes=file_size,
        target=target,
        opset=opset,
        nodes=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        operators=operators,
        differences=differences,
        overflow=overflow,
        seconds=time.perf_counter() - start,
    )


# ---- arguments ------------------------------------------------------------------------------------------------------


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"[to_onnx] needs {', '.join(missing)}: pip install rarefy[onnx]")


def _check_inputs(example: Any) -> tuple[list[Tensor], list[str], dict[str, object]]:
    """The tensors, the argument names where they were given by name, and the arguments that are constants."""
    keywords: list[str] = []
    constants: dict[str, object] = {}
    if isinstance(example, Mapping):
        constants = {k: v for k, v in example.items() if v is None or isinstance(v, (bool, int, float, str))}
        keywords = [name for name in example if name not in constants]
        values = [example[name] for name in keywords]
    elif isinstance(example, Tensor):
        values = [example]
    elif isinstance(example, Sequence):
        values = list(example)
    else:
        raise TypeError(f"[to_onnx] example_inputs must be tensors, got {type(example).__name__}")
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"[to_onnx] example_inputs must be tensors, got {type(value).__name__} among them")
    if not values:
        raise ValueError("[to_onnx] example_inputs must hold at least one tensor, got none")
    return [value.detach().cpu() for value in values], keywords, constants


def _check_batch(inputs: list[Tensor]) -> int:
    sizes = [tuple(x.shape) for x in inputs]
    if any(not shape or shape[0] != (sizes[0] or (0,))[0] for shape in sizes) or sizes[0][0] == 0:
        raise ValueError(
            "[to_onnx] dynamic_batch needs inputs that share the size of their first dimension, at least 1, got shapes "
            f"{', '.join(map(str, sizes))} (dynamic_batch=False fixes all sizes)"
        )
    return sizes[0][0]


def _numbered(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


def _names(argument: str, given: Sequence[str] | None, default: list[str], count: int) -> list[str]:
    names = default if given is None else list(given)
    if isinstance(given, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"[to_onnx] {argument} must be {count} different names, got {given!r}")
    return names


@contextlib.contextmanager
def _reserved(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file of another name in the same folder, created at once and removed at the end if it still has that name."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"[to_onnx] path must name a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"[to_onnx] path must be in a folder that exists, got {path}")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(f"[to_onnx] path must be in a folder that can be written, got {path} ({error})") from error
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


# ---- the model ------------------------------------------------------------------------------------------------------


def _with_constants(model: nn.Module, constants: dict[str, object]) -> nn.Module:
    """Gives the arguments to every call of the model itself, so that nothing that follows has to carry them."""
    if constants:
        model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | constants), with_kwargs=True)
    return model


def _run(model: nn.Module, inputs: list[Tensor], keywords: list[str]) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = model(**dict(zip(keywords, inputs, strict=True))) if keywords else model(*inputs)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            hint = " (use_cache=False among the example inputs leaves it out)" if "Cache" in type(leaf).__name__ else ""
            raise TypeError(f"[to_onnx] the model must return tensors, got {type(leaf).__name__} among them{hint}")
    return [leaf.detach().cpu().numpy() for leaf in leaves]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back the exporter's log, its notices about itself and deprecations; other warnings are given at the end."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    exporter = os.path.dirname(torch.onnx.__file__)
    for item in caught:
        if item.filename.startswith(exporter):
            continue
        if not issubclass(item.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


def _translate(
    lowered: nn.Module,
    inputs: list[Tensor],
    keywords: list[str],
    batch: int | None,
    opset: int,
    input_names: list[str],
    output_names: list[str],
) -> torch.onnx.ONNXProgram:
    shapes: Any = None
    if batch is not None:
        size = torch.export.Dim("batch")
        shapes = {name: {0: size} for name in keywords} if keywords else tuple({0: size} for _ in inputs)
        if batch == 1:  # torch.export takes a size of 1 for a constant
            inputs = [torch.cat([x, x]) for x in inputs]
    try:
        with _quiet(), torch.no_grad(), decomposing_where_needed():
            return torch.onnx.export(
                lowered,
                () if keywords else tuple(inputs),
                kwargs=dict(zip(keywords, inputs, strict=True)) if keywords else None,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        hint = "" if batch is None else " (if the model fixes its batch size, pass dynamic_batch=False)"
        raise RuntimeError(
            f"[to_onnx] torch.onnx.export cannot translate the model{hint}: {type(cause).__name__}: {cause}"
        ) from error
