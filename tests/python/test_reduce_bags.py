"""torch.ops.rarefy.reduce_bags: bags of rows that were looked up, against plain loops and torch's bags of the table."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rarefy as rf

reduce_bags = torch.ops.rarefy.reduce_bags
MODES = ["sum", "mean", "max"]
#: Empty bags, one of padding alone, one that is nothing but one index.
BAGS = [[1, 2, 2], [], [7], [2], [3, 0, 10, 3], [2, 2]]


def loops(table, bags, mode, padding_idx, weights=None):
    out = []
    for number, bag in enumerate(bags):
        total = torch.zeros(table.shape[1], dtype=torch.float64)
        largest = torch.full((table.shape[1],), -torch.inf, dtype=torch.float64)
        count = 0
        for place, index in enumerate(bag):
            if index == padding_idx:
                continue
            row = table[index].double() * (1.0 if weights is None else float(weights[number][place]))
            total, largest, count = total + row, torch.maximum(largest, row), count + 1
        if mode == "max":
            out.append(largest if count else torch.zeros_like(largest))
        else:
            out.append(total / max(count, 1) if mode == "mean" else total)
    return torch.stack(out).to(table.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_equals_the_loops(mode, padding_idx, dtype, index_type):
    torch.manual_seed(0)
    table = torch.randn(11, 5).to(dtype)
    flat = torch.tensor([i for bag in BAGS for i in bag], dtype=index_type)
    offsets = torch.tensor(np.cumsum([0, *map(len, BAGS)]), dtype=index_type)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
    want = loops(table, BAGS, mode, padding_idx)
    for begins, last in ((offsets[:-1], False), (offsets, True)):
        got = reduce_bags(table[flat.long()], flat, begins, None, mode, last, padding_idx)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    matrix = torch.tensor([[1, 2, 3], [2, 2, 2]], dtype=index_type)
    got = reduce_bags(table[matrix.long().flatten()], matrix, None, None, mode, False, padding_idx)
    torch.testing.assert_close(got, loops(table, matrix.tolist(), mode, padding_idx), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_torch_to_the_bit(mode, padding_idx, transposed):
    """The bags of the rows are those of the table, with their gradients."""
    torch.manual_seed(0)
    table = torch.randn(11, 5, requires_grad=True)
    ids = torch.randint(11, (6, 4)).t() if transposed else torch.randint(11, (4, 6))
    weights = torch.rand(4, 6, requires_grad=True) if mode == "sum" else None
    upstream = torch.randn(4, 5)
    leaves = [x for x in (table, weights) if x is not None]
    want = F.embedding_bag(ids, table, mode=mode, padding_idx=padding_idx, per_sample_weights=weights)
    got = reduce_bags(F.embedding(ids.reshape(-1), table), ids, None, weights, mode, False, padding_idx)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_weights_belong_to_samples(padding_idx):
    torch.manual_seed(0)
    table, ids, weights = torch.randn(11, 5), torch.randint(11, (4, 6)), torch.randn(4, 6, dtype=torch.float64)
    got = reduce_bags(table[ids.flatten()], ids, None, weights, "sum", False, padding_idx)
    want = loops(table, ids.tolist(), "sum", padding_idx, weights)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_opcheck(mode, padding_idx, with_offsets):
    torch.manual_seed(0)
    rows = torch.randn(12, 5, requires_grad=True)
    ids = torch.randint(11, (12,) if with_offsets else (3, 4))
    offsets = torch.tensor([0, 5, 5]) if with_offsets else None
    weights = torch.rand(ids.shape, requires_grad=True) if mode == "sum" else None
    torch.library.opcheck(reduce_bags, (rows, ids, offsets, weights, mode, False, padding_idx))


def test_compiles_for_every_batch():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(table, ids):
        return reduce_bags(F.embedding(ids.reshape(-1), table), ids, None, None, "mean", False, 2)

    table = torch.randn(11, 5)
    for ids in (torch.randint(11, (3, 4)), torch.randint(11, (5, 2))):
        want = F.embedding_bag(ids, table, mode="mean", padding_idx=2)
        assert torch.equal(compiled(table, ids), want)


def test_a_recording_has_one_operator():
    bag = torch.nn.ModuleDict({"bag": torch.nn.EmbeddingBag(11, 5, mode="mean", padding_idx=2)})
    layer = rf.quantization.prepare_qat(bag, rf.quantization.QConfig.int8()).eval()["bag"]
    text = str(rf.graph.record(layer, torch.randint(11, (4, 6))))
    assert text.count("rarefy::reduce_bags") == 1
    assert "aten::cat" not in text
    assert "aten::embedding_bag" not in text


def test_no_indices():
    none = torch.empty(0, dtype=torch.int64)
    got = reduce_bags(torch.empty(0, 5), none, torch.tensor([0, 0]), None, "mean", False, 3)
    assert torch.equal(got, torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "mode must be 'sum', 'mean' or 'max', got 'median'", {"mode": "median"}),
        (TypeError, "rows must be floating point, got Int", {"rows": torch.zeros(6, 4, dtype=torch.int32)}),
        (TypeError, "indices must be int32 or int64, got Float", {"indices": torch.zeros(2, 3)}),
        (ValueError, r"rows must be \[6, width\], one for each index, got shape \[5, 4\]", {"rows": torch.zeros(5, 4)}),
        (ValueError, r"rows must be \[6, width\], one for each index, got shape \[6\]", {"rows": torch.zeros(6)}),
        (ValueError, "indices must have one dimension or two, got 3", {"indices": torch.zeros(1, 2, 3).long()}),
        (
            ValueError,
            r"offsets must be given for indices of one dimension, and for no others, got them and shape \[2, 3\]",
            {"offsets": torch.tensor([0, 3])},
        ),
        (ValueError, r"and for no others, got none and shape \[6\]", {"indices": torch.zeros(6).long()}),
        (
            ValueError,
            r"offsets must have one dimension, got shape \[1, 2\]",
            {"indices": torch.zeros(6).long(), "offsets": torch.tensor([[0, 3]])},
        ),
        (
            ValueError,
            "per_sample_weights belong to mode 'sum', got 'mean'",
            {"mode": "mean", "per_sample_weights": torch.ones(2, 3)},
        ),
        (
            ValueError,
            r"per_sample_weights must have the shape of the indices, \[2, 3\], got \[6\]",
            {"per_sample_weights": torch.ones(6)},
        ),
    ],
)
def test_refusals(error, message, arguments):
    given = {"rows": torch.zeros(6, 4), "indices": torch.zeros(2, 3).long(), "mode": "sum"} | arguments
    with pytest.raises(error, match=rf"\[reduce_bags\] .*{message}"):
        reduce_bags(**given)
