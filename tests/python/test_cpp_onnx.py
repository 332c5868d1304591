"""The files that C++ writes (rarefy::export_onnx), checked and run, against the outputs of the C++ models."""

import subprocess

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
load_file = pytest.importorskip("safetensors.numpy").load_file

from rarefy.export.onnx_verify import check_operators  # noqa: E402

NETWORKS = ("residual", "mlp", "transformer", "signals", "patches")
TARGETS = ("onnxruntime", "openvino", "tensorrt", "qnn")
CASES = [
    *(f"{network}-{target}" for network in NETWORKS for target in TARGETS),
    *(f"{network}-onnxruntime-{opset}" for network in NETWORKS for opset in (13, 17, 18, 21)),
    *(f"{network}-{kind}-onnxruntime" for network in NETWORKS for kind in ("signed", "exact", "float", "converted")),
    *(f"{network}-converted-tensorrt" for network in NETWORKS),
    *(
        f"{network}-{target}"
        for network in ("joined", "joined-linked", "joined-plain-first", "joined-plain-first-linked", "widened")
        for target in ("onnxruntime", "openvino", "qnn")
    ),
    *(f"decoder-{target}" for target in ("openvino", "tensorrt", "qnn")),
    "decoder-linked-openvino",
    *(
        f"{network}{kind}-{target}"
        for network in ("tagger", "attention")
        for kind in ("", "-converted")
        for target in ("onnxruntime", "openvino", "qnn")
    ),
    "bytes",
    "transformer-float-external-onnxruntime",
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    program = request.config.rootpath / "build" / "dev" / "tests" / "cpp" / "rarefy_onnx_models"
    if not program.exists():
        pytest.skip("rarefy_onnx_models is not built (-DRAREFY_BUILD_TESTS=ON)")
    folder = tmp_path_factory.mktemp("cpp_onnx")
    subprocess.run([program, folder], check=True, timeout=300, stdout=subprocess.DEVNULL)
    return folder


def run(path, inputs, optimized=True):
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)


def load(folder, case):
    model = onnx.load(folder / f"{case}.onnx")
    tensors = load_file(folder / f"{case}.safetensors")
    inputs = [tensors[f"input.{i}"] for i in range(len(model.graph.input))]
    outputs = [tensors[f"output.{i}"] for i in range(len(model.graph.output))]
    return model, inputs, outputs


def distance(got, want):
    """Root mean square of the difference, in that of the output."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float(np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2)))


@pytest.mark.parametrize("case", CASES)
def test_runs_as_the_model(folder, case):
    path = folder / f"{case}.onnx"
    model, inputs, outputs = load(folder, case)
    onnx.checker.check_model(model, full_check=True)
    assert model.producer_name == "rarefy"
    # Float sums in another order: 1e-5, and 1e-6 where those before the quantizers are exact. A value on the other side
    # of a tie is a step of 8 bits, and it spreads.
    exact = case == "bytes" or "exact" in case
    rounded = 0.1 if case == "bytes" else 2e-2  # its steps are 1/8, and many of its sums lie on ties
    for optimized, tolerance in ((False, 1e-6 if exact else 5e-3), (True, rounded)):
        tolerance = 1e-5 if "float" in case else tolerance
        for got, want in zip(run(path, inputs, optimized), outputs, strict=True):
            assert distance(got, want) <= tolerance, f"optimized={optimized}"
    one = run(path, [x[:1] for x in inputs])
    for got, want in zip(one, outputs, strict=True):
        assert got.shape == want[:1].shape


@pytest.mark.parametrize("opset", range(13, 24))
def test_every_operator(folder, opset):
    path = folder / f"operators-{opset}.onnx"
    onnx.checker.check_model(path, full_check=True)
    tensors = load_file(folder / "operators.safetensors")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {"input_0": tensors["input.0"], "input_1": tensors["input.1"]})
    names = [value.name for value in session.get_outputs()]
    assert len(names) == len(tensors) - 2 > 50
    for name, got in zip(names, results, strict=True):
        np.testing.assert_allclose(got, tensors[name], rtol=1e-4, atol=2e-5, err_msg=name)
        assert got.dtype == tensors[name].dtype, name


def test_formats(folder):
    """One network, its weights and its activations in every format, its packed weights too."""
    files = sorted(folder.glob("formats-*.onnx"))
    assert len(files) >= 56
    for path in files:
        onnx.checker.check_model(path, full_check=True)
        tensors = load_file(path.with_suffix(".safetensors"))
        rounded = "activation" in path.name
        for optimized in (False, True):
            got = run(path, [tensors["input.0"], tensors["input.1"]], optimized)[0]
            # Float sums in another order; a value on the other side of a tie is a step, and ONNX Runtime's MatMulNBits
            # rounds the float inputs of 4-bit weights by itself.
            tolerance = 0.05 if rounded else 2e-2 if optimized else 2e-6
            assert distance(got, tensors["output.0"]) <= tolerance, (path.name, optimized)


BAGS = (
    "float",
    "float-13",
    "rows",
    "rows-13",
    "rows-openvino",
    "rows-converted",
    "one-scale",
    "one-scale-converted",
    "wide",
)
PACKED_BAGS = ("groups", "groups-packed", "nf4-packed", "e4m3-packed")


@pytest.mark.parametrize("state", [*BAGS, *PACKED_BAGS])
def test_bags_of_embeddings(folder, state):
    """Sums, means and largest values, with and without padding and weights, of rarefy's layer and of torch's."""
    path = folder / f"bags-{state}.onnx"
    onnx.checker.check_model(path, full_check=True)
    tensors = load_file(path.with_suffix(".safetensors"))
    inputs = [tensors["input.0"], tensors["input.1"]]
    names = [value.name for value in onnx.load(path).graph.output]
    assert set(names) == set(tensors) - {"input.0", "input.1"}
    assert len(names) == 18
    assert (inputs[0][1] == 2).all()
    for optimized in (False, True):
        for name, got in zip(names, run(path, inputs, optimized), strict=True):
            want = tensors[name]
            assert got.dtype == want.dtype
            if "max" in name:
                assert np.array_equal(got, want), name
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=name)
            if "padded" in name:
                assert not got[1].any(), name  # a bag of padding alone
    for name, got in zip(names, run(path, [x[:1] for x in inputs]), strict=True):
        if name != "turned":  # whose bags follow the batch
            np.testing.assert_allclose(got, tensors[name][:1], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("state", [*BAGS, *PACKED_BAGS])
def test_tables_of_bags_are_stored_as_they_are(folder, state):
    """A table per layer: floats of torch's layers and of layers that nothing quantized, integers and codes otherwise."""
    types = onnx.TensorProto
    kinds = {"float": types.FLOAT, "float-13": types.FLOAT, "wide": types.INT16, "e4m3-packed": types.FLOAT8E4M3FN}
    kinds |= {"groups": types.INT4, "groups-packed": types.INT4, "nf4-packed": types.UINT4}
    model = onnx.load(folder / f"bags-{state}.onnx")
    tables = {tensor.name: tensor for tensor in model.graph.initializer if list(tensor.dims) == [9, 6]}
    own = [name for name in tables if not name.startswith("plain")]
    assert {name.split(".")[0] for name in own} == {
        f"{mode}{padded}" for mode in ("sum", "mean", "max") for padded in ("", "_padded")
    }
    if state.endswith("packed"):
        assert len(own) == 6  # once, though some are read by several bags
    assert {tables[name].data_type for name in own} == {kinds.get(state, types.INT8)}
    assert all(tensor.data_type == types.FLOAT for name, tensor in tables.items() if name.startswith("plain"))


def exposed_weight(model, name):
    """The model with what the operators of a weight give as another output, as it is multiplied: [in, out]."""
    nodes = {output: node for node in model.graph.node for output in node.output}
    readers = [node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith(name)]
    sources = {reader.input[1] for reader in readers if reader.input[1] in nodes}
    assert len(sources) == 1
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(sources.pop()))
    return model


@pytest.mark.parametrize("state", ["float", "float-13", "prepared", "converted", "openvino"])
@pytest.mark.parametrize("base", ["nf4", "int8", "floating"])
def test_adapters(folder, base, state):
    """The base of a LoRALinear is in the file once, as it is kept, and stands for the same numbers."""
    path = folder / f"adapters-{base}-{state}.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    tensors = load_file(path.with_suffix(".safetensors"))
    weight, x, want = tensors["weight"], tensors["input.0"], tensors["output"]
    for optimized in (False, True):
        exact = state.startswith("float") and not (
            optimized and base == "int8"
        )  # MatMulNBits rounds the floats that it reads
        tolerance = 2e-6 if exact else 2e-2 if optimized else 5e-3
        assert distance(run(path, [x], optimized)[0], want) <= tolerance, optimized
    assert run(path, [x[:1]])[0].shape == (1, 5)
    kept = [tensor for tensor in model.graph.initializer if int(np.prod(tensor.dims)) == weight.size]
    assert len(kept) == 1
    types = {"nf4": onnx.TensorProto.UINT4, "int8": onnx.TensorProto.INT8, "floating": onnx.TensorProto.FLOAT}
    assert kept[0].data_type == (onnx.TensorProto.UINT8 if base == "nf4" and state == "float-13" else types[base])
    if base == "floating":
        return
    assert path.stat().st_size < weight.nbytes * 0.8  # of the whole model: no float copy is in it
    exposed = path.with_suffix(".exposed.onnx")
    onnx.save(exposed_weight(model, "adapted"), exposed)
    assert np.array_equal(run(exposed, [x], optimized=False)[1], weight.T)


def test_openvino_reads_bags_and_adapters(folder):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    for case in ("bags-rows-openvino", "adapters-nf4-openvino", "adapters-int8-openvino"):
        tensors = load_file(folder / f"{case}.safetensors")
        inputs = [tensors[f"input.{i}"] for i in range(len([name for name in tensors if name.startswith("input")]))]
        model = core.compile_model(folder / f"{case}.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for value, got in zip(model.outputs, model(inputs).values(), strict=True):
            assert distance(got, tensors[value.any_name]) < (1e-6 if "bags" in case else 2e-2), value.any_name


def in_float(folder, case):
    path = folder / f"{case}.onnx"
    return {operator.name for operator in check_operators(path, onnx.load(path)) if not operator.integer}


@pytest.mark.parametrize("case", ["", "-signed", "-13", "-21"])
def test_onnx_runtime_computes_in_integers(folder, case):
    """But where the model has no quantizer behind an operator that needs one."""
    kind, opset = ("", case) if case[1:].isdigit() else (case, "")
    assert in_float(folder, f"residual{kind}-onnxruntime{opset}") == {"add2/Add"}
    assert in_float(folder, f"mlp{kind}-onnxruntime{opset}") == set()
    scores = {"MatMul", "MatMul_2"}
    if opset != "-13":  # LayerNormalization came with 17
        assert in_float(folder, f"transformer{kind}-onnxruntime{opset}") == scores
    assert "volume/Conv" not in in_float(folder, f"signals{kind}-onnxruntime{opset}")


def constants(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def quantizers(folder, case, op_type="QuantizeLinear"):
    model = onnx.load(folder / f"{case}.onnx")
    values = constants(model)
    return [[values.get(name) for name in node.input] for node in model.graph.node if node.op_type == op_type]


@pytest.mark.parametrize("network", NETWORKS)
def test_targets_get_the_integers_that_they_know(folder, network):
    for _, _, zero_point in quantizers(folder, f"{network}-tensorrt"):
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    for target in ("onnxruntime", "openvino", "qnn"):
        assert all(zero_point.dtype == np.uint8 for _, _, zero_point in quantizers(folder, f"{network}-{target}"))
    weights = [
        inputs for inputs in quantizers(folder, f"{network}-openvino", "DequantizeLinear") if inputs[0] is not None
    ]
    assert weights
    assert all(len(inputs) == 2 and inputs[0].dtype == np.int8 for inputs in weights)
    weights = [
        inputs for inputs in quantizers(folder, f"{network}-tensorrt", "DequantizeLinear") if inputs[0] is not None
    ]
    assert weights
    assert all(not zero_point.any() for _, _, zero_point in weights)


def test_weights_are_integers_and_biases_float(folder):
    values = constants(onnx.load(folder / "residual-onnxruntime.onnx"))
    for name in ("stem", "conv1", "conv2", "conv3", "shortcut"):
        assert values[f"{name}.weight"].dtype == np.int8
        assert values[f"{name}.weight_scale"].shape == values[f"{name}.weight"].shape[:1]
        assert np.abs(values[f"{name}.weight"]).max(axis=(1, 2, 3)).min() == 127  # every channel uses its range
    assert values["fc.weight"].shape == (16, 5)  # as it is multiplied
    assert values["fc.bias"].dtype == np.float32
    assert not any("bn" in name for name in values)


def test_large_weights_are_in_a_file_of_their_own(folder):
    path = folder / "transformer-float-external-onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert {"up.weight", "down.weight", "query.weight"} <= set(entries)
    assert {entry["location"] for entry in entries.values()} == {f"{path.name}.data"}
    assert all(int(entry["offset"]) % 4096 == 0 and int(entry["length"]) >= 1024 for entry in entries.values())


def test_tables_are_looked_up_as_integers(folder):
    model = onnx.load(folder / "transformer-onnxruntime.onnx")
    assert constants(model)["words.weight"].dtype == np.int8
    gather = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[0] == "words.weight")
    assert gather.input[1] == "input"


def test_max_pooling_runs_on_bytes(folder):
    model = onnx.load(folder / "residual-onnxruntime.onnx")
    nodes = {output: node for node in model.graph.node for output in node.output}
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    before = nodes[pool.input[0]]
    after = next(node for node in model.graph.node if pool.output[0] in node.input)
    assert before.op_type == "DequantizeLinear"
    assert after.op_type == "QuantizeLinear"
    assert list(before.input)[1:] == list(after.input)[1:]
    assert not any(node.op_type == "Relu" and "add2" not in node.input[0] for node in model.graph.node)


def test_openvino_reads_it(folder):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    for network in NETWORKS:
        _, inputs, outputs = load(folder, f"{network}-openvino")
        model = core.compile_model(folder / f"{network}-openvino.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for got, want in zip(model(inputs).values(), outputs, strict=True):
            assert distance(got, want) < 2e-2
