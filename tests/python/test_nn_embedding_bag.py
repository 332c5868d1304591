"""EmbeddingBag: sums, means and largest values of rows on their grids, against plain loops and torch."""

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import (
    PerChannel,
    QConfig,
    Scheme,
    convert,
    load_quantized,
    prepare_qat,
    report,
    save_quantized,
    set_state,
)


def loops(layer, bags, weights):
    """Each bag by its definition, on rows rounded by the formula."""
    q, table = layer.quant.weight, layer.weight.detach().numpy()
    scale = np.broadcast_to(q.scale.numpy(), (len(table),))
    out = []
    for number, bag in enumerate(bags):
        rows = [
            (np.clip(np.rint(table[i] / scale[i]), q.qmin, q.qmax) * scale[i], 1.0 if weights is None else w)
            for i, w in zip(bag, [1.0] * len(bag) if weights is None else weights[number], strict=True)
            if i != layer.padding_idx
        ]
        if not rows:
            out.append(np.zeros(table.shape[1], np.float32))
        elif layer.mode == "max":
            out.append(np.max([row for row, _ in rows], 0))
        else:
            total = np.sum([row * np.float32(w) for row, w in rows], 0)
            out.append(total / len(rows) if layer.mode == "mean" else total)
    return torch.from_numpy(np.stack(out).astype(np.float32))


CONFIGS = [
    QConfig.int8(),
    QConfig(Scheme(bits=3, granularity=PerChannel(0))),
    QConfig(Scheme(), Scheme(symmetric=False)),
]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("config", CONFIGS, ids=["rows", "3 bits", "one scale"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_equals_the_loops(mode, config, padding_idx):
    torch.manual_seed(0)
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(11, 5, mode=mode, padding_idx=padding_idx)})
    prepared = prepare_qat(model, config)
    layer = prepared["bag"]
    bags = [[1, 2, 2], [], [7], [2], [3, 0, 10, 3]]
    flat = torch.tensor([i for bag in bags for i in bag])
    offsets = torch.tensor(np.cumsum([0, *map(len, bags[:-1])]))
    weights = None
    if mode == "sum":
        weights = [torch.rand(len(bag)).tolist() for bag in bags]
    per_sample = None if weights is None else torch.tensor([w for bag in weights for w in bag])
    expected = loops(layer, bags, weights)
    y = layer(flat, offsets, per_sample)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-6)
    converted = convert(prepared.eval())["bag"]
    assert type(converted) is rf.nn.QuantizedEmbeddingBag
    assert converted.integer_weight.dtype == torch.int8
    assert torch.equal(converted(flat, offsets, per_sample), layer(flat, offsets, per_sample))
    matrix = torch.tensor([[1, 2, 3], [2, 2, 2]])
    torch.testing.assert_close(layer(matrix).detach(), loops(layer, matrix.tolist(), None), rtol=1e-6, atol=1e-6)
    assert torch.equal(converted(matrix), layer(matrix))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"include_last_offset": True}], ids=str)
def test_gradient_is_that_of_torch(mode, options):
    torch.manual_seed(0)
    flat = torch.tensor([0, 1, 1, 3, 4, 0])
    offsets = torch.tensor([0, 3, 6] if options.get("include_last_offset") else [0, 3])
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(6, 4, mode=mode, **options)})
    prepared = prepare_qat(model, QConfig.int8())
    set_state(prepared, quantize=False)
    upstream = torch.randn(2, 4)
    expected, y = model["bag"](flat, offsets), prepared["bag"](flat, offsets)
    torch.testing.assert_close(y, expected)
    expected.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(prepared["bag"].weight.grad, model["bag"].weight.grad)


def test_only_rows_that_are_looked_up_are_observed():
    model = prepare_qat(nn.ModuleDict({"bag": nn.EmbeddingBag(4, 3)}), QConfig.int8())
    quantizer = model["bag"].quant.weight
    with torch.no_grad():
        model["bag"].weight.mul_(2.0)
    before = quantizer.scale.clone()
    model["bag"](torch.tensor([[1, 1]]))
    assert torch.equal(quantizer.scale / before, torch.tensor([1.0, 2.0, 1.0, 1.0]))


def test_folders_and_refusals(tmp_path):
    torch.manual_seed(0)

    def model():
        return nn.ModuleDict({"bag": nn.EmbeddingBag(9, 4, mode="mean", padding_idx=0)})

    converted = convert(prepare_qat(model(), QConfig.int8()).eval())
    save_quantized(converted, tmp_path / "bag")
    again = load_quantized(model(), tmp_path / "bag")
    ids = torch.randint(9, (3, 5))
    assert torch.equal(again["bag"](ids), converted["bag"](ids))
    with pytest.raises(ValueError, match="layer bag must be a EmbeddingBag in the model, got a Embedding"):
        load_quantized(nn.ModuleDict({"bag": nn.Embedding(9, 4)}), tmp_path / "bag")
    for options, reason in (({"max_norm": 1.0}, "max_norm is not supported"), ({"sparse": True}, "sparse gradients")):
        refused = nn.ModuleDict({"bag": nn.EmbeddingBag(4, 3, **options), "fc": nn.Linear(3, 2)})
        with pytest.raises(ValueError, match=rf"bag \({reason}"):
            prepare_qat(refused, QConfig.int8())
        assert reason in report(prepare_qat(refused, QConfig.int8(), strict=False)).skipped[0].note
