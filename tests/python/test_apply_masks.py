"""torch.ops.rarefy.apply_masks_ and stray_values against loops over booleans."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import pack

import rarefy as rf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = [isa for isa in ("plain", "avx2", "avx512") if isa in rf._core.show_config().split("in use")[0]]


@pytest.fixture(params=ISAS)
def isa(request, restore_instruction_set):
    rf._core.set_instruction_set(request.param)
    return request.param


def reference_stray(x, kept):
    """(count, first) in a plain loop."""
    count, first = 0, -1
    for i, (value, keep) in enumerate(zip(x.reshape(-1).tolist(), kept.reshape(-1).tolist(), strict=True)):
        if not keep and value != 0.0:
            first = i if count == 0 else first
            count += 1
    return [count, first]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=0, max_size=5),
    kept=st.floats(0, 1),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_matches_loops(sizes, kept, zeros, dtype, seed):
    random = np.random.default_rng(seed)
    keep = [random.random(n) < kept for n in sizes]
    xs = [torch.from_numpy(random.standard_normal(n) * (random.random(n) >= zeros)).to(dtype) for n in sizes]
    masks = [pack(k) for k in keep]
    rows = torch.ops.rarefy.stray_values(xs, masks) if xs else torch.empty(0, 2)
    assert rows.tolist() == [reference_stray(x, k) for x, k in zip(xs, keep, strict=True)]
    expected = [
        torch.where(torch.from_numpy(k), x, torch.zeros((), dtype=dtype)) for x, k in zip(xs, keep, strict=True)
    ]
    if xs:
        torch.ops.rarefy.apply_masks_(xs, masks)
    for x, e in zip(xs, expected, strict=True):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        assert torch.equal(x.view(bits), e.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 64, 1023, 1024, 16_383, 16_384, 39_990, 40_000])
def test_one_stray_value_is_found_anywhere(isa, dtype, place):
    """Of several tensors, at the borders of words, blocks and pieces, in the tail."""
    xs = [torch.zeros(n, dtype=dtype) for n in (70, 40_001, 5)]
    masks = [pack(np.zeros(x.numel(), dtype=bool)) for x in xs]
    assert torch.ops.rarefy.stray_values(xs, masks).tolist() == [[0, -1]] * 3
    xs[1][place] = torch.finfo(dtype).smallest_normal
    assert torch.ops.rarefy.stray_values(xs, masks).tolist() == [[0, -1], [1, place], [0, -1]]
    torch.ops.rarefy.apply_masks_(xs, masks)
    assert not any(x.any() for x in xs)


def test_special_values(isa):
    tiny = float(np.float32(1e-45))
    x = torch.tensor([0.0, -0.0, float("nan"), tiny, -tiny, float("inf"), 1.0])
    mask = pack(np.array([False] * 6 + [True]))
    assert torch.ops.rarefy.stray_values([x], [mask]).tolist() == [[4, 2]]
    torch.ops.rarefy.apply_masks_([x], [mask])
    assert torch.equal(x.view(torch.int32), torch.tensor([0.0] * 6 + [1.0]).view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.flatten()[::3],
    ],
)
def test_strided(view, dtype):
    random = np.random.default_rng(3)
    base = torch.from_numpy(random.standard_normal((33, 40, 5, 7))).to(dtype)
    x, untouched = view(base), base.clone()
    kept = random.random(tuple(x.shape)) > 0.3
    small = torch.ones(3, dtype=dtype)
    masks = [pack(kept), pack(np.array([True, False, True]))]
    rows = torch.ops.rarefy.stray_values([x, small], masks).tolist()
    assert rows == [reference_stray(x, kept), [1, 1]]
    expected = torch.where(torch.from_numpy(kept), x, torch.zeros((), dtype=dtype))
    torch.ops.rarefy.apply_masks_([x, small], masks)
    assert torch.equal(x, expected)
    assert small.tolist() == [1, 0, 1]
    if x.data_ptr() == base.data_ptr() and x.numel() < base.numel():
        assert (base != untouched).sum() <= (~kept).sum()  # and nothing between the elements of the view


@pytest.mark.cuda
def test_cuda(cuda):
    random = np.random.default_rng(5)
    xs = [torch.from_numpy(random.standard_normal(s)).to(cuda, torch.float32) for s in ((9, 31), (0, 3), (1000,))]
    keep = [random.random(tuple(x.shape)) > 0.5 for x in xs]
    masks = [pack(k).to(cuda) for k in keep]
    expected = [reference_stray(x.cpu(), k) for x, k in zip(xs, keep, strict=True)]
    assert torch.ops.rarefy.stray_values(xs, masks).tolist() == expected
    torch.ops.rarefy.apply_masks_(xs, masks)
    assert torch.ops.rarefy.stray_values(xs, masks).tolist() == [[0, -1]] * 3


def test_kept_stretches_are_neither_read_nor_written():
    """A full mask: a tensor over memory that must not be touched (its version, its pages) stays as it is."""
    x = torch.full((40_000,), float("nan"))
    mask = pack(np.ones(40_000, dtype=bool))
    assert torch.ops.rarefy.stray_values([x], [mask]).tolist() == [[0, -1]]
    torch.ops.rarefy.apply_masks_([x], [mask])
    assert x.isnan().all()


def test_threads_do_not_matter():
    random = np.random.default_rng(6)
    x = torch.from_numpy(random.standard_normal(200_000)).float()
    mask = pack(random.random(200_000) > 0.5)
    threads = torch.get_num_threads()
    rows = []
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        rows.append(torch.ops.rarefy.stray_values([x], [mask]).tolist())
    torch.set_num_threads(threads)
    assert rows[0] == rows[1] == rows[2]


def test_opcheck():
    xs = [torch.randn(70), torch.randn(5, 9)]
    masks = torch.ops.rarefy.magnitude_mask(xs, 0.5)
    torch.library.opcheck(torch.ops.rarefy.apply_masks_, (xs, masks))
    torch.library.opcheck(torch.ops.rarefy.stray_values, (xs, masks))


def test_gradients_and_versions():
    x = torch.nn.Parameter(torch.randn(10))
    masks = torch.ops.rarefy.magnitude_mask([x], 0.5)
    with pytest.raises(
        ValueError, match=r"\[apply_masks_\] tensors must not require grad while gradients are recorded"
    ):
        torch.ops.rarefy.apply_masks_([x], masks)
    loss, version = (x * x).sum(), x._version
    torch.ops.rarefy.stray_values([x], masks)
    assert x._version == version
    with torch.no_grad():
        torch.ops.rarefy.apply_masks_([x], masks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", [torch.ops.rarefy.apply_masks_, torch.ops.rarefy.stray_values])
def test_errors(op):
    name = op.__name__
    mask = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"\[{name}\] needs one mask per tensor, got 1 masks for 2 tensors"):
        op([torch.ones(3), torch.ones(3)], [mask])
    with pytest.raises(ValueError, match=rf"\[{name}\] mask must hold 16 bytes for 65 elements, got 8"):
        op([torch.ones(3), torch.ones(65)], [mask, mask])
    with pytest.raises(TypeError, match=rf"\[{name}\] mask must be uint8, got Long"):
        op([torch.ones(5)], [mask.long()])
    with pytest.raises(TypeError, match=rf"\[{name}\] tensors must be float32, float64, bfloat16 or float16, got Int"):
        op([torch.ones(5).int()], [mask])
    with pytest.raises(ValueError, match=r"stride 0 in dimension 0 of size 4 in tensor 1"):
        op([torch.ones(3), torch.ones(1, 3).expand(4, 3)], [mask, mask])
    first = torch.ones(3)
    with pytest.raises(ValueError, match="must hold 16 bytes"):
        op([first, torch.ones(65)], [mask, mask])
    assert first.tolist() == [1, 1, 1]  # nothing has changed
