"""ONNX files with QuantizeLinear and DequantizeLinear, verified before they get their name."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy._core.quantization import TargetProfile, target_names, target_profile
from rarefy.export import runtime
from rarefy.export.decompose import decomposing_where_needed
from rarefy.export.files import Staged, staged
from rarefy.export.lowering import check_quantizers, lower, without_rounding
from rarefy.export.report import ExportReport
from rarefy.export.shapes import Axes, free_axes, other_sizes, resized, sizes_of, traceable

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

    from rarefy.export.onnx_verify import Case

_SMALL_TENSOR = 1024  # bytes
_LARGEST_FILE = 1536 << 20  # bytes of tensors in one protobuf message, which must stay below 2 GiB


@runtime.without_autocast()
def to_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, object],
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | Sequence[Mapping[int, str] | None] | None = None,
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
        dynamic_batch: the file takes any size of the first dimension, which all inputs must share. True unless the target
            needs fixed sizes.
        dynamic_shapes: further axes of any size, by input and axis, with their names in the file:
            ``{"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}``, or one mapping (or None) per input. Axes of
            one name have one size. A name given to axis 0 takes the place of "batch".
        input_names, output_names: names in the file; by default input (input_0, ... if several) or the argument names,
            and output (output_0, ...).
        verify: run the file against the eager model: every quantized tensor on the example, and the outputs on the example and
            on other sizes of the free axes. By ONNX's reference evaluator where that is quick, by ONNX Runtime with
            optimizations off, and by the target with its fused kernels. Without it only the ONNX checker runs.

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
    from torch.utils.flop_counter import FlopCounterMode

    from rarefy.export import onnx_formats, onnx_graph, onnx_opset, onnx_targets, onnx_verify, openvino_verify, targets

    if not isinstance(model, nn.Module):
        raise TypeError(f"[to_onnx] model must be a torch.nn.Module, got {type(model).__name__}")
    runtime.check_parameters("to_onnx", model)
    target = targets.chosen_target(model) if target is None else target
    if target not in target_names():
        raise ValueError(f"[to_onnx] target must be one of {', '.join(target_names())}, got {target!r}")
    profile = target_profile(target)
    needed = targets.needs_newer_types(model)
    if verify and target == "openvino":
        openvino_verify.require("to_onnx")
    opset = onnx_opset.choose_opset("to_onnx", opset, profile, onnx.defs.onnx_opset_version(), needed)
    inputs, keywords, constants = _check_inputs(example_inputs)
    input_names = _names("input_names", input_names, len(inputs), keywords or _numbered("input", len(inputs)))
    axes = free_axes(inputs, input_names, _check_dynamic(profile, dynamic_batch, dynamic_shapes), dynamic_shapes)
    check_quantizers("to_onnx", model, formats=True)
    targets.check_target("to_onnx", model, profile)

    with staged("to_onnx", path) as stage:
        name = stage.path.name
        model = _with_constants(_private_copy(model), constants)
        blocked = targets.has_blocks(model)
        cases = _cases(model, inputs, keywords, axes, verify or blocked)
        output_count = len(cases[0].expected)
        default = _numbered("output", output_count, taken=input_names)
        output_names = _names("output_names", output_names, output_count, default, taken=input_names)

        lowered = lower(model, unsigned=profile.unsigned_activations, formats=True)
        del model
        if blocked:
            for case in cases:
                _run(lowered, [torch.from_numpy(x) for x in case.inputs], keywords)
            targets.check_blocks("to_onnx", lowered)
        overflow = targets.pairwise_overflow(lowered)
        program_opset = max(opset, onnx_opset.EXPORTER_OPSET)
        program = _translate(lowered, inputs, keywords, axes, program_opset, input_names, output_names)
        onnx_graph.tidy(program.model)
        onnx_formats.write_formats(program.model, lowered, profile, opset)
        onnx_targets.place(program.model, profile)
        onnx_opset.lower_opset(program.model, opset)
        _check_free(program.model, axes)
        proto, files = _write(program.model, stage)
        del program
        onnx.checker.check_model(os.fspath(stage / name), full_check=True)

        found = onnx_verify.Verification()
        if verify:
            with without_rounding(lowered), FlopCounterMode(display=False) as counter:
                unrounded = _run(lowered, inputs, keywords)
            subject = onnx_verify.Subject(
                path=stage / name,
                model=proto,
                lowered=lowered,
                run=lambda: _run(lowered, inputs, keywords),
                cases=cases,
                unrounded=unrounded,
                macs=counter.get_total_flops() // 2,
            )
            found = onnx_verify.verify(subject, target, opset)
        size = sum((stage / file).stat().st_size for file in files)
        stage.commit(*files)

    targets.warn_of_overflow("to_onnx", overflow)
    return ExportReport(
        path=Path(path),
        bytes=size,
        target=target,
        opset=opset,
        nodes=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        operators=found.operators,
        differences=found.differences,
        nodes_checked=found.nodes,
        skipped=found.skipped,
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
        for name in example:
            if not isinstance(name, str) or not name:
                raise TypeError(f"[to_onnx] example_inputs must have names of arguments, got {name!r} among them")
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


def _check_dynamic(profile: TargetProfile, dynamic_batch: bool | None, dynamic_shapes: Any) -> bool:
    """Whether the batch is free."""
    if profile.dynamic_shapes:
        return True if dynamic_batch is None else bool(dynamic_batch)
    for argument, value in (("dynamic_batch", dynamic_batch), ("dynamic_shapes", dynamic_shapes)):
        if value:
            raise ValueError(
                f"[to_onnx] {argument} must not be set for {profile.name}, which needs fixed sizes, got {value!r}"
            )
    return False


def _numbered(stem: str, count: int, taken: Sequence[str] = ()) -> list[str]:
    """`stem` for one name, else `stem_0`, ...; names that are taken are passed over."""
    if count == 1 and stem not in taken:
        return [stem]
    free = (name for name in (f"{stem}_{index}" for index in itertools.count()) if name not in taken)
    return list(itertools.islice(free, count))


def _names(argument: str, given: Any, count: int, default: list[str], taken: Sequence[str] = ()) -> list[str]:
    """The names that were given, checked; or the default."""
    if given is None:
        return default
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"[to_onnx] {argument} must be a sequence of strings, got {given!r}")
    names = list(given)
    if not all(names) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"[to_onnx] {argument} must be {count} different names, got {given!r}")
    for name in names:
        if name in taken:
            raise ValueError(f"[to_onnx] {argument} must differ from the names of the inputs, got {name!r} in both")
    return names


# ---- the model ------------------------------------------------------------------------------------------------------


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU; it reads the model's parameters where they lie, and has buffers of its own."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if p.device.type == "cpu"
    }
    return copy.deepcopy(model, memo=shared).cpu().eval()


def _cases(model: nn.Module, inputs: list[Tensor], keywords: list[str], axes: Axes, verify: bool) -> list[Case]:
    """The model's outputs on the example and, to verify, at another size of every free axis."""
    from rarefy.export.onnx_verify import Case

    def case(tensors: list[Tensor]) -> Case:
        return Case(
            sizes_of(tensors, axes),
            [runtime.to_numpy("to_onnx", "example_inputs", x) for x in tensors],
            _run(model, tensors, keywords),
        )

    cases = [case(inputs)]
    if not verify or not any(axes):
        return cases
    sizes = dict(cases[0].sizes)
    for name, size in cases[0].sizes:  # one after the other: a size may be out of what the model can do
        for other in other_sizes(size, name):
            trial = {**sizes, name: other}
            try:
                found = case(resized(inputs, axes, trial))
            except Exception as error:
                failure = error
                continue
            sizes, last = trial, found
            break
        else:
            raise ValueError(
                f"[to_onnx] the model must run at other sizes of the free axis {name!r} than {size}, got "
                f"{type(failure).__name__}: {failure}"
            ) from failure
    return [*cases, last]


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
    return [runtime.to_numpy("to_onnx", "outputs", leaf) for leaf in leaves]


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
    axes: Axes,
    opset: int,
    input_names: list[str],
    output_names: list[str],
) -> torch.onnx.ONNXProgram:
    shapes: Any = None
    if any(axes):
        shapes = dict(zip(keywords, axes, strict=True)) if keywords else axes
        inputs = traceable(inputs, axes)
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
        free = ", ".join(dict.fromkeys(name for named in axes for name in named.values()))
        hint = f" (an axis whose size the model fixes cannot be free; here free: {free})" if free else ""
        raise RuntimeError(
            f"[to_onnx] torch.onnx.export cannot translate the model{hint}: {type(cause).__name__}: {cause}"
        ) from error


def _check_free(model: ir.Model, axes: Axes) -> None:
    """Gives free axes their names; an axis that the exporter has fixed after all is an error."""
    for value, named in zip(model.graph.inputs, axes, strict=True):
        for axis, name in named.items():
            if isinstance(value.shape[axis], int):
                raise RuntimeError(
                    f"[to_onnx] the model fixes the size of axis {axis} ({name!r}) of {value.name!r} to {value.shape[axis]}: "
                    "leave it out of dynamic_shapes (dynamic_batch=False fixes the batch)"
                )


def _write(model: ir.Model, stage: Staged) -> tuple[onnx.ModelProto, list[str]]:
    """Writes the model, with its large tensors in a second file where one protobuf message cannot hold them.

    Returns:
        What is in the file that has the graph, with large tensors in a file beside it either way, and the names of the
        files in the order in which they become visible.
    """
    import onnx
    import onnx_ir as ir

    name = stage.path.name
    tensors = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if tensors > _LARGEST_FILE:
        data = f"{name}.data"
        ir.save(model, stage / name, external_data=data)
        return onnx.load(stage / name, load_external_data=False), [data, name]
    proto = ir.to_proto(model)
    onnx.save(proto, stage / name)
    _move_out(proto, stage / "tensors")
    return proto, [name]


def _move_out(model: onnx.ModelProto, path: Path) -> None:
    """Moves large tensors into a file, so that they are in memory once, and copies of the model in files are small."""
    from onnx import external_data_helper

    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > _SMALL_TENSOR:
                offset = file.seek(-file.tell() % 4096, os.SEEK_CUR)  # aligned, so that runtimes map them
                file.write(tensor.raw_data)
                external_data_helper.set_external_data(tensor, path.name, offset, len(tensor.raw_data))
                tensor.ClearField("raw_data")
