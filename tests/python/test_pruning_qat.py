"""Zeros through quantization-aware training: the grid has zero, layers keep their masks, integers keep the zeros."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import masks_of, put_masks, stray
from torch import nn

import rarefy as rf
from rarefy.pruning import MagnitudePruner, PolynomialSchedule
from rarefy.pruning.enforce import OptimizerHook, SaveCheck, check_masks, guard, masked_parameters
from rarefy.quantization import (
    PerChannel,
    PerTensor,
    QConfig,
    Scheme,
    convert,
    load_quantized,
    prepare_qat,
    save_quantized,
)

ACTIVATION = Scheme(bits=8, symmetric=False)
CONFIGS = {
    f"{bits} bits{', narrow' if narrow else ''}, {name}": QConfig(
        weight=Scheme(bits=bits, narrow_range=narrow, granularity=granularity), activation=ACTIVATION
    )
    for bits in (8, 7, 4, 3, 2)
    for narrow in (False, True)
    for name, granularity in (("per channel", PerChannel(0)), ("per tensor", PerTensor()))
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 5))

    def forward(self, x):
        return self.head(self.conv2(self.relu(self.bn(self.conv(x)))).mean((2, 3)))


WEIGHTS = ("conv.weight", "conv2.weight", "head.0.weight", "head.2.weight")


def make(seed=0, kept=0.5):
    torch.manual_seed(seed)
    model = Net()
    put_masks(model, kept=kept)
    guard(model)
    return model


def images(step=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps):
    for step in range(*steps):
        optimizer.zero_grad()
        model(images(step)).pow(2).mean().backward()
        optimizer.step()
        assert stray(model) == 0


# --- zero is on the grid ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    magnitude=st.floats(1e-35, 1e35),
    zero=st.sampled_from([0.0, -0.0]),
    seed=st.integers(0, 2**31),
)
def test_zero_is_on_every_weight_grid(name, magnitude, zero, seed):
    """round(0 / scale) * scale is 0 for whatever scale the other weights give; also where a whole channel is pruned."""
    torch.manual_seed(seed)
    model = prepare_qat(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), CONFIGS[name])
    weight = model[0].weight
    kept = torch.rand(5, 7) < 0.5
    kept[1], kept[3] = False, True
    with torch.no_grad():
        weight.copy_(torch.where(kept, torch.randn(5, 7) * magnitude, torch.full((), zero)))
    on_grid = model[0].quant.weight(weight)
    assert not on_grid[~kept].any()
    integers = model[0].quant.weight  # what convert() deploys
    assert not model[0].integer_weight().values[~kept].any()
    assert not integers.zero_point.any()


def test_weights_have_no_zero_point():
    """Why the proof is complete: there is no other weight scheme."""
    for scheme in (Scheme(symmetric=False), Scheme(signed=False)):
        with pytest.raises(ValueError, match="symmetric"):
            QConfig(weight=scheme, activation=ACTIVATION)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["integer", "simulated"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("inputs", [None, "run"])
def test_masks_travel_with_the_layers(execution, inplace, inputs):
    """Names of masks and parameters stay, folded batch normalization or not, and training goes on at zero."""
    model = make()
    names = {name for name, _ in model.named_buffers() if name.endswith("_mask_bits")}
    kept = {name: mask for name, (_, mask) in masks_of(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    OptimizerHook(optimizer, lambda: masked_parameters(model))
    train(model, optimizer, (0, 2))
    config = QConfig.int8(execution=execution)
    prepared = prepare_qat(model, config, images() if inputs else None, inplace=inplace)
    assert {name for name, _ in prepared.named_buffers() if name.endswith("_mask_bits")} == names
    assert {name: mask.tolist() for name, (_, mask) in masks_of(prepared).items()} == {
        name: mask.tolist() for name, mask in kept.items()
    }
    assert type(prepared.conv) is not nn.Conv2d
    if not inplace:
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05, momentum=0.9)
        OptimizerHook(optimizer, lambda: masked_parameters(prepared))
    before = prepared.conv.weight.detach().clone()
    train(prepared, optimizer, (2, 6))
    assert not torch.equal(before, prepared.conv.weight)
    for name in WEIGHTS:
        layer = prepared.get_submodule(name.removesuffix(".weight"))
        assert not layer.integer_weight().values[~kept[name]].any()  # batch normalization folded in, where it is
        assert not layer.weight.grad[~kept[name]].any()
    with torch.no_grad():
        prepared.conv2.weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"'conv2\.weight' must be zero where its mask prunes"):
        prepared.state_dict()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_pruner_goes_on_after_prepare_qat(inplace):
    """In place it goes on by itself; a copy has the masks and the step, and a new pruner continues them."""
    torch.manual_seed(0)
    model = Net()
    options = {"sparsity": 0.8, "schedule": PolynomialSchedule(begin=0, end=8, every=2)}
    pruner = MagnitudePruner(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)).pow(2).mean().backward()
        optimizer.step()
        pruner.step()
    sparsity = pruner.sparsity
    prepared = prepare_qat(model, QConfig.int8(), images(), inplace=inplace)
    if not inplace:
        pruner = MagnitudePruner(prepared, **options)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05, momentum=0.9)
    assert pruner.steps == 3
    assert pruner.sparsity == sparsity
    for step in range(3, 9):
        optimizer.zero_grad()
        prepared(images(step)).pow(2).mean().backward()
        optimizer.step()
        pruner.step()
        assert stray(prepared) == 0
    elements = sum(parameter.numel() for parameter, _ in masks_of(prepared).values())
    assert sum(int((~kept).sum()) for _, kept in masks_of(prepared).values()) == round(0.8 * elements)
    assert pruner.steps == 9
    pruner.finalize()
    converted = convert(prepared)
    zeros = sum(
        int((module.integer_weight == 0).sum()) for module in converted.modules() if hasattr(module, "channel_axis")
    )
    assert zeros >= round(0.8 * elements)


# --- integers ---------------------------------------------------------------------------------------------------------


def prepared_and_trained(config, **options):
    model = prepare_qat(make(), config, images(), **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    OptimizerHook(optimizer, lambda: masked_parameters(model))
    train(model, optimizer, (0, 4))
    return model


@pytest.mark.parametrize("name", ["8 bits, narrow, per channel", "4 bits, narrow, per channel", "2 bits, per tensor"])
def test_convert_keeps_zeros_and_ends_masks(name):
    """The zeros are integers from then on, which nothing trains: masks, step and checks are gone from the result."""
    model = prepared_and_trained(CONFIGS[name])
    model.register_buffer("pruning_step", torch.tensor(4))
    kept = {name: mask for name, (_, mask) in masks_of(model).items()}
    converted = convert(model)
    for layer, mask in kept.items():
        integers = converted.get_submodule(layer.removesuffix(".weight")).integer_weight
        assert integers.dtype == torch.int8
        assert not integers[~mask].any()
        assert integers[mask].any()
    assert not any("mask" in key or key == "pruning_step" for key in converted.state_dict())
    assert not any(isinstance(h, SaveCheck) for m in converted.modules() for h in m._state_dict_pre_hooks.values())
    assert len(masks_of(model)) == 4  # what was given keeps its own
    check_masks(model)
    converted(images())
    convert(model, inplace=True)
    assert not any("mask" in key for key in model.state_dict())


def test_layers_that_stay_in_floating_point_lose_their_masks_too():
    model = prepare_qat(make(), QConfig.int8(overrides={"head.2": None}))
    model(images())
    converted = convert(model)
    assert type(converted.head[2]) is nn.Linear
    assert not any("mask" in key for key in converted.state_dict())


def test_convert_refuses_values_that_left_their_masks():
    model = prepared_and_trained(QConfig.int8())
    with torch.no_grad():
        model.head[0].weight.fill_(1.0)
    before = copy.deepcopy(dict(model.named_buffers()))
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"'head\.0\.weight' must be zero where its mask prunes"):
            convert(model, inplace=inplace)
    assert dict(model.named_buffers()).keys() == before.keys()


def test_saved_and_loaded_integers(tmp_path):
    model = prepared_and_trained(QConfig.int8())
    kept = {name: mask for name, (_, mask) in masks_of(model).items()}
    converted = convert(model)
    save_quantized(converted, tmp_path / "model")
    loaded = load_quantized(Net(), tmp_path / "model")
    for layer, mask in kept.items():
        assert not loaded.get_submodule(layer.removesuffix(".weight")).integer_weight[~mask].any()
    assert torch.equal(loaded(images()), converted(images()))


def test_an_exported_model_has_the_zeros(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = prepared_and_trained(QConfig.int8(target="onnxruntime"))
    kept = {name: mask for name, (_, mask) in masks_of(model).items()}
    path = tmp_path / "model.onnx"
    rf.export.to_onnx(model.eval(), (images(),), path)
    shapes = {tuple(mask.shape): mask for mask in kept.values()}
    found = 0
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            integers = onnx.numpy_helper.to_array(tensor)
            for shape, mask in shapes.items():
                for values in (integers, integers.T if integers.ndim == 2 else integers):
                    if values.shape == shape:
                        assert not np.asarray(values)[~mask.numpy()].any()
                        found += 1
                        break
    assert found == len(shapes) == 4


def test_folding_batch_normalization_keeps_zeros():
    model = prepared_and_trained(QConfig.int8())
    kept = masks_of(model)["conv.weight"][1]
    assert "ConvBn" in type(model.conv).__name__
    folded = model.conv.integer_weight()
    assert not folded.values[~kept].any()
    with torch.no_grad():
        model.bn.running_var.fill_(1e-12)
    assert not model.conv.integer_weight().values[~kept].any()
