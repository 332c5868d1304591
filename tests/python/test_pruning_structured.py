"""Removal of slices from a model with masks: the packed bits are cut along, in the transaction."""

import copy

import numpy as np
import pytest
import torch
from masks import masks_of, pack, put_masks, stray, unpack
from torch import nn

import rarefy as rf
from rarefy.pruning import MagnitudePruner, PolynomialSchedule, StructuredPruner, Surgery, load_pruned, save_pruned
from rarefy.pruning.enforce import OptimizerHook, check_masks, guard, masked_parameters

Cut = rf.pruning.Cut


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 9, 3)
        self.head = nn.Sequential(nn.Linear(9, 13), nn.ReLU(), nn.Linear(13, 5))

    def forward(self, x):
        return self.head(self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3)))


def make(seed=0):
    torch.manual_seed(seed)
    model = Net()
    put_masks(model, kept=0.6)
    guard(model)
    return model


def cuts(kept=(0, 2, 3, 7)):
    kept = list(kept)
    return [
        Cut("conv1.weight", 0, kept), Cut("conv1.bias", 0, kept), Cut("bn.weight", 0, kept), Cut("bn.bias", 0, kept),
        Cut("bn.running_mean", 0, kept), Cut("bn.running_var", 0, kept), Cut("conv2.weight", 1, kept),
    ]  # fmt: skip


def images():
    return torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2), (70, 3), (2, 130), (3, 4, 3, 3)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_bits_are_those_of_the_slices_that_stay(shape, memory):
    """Any dimensions, several at once, against booleans indexed by NumPy; also where the weight lies channels-last."""
    if memory == torch.channels_last and len(shape) != 4:
        pytest.skip("of images")
    random = np.random.default_rng(0)
    for dims in [(0,), (1,), tuple(range(len(shape)))]:
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(shape).contiguous(memory_format=memory))
        kept = random.random(shape) < 0.5
        model.register_buffer("weight_mask_bits", pack(kept))
        with torch.no_grad():
            model.weight[torch.from_numpy(~kept)] = 0
        values, mask = model.weight.detach().clone(), model.weight_mask_bits
        left = {dim: sorted(random.choice(shape[dim], random.integers(1, shape[dim]), replace=False)) for dim in dims}
        left = {dim: [int(i) for i in indices] for dim, indices in left.items()}
        with Surgery(model) as surgery:
            surgery.apply([Cut("weight", dim, indices) for dim, indices in left.items()])
            surgery.commit()
        expected_kept, expected = kept, values
        for dim, indices in left.items():
            expected_kept = np.take(expected_kept, indices, axis=dim)
            expected = expected.index_select(dim, torch.tensor(indices))
        assert model.weight_mask_bits is mask
        assert torch.equal(model.weight, expected)
        assert torch.equal(unpack(mask, tuple(expected.shape)), torch.from_numpy(expected_kept))
        check_masks(model)


def test_rollback_brings_the_masks_back():
    model = make()
    before = copy.deepcopy(model)
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    with Surgery(model) as surgery:
        surgery.apply(cuts())
        assert model.conv1.weight_mask_bits.numel() != before.conv1.weight_mask_bits.numel()
        check_masks(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name))
        assert buffer.data_ptr() == pointers[name]
    check_masks(model)


def test_what_else_pruners_keep_is_cut_along():
    model = make()
    for name in ("score", "latent", "rewind"):
        model.conv2.register_buffer(f"weight_mask_{name}", torch.arange(9.0 * 10 * 9).view(9, 10, 3, 3))
    model.conv1.register_buffer("bias_mask_rewind", torch.arange(10.0))
    with Surgery(model) as surgery:
        surgery.apply(cuts())
        surgery.commit()
    expected = torch.arange(9.0 * 10 * 9).view(9, 10, 3, 3)[:, [0, 2, 3, 7]]
    assert all(torch.equal(model.conv2.get_buffer(f"weight_mask_{n}"), expected) for n in ("score", "latent", "rewind"))
    assert model.conv1.bias_mask_rewind.tolist() == [0, 2, 3, 7]


def test_errors_leave_everything():
    model = make()
    before = copy.deepcopy(model)
    surgery = Surgery(model)
    with pytest.raises(ValueError, match=r"conv1\.weight_mask_bits must be cut by a cut of what it belongs to"):
        surgery.apply([Cut("conv1.weight_mask_bits", 0, [0, 1])])
    model.conv2.weight_mask_bits = torch.zeros(8, dtype=torch.uint8)
    surgery = Surgery(model)
    with pytest.raises(
        ValueError, match=r"conv2\.weight_mask_bits must fit conv2\.weight of shape \[9, 10, 3, 3\], as packed"
    ):
        surgery.apply(cuts())
    model.conv2.weight_mask_bits = before.conv2.weight_mask_bits
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    check_masks(model)


def test_training_goes_on():
    """Optimizer, hook and masks follow: the next steps hold the zeros that are left."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    OptimizerHook(optimizer, lambda: masked_parameters(model))
    train(model, optimizer)
    with Surgery(model, optimizer) as surgery:
        surgery.apply(cuts())
        surgery.commit()
    assert stray(model) == 0
    before = model.conv2.weight.detach().clone()
    train(model, optimizer)
    assert stray(model) == 0
    assert not torch.equal(model.conv2.weight, before)
    model.state_dict()


def test_tied_weights_have_one_mask():
    model = nn.ModuleDict({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False)})
    model["b"].weight = model["a"].weight
    put_masks(model["a"])
    kept = masks_of(model)["a.weight"][1]
    with Surgery(model) as surgery:
        surgery.apply([Cut("b.weight", 1, [1, 4])])  # by the other name
        surgery.commit()
    assert torch.equal(masks_of(model)["a.weight"][1], kept[:, [1, 4]])


@pytest.mark.parametrize("target", [{"channels": 0.4}, {"macs": 0.5}])
def test_structured_pruner(target):
    """The transaction with its verification, on a model that a mask pruner holds: both go on."""
    torch.manual_seed(0)
    model = Net()
    masks = MagnitudePruner(model, 0.6, schedule=PolynomialSchedule(0, 6, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        train(model, optimizer, 1)
        masks.step()
    before = masks.sparsity
    StructuredPruner(model, images(), **target).prune(optimizers=[optimizer])
    assert model.conv1.out_channels < 10
    assert stray(model) == 0
    assert masks.steps == 3
    assert masks.sparsity == pytest.approx(before, abs=0.25)
    for _ in range(4):
        train(model, optimizer, 1)
        masks.step()
        assert stray(model) == 0
    elements = sum(parameter.numel() for parameter, _ in masks_of(model).values())
    assert sum(int((~kept).sum()) for _, kept in masks_of(model).values()) == round(0.6 * elements)
    masks.finalize()


def test_a_file_with_masks(tmp_path):
    """Of a model with a pruner, into one with a pruner: the masks of the file are those of the shapes that are left."""
    torch.manual_seed(0)
    model = Net()
    MagnitudePruner(model, 0.5).step()
    with Surgery(model) as surgery:
        surgery.apply(cuts())
        surgery.commit()
    save_pruned(model, tmp_path / "pruned.safetensors")
    other = Net()
    with pytest.raises(ValueError, match=r"unexpected are: .*conv1\.weight_mask_bits"):
        load_pruned(other, tmp_path / "pruned.safetensors")
    other = Net()
    pruner = MagnitudePruner(other, 0.5)
    load_pruned(other, tmp_path / "pruned.safetensors")
    assert pruner.steps == 1
    for name, (parameter, kept) in masks_of(model).items():
        assert torch.equal(masks_of(other)[name][0], parameter)
        assert torch.equal(masks_of(other)[name][1], kept)
    assert torch.equal(other.eval()(images()), model.eval()(images()))
