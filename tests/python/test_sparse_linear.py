"""rarefy::sparse_linear against plain loops: single weights and blocks, both types, every batch, bits for threads and ISAs."""

import numpy as np
import pytest
import torch
from conftest import available_instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy as rf
from rarefy import _core
from rarefy.nn import SparseLinear

DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = [(1, 1), (4, 4), (16, 1), (1, 16), (2, 3), (1, 4), (8, 8), (4, 16), (5, 2)]


def sparse_weight(out: int, width: int, density: float, dtype: torch.dtype, block=(1, 1), seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, across = block
    kept = torch.rand(out // height, width // across, generator=generator) < density
    mask = kept.repeat_interleave(height, 0).repeat_interleave(across, 1)
    return torch.where(mask, torch.randn(out, width, generator=generator), torch.zeros(())).to(dtype)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    """The definition, in float64."""
    y = x.double().numpy().reshape(-1, x.shape[-1]) @ weight.double().numpy().T
    y = y if bias is None else y + bias.double().numpy()
    return y.reshape(*x.shape[:-1], len(weight))


def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, block=(1, 1)) -> torch.Tensor:
    return torch.ops.rarefy.sparse_linear(x, *_core.pruning.to_sparse_weight(weight, *block), bias)


def tolerance(x: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """Rounding of sums in float32, and of the result."""
    magnitude = reference(x.abs(), weight.abs(), None)
    return magnitude * 2.0**-21 + magnitude * (2.0**-8 if x.dtype == torch.bfloat16 else 0) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_against_the_definition(dtype, block, samples):
    out, width = 7 * block[0], 13 * block[1]
    weight = sparse_weight(out, width, 0.3, dtype, block, seed=samples)
    x, bias = torch.randn(samples, width).to(dtype), torch.randn(out).to(dtype)
    for given_bias in (None, bias):
        y = apply(x, weight, given_bias, block)
        assert y.dtype == dtype
        assert y.shape == (samples, out)
        error = np.abs(y.double().numpy() - reference(x, weight, given_bias))
        assert (error <= tolerance(x, weight) + (2.0**-8 * 4 if dtype == torch.bfloat16 else 1e-6)).all()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    samples=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 1000),
)
def test_whole_numbers_are_exact(rows, columns, samples, density, block, seed):
    """Sums of small integers have no rounding, in any order."""
    generator = torch.Generator().manual_seed(seed)
    weight = sparse_weight(rows * block[0], columns * block[1], density, torch.float32, block, seed).mul(4).round()
    x = torch.randint(-9, 10, (samples, weight.shape[1]), generator=generator).float()
    bias = torch.randint(-9, 10, (len(weight),), generator=generator).float()
    np.testing.assert_array_equal(apply(x, weight, bias, block).numpy(), reference(x, weight, bias).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_equal_bits_for_instruction_sets_and_threads(restore_instruction_set, dtype, block):
    weight = sparse_weight(24 * block[0], 40 * block[1], 0.4, dtype, block)
    parts = _core.pruning.to_sparse_weight(weight, *block)
    bias, threads = torch.randn(len(weight)).to(dtype), torch.get_num_threads()
    try:
        for samples in (1, 3, 40, 100):
            x = torch.randn(samples, weight.shape[1]).to(dtype)
            results = []
            for isa in available_instruction_sets():
                _core.set_instruction_set(isa)
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(torch.ops.rarefy.sparse_linear(x, *parts, bias))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


def test_many_threads_on_a_large_weight(restore_instruction_set):
    """Enough work that rows are shared out."""
    weight, x = sparse_weight(512, 768, 0.1, torch.float32), torch.randn(96, 768)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [(apply(x, weight), apply(x[:1], weight), apply(x, weight, None, (4, 4)))]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        assert (np.abs(results[0][0].double().numpy() - reference(x, weight, None)) <= tolerance(x, weight)).all()
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_strides():
    weight = sparse_weight(6, 8, 0.5, torch.float32)
    for shape in ((8,), (0, 8), (2, 3, 8), (2, 0, 8)):
        x = torch.randn(shape)
        y = apply(x, weight)
        assert y.shape == (*shape[:-1], 6)
        np.testing.assert_allclose(y.numpy(), reference(x, weight, None), rtol=1e-5, atol=1e-6)
    x = torch.randn(8, 5).t()
    assert torch.equal(apply(x, weight), apply(x.contiguous(), weight))
    parts = _core.pruning.to_sparse_weight(weight)
    strided = [torch.stack([part, part], 1)[:, 0] for part in parts]
    assert torch.equal(torch.ops.rarefy.sparse_linear(x, *strided), apply(x, weight))


def test_zero_times_infinity_is_nothing_where_no_weight_is():
    weight = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    for samples in (1, 4):
        x = torch.tensor([[float("inf"), 1.0]]).expand(samples, 2)
        y = apply(x, weight)
        assert torch.equal(y[0], torch.tensor([2.0, float("inf")]))
    assert torch.isnan(apply(torch.tensor([[float("nan"), 1.0]]), weight)[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_weight_round_trip(dtype, block):
    weight = sparse_weight(6 * block[0], 5 * block[1], 0.4, dtype, block)
    weight.view(-1)[torch.randperm(weight.numel())[:3]] = float("nan")
    values, columns, offsets = _core.pruning.to_sparse_weight(weight, *block)
    assert columns.dtype == torch.int16
    assert int(offsets[-1]) == len(columns) == len(values)
    dense = _core.pruning.to_dense_weight(values, columns, offsets, weight.shape[1])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(dense.view(bits), weight.view(bits))


def test_wide_columns():
    weight = torch.zeros(2, 40_000)
    weight[0, 39_999], weight[1, 7] = 2.0, 3.0
    parts = _core.pruning.to_sparse_weight(weight)
    assert parts[1].dtype == torch.int32
    x = torch.randn(3, 40_000)
    expected = torch.stack([2 * x[:, 39_999], 3 * x[:, 7]], 1)
    assert torch.equal(torch.ops.rarefy.sparse_linear(x, *parts), expected)
    assert torch.equal(torch.ops.rarefy.sparse_linear(x[:1], *parts), expected[:1])


def test_opcheck_and_compile():
    for dtype, block, bias in ((torch.float32, (1, 1), None), (torch.bfloat16, (4, 4), torch.randn(8))):
        parts = _core.pruning.to_sparse_weight(sparse_weight(8, 12, 0.5, dtype, block), *block)
        given = None if bias is None else bias.to(dtype)
        arguments = (torch.randn(3, 12).to(dtype), *parts, given)
        torch.library.opcheck(torch.ops.rarefy.sparse_linear.default, arguments)
    layer = SparseLinear.from_linear(torch.nn.Linear(12, 8)).eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert [str(n.target) for n in program.graph.nodes if "sparse_linear" in str(n.target)] == [
            "rarefy.sparse_linear.default"
        ]
        longer = torch.randn(20, 12)
        assert torch.equal(program.module()(longer), layer(longer))


def test_a_backward_pass_is_refused():
    parts = _core.pruning.to_sparse_weight(sparse_weight(4, 6, 0.5, torch.float32))
    x = torch.randn(2, 6, requires_grad=True)
    y = torch.ops.rarefy.sparse_linear(x, *parts)
    with pytest.raises(NotImplementedError, match=r"\[sparse_linear\] is for inference and has no gradient"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda a: a.update(x=a["x"].double()),
            TypeError,
            "input must be of the type of the values, Float, got Double",
        ),
        (lambda a: a.update(values=a["values"].double()), TypeError, "values must be float32 or bfloat16, got Double"),
        (lambda a: a.update(columns=a["columns"].long()), TypeError, "columns must be int16 or int32, got Long"),
        (lambda a: a.update(offsets=a["offsets"].int()), TypeError, "row_offsets must be int64, got Int"),
        (lambda a: a.update(columns=a["columns"][1:]), ValueError, r"columns must have shape \[2\]"),
        (lambda a: a.update(bias=torch.ones(3)), ValueError, r"bias must have shape \[2\], got \[3\]"),
        (lambda a: a.update(bias=torch.ones(2).double()), TypeError, "bias must be of the type of the values"),
        (lambda a: a.update(x=torch.ones(())), ValueError, "input must have at least 1 dimension"),
        (lambda a: a["columns"].fill_(4), ValueError, r"columns must be in \[0, 4\) for an input of 4 features"),
        (lambda a: a["columns"].fill_(-1), ValueError, r"columns must be in \[0, 4\)"),
        (lambda a: a["offsets"].fill_(5), ValueError, "row_offsets must ascend from 0 to the number of columns, 2"),
        (lambda a: a["offsets"].copy_(torch.tensor([0, 3, 2])), ValueError, "row_offsets must ascend"),
        (lambda a: a.update(values=torch.ones(2, 1, 3)), ValueError, "input must have a multiple of 3 features"),
        (lambda a: a.update(values=torch.ones(2, 1)), ValueError, r"values must have shape \[kept\] or"),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_errors(change, error, message, samples):
    values, columns, offsets = _core.pruning.to_sparse_weight(torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 2.0]]))
    arguments = {"x": torch.ones(samples, 4), "values": values, "columns": columns, "offsets": offsets, "bias": None}
    change(arguments)
    with pytest.raises(error, match=rf"\[sparse_linear\] {message}"):
        torch.ops.rarefy.sparse_linear(*arguments.values())


def test_weight_errors():
    with pytest.raises(ValueError, match="multiples of the block's, got"):
        _core.pruning.to_sparse_weight(torch.ones(6, 6), 4, 4)
    with pytest.raises(TypeError, match="weight must be float32 or bfloat16, got Double"):
        _core.pruning.to_sparse_weight(torch.ones(2, 2).double())
    parts = _core.pruning.to_sparse_weight(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"columns must be in \[0, 3\), got 3"):
        _core.pruning.to_dense_weight(*parts, 3)


def test_layer_state(tmp_path):
    """A state of another number of values, and a dense one, load."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6)
    linear.weight.data = sparse_weight(6, 8, 0.4, torch.float32, seed=1)
    other = torch.nn.Linear(8, 6)
    other.weight.data = sparse_weight(6, 8, 0.7, torch.float32, seed=2)
    first, second = SparseLinear.from_linear(linear), SparseLinear.from_linear(other)
    assert first.bias is linear.bias
    assert second.weight_values.shape != first.weight_values.shape
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, linear.weight)
    assert torch.equal(second.bias, linear.bias)
    second.load_state_dict(other.state_dict())
    assert torch.equal(second.weight, other.weight)
    dense = second.to_linear()
    assert dense.bias is second.bias
    assert torch.equal(dense.weight, other.weight)
    with pytest.raises(ValueError, match="input must have 8 features, got"):
        second(torch.ones(2, 7))
    with pytest.raises(RuntimeError, match="size mismatch"):
        second.load_state_dict(SparseLinear.from_linear(torch.nn.Linear(8, 7)).state_dict())
    assert "kept=" in repr(second)
    assert rf.graph.count_costs(rf.graph.record(first, torch.ones(5, 8))).total.macs == 5 * first.weight_values.numel()
