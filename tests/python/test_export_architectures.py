"""Architectures of Hugging Face's transformers, from one training step with quantization to a file that ONNX Runtime runs.

Nothing is downloaded: every model is made from its configuration.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
from configured_models import ARCHITECTURES, build, floats

from rarefy.export import to_onnx
from rarefy.nn import MultiheadAttention
from rarefy.quantization import QConfig, prepare_qat, report


def trained(name: str):
    """The prepared model after one step, and example inputs; decoders without their cache, which is no tensor."""
    model, inputs = build(name)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"use_cache": False}
    model = prepare_qat(model, QConfig.int8(), inputs, strict=False).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    loss = sum(x.square().mean() for x in floats(model(**inputs)) if x.requires_grad)
    loss.backward()
    optimizer.step()
    return model.eval(), inputs


def free_lengths(name: str, inputs: dict[str, object]) -> dict[str, dict[int, str]]:
    """The axes of sentences, each of a length of its own. Mamba unrolls its sentence when it is traced."""
    if name == "Mamba" or not isinstance(inputs.get("input_ids"), torch.Tensor) or "pixel_values" in inputs:
        return {}
    return {key: {1: f"{key}_length"} for key, value in inputs.items() if key.endswith("input_ids")}


def other_sizes(inputs: dict[str, object], size: int, free: dict[str, dict[int, str]]) -> dict[str, object]:
    """Another example, of other sizes: the given one repeated, cut, and disturbed where that means something."""
    more = {}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value[torch.arange(size) % len(value)]
            value = value[:, :-3] if key in free else value
            value = value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value.flip(0)
        more[key] = value
    return more


def run(path, inputs: dict[str, object], optimized: bool) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {key: x.numpy() for key, x in inputs.items() if isinstance(x, torch.Tensor)}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def called_weights(model: torch.nn.Module, inputs: dict[str, object]) -> list[torch.Tensor]:
    """The integers of the quantized layers that a forward pass calls."""
    called, handles = {}, []
    for row in report(model).quantized:
        layer = model.get_submodule(row.name)
        handles.append(layer.register_forward_hook(lambda layer, *_: called.update({id(layer): layer})))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    weights = []
    for layer in called.values():
        if isinstance(layer, MultiheadAttention):  # its out_proj is a layer by itself
            weights += [t for name, t in layer.integer_tensors().items() if name.endswith("weight")]
        else:
            weights.append(layer.integer_weight().values)
    return weights


# Root mean square of a difference, relative to the output's. With optimizations off only float sums have another order,
# which moves a value over a rounding edge here and there (the largest seen is 3e-4). With them on ONNX Runtime rounds
# biases too; a network that amplifies this amplifies the rounding of its activations, which the export has measured.
TOLERANCE = 2e-3


@pytest.mark.slow  # all of them together
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path):
    model, inputs = trained(name)
    path = tmp_path / "model.onnx"
    free = free_lengths(name, inputs)
    exported = to_onnx(model, inputs, path, dynamic_shapes=free or None)
    assert {d.batch for d in exported.differences} == {2, 3}

    # Every quantized weight that the model computes with is in the file as integers, and none is left in float.
    weights = called_weights(model, inputs)
    assert weights
    file = onnx.load(path)
    integers = {t.name: t for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1}
    read = [integers[name] for node in file.graph.node for name in node.input if name in integers]
    assert sorted(sorted(t.dims) for t in read) == sorted(sorted(w.shape) for w in weights)

    # At sizes that the export has not tried.
    more = other_sizes(inputs, 5, free)
    with torch.no_grad():
        expected = floats(model(**more))
    assert expected
    allowed = {d.output: d.allowed for d in exported.differences}
    for optimized in (False, True):
        got = {name: y for name, y in run(path, more, optimized).items() if np.issubdtype(y.dtype, np.floating)}
        assert len(got) == len(expected)
        for x, (output, y) in zip(expected, got.items(), strict=True):
            assert tuple(x.shape) == y.shape
            assert np.isfinite(y).all()
            error, size = float(np.sqrt(np.mean((x.numpy() - y) ** 2))), float(x.square().mean().sqrt())
            limit = allowed[output] if optimized else TOLERANCE * size
            assert error <= limit, f"{output}, optimizations {optimized}: {error:.2e}, rms of the output {size:.2e}"


def test_thirty_architectures_are_here():
    assert len(ARCHITECTURES) >= 30
