"""Weights kept as codes and scales: operators against the format's numbers, layers against their simulated selves, folders."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import available_instruction_sets
from strategies import FLOAT_TYPES
from test_formats import data
from test_packed import SCHEMES, simulated
from torch import nn

import rarefy as rf
from rarefy import _core
from rarefy.quantization import (
    MX,
    NF4,
    NVFP4,
    Binary,
    Codebook,
    Minifloat,
    PerBlock,
    PerChannel,
    PerGroup,
    QConfig,
    Scheme,
    Ternary,
    calibrate,
    convert,
    load_quantized,
    part_names,
    prepare,
    prepare_qat,
    quantize_to,
    report,
    save_quantized,
)

ops = torch.ops.rarefy

#: Formats of weights, with the bits per value that they take in the matrix of `model`.
WEIGHTS = {
    "int4 groups": Scheme(bits=4, granularity=PerGroup(16, axis=1)),
    "int4 odd groups": Scheme(bits=4, granularity=PerGroup(7, axis=1)),
    "uint4 blocks": Scheme(bits=4, symmetric=False, granularity=PerBlock(4, 5)),
    "int3 groups": Scheme(bits=3, granularity=PerGroup(16, axis=0)),
    "int10 blocks": Scheme(bits=10, granularity=PerBlock(8, 8)),
    "power of two": Scheme(bits=4, granularity=PerChannel(0), power_of_two=True),
    "fp8": Scheme(format=Minifloat.e4m3(), granularity=PerChannel(0)),
    "fp6": Scheme(format=Minifloat.e2m3()),
    "mxfp4": Scheme(format=MX("e2m1"), granularity=PerGroup(32, axis=1)),
    "mxint8": Scheme(format=MX("int8"), granularity=PerGroup(32, axis=1)),
    "nvfp4": Scheme(format=NVFP4(), granularity=PerGroup(16, axis=1)),
    "nf4": Scheme(format=NF4(True), granularity=PerGroup(64, axis=1)),
    "nf4 plain": Scheme(format=NF4(), granularity=PerGroup(64, axis=1)),
    "codebook": Scheme(format=Codebook(6), granularity=PerGroup(16, axis=1)),
    "codebook of 40": Scheme(format=Codebook(40)),
    "binary": Scheme(format=Binary(), granularity=PerChannel(0)),
    "ternary": Scheme(format=Ternary(), granularity=PerChannel(0)),
}


def parts_of(x: torch.Tensor, scheme: Scheme):
    """The arguments of the operators that say what a weight is."""
    parts = quantize_to(x, scheme)
    return [parts.tensors[name] for name in part_names(scheme)], scheme.to_json(), list(x.shape), x.dtype


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_unpacking_gives_what_simulating_gives(scheme, dtype):
    for shape in ((6, 20), (3, 5, 7), (1, 64)):
        x = data(shape).to(dtype)
        got = ops.dequantize_packed(*parts_of(x, scheme))
        assert got.dtype == dtype
        assert got.shape == x.shape
        assert torch.equal(got, simulated(x, scheme))


def test_instruction_sets_are_equal(restore_instruction_set):
    x = data((33, 131))
    for scheme in WEIGHTS.values():
        arguments, want = parts_of(x, scheme), quantize_to(x, scheme).dequantize()
        for isa in available_instruction_sets():
            _core.set_instruction_set(isa)
            assert torch.equal(ops.dequantize_packed(*arguments), want), f"{scheme} {isa}"


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_numbers(name, bias):
    torch.manual_seed(0)
    weight, scheme = data((300, 513)), WEIGHTS[name]  # several blocks of rows, none of them full
    arguments = parts_of(weight, scheme)
    numbers, b = ops.dequantize_packed(*arguments).double(), torch.randn(300) if bias else None
    for shape in ((513,), (1, 513), (5, 513), (2, 3, 513), (100, 513), (0, 513), (513, 4)):
        x = torch.randn(shape)
        x = x.t() if shape == (513, 4) else x  # strided
        y = ops.packed_linear(x, arguments[0], b, *arguments[1:])
        exact = F.linear(x.double(), numbers, None if b is None else b.double())
        # Of the sum of the magnitudes: what a float32 sum in any order keeps to.
        size = F.linear(x.double().abs(), numbers.abs(), None if b is None else b.double().abs())
        assert bool(((y - exact).abs() <= 32 * 2**-24 * size).all())
        assert y.shape == (*x.shape[:-1], 300)


def test_results_do_not_depend_on_the_number_of_threads():
    arguments = parts_of(data((700, 512)), WEIGHTS["int4 groups"])
    before, x, results = torch.get_num_threads(), torch.randn(3, 512), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.packed_linear(x, arguments[0], None, *arguments[1:]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize("name", ["int4 groups", "uint4 blocks", "nvfp4", "nf4", "codebook", "fp8"])
def test_opcheck_and_gradients(name):
    torch.manual_seed(0)
    parts, *form = parts_of(torch.randn(6, 40), WEIGHTS[name])
    x, bias = torch.randn(4, 40, requires_grad=True), torch.randn(6, requires_grad=True)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(part.dtype is torch.float8_e4m3fn for part in parts):  # which torch's own check multiplies
        checks.append("test_schema")
    for op, arguments in (
        (ops.dequantize_packed, (parts, *form)),
        (ops.packed_linear, (x, parts, bias, *form)),
        (ops.packed_embedding, (torch.tensor([[1, 5], [0, 0]]), parts, *form)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)
    double = parts_of(torch.randn(6, 40, dtype=torch.float64), WEIGHTS[name])
    x, bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda a, b: ops.packed_linear(a, double[0], b, *double[1:]), (x, bias))


def test_a_table_unpacks_its_rows():
    table = data((50, 37))
    for scheme in WEIGHTS.values():
        parts, *form = parts_of(table, scheme)
        numbers = ops.dequantize_packed(parts, *form)
        for ids in (
            torch.tensor([[3, 49], [0, 3]]),
            torch.tensor([7], dtype=torch.int32),
            torch.empty(0, 2, dtype=torch.int64),
        ):
            assert torch.equal(ops.packed_embedding(ids, parts, *form), F.embedding(ids, numbers)), str(scheme)


def test_refusals_name_their_reason():
    weight, scheme = data((6, 40)), WEIGHTS["int4 groups"]
    parts, *form = parts_of(weight, scheme)
    x = torch.randn(2, 40)
    with pytest.raises(ValueError, match=r"\[parts_of\] int4 .* must have 2 parts, got 1"):
        ops.packed_linear(x, parts[:1], None, *form)
    with pytest.raises(ValueError, match=r"\[packed_linear\] x must have 40 features, got shape \[2, 41\]"):
        ops.packed_linear(torch.randn(2, 41), parts, None, *form)
    with pytest.raises(TypeError, match=r"\[packed_linear\] x must have the weight's type, Float, got BFloat16"):
        ops.packed_linear(x.bfloat16(), parts, None, *form)
    with pytest.raises(
        ValueError, match=r"\[dequantize_packed\] 'data' of .* must be Byte and have 120 elements, got Byte and 119"
    ):
        ops.dequantize_packed([parts[0][1:], parts[1]], *form)
    with pytest.raises(
        ValueError, match=r"\[packed_linear\] the weight must have two dimensions, got shape \[6, 8, 5\]"
    ):
        ops.packed_linear(x, parts, None, form[0], [6, 8, 5], form[2])
    with pytest.raises(IndexError, match=r"\[packed_embedding\] indices must be within \[0, 6\), got 6"):
        ops.packed_embedding(torch.tensor([6]), parts, *form)
    with pytest.raises(TypeError, match=r"\[packed_embedding\] indices must be int32 or int64, got Float"):
        ops.packed_embedding(torch.tensor([1.0]), parts, *form)
    with pytest.raises(TypeError, match=r"\[dequantize_packed\] dtype must be floating point, got Int"):
        ops.dequantize_packed(parts, *form[:2], torch.int32)


class Every(nn.Module):
    """A layer of every kind that packs its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(30, 64), nn.EmbeddingBag(30, 64, mode="mean", padding_idx=2)
        self.conv, self.bn = nn.Conv1d(64, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.up = nn.ConvTranspose1d(32, 32, 2, stride=2, groups=2)
        self.hidden, self.out = nn.Linear(32, 64), nn.Linear(64, 5, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(self.words(ids).transpose(1, 2))))
        x = self.up(x).mean(2)
        return self.out(torch.relu(self.hidden(x)) + self.bag(ids))


PRESETS = {
    "int4": QConfig.int4_weight_only(group_size=16),
    "nf4": QConfig.nf4(),
    "fp8": QConfig.fp8(),
    "mxfp8": QConfig.mxfp8(),
    "nvfp4": QConfig.nvfp4(),
    "blocks": QConfig(weight=Scheme(bits=6, symmetric=False, granularity=PerGroup(8, axis=1))),
}


def converted_of(config: QConfig, example: bool = True):
    """A prepared model and the converted one."""
    torch.manual_seed(0)
    ids = torch.randint(30, (4, 6))
    model = prepare(Every().eval(), config, ids if example else None)
    model = calibrate(model, [ids]).eval()
    model(ids)
    return model, convert(model), ids


@pytest.mark.parametrize("name", PRESETS)
def test_presets_convert_to_packed_layers_that_compute_the_same(name, tmp_path):
    model, packed, ids = converted_of(PRESETS[name])
    kinds = {name: type(m).__name__ for name, m in packed.named_modules() if isinstance(m, rf.nn.PackedLayer)}
    assert kinds == {
        "words": "PackedEmbedding", "bag": "PackedEmbeddingBag", "conv": "PackedConv1d", "up": "PackedConvTranspose1d",
        "hidden": "PackedLinear", "out": "PackedLinear",
    }  # fmt: skip
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(packed(ids), expected)
        assert not list(packed.parameters())
        for layer in ("words", "hidden", "out", "bag"):
            quantizer, stored = model.get_submodule(layer).quant.weight, packed.get_submodule(layer)
            assert torch.equal(stored.weight + 0, quantizer(model.get_submodule(layer).weight))
        # The state, in a model that was converted of other values.
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        other = convert(other)
        assert not torch.equal(other(ids), expected)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(other(ids), expected)
        torch.save(packed, tmp_path / "pickled")
        assert torch.equal(torch.load(tmp_path / "pickled", weights_only=False)(ids), expected)
        assert torch.equal(copy.deepcopy(packed)(ids), expected)
        save_quantized(packed, tmp_path / "packed")
        again = load_quantized(Every(), tmp_path / "packed")
        assert torch.equal(again(ids), expected)
        assert again.state_dict().keys() == packed.state_dict().keys()
    assert repr(report(again)).count("packed") >= 6


def test_memory_and_files_are_as_small_as_the_format(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(512, 512), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    floats = 4 * 3 * 512 * 512
    for name, bits in (("int4", 4 + 32 / 16), ("nf4", 4.13), ("fp8", 8.07), ("mxfp8", 8.25), ("nvfp4", 4.51)):
        prepared = prepare(model, PRESETS[name]).eval()
        if prepared[1].quant.input is not None and not prepared[1].quant.input.calibrated:
            prepared = calibrate(prepared, [torch.randint(512, (4, 6))])
        packed = convert(prepared)
        for layer in (packed[0], packed[1], packed[3]):
            assert layer.bits_per_value == pytest.approx(bits, abs=0.02)
            assert f"{layer.weight_bytes} bytes" in repr(layer)
        held = sum(b.numel() * b.element_size() for b in packed.buffers())
        assert held < floats * (bits + 0.2) / 32
        save_quantized(packed, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").stat().st_size < floats * (bits + 0.3) / 32
        rows = {row.name: row for row in report(packed).layers}
        assert rows["1"].state == "packed"
        assert "bits per value" in rows["1"].note
        assert str(PRESETS[name].weight) == rows["1"].weight
    assert packed[1].weight.shape == (512, 512)
    assert packed[1].weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="must only be read"):
        packed[1].weight.mul_(2)


def test_trained_weights_and_codebooks_are_kept():
    torch.manual_seed(0)
    x = torch.randn(16, 40)
    for scheme in WEIGHTS.values():
        if scheme.bits > 8:  # no layer takes them
            continue
        model = prepare_qat(nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)), QConfig(weight=scheme))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            assert torch.equal(convert(model)(x), model(x)), str(scheme)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 3)).to(dtype), QConfig.nf4()).eval()
    x = torch.randn(5, 40, dtype=dtype)
    with torch.no_grad():
        packed = convert(model)
        assert packed(x).dtype == dtype
        assert torch.equal(packed(x), model(x))
        single = copy.deepcopy(packed).float()
        assert single(x.float()).dtype == torch.float32
        torch.testing.assert_close(single(x.float()), packed(x).float(), rtol=2e-2, atol=2e-2)
        for a, b in zip(single[0].parts(), packed[0].parts(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_tied_tables_and_heads_share_their_codes(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(40, 64), nn.Linear(64, 40, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids))

    ids = torch.randint(40, (3, 5))
    packed = convert(prepare(Tied(), QConfig.nf4(), ids).eval())
    assert packed.words.weight_data.data_ptr() == packed.head.weight_data.data_ptr()
    save_quantized(packed, tmp_path / "tied")
    assert (tmp_path / "tied" / "model.safetensors").stat().st_size < 40 * 64 * 0.6 + 2500
    again = load_quantized(Tied(), tmp_path / "tied")
    assert torch.equal(again(ids), packed(ids))
    assert again.words.weight_data.data_ptr() == again.head.weight_data.data_ptr()


def test_adapters_train_in_front_of_a_packed_layer_and_graphs_compile():
    torch.manual_seed(0)
    packed = convert(prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), QConfig.nf4()).eval())
    x = torch.randn(4, 16, requires_grad=True)
    packed(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach()), packed(x.detach()))


def test_folders_are_checked(tmp_path):
    _, packed, _ = converted_of(PRESETS["int4"])
    save_quantized(packed, tmp_path / "model")

    class Narrow(Every):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 4, bias=False)

    with pytest.raises(
        ValueError, match=r"the weight of layer out must have the model's shape \[4, 64\], got \[5, 64\]"
    ):
        load_quantized(Narrow(), tmp_path / "model")

    class WithBias(Every):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 5)

    with pytest.raises(ValueError, match=r"layer out must have a bias, as in the model"):
        load_quantized(WithBias(), tmp_path / "model")
    broken = copy.deepcopy(packed)
    broken.out.weight_scale[0] = float("nan")
    with pytest.raises(ValueError, match=r"\[save_quantized\] layer out: weight_scale must be finite, but is not"):
        save_quantized(broken, tmp_path / "broken")


def test_stochastic_rounding_stays_simulated():
    scheme = Scheme(bits=4, granularity=PerGroup(8, axis=1), rounding="stochastic")
    model = prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), QConfig(weight=scheme)).eval()
    model(torch.randn(2, 16))
    assert type(convert(model)[0]) is rf.nn.Linear
