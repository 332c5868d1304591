"""Quantized multi-head attention: against torch and plain loops, masks, transformers, conversion, folders, refusals."""

import copy

import numpy as np
import pytest
import torch
from test_attention import HEADS, MASKS, TARGET, WIDTH, inputs, masks
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    MX,
    PerGroup,
    QConfig,
    Scheme,
    calibrate,
    convert,
    load_float_state_dict,
    load_quantized,
    prepare,
    prepare_qat,
    report,
    save_quantized,
    set_state,
)

SIMULATED = QConfig.int8(execution="simulated")
FORMS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10, "batch_first": True},
    "one other width": {"kdim": 6},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zeros": {"add_zero_attn": True, "add_bias_kv": True},
}


class Attends(nn.Module):
    """An attention in a model, with any arguments."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


def attention(form: str = "packed", **options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **FORMS[form], **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return module


def given(module: nn.MultiheadAttention, kind: str = "three"):
    widths = (module.kdim, module.vdim)
    same = widths == (WIDTH, WIDTH)
    return [x.float() for x in inputs(kind if same else "three", widths, module.batch_first)]


def tied(tensors):
    """Of one tensor given twice, one tensor again."""
    seen = []
    for x in tensors:
        seen.append(next((y for y in seen if y is x or (y.shape == x.shape and torch.equal(x, y))), x))
    return seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_without_quantizers_switched_on_it_is_torch(form, mask):
    reference = attention(form).eval()
    model = prepare_qat(Attends(reference), QConfig.int8())
    ours = model.eval().attention
    set_state(model, observe=False, quantize=False)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in reference.named_parameters()]
    assert type(ours) is rf.nn.MultiheadAttention
    assert type(ours.out_proj) is rf.nn.Linear
    for kind in ("self", "memory", "three"):
        q, k, v = tied(given(reference, kind))
        source = k.shape[1] if reference.batch_first else k.shape[0]
        attn, padding = masks(mask, TARGET, source)
        attn, padding = (m.float() if m is not None and m.is_floating_point() else m for m in (attn, padding))
        for average in (True, False):
            got = ours(q, k, v, padding, True, attn, average)
            expected = reference(q, k, v, padding, True, attn, average)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        y, weights = ours(q, k, v, padding, need_weights=False, attn_mask=attn)
        assert weights is None
        torch.testing.assert_close(y, reference(q, k, v, padding, False, attn)[0], rtol=1e-5, atol=1e-5)


def test_causal_hints_and_inputs_without_a_batch():
    reference = attention().eval()
    model = prepare_qat(Attends(reference), QConfig.int8())
    set_state(model.eval(), observe=False, quantize=False)
    x = given(reference, "self")[0]
    mask = nn.Transformer.generate_square_subsequent_mask(TARGET)
    for need_weights in (True, False):
        arguments = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        for a, b in ((x, x), (x[:, 0], x[:, 0])):
            got, expected = model(a, a, a, **arguments), reference(b, b, b, **arguments)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
            assert (got[1] is None) == (expected[1] is None)
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] attn_mask must be given where is_causal"):
        model(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] attn_mask must have shape"):
        model(x, x, x, attn_mask=mask[:2])
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] key_padding_mask must have shape"):
        model(x, x, x, key_padding_mask=torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] query, key and value must all have"):
        model(x, x[0], x)
    with pytest.raises(TypeError, match=r"\[MultiheadAttention\] attn_mask must be bool or floating point"):
        model(x, x, x, attn_mask=torch.zeros(TARGET, TARGET, dtype=torch.int64))


def fq(x, q):
    """Fake quantization by the formula, in float32 numpy."""
    scale = q.scale.numpy() if q.axis is None else q.scale.numpy().reshape(-1, 1)
    zero = float(q.zero_point[0])
    return ((np.clip(np.rint(x / scale) + zero, q.qmin, q.qmax) - zero) * scale).astype(np.float32)


def by_loops(layer, query, key, value, mask=None):
    """The definition, head by head, on the grids of the quantizers; [length, N, width]."""
    find, width = layer.quant.find, layer.head_dim
    bias = layer.in_proj_bias.detach().numpy().reshape(3, -1)
    projected = []
    for i, (part, x) in enumerate(zip(("query", "key", "value"), (query, key, value), strict=True)):
        weight = fq(layer.projections()[i].detach().numpy(), find(f"weight_{part}"))
        projected.append(fq(x.numpy(), find(f"input_{part}")) @ weight.T + bias[i])
    q, k, v = (fq(x, find(name)) for x, name in zip(projected, ("query", "key", "value"), strict=True))
    results = np.zeros((query.shape[0], query.shape[1], layer.embed_dim), np.float32)
    shown = np.zeros((query.shape[1], layer.num_heads, query.shape[0], key.shape[0]), np.float32)
    for n in range(query.shape[1]):
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[:, n, part] @ k[:, n, part].T * np.float32(layer.scale)
            if mask is not None:
                scores = np.where(mask.numpy(), -np.inf, scores)
            e = np.exp(scores - scores.max(1, keepdims=True))
            shown[n, h] = e / e.sum(1, keepdims=True)
            results[:, n, part] = fq(shown[n, h], find("probabilities")) @ v[:, n, part]
    out = layer.out_proj
    weight = fq(out.weight.detach().numpy(), out.quant.weight)
    return fq(results, out.quant.input) @ weight.T + out.bias.detach().numpy(), shown


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("execution", ["simulated", None])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loops_on_the_grids(execution, bits, masked):
    base = QConfig.int8()
    weight = Scheme(bits=bits, narrow_range=True, granularity=base.weight.granularity)
    config = QConfig(weight, Scheme(bits=bits, symmetric=False), execution=execution)
    model = prepare_qat(Attends(attention()), config)
    q, k, v = given(model.attention)
    mask = masks("bool", TARGET, k.shape[0])[0] if masked else None
    model(q, k, v)
    set_state(model, observe=False)
    expected, shown = by_loops(model.attention, q, k, v, mask)
    got, weights = model(q, k, v, attn_mask=mask, average_attn_weights=False)
    # A value on a rounding edge may be met from either side: a step of the last grid times the largest row of its weight.
    out = model.attention.out_proj
    step = float(out.quant.input.scale * out.weight.detach().abs().sum(1).max())
    error = np.abs(got.detach().numpy() - expected)
    assert error.max() <= step
    assert np.median(error) <= 1e-5
    np.testing.assert_allclose(weights.detach().numpy(), shown, atol=1e-5 if bits == 3 else 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_integer_training_follows_simulated_training(form):
    module = attention(form)
    tensors, results = given(module), []
    for config in (QConfig.int8(execution="integer"), SIMULATED):
        model = prepare_qat(Attends(copy.deepcopy(module)), config)
        leaves = [x.clone().requires_grad_() for x in tensors]
        y, _ = model(*leaves)
        (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum().backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        results.append([y.detach(), *[x.grad for x in leaves], *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("form", FORMS)
def test_converted_equals_its_simulated_self_and_comes_back_from_a_folder(form, tmp_path):
    model = prepare_qat(Attends(attention(form)), QConfig.int8())
    tensors = given(model.attention)
    for scale in (1.0, 1.1, 0.9):
        model(*(scale * x for x in tensors))
    model.eval()
    converted = convert(model)
    layer = converted.attention
    assert type(layer) is rf.nn.QuantizedMultiheadAttention
    assert type(layer.out_proj) is rf.nn.QuantizedLinear
    assert layer.q_proj_weight.dtype == layer.v_proj_weight.dtype == torch.int8
    assert not list(converted.parameters())
    with torch.no_grad():
        expected, weights = model(*tensors)
        got, got_weights = converted(*tensors)
        step = float(layer.out_proj.quant.input.scale * layer.out_proj.weight.abs().sum(1).max())
        assert float((got - expected).abs().max()) <= step
        assert float((got - expected).abs().mean()) <= 0.02 * step
        torch.testing.assert_close(got_weights, weights, rtol=0, atol=0.02)
        save_quantized(converted, tmp_path / "attention")
        again = load_quantized(Attends(attention(form)), tmp_path / "attention")
        assert torch.equal(again(*tensors)[0], got)
        assert again.state_dict().keys() == converted.state_dict().keys()
        fresh = convert(
            calibrate(prepare(Attends(attention(form)), QConfig.int8()), [tensors], forward=lambda m, b: m(*b))
        )
        fresh.load_state_dict(converted.state_dict())
        assert torch.equal(fresh(*tensors)[0], got)
    wider = nn.MultiheadAttention(
        2 * WIDTH, HEADS, **{k: v for k, v in FORMS[form].items() if k not in ("kdim", "vdim")}
    )
    with pytest.raises(ValueError, match=r"layer attention must have the model's shape"):
        load_quantized(Attends(wider), tmp_path / "attention")
    other = {**FORMS[form], "bias": not FORMS[form].get("bias", True)}
    with pytest.raises(ValueError, match=r"layer attention"):
        load_quantized(Attends(nn.MultiheadAttention(WIDTH, HEADS, **other)), tmp_path / "attention")


def test_float_checkpoints_load():
    a, b = attention(), attention()
    with torch.no_grad():
        b.in_proj_weight.mul_(2)
    model = prepare_qat(Attends(a), QConfig.int8())
    load_float_state_dict(model, Attends(b).state_dict())
    assert torch.equal(model.attention.in_proj_weight, b.in_proj_weight)
    inplace = Attends(a)
    parameters = list(inplace.parameters())
    prepare_qat(inplace, QConfig.int8(), inplace=True)
    assert all(x is y for x, y in zip(parameters, inplace.parameters(), strict=True))


def test_heads_of_any_width():
    """What pruning leaves of an attention is quantized like torch's own."""
    torch.manual_seed(0)
    pruned = rf.nn.MultiheadAttention(WIDTH, 3, head_dim=2, v_head_dim=5, scale=0.3, batch_first=True)
    x = torch.randn(2, 5, WIDTH)
    expected = pruned(x, x, x)[0]
    assert not pruned.prepared
    model = calibrate(prepare(Attends(pruned), QConfig.int8()), [x], forward=lambda m, b: m(b, b, b))
    torch.testing.assert_close(model(x, x, x)[0], expected, rtol=0.1, atol=0.05)
    torch.testing.assert_close(convert(model)(x, x, x)[0], model.eval()(x, x, x)[0], rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match=r"\[Surgery\] MultiheadAttention must not be prepared yet"):
        rf.pruning.StructuredPruner(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), SelfAttends(model.attention)), x, channels=0.5
        ).prune()


class SelfAttends(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_dropout_and_checkpointing_of_modes():
    model = prepare_qat(Attends(attention(dropout=0.5)), QConfig.int8())
    x = given(model.attention, "self")[0]
    model(x, x, x)
    set_state(model, observe=False)
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.eval()
    assert torch.equal(model(x, x, x)[0], model(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_and_layouts(dtype):
    model = prepare_qat(Attends(attention("batch first")), QConfig.int8())
    x = torch.randn(2, 5, WIDTH)
    model(x, x, x)
    model.eval().to(dtype)
    for module in model.modules():
        if isinstance(module, rf.quantization.FakeQuantizer):
            module.to(torch.float32)
    wide = torch.randn(2, 5, 2 * WIDTH, dtype=dtype)
    y, weights = model(*(wide[..., ::2],) * 3)
    assert y.dtype == weights.dtype == dtype
    torch.testing.assert_close(y, model(*(wide[..., ::2].contiguous(),) * 3)[0], rtol=1e-2, atol=1e-2)
    empty = model(*(x[:0].to(dtype),) * 3)[0]
    assert empty.shape == (0, 5, WIDTH)


def test_overrides_reach_the_output_projection():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    config = QConfig.int8(overrides={"layers.0.self_attn": None, "layers.1.self_attn.out_proj": None})
    model = prepare_qat(encoder, config, torch.randn(2, 5, WIDTH))
    rows = {layer.name: layer for layer in report(model).layers}
    assert rows["layers.0.self_attn"].note == "kept in FP32 by the override 'layers.0.self_attn'"
    assert rows["layers.0.self_attn.out_proj"].note == "layers.0.self_attn, to which it belongs, stays in FP32"
    assert rows["layers.1.self_attn"].state == "prepared"
    assert "the products of its heads are simulated" in rows["layers.1.self_attn"].note
    assert rows["layers.1.self_attn.out_proj"].note == "kept in FP32 by the override 'layers.1.self_attn.out_proj'"
    by_type = prepare_qat(encoder, QConfig.int8(overrides={nn.MultiheadAttention: None}), torch.randn(2, 5, WIDTH))
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in by_type.layers)
    assert all(not rf.nn.registry.is_prepared(layer.self_attn.out_proj) for layer in by_type.layers)
    ends = prepare_qat(
        nn.Sequential(SelfAttends(attention("batch first"))), QConfig.int8(overrides={"0.*": QConfig.int8()})
    )
    assert ends[0].attention.prepared


def test_a_projection_in_floating_point_survives_folders(tmp_path):
    config = QConfig.int8(overrides={"*.out_proj": None})
    x = torch.randn(2, 5, WIDTH)
    model = calibrate(prepare(SelfAttends(attention("batch first")), config), [x])
    converted = convert(model)
    assert isinstance(converted.attention.out_proj, nn.Linear)
    save_quantized(converted, tmp_path / "model")
    again = load_quantized(SelfAttends(attention("batch first")), tmp_path / "model")
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers_train_convert_and_link(norm_first, tmp_path):
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    source, target = torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    example = {"src": source, "tgt": target, "tgt_mask": mask, "src_key_padding_mask": padding}
    example |= {"memory_key_padding_mask": padding}
    expected = model.eval()(**example)
    qat = prepare_qat(model, QConfig.int8(), example)
    names = {layer.name for layer in report(qat).layers if layer.kind == "MultiheadAttention"}
    assert len(names) == 3
    assert not report(qat).skipped
    optimizer = torch.optim.Adam(qat.train().parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (qat(**example) - expected.detach()).square().mean().backward()
        optimizer.step()
    qat.eval()
    with torch.no_grad():
        plain, linked = convert(qat), convert(qat, example)
        got = plain(**example)
        assert torch.equal(linked(**example), got)
        assert float((got - qat(**example)).abs().mean()) < 0.02
        assert float((got - expected).abs().mean()) < 0.2
        save_quantized(linked, tmp_path / "model")
        fresh = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        assert torch.equal(load_quantized(fresh, tmp_path / "model")(**example), got)


def test_weights_only_formats_and_sixteen_bits():
    x = torch.randn(2, 5, WIDTH)
    module = SelfAttends(attention("batch first")).eval()
    weights = prepare_qat(module, QConfig(weight=QConfig.int8().weight)).eval()
    assert weights.attention.quant.find("query") is None
    torch.testing.assert_close(convert(weights)(x), weights(x), rtol=1e-5, atol=1e-6)
    for config in (
        QConfig(weight=Scheme(bits=4, granularity=PerGroup(4, axis=1))),
        QConfig(Scheme(format=MX("e4m3"), granularity=PerGroup(32, axis=1)), Scheme(format=MX("e4m3"))),
        QConfig.nf4(),
    ):
        model = prepare_qat(module, config).eval()
        y = model(x).detach()
        assert 0 < float((y - module(x)).abs().mean()) < 0.25 * float(module(x).abs().mean())
        assert torch.equal(convert(model)(x), y)
    wide = calibrate(prepare(module, QConfig.int8(activation=Scheme(bits=16, symmetric=False))), [x])
    assert type(convert(wide).attention) is rf.nn.MultiheadAttention
    torch.testing.assert_close(wide(x), module(x), rtol=0.05, atol=0.05)


def task(count: int, seed: int):
    """Rows of numbers; each place is told by which earlier place holds the largest number so far."""
    x = torch.randn(count, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, x[..., 0].cummax(1).indices


def test_a_trained_attention_equals_its_simulated_self():
    torch.manual_seed(0)

    class Finder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.randn(6, WIDTH) * 0.5)
            self.encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)
            self.out = nn.Linear(WIDTH, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(6)
            return self.out(self.encoder(x + self.place, src_mask=mask, is_causal=True))

    model = prepare_qat(Finder(), QConfig.int8(), task(4, 0)[0]).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(250):
        x, places = task(64, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), places.flatten()).backward()
        optimizer.step()
    model.eval()
    x, places = task(256, 10_000)
    with torch.no_grad():
        expected, got = model(x), convert(model, x)(x)
    assert float((expected.argmax(-1) == places).float().mean()) > 0.6  # the most frequent place alone: 0.41
    assert float((expected.argmax(-1) == got.argmax(-1)).float().mean()) > 0.99
    step = float(model.out.quant.input.scale * model.out.weight.detach().abs().sum(1).max())
    assert float((got - expected).abs().max()) < step
    assert float((got - expected).abs().mean()) < 0.02 * step


def test_refusals_name_their_reason():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"attention": Own(8, 2), "fc": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"attention \(Own is a subclass of MultiheadAttention\)"):
        prepare_qat(model, QConfig.int8())
    left = {layer.name: layer for layer in report(prepare_qat(model, QConfig.int8(), strict=False)).layers}
    assert left["attention.out_proj"].note == "attention, to which it belongs, stays in FP32"
    double = prepare_qat(Attends(attention().double()), QConfig.int8(execution="integer"))
    x = torch.randn(5, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[MultiheadAttention\] execution='integer' must be possible.*float64"):
        double(x, x, x)
    with pytest.raises(
        ValueError, match=r"\[convert\] every quantizer must be calibrated.*attention.quant.input_query"
    ):
        convert(prepare_qat(Attends(attention()), QConfig.int8()))
    tensorrt = prepare(
        nn.Sequential(SelfAttends(attention("batch first")), nn.Linear(WIDTH, 3)), QConfig.int8(target="tensorrt")
    )
    rows = {layer.name: layer for layer in report(tensorrt).layers}
    assert rows["0.attention"].note == "kept in FP32: tensorrt does not run it in integers"
    assert rows["1"].state == "prepared"
