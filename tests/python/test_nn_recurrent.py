"""LSTM, GRU and cells: against torch and plain loops, packed sequences, integers against simulation, folders."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rarefy as rf
from rarefy.quantization import (
    QConfig,
    Scheme,
    calibrate,
    checkpoint_context,
    convert,
    load_quantized,
    prepare,
    prepare_qat,
    report,
    save_quantized,
    set_state,
)

LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"bias": False, "bidirectional": True}),
    (nn.GRU, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.GRU, {"bias": False}),
]
SIMULATED = QConfig.int8(execution="simulated")


def tensors(result):
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


def close(a, b, **limits):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, **limits)


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_without_quantizers_switched_on_it_is_torch(kind, options, given):
    """The loop itself, state by state: quantizers that pass everything leave torch's own layer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": kind(5, 6, **options)})
    prepared = prepare_qat(model, QConfig.int8())
    set_state(prepared, observe=False, quantize=False)
    layer, ours = model["rnn"], prepared["rnn"]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in layer.named_parameters()]
    x = torch.randn(3, 4, 5)
    batch = 3 if options.get("batch_first") else 4
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = tuple(torch.randn(count, batch, 6) for _ in range(2)) if given else None
    state = state if state is None or kind is nn.LSTM else state[0]
    close(ours(x, state), layer(x, state), rtol=1e-5, atol=1e-6)
    one = x[0]
    single = None
    if given:
        single = tuple(s[:, 0] for s in state) if kind is nn.LSTM else state[:, 0]
    close(ours(one, single), layer(one, single), rtol=1e-5, atol=1e-6)
    # Packed, in no order: longer sequences are not first.
    lengths = [2, 4, 1] if options.get("batch_first") else [1, 3, 2, 3]
    packed = pack_padded_sequence(x, lengths, options.get("batch_first", False), enforce_sorted=False)
    (y, *last), (expected, *expected_last) = ours(packed, state), layer(packed, state)
    assert isinstance(y, PackedSequence)
    close(pad_packed_sequence(y)[0], pad_packed_sequence(expected)[0], rtol=1e-5, atol=1e-6)
    close(last, expected_last, rtol=1e-5, atol=1e-6)


def fq(x, q):
    """Fake quantization by the formula, in float32 numpy."""
    s = q.scale.numpy() if q.axis is None else q.scale.numpy().reshape(-1, 1)
    return ((np.clip(np.rint(x / s) + float(q.zero_point[0]), q.qmin, q.qmax) - float(q.zero_point[0])) * s).astype(
        np.float32
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_loop(layer, x, suffix="_l0", steps=None):
    """One direction of an LSTM by its definition, on the grids of its quantizers."""
    q = layer.quant
    w_ih, w_hh = (
        fq(getattr(layer, f"weight_{p}{suffix}").detach().numpy(), q.find(f"weight_{p}{suffix}")) for p in ("ih", "hh")
    )
    b_ih, b_hh = (getattr(layer, f"bias_{p}{suffix}").detach().numpy() for p in ("ih", "hh"))
    h = c = np.zeros((x.shape[1], layer.hidden_size), np.float32)
    out = []
    for x_t in fq(x, q.find(f"input{suffix}")):
        gates = x_t @ w_ih.T + b_ih + fq(h, q.find(f"hidden{suffix}")) @ w_hh.T + b_hh
        i, f, g, o = np.split(gates, 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out), h, c


def gru_loop(layer, x, suffix="_l0"):
    q = layer.quant
    w_ih, w_hh = (
        fq(getattr(layer, f"weight_{p}{suffix}").detach().numpy(), q.find(f"weight_{p}{suffix}")) for p in ("ih", "hh")
    )
    b_ih, b_hh = (getattr(layer, f"bias_{p}{suffix}").detach().numpy() for p in ("ih", "hh"))
    h = np.zeros((x.shape[1], layer.hidden_size), np.float32)
    out = []
    for x_t in fq(x, q.find(f"input{suffix}")):
        a = np.split(x_t @ w_ih.T + b_ih, 3, 1)
        d = np.split(fq(h, q.find(f"hidden{suffix}")) @ w_hh.T + b_hh, 3, 1)
        r, z = sigmoid(a[0] + d[0]), sigmoid(a[1] + d[1])
        n = np.tanh(a[2] + r * d[2])
        h = n + z * (h - n)
        out.append(h)
    return np.stack(out), h


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("execution", ["simulated", None])
@pytest.mark.parametrize(("kind", "loop"), [(nn.LSTM, lstm_loop), (nn.GRU, gru_loop)])
def test_equals_the_loop_on_the_grids(kind, loop, execution, bits):
    torch.manual_seed(0)
    base = QConfig.int8()
    weight = Scheme(bits=bits, narrow_range=True, granularity=base.weight.granularity)
    config = QConfig(weight, Scheme(bits=bits, symmetric=False), execution=execution)
    model = prepare_qat(nn.ModuleDict({"rnn": kind(7, 5)}), config)
    layer = model["rnn"]
    x = torch.randn(6, 3, 7)
    layer(x)
    set_state(model, observe=False)
    expected = loop(layer, x.numpy())
    got = tensors(layer(x))
    # A rounding edge of a hidden state may be met from either side: a step of its grid, times a row of the weight.
    limit = 1e-5 if bits == 3 else 2 * float(layer.quant.find("hidden_l0").scale)
    for a, b in zip(got, expected, strict=True):
        assert float(np.abs(a.detach().numpy().reshape(b.shape) - b).max()) <= limit


def test_a_hidden_state_is_on_the_grid_of_one_until_it_is_observed():
    torch.manual_seed(0)
    model = prepare_qat(nn.ModuleDict({"rnn": nn.LSTM(4, 3)}), QConfig.int8())
    layer, quantizer = model["rnn"], model["rnn"].quant.find("hidden_l0")
    assert not quantizer.calibrated
    x = torch.randn(5, 2, 4)
    y, _ = layer(x)
    # Observed once, as a whole: 0.01 of the way from [-1, 1] to the range of the states.
    torch.testing.assert_close(quantizer.max_val, 1 + 0.01 * (y.max() - 1).view(1))
    torch.testing.assert_close(quantizer.min_val, -1 + 0.01 * (y.min() + 1).view(1))
    before = quantizer.state_dict()
    layer.eval()(x)
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())
    ptq = calibrate(
        prepare(nn.ModuleDict({"rnn": nn.LSTM(4, 3)}), QConfig.int8()), [x], forward=lambda m, b: m["rnn"](b)
    )
    quantizer = ptq["rnn"].quant.find("hidden_l0")
    assert float(quantizer.max_val) < 0.99


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_integer_training_follows_simulated_training(kind, options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": kind(5, 6, **options)})
    x = torch.randn(4, 3, 5)
    results = []
    for config in (QConfig.int8(), SIMULATED):
        prepared = prepare_qat(copy.deepcopy(model), config)
        inputs = x.clone().requires_grad_()
        y = tensors(prepared["rnn"](inputs))
        sum((t * torch.cos(torch.arange(t.numel())).view_as(t)).sum() for t in y).backward()
        grads = [p.grad for p in prepared.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        results.append([*[t.detach() for t in y], inputs.grad, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_converted_equals_its_simulated_self(kind, options, tmp_path):
    torch.manual_seed(0)
    model = prepare_qat(nn.ModuleDict({"rnn": kind(9, 8, **options)}), QConfig.int8())
    for _ in range(3):
        model["rnn"](torch.randn(6, 3, 9))
    model.eval()
    converted = convert(model)
    layer = converted["rnn"]
    assert isinstance(layer, rf.nn.QuantizedRecurrent)
    assert layer.weight_ih_l0.dtype == layer.weight_hh_l0.dtype == torch.int8
    x = torch.randn(6, 3, 9)
    with torch.no_grad():
        got, expected = tensors(layer(x)), tensors(model["rnn"](x))
        step = 4 * max(float(q.scale) for n, q in layer.quant.named_children() if not n.startswith("weight"))
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).abs().max()) <= step
            assert float((a - b).abs().mean()) <= 0.05 * step
        packed = pack_padded_sequence(
            x, [3, 1, 2, 3, 2, 1] if options.get("batch_first") else [6, 2, 4], options.get("batch_first", False), False
        )
        a, b = layer(packed)[0].data, model["rnn"](packed)[0].data
        assert float((a - b).abs().max()) <= step
        save_quantized(converted, tmp_path / "rnn")
        again = load_quantized(nn.ModuleDict({"rnn": kind(9, 8, **options)}), tmp_path / "rnn")
        for a, b in zip(tensors(again["rnn"](x)), got, strict=True):
            assert torch.equal(a, b)
        assert again.state_dict().keys() == converted.state_dict().keys()
    other = {**options, "bias": not options.get("bias", True)}
    with pytest.raises(ValueError, match=r"layer rnn"):
        load_quantized(nn.ModuleDict({"rnn": kind(9, 8, **other)}), tmp_path / "rnn")
    with pytest.raises(ValueError, match=r"must have the model's shape"):
        load_quantized(nn.ModuleDict({"rnn": kind(9, 7, **options)}), tmp_path / "rnn")


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, bias):
    torch.manual_seed(0)
    cell = kind(5, 4, bias=bias)
    model = prepare_qat(nn.ModuleDict({"cell": cell}), QConfig.int8())
    ours = model["cell"]
    assert set(ours.quant._modules) == {"input", "hidden", "weight_ih", "weight_hh"}
    x = torch.randn(3, 5)
    state = torch.randn(3, 4).tanh()
    state = (state, torch.randn(3, 4)) if kind is nn.LSTMCell else state
    for h in (None, state):
        close(ours(x, h), cell(x, h), rtol=0.1, atol=0.1)
    set_state(model, observe=False, quantize=False)
    for h in (None, state):
        close(ours(x, h), cell(x, h), rtol=1e-5, atol=1e-6)
        one = None if h is None else tuple(s[0] for s in h) if isinstance(h, tuple) else h[0]
        close(ours(x[0], one), cell(x[0], one), rtol=1e-5, atol=1e-6)
    set_state(model, quantize=True)
    model.eval()
    converted = convert(model)["cell"]
    close(converted(x, state), ours(x, state), rtol=1e-4, atol=1e-4)


class Tagger(nn.Module):
    """Words to tags: an embedding, a bidirectional LSTM, a linear layer."""

    def __init__(self, words: int = 12, tags: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 8)
        self.rnn = nn.LSTM(8, 12, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(24, tags)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tags(self.rnn(self.words(ids))[0])


def sentences(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words; the tag of a word is told by its neighbours on both sides."""
    ids = torch.randint(0, 12, (count, 7), generator=torch.Generator().manual_seed(seed))
    left = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
    right = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    return ids, 2 * (left // 6) + right // 6


def trained_tagger(steps: int = 120) -> nn.Module:
    torch.manual_seed(0)
    ids, _ = sentences(64)
    model = prepare_qat(Tagger(), QConfig.int8(), ids)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(steps):
        ids, tags = sentences(64, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), tags.flatten()).backward()
        optimizer.step()
    return model.eval()


def test_a_trained_tagger_equals_its_simulated_self():
    model = trained_tagger()
    ids, tags = sentences(128, seed=1000)
    with torch.no_grad():
        expected = model(ids)
        plain, linked = convert(model), convert(model, ids)
        scores = plain(ids)
        assert torch.equal(scores, linked(ids))
    accuracy = float((expected.argmax(-1) == tags).float().mean())
    assert accuracy > 0.9  # of sentences that it has not seen; guessing: 0.25
    assert float((scores.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.995
    # One step of the grid that the last layer reads, times the largest sum of a row of its weight.
    step = float(model.tags.quant.input.scale * model.tags.weight.detach().abs().sum(1).max())
    assert float((scores - expected).abs().max()) < step
    assert float((scores - expected).abs().mean()) < 0.02 * step
    rows = {layer.name: layer for layer in report(model).layers}
    assert "products with the input execute in integers" in rows["rnn"].note
    assert rows["rnn"].kind == "LSTM"
    assert "int8 symmetric per-channel(axis=0)" in rows["rnn"].weight
    assert {layer.name: layer for layer in report(linked).layers}["rnn"].state == "integer"


def test_refusals_name_their_reason():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 6, proj_size=3), "fc": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"rnn \(proj_size is not supported\)"):
        prepare_qat(model, QConfig.int8())
    left = prepare_qat(model, QConfig.int8(), strict=False)
    assert type(left["rnn"]) is nn.LSTM
    assert "proj_size" in {layer.name: layer for layer in report(left).layers}["rnn"].note
    with pytest.raises(ValueError, match=r"rnn \(RNN is not supported\)"):
        prepare_qat(nn.ModuleDict({"rnn": nn.RNN(4, 6), "fc": nn.Linear(3, 2)}), QConfig.int8())
    layer = prepare_qat(nn.ModuleDict({"rnn": nn.GRU(4, 6)}), QConfig.int8())["rnn"]
    with pytest.raises(ValueError, match=r"\[GRU\] input must have 4 features, got shape \(6, 5\)"):
        layer(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"\[GRU\] the state must have shape \(1, 3, 6\), got \(1, 2, 6\)"):
        layer(torch.randn(2, 3, 4), torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match=r"\[GRU\] input must have 2 or 3 dimensions, got shape \(4,\)"):
        layer(torch.randn(4))
    with pytest.raises(ValueError, match=r"\[GRU\] sequences must have a step, got shape \(0, 3, 4\)"):
        layer(torch.randn(0, 3, 4))
    with pytest.raises(ValueError, match=r"\[GRU\] execution='integer' must be possible for its input, but float64"):
        prepare_qat(nn.ModuleDict({"rnn": nn.GRU(4, 6).double()}), QConfig.int8(execution="integer"))["rnn"](
            torch.randn(2, 3, 4, dtype=torch.float64)
        )
    with pytest.raises(ValueError, match=r"\[convert\] every quantizer must be calibrated.*rnn.quant.input_l0"):
        convert(prepare_qat(nn.ModuleDict({"rnn": nn.GRU(4, 6)}), QConfig.int8()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_and_layouts(dtype):
    torch.manual_seed(0)
    model = prepare_qat(nn.ModuleDict({"rnn": nn.LSTM(4, 6)}), QConfig.int8())
    model["rnn"](torch.randn(5, 3, 4))
    model.eval().to(dtype)
    for quantizer in model["rnn"].quant.children():
        quantizer.to(torch.float32)
    x = torch.randn(5, 3, 8).to(dtype)
    (y, (h, c)) = model["rnn"](x[..., ::2])
    assert y.dtype == h.dtype == c.dtype == dtype
    close((y, h, c), model["rnn"](x[..., ::2].contiguous()), rtol=1e-3, atol=1e-3)
    y, (h, c) = model["rnn"](x[:, :0, ::2])
    assert y.shape == (5, 0, 6)
    assert h.shape == c.shape == (1, 0, 6)


def test_weights_only_sixteen_bits_and_dropout():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"rnn": nn.GRU(4, 6, num_layers=2, dropout=0.5)}), torch.randn(5, 3, 4)
    weights = prepare_qat(model, QConfig(weight=QConfig.int8().weight)).eval()
    close(convert(weights)["rnn"](x), weights["rnn"](x), rtol=1e-5, atol=1e-6)
    wide = prepare(model, QConfig.int8(activation=Scheme(bits=16, symmetric=False)))
    wide = calibrate(wide, [x], forward=lambda m, b: m["rnn"](b)).eval()
    assert type(convert(wide)["rnn"]) is rf.nn.GRU
    close(wide["rnn"](x), model.eval()["rnn"](x), rtol=0.05, atol=0.05)
    trains = prepare_qat(model, QConfig.int8()).train()["rnn"]
    trains(x)
    a, b = trains(x)[0], trains(x)[0]
    assert not torch.equal(a, b)


def test_checkpointing_recomputes_with_the_grid_of_its_own_forward():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 6)})
    x = torch.randn(5, 3, 4)
    grads = []
    for recompute in (False, True):
        layer = prepare_qat(model, SIMULATED)["rnn"]
        for step in range(2):
            inputs = (x + step).requires_grad_()
            if recompute:
                y = checkpoint(
                    lambda a, layer=layer: layer(a)[0], inputs, use_reentrant=False, context_fn=checkpoint_context
                )
            else:
                y = layer(inputs)[0]
            y.square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
        state = {k: v.clone() for k, v in layer.quant.state_dict().items()}
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.isfinite(state["hidden_l0.max_val"]).all()


def test_recurrence_opcheck_and_errors():
    torch.manual_seed(0)
    gates, weight, h = torch.randn(6, 12), torch.randn(12, 4), torch.randn(3, 4)
    grid = (torch.tensor([0.01]), torch.tensor([128], dtype=torch.int32), 0, 255)

    def run(gates=gates, weight=weight, scale=None, h=h, sizes=(3, 2, 1)):
        return torch.ops.rarefy.recurrence(gates, weight, scale, None, *grid, h, None, list(sizes), False)

    arguments = (gates.requires_grad_(), weight.requires_grad_(), None, None, *grid, h, None, [3, 2, 1], False)
    torch.library.opcheck(torch.ops.rarefy.recurrence, arguments)
    with pytest.raises(ValueError, match=r"\[recurrence\] batch_sizes must be one or more numbers that do not grow"):
        run(sizes=(1, 2, 3))
    with pytest.raises(ValueError, match=r"\[recurrence\] gates must have 7 rows, the sum of batch_sizes, got 6"):
        run(sizes=(4, 2, 1))
    with pytest.raises(ValueError, match=r"\[recurrence\] weight must have shape \[3 \* hidden, hidden\]"):
        run(weight=torch.randn(16, 4))
    with pytest.raises(ValueError, match=r"\[recurrence\] h0 and c0 must have shape \[3, 4\], got \[2, 4\]"):
        run(h=torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"\[recurrence\] weight_scale must be given for an int8 weight and no other"):
        run(scale=torch.ones(12))
