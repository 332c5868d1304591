"""OpenVINO's own files (.xml with .bin), for Intel's and other x86 and ARM processors."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from rarefy.export import openvino_verify, runtime
from rarefy.export.comparison import RELATIVE, largest
from rarefy.export.onnx import to_onnx
from rarefy.export.report import ExportReport, Operator
from rarefy.export.runtime import ExampleInputs, Prepared

if TYPE_CHECKING:
    import openvino

_FUNCTION = "to_openvino"

#: The operators whose execution is worth a line in the report; of the second kind, those without a constant.
_COUNTED = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul", "ReduceMean", "AvgPool"})
_ELEMENTWISE = frozenset({"Add", "Multiply"})


@runtime.without_autocast()
def to_openvino(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    float16: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Writes the model in OpenVINO's format: the ONNX file of `to_onnx`, converted, with its integers.

    The model is evaluated in evaluation mode on a copy; it is not changed, whatever happens.

    Args:
        model: any module; parts that are not quantized are exported in float.
        example_inputs: what the model is called with: a tensor, a sequence of tensors, or tensors by argument name.
        path: the .xml file to write; a .bin file of the same name holds the weights. They get their names when all
            checks passed.
        dynamic_batch: the file takes any size of the first dimension, which all inputs must share.
        float16: store what stayed in float in half precision, as OpenVINO's own converter does.
        verify: run the file in float32 precision, compare its outputs with the model's, and read from the executed graph
            which operators computed in integers. OpenVINO's default precision on some processors is bfloat16, which
            rounds what is not quantized.

    Returns:
        What is in the file, which operators run in integers, and how far the outputs are from the model's. Sizes are
        those of both files.

    Raises:
        ImportError: the packages of `rarefy[openvino]` are missing.
        TypeError, ValueError: an argument; quantizers that cannot be written.
        OSError: the path cannot be written.
        RuntimeError: the model cannot be translated, or the file does not compute what the model computes.
            In every case no file is left, and one that had the name before is as it was.
    """
    start = time.perf_counter()
    runtime.require(_FUNCTION, "openvino", "openvino", "onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    prepared = runtime.prepare_model(_FUNCTION, model, example_inputs, unsigned=True, eight_bits=False, formats=True)
    with runtime.pending(_FUNCTION, path, ".xml") as temporary:
        converted, exported = _convert(model, example_inputs, dynamic_batch, verify)
        _save(converted, temporary, float16)
        size = runtime.size_of(temporary.parent)
        operators, differences = (), ()
        if verify:
            operators, outputs = _run(temporary, prepared)
            scales = [_output_scale(result) for result in converted.get_results()]
            differences = runtime.compare(_FUNCTION, outputs, prepared, scales, half=float16)
            if not float16:
                _check_same(_execute(converted, prepared)[1], outputs)
        nodes = Counter(node.get_type_name() for node in converted.get_ops())
    for kind in ("Constant", "Parameter", "Result"):
        del nodes[kind]
    return ExportReport(
        path=Path(path),
        bytes=size,
        target="openvino",
        opset=None,
        nodes=dict(nodes.most_common()),
        operators=operators,
        differences=differences,
        nodes_checked=exported.nodes_checked,
        skipped=exported.skipped,
        seconds=time.perf_counter() - start,
    )


def _convert(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_batch: bool, verify: bool
) -> tuple[openvino.Model, ExportReport]:
    """The model by way of an ONNX file, and what was found about that: every quantized tensor is compared there."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        exported = to_onnx(model, example_inputs, file, target="openvino", dynamic_batch=dynamic_batch, verify=verify)
        try:
            return openvino.convert_model(file), exported
        except RuntimeError as error:
            raise RuntimeError(f"[{_FUNCTION}] OpenVINO cannot read the model: {error}") from error


def _save(converted: openvino.Model, path: Path, float16: bool) -> None:
    import openvino

    openvino.save_model(converted, path, compress_to_fp16=float16)


def _run(path: Path, prepared: Prepared) -> tuple[tuple[Operator, ...], list[np.ndarray]]:
    import openvino

    try:
        written = openvino.Core().read_model(path)
    except RuntimeError as error:
        raise RuntimeError(f"[{_FUNCTION}] OpenVINO cannot read the file: {error}") from error
    compiled, outputs = _execute(written, prepared)
    return tuple(executed_operators(written, compiled)), outputs


def _execute(model: openvino.Model, prepared: Prepared) -> tuple[openvino.CompiledModel, list[np.ndarray]]:
    import openvino

    try:
        compiled = openvino.Core().compile_model(model, "CPU", openvino_verify.CONFIG)
        results = compiled([tensor.numpy() for tensor in prepared.example.tensors])
    except RuntimeError as error:
        raise RuntimeError(f"[{_FUNCTION}] OpenVINO cannot run the file: {error}") from error
    return compiled, [np.array(results[index]) for index in range(len(compiled.outputs))]


def _check_same(converted: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    """The file against the model that was stored in it, whose tensors were compared one by one: no rounding between them."""
    for index, (want, got) in enumerate(zip(converted, outputs, strict=True)):
        if not np.allclose(got, want, rtol=0, atol=RELATIVE[1] * largest(want[np.isfinite(want)]), equal_nan=True):
            raise RuntimeError(
                f"[{_FUNCTION}] verification failed: output_{index} of the file is not that of the model stored in it"
            )


def executed_operators(model: openvino.Model, compiled: openvino.CompiledModel) -> Iterator[Operator]:
    """The operators of a model, with what the compiled graph runs in their place and whether that computes in integers."""
    executed: dict[str, tuple[str, str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind, precision, names = (
            facts[key].astype(str) if key in facts else ""
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        for name in names.split(","):
            executed.setdefault(_plain(name), (kind, precision))
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in _COUNTED and not (kind in _ELEMENTWISE and not any(map(_is_constant, node.input_values()))):
            continue
        name = _plain(node.get_friendly_name())
        found, precision = executed.get(name, ("fused", ""))
        yield Operator(name, kind, f"{found} {precision}".strip(), precision in ("u8", "i8"))


def _plain(name: str) -> str:
    """The name in the ONNX file, without what OpenVINO's passes put behind it."""
    return re.sub(r"(/(WithoutBiases|Dequantization\w+))+$", "", name)


def _is_constant(value: openvino.Output) -> bool:
    return value.get_node().get_type_name() in ("Constant", "Convert")


def _output_scale(result: openvino.Node) -> float | None:
    """The scale of an output that a quantizer gives."""
    node = result.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize":
        return None
    low, high = (node.input_value(index).get_node().get_data() for index in (3, 4))
    return float((high - low).reshape(()) / (node.get_attributes()["levels"] - 1)) if low.size == 1 else None
