"""LiteRT files (.tflite), as TensorFlow Lite calls itself now, for phones and small devices."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from rarefy.export import lowering, runtime
from rarefy.export.program import export_program
from rarefy.export.report import ExportReport, Operator
from rarefy.export.runtime import ExampleInputs, Prepared

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

_FUNCTION = "to_litert"
_ROOT = "_model"  # how names of tensors call the model itself
_LOWERED, _QUANTIZER = lowering.__name__, lowering.QuantizeDequantize.__name__

#: The operators whose execution is worth a line in the report; of the second kind, those that come from quantized layers.
_COUNTED = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL", "EMBEDDING_LOOKUP"}
)
_ELEMENTWISE = frozenset({"ADD", "MUL", "MEAN", "CONCATENATION", "AVERAGE_POOL_2D"})


@runtime.without_autocast()
def to_litert(
    model: nn.Module, example_inputs: ExampleInputs, path: str | os.PathLike[str], *, verify: bool = True
) -> ExportReport:
    """Writes the model as a LiteRT file whose quantized parts run on integer kernels.

    LiteRT computes an operator in integers where its inputs and its result are quantized, in int8: uint8 activations are
    relabelled (zero point z becomes z - 128), which changes no value. A layer whose result is not quantized runs in
    float, with a float weight in the file; the report names it. An input that only quantizers read, and an output that a
    quantizer gives, are int8 in the file; the report tells their scales.

    The model is evaluated in evaluation mode on a copy; it is not changed, whatever happens.

    Args:
        model: any module; parts that are not quantized are exported in float.
        example_inputs: what the model is called with: a tensor, a sequence of tensors, or tensors by argument name
            (with plain values, which are fixed). The file takes inputs of exactly these shapes.
        path: the file to write, ending in .tflite. It gets its name when all checks passed.
        verify: run the file and compare its outputs with the model's.

    Returns:
        What is in the file, which operators run in integers, and how far the outputs are from the model's.

    Raises:
        ImportError: the packages of `rarefy[litert]` are missing.
        TypeError, ValueError: an argument; quantizers that cannot be written, or activations of other than 8 bits.
        OSError: the path cannot be written.
        RuntimeError: the model cannot be translated, or the file does not compute what the model computes.
            In every case no file is left, and one that had the name before is as it was.
    """
    start = time.perf_counter()
    runtime.require(_FUNCTION, "litert", "litert_torch", "ai_edge_litert")
    # The converter wants to find the integers of weights itself.
    prepared = runtime.prepare_model(_FUNCTION, model, example_inputs, weights="quantize")
    with runtime.pending(_FUNCTION, path, ".tflite") as temporary:
        program = export_program(_FUNCTION, prepared.lowered, prepared.example)
        _convert(program, prepared, temporary)
        size = temporary.stat().st_size
        interpreter = _load(temporary, delegates=False)  # they replace the operators whose types are to be read
        operators = tuple(_operators(interpreter))
        nodes = Counter(operation["op_name"] for operation in interpreter._get_ops_details())
        notes = tuple(_describe_bytes(interpreter, prepared.example.names))
        differences = ()
        if verify:
            outputs, scales = _run(temporary, prepared)
            differences = runtime.compare(_FUNCTION, outputs, prepared, scales)
    return ExportReport(
        path=Path(path),
        bytes=size,
        target="litert",
        opset=None,
        nodes=dict(nodes.most_common()),
        operators=operators,
        differences=differences,
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _convert(program: torch.export.ExportedProgram, prepared: Prepared, path: Path) -> None:
    with _silent():
        import litert_torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        # Quantizes nothing here: it tells the converter that the program holds quantizers, to be turned into types.
        mode = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False))
        try:
            edge = litert_torch.convert(
                program.module(), sample_kwargs=prepared.example.named(), quant_config=QuantConfig(pt2e_quantizer=mode)
            )
            edge.export(os.fspath(path))
        except Exception as error:
            raise RuntimeError(
                f"[{_FUNCTION}] litert_torch cannot translate the model: {type(error).__name__}: {error}"
            ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps the converter's progress report from the terminal."""
    with runtime.quiet("litert_torch", "jax", "root"), contextlib.redirect_stdout(io.StringIO()):
        yield


def _load(path: Path, *, delegates: bool) -> Interpreter:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if delegates else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = Interpreter(model_content=path.read_bytes(), experimental_op_resolver_type=resolver)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"[{_FUNCTION}] LiteRT cannot load the file: {error}") from error
    return interpreter


def _operators(interpreter: Interpreter) -> Iterator[Operator]:
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    for operation in interpreter._get_ops_details():
        kind, result = operation["op_name"], tensors[operation["outputs"][0]]["name"]
        if kind not in _COUNTED | _ELEMENTWISE:
            continue
        indices = [*operation["inputs"][: 1 if kind == "MEAN" else 2], *operation["outputs"]]
        types = [tensors[index]["dtype"] for index in indices]
        integer = all(np.issubdtype(dtype, np.integer) for dtype in types)
        if kind in _COUNTED or integer or _LOWERED in result:
            shown = "/".join(np.dtype(dtype).name for dtype in types)
            # A weight has the name of its layer; results that the model returns have none.
            weight = tensors[operation["inputs"][1]]["name"] if kind in _COUNTED else ""
            path = _module_path(weight) or _module_path(result)
            yield Operator(f"{path}/{kind}" if path else kind, kind, f"{kind} {shown}", integer)


def _module_path(name: str) -> str:
    """The path of the module that a tensor comes from: its name lists classes and attributes, from the outermost in."""
    steps = re.split(f"{_ROOT}(?=[/;]|$)", name, maxsplit=1)[1:]
    steps = steps[0].split(";")[0].split("/")[1:] if steps else []
    attributes = (re.sub(r"^_*[A-Za-z0-9]+_", "", step.rpartition(".")[2]) for step in steps if _QUANTIZER not in step)
    return ".".join(attribute for attribute in attributes if attribute)


def _describe_bytes(interpreter: Interpreter, names: tuple[str, ...]) -> Iterator[str]:
    inputs, outputs = _signature(interpreter, names)
    for what, details in (*zip(names, inputs, strict=True), *((f"output_{i}", d) for i, d in enumerate(outputs))):
        scale, zero_point = details["quantization"]
        if scale:
            yield f"{what} is {np.dtype(details['dtype']).name}: scale {scale:.9g}, zero point {zero_point}"


def _signature(interpreter: Interpreter, names: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Details of the inputs and outputs, in the model's order."""
    runner = interpreter.get_signature_runner()
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    return [inputs[name] for name in names], [
        outputs[key] for key in sorted(outputs, key=lambda key: int(key.split("_")[-1]))
    ]


def _run(path: Path, prepared: Prepared) -> tuple[list[np.ndarray], list[float | None]]:
    interpreter = _load(path, delegates=True)
    inputs, outputs = _signature(interpreter, prepared.example.names)
    for details, tensor in zip(inputs, prepared.example.tensors, strict=True):
        scale, zero_point = details["quantization"]
        values = tensor.numpy()
        if scale:
            info = np.iinfo(details["dtype"])
            values = np.clip(np.rint(values / np.float32(scale)) + zero_point, info.min, info.max)
        interpreter.set_tensor(details["index"], values.astype(details["dtype"]))
    interpreter.invoke()
    results, scales = [], []
    for details in outputs:
        values, (scale, zero_point) = interpreter.get_tensor(details["index"]), details["quantization"]
        results.append((values.astype(np.float32) - zero_point) * np.float32(scale) if scale else values)
        scales.append(scale or None)
    return results, scales
