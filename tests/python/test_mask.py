"""rarefy::magnitude_mask and rarefy::apply_mask_ against NumPy's stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy as rf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = [isa for isa in ("plain", "avx2", "avx512") if isa in rf._core.show_config().split("in use")[0]]


@pytest.fixture(params=ISAS)
def isa(request):
    before = rf._core.instruction_set()
    rf._core.set_instruction_set(request.param)
    yield request.param
    rf._core.set_instruction_set(before)


def unpack(mask: torch.Tensor, elements: int) -> np.ndarray:
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    assert not bits[elements:].any(), "padding bits must be zero"
    return bits[:elements].astype(bool)


def pack(kept: np.ndarray) -> torch.Tensor:
    bits = np.zeros(-(-kept.size // 64) * 64, dtype=np.uint8)
    bits[: kept.size] = kept
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def reference(weights: list[torch.Tensor], sparsity: float, kept: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Prune the first round(sparsity * total) of a stable ascending sort by magnitude, pruned elements first."""
    flat = np.concatenate([w.detach().double().contiguous().flatten().abs().numpy() for w in weights])
    if kept is not None:
        flat = np.where(np.concatenate(kept), flat, -1.0)
    count = max(round(sparsity * flat.size), int((flat == -1.0).sum()))
    out = np.ones(flat.size, dtype=bool)
    out[np.argsort(flat, kind="stable")[:count]] = False
    return np.split(out, np.cumsum([w.numel() for w in weights])[:-1])


def check(weights: list[torch.Tensor], sparsity: float, kept: list[np.ndarray] | None = None) -> list[np.ndarray]:
    masks = torch.ops.rarefy.magnitude_mask(weights, sparsity, None if kept is None else [pack(k) for k in kept])
    got = [unpack(mask, w.numel()) for mask, w in zip(masks, weights, strict=True)]
    for mine, expected, mask, w in zip(got, reference(weights, sparsity, kept), masks, weights, strict=True):
        assert mask.dtype == torch.uint8
        assert mask.shape == (-(-w.numel() // 64) * 8,)
        np.testing.assert_array_equal(mine, expected)
    return got


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from(DTYPES),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_matches_stable_sort(sizes, sparsity, dtype, levels, seed):
    """Few levels make most elements ties, across tensors too."""
    generator = torch.Generator().manual_seed(seed)
    weights = [(torch.randint(-levels, levels + 1, (n,), generator=generator) / 8).to(dtype) for n in sizes]
    got = check(weights, sparsity)
    total = sum(sizes)
    assert sum(int((~mask).sum()) for mask in got) == round(sparsity * total)
    kept = check(weights, sparsity / 2)
    grown = check(weights, sparsity, kept)
    assert not any((new & ~old).any() for new, old in zip(grown, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.003, 0.5, 0.77, 0.9, 0.9999])
def test_large(isa, dtype, sparsity):
    """More elements than the sample: the located range, and with 16-bit types long runs of ties."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(n, generator=generator).to(dtype) for n in (150_001, 3, 70_000, 64, 16_385)]
    check(weights, sparsity)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.6])
def test_large_with_masks(isa, sparsity):
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(n, generator=generator) for n in (150_001, 70_000)]
    kept = [torch.rand(w.numel(), generator=generator).numpy() > 0.4 for w in weights]
    check(weights, sparsity, kept)


@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_equal(isa, value, dtype):
    """Every element is a tie: the earlier ones go, over chunk and tensor borders."""
    weights = [torch.full((n,), value).to(dtype) for n in (100_001, 40_000)]
    for sparsity in (0.1, 0.5, 0.9):
        got = np.concatenate(check(weights, sparsity))
        count = round(sparsity * got.size)
        assert not got[:count].any()
        assert got[count:].all()


def test_misleading_sample(isa):
    """Outliers at just the places that the sample takes: the answer is exact, by passes over all weights."""
    n, places, run = 1 << 20, 16384, 4
    x = torch.rand(n)
    for k in range(places):
        scatter = k * 2654435761 % 2**32
        place = k * (n // places) + (scatter * (n // places) >> 32)
        x[place : place + run] = 100.0
    for sparsity in (0.1, 0.5, 0.95):
        check([x], sparsity)


def test_special_values(isa):
    tiny = float(np.float32(1e-45))
    x = torch.tensor([float("inf"), -0.0, 0.0, -tiny, tiny, 2 * tiny, -3e38, -float("inf"), 1.0, 3e38])
    got = check([x], 0.3)[0]
    assert got.tolist() == [True, False, False, False, True, True, True, True, True, True]
    check([x], 0.9)
    check([x], 0.5)
    torch.set_flush_denormal(True)
    try:
        masks = torch.ops.rarefy.magnitude_mask([x], 0.3)
    finally:
        torch.set_flush_denormal(False)
    assert unpack(masks[0], 10).tolist() == got.tolist()


def test_mixed_dtypes():
    generator = torch.Generator().manual_seed(7)
    check([torch.randn(1000, generator=generator).to(dtype) for dtype in DTYPES], 0.6)
    check([torch.randn(1000, generator=generator).to(dtype) for dtype in DTYPES if dtype != torch.float64], 0.6)


def test_channels_last_means_the_same():
    x = torch.randn(16, 24, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    assert last.stride() != x.stride()
    for mine, other in zip(
        torch.ops.rarefy.magnitude_mask([x], 0.4), torch.ops.rarefy.magnitude_mask([last], 0.4), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_threads_do_not_matter():
    x = torch.randn(300_000).to(torch.bfloat16)
    threads = torch.get_num_threads()
    many = torch.ops.rarefy.magnitude_mask([x], 0.7)[0]
    torch.set_num_threads(1)
    try:
        one = torch.ops.rarefy.magnitude_mask([x], 0.7)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many, one)


def test_half_is_rounded_to_even():
    assert [int((~check([torch.randn(n)], 0.5)[0]).sum()) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]


def test_infinities_may_be_pruned():
    check([torch.full((100,), float("inf"))], 0.5)
    check([torch.full((100_000,), float("inf"))], 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 256, 511, 20_000])
def test_apply(isa, dtype, n):
    x = torch.randn(n).to(dtype)
    x[::7] = float("nan")
    x[::5] = float("-inf")
    kept = np.random.default_rng(n).random(n) > 0.5
    expected = torch.where(torch.from_numpy(kept), x, torch.zeros((), dtype=dtype))
    torch.ops.rarefy.apply_mask_(x, pack(kept))
    assert torch.equal(x.view(torch.uint8), expected.view(torch.uint8))  # bits: +0, and what is kept is untouched


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x[1:, :, 1:2, :],
        lambda x: x.flatten()[::3],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_to_strided(view, dtype):
    base = torch.randn(33, 40, 5, 7).to(dtype)
    x = view(base)
    kept = np.random.default_rng(1).random(x.numel()) > 0.3
    expected = torch.where(torch.from_numpy(kept).view(x.shape), x, torch.zeros((), dtype=dtype))
    untouched = base.clone()
    version = x._version
    torch.ops.rarefy.apply_mask_(x, pack(kept))
    assert torch.equal(x, expected)
    assert x._version > version
    if x.data_ptr() == base.data_ptr() and x.numel() < base.numel():
        assert (base != untouched).sum() <= (~kept).sum()


def test_apply_to_scalar_and_empty():
    x = torch.tensor(3.0)
    torch.ops.rarefy.apply_mask_(x, pack(np.array([False])))
    assert x.item() == 0.0
    torch.ops.rarefy.apply_mask_(torch.empty(0, 3), torch.empty(0, dtype=torch.uint8))


def test_opcheck():
    weights = [torch.randn(70), torch.randn(5, 9)]
    masks = torch.ops.rarefy.magnitude_mask(weights, 0.5)
    torch.library.opcheck(torch.ops.rarefy.magnitude_mask, (weights, 0.3))
    torch.library.opcheck(torch.ops.rarefy.magnitude_mask, (weights, 0.7, masks))
    torch.library.opcheck(torch.ops.rarefy.apply_mask_, (torch.randn(5, 9), masks[1]))


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def prune(x):
        mask = torch.ops.rarefy.magnitude_mask([x], 0.5)[0]
        y = x * 2
        torch.ops.rarefy.apply_mask_(y, mask)
        return y

    x = torch.randn(130)
    assert int((prune(x) == 0).sum()) == 65


def test_gradients():
    x = torch.nn.Parameter(torch.randn(10))
    mask = torch.ops.rarefy.magnitude_mask([x], 0.5)[0]
    assert not mask.requires_grad
    with pytest.raises(ValueError, match=r"\[apply_mask_\] x must not require grad while gradients are recorded"):
        torch.ops.rarefy.apply_mask_(x, mask)
    loss = (x * x).sum()
    with torch.no_grad():
        torch.ops.rarefy.apply_mask_(x, mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan(isa, dtype):
    for n in (100, 200_000):
        weights = [torch.randn(n).to(dtype), torch.randn(n).to(dtype)]
        weights[1][77] = float("nan")
        for sparsity in (0.0, 0.5):
            with pytest.raises(
                ValueError, match=r"\[magnitude_mask\] weights must not be NaN, got NaN in tensor 1 at flat index 77"
            ):
                torch.ops.rarefy.magnitude_mask(weights, sparsity)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: op([torch.ones(3)], 1.0), ValueError, r"\[magnitude_mask\] sparsity must be in \[0, 1\), got 1"),
        (lambda op: op([torch.ones(3)], -0.1), ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
        (lambda op: op([torch.ones(3)], float("nan")), ValueError, r"sparsity must be in \[0, 1\), got nan"),
        (lambda op: op([torch.ones(3).int()], 0.5), TypeError, "weights must be float32, float64, bfloat16 or float16"),
        (lambda op: op([torch.ones(3)], 0.5, []), ValueError, "one mask per weight, got 0 masks for 1 weights"),
        (
            lambda op: op([torch.ones(65)], 0.5, [torch.zeros(8, dtype=torch.uint8)]),
            ValueError,
            r"\[magnitude_mask\] mask must hold 16 bytes for 65 elements, got 8",
        ),
        (lambda op: op([torch.ones(3)], 0.5, [torch.zeros(8)]), TypeError, "mask must be uint8, got Float"),
    ],
)
def test_magnitude_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ops.rarefy.magnitude_mask)


def test_apply_errors():
    mask = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[apply_mask_\] mask must hold 16 bytes for 65 elements, got 8"):
        torch.ops.rarefy.apply_mask_(torch.ones(65), mask)
    with pytest.raises(TypeError, match=r"\[apply_mask_\] mask must be uint8, got Long"):
        torch.ops.rarefy.apply_mask_(torch.ones(5), mask.long())
    with pytest.raises(TypeError, match=r"\[apply_mask_\] x must be float32, float64, bfloat16 or float16, got Int"):
        torch.ops.rarefy.apply_mask_(torch.ones(5).int(), mask)
    with pytest.raises(ValueError, match=r"must not overlap itself, got stride 0 in dimension 0 of size 4"):
        torch.ops.rarefy.apply_mask_(torch.ones(1, 3).expand(4, 3), mask)
