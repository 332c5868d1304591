"""Weights in channels-last order: where the model runs with them, and only there."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import QConfig, convert, prepare, prepare_qat, report


class LeNet(nn.Module):
    """Two convolutions with pooling, and two linear layers behind ``view`` or ``flatten``."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view
        self.conv1, self.bn = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.bn(self.conv1(x))), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = x.view(x.shape[0], -1) if self.view else x.flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


def is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def layouts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: parameter.stride() for name, parameter in model.named_parameters()}


def train(model: nn.Module, steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = model(torch.randn(6, 1, 16, 16, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 1, 16, 16)


def test_a_model_with_flatten_gets_channels_last_weights(x):
    model = LeNet(view=False)
    prepared = prepare_qat(model, QConfig.int8(), x)
    # The weight of one input channel is contiguous in both senses.
    assert is_channels_last(prepared.conv2.weight)
    images = torch.rand(2, 6, 5, 5)  # in the usual layout
    assert is_channels_last(prepared.conv2(images))
    assert "not channels-last" not in repr(report(prepared))
    assert torch.equal(prepared.conv2.weight, model.conv2.weight)
    assert layouts(model) == layouts(LeNet(view=False)), "the model given stays as it was"


def test_a_model_that_views_its_activations_works_with_contiguous_weights(x, tmp_path):
    models = {view: LeNet(view) for view in (True, False)}
    models[False].load_state_dict(models[True].state_dict())
    prepared = {view: prepare_qat(model, QConfig.int8(), x) for view, model in models.items()}
    assert all(parameter.is_contiguous() for parameter in prepared[True].parameters())
    notes = {layer.name: layer.note for layer in report(prepared[True]).layers}
    for name in ("conv1", "conv2"):
        assert "not channels-last: view size is not compatible" in notes[name]
    assert "channels-last" not in notes["fc1"]
    assert "batch norm folded, ReLU fused, executes in integers" in notes["conv1"], "the second run was recorded"

    # Both layouts train to the same numbers: gradients are summed in another order only.
    assert train(prepared[True]) == pytest.approx(train(prepared[False]), rel=1e-4)
    evaluated = {view: model.eval()(x).detach() for view, model in prepared.items()}
    integer = convert(prepared[True])
    with torch.no_grad():
        torch.testing.assert_close(integer(x), evaluated[True], rtol=1e-4, atol=1e-4)

    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for view, model in prepared.items():
        exported = rf.export.to_onnx(model, x, tmp_path / f"{view}.onnx")
        assert exported.in_float == ()
        assert all(d.rms <= d.allowed for d in exported.differences)
    exported = rf.export.to_onnx(integer, x, tmp_path / "converted.onnx")
    assert exported.in_float == ()


@pytest.mark.parametrize("view", [False, True])
def test_in_place_keeps_parameters_and_their_values(x, view):
    model = LeNet(view)
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    prepared = prepare_qat(model, QConfig.int8(), x, inplace=True)
    assert prepared is model
    after = dict(prepared.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in values.items())
    assert is_channels_last(prepared.conv2.weight) == (not view)


def test_layouts_of_the_user_stay(x):
    model = LeNet(view=False).to(memory_format=torch.channels_last)
    model.fc1.weight.data = model.fc1.weight.data.t().contiguous().t()
    before = layouts(model)
    assert layouts(prepare_qat(model, QConfig.int8(), x)) == before


def simulated(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat(model, QConfig.int8(execution="simulated"), x)


def without_example(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat(model, QConfig.int8())


def after_training(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare(model, QConfig.int8(), x)


def weights_only(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat(model, QConfig(weight=QConfig.int8().weight), x)


@pytest.mark.parametrize("make", [simulated, without_example, after_training, weights_only])
def test_only_training_in_integers_changes_layouts(x, make):
    model = LeNet(view=False)
    assert layouts(make(model, x)) == layouts(model)


def test_a_preparation_that_fails_leaves_layouts_as_they_were(x):
    class Breaks(LeNet):
        def __init__(self) -> None:
            super().__init__(view=False)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            assert is_channels_last(self.conv2.weight) == (self.calls == 1), "tried with both layouts"
            super().forward(x)
            raise RuntimeError("this model does not run")

    model = Breaks()
    before, data = layouts(model), [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="this model does not run"):
        prepare_qat(model, QConfig.int8(), x, inplace=True)
    assert model.calls == 2
    assert layouts(model) == before

    model = LeNet(view=False)
    data = [parameter.data_ptr() for parameter in model.parameters()]
    for config, message in (
        (QConfig.int8(overrides={"nothing": None}), "override 'nothing' must match a layer"),
        (QConfig.int8(overrides={"*": None}), "must have a layer that the configuration quantizes"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_qat(model, config, x, inplace=True)
        assert layouts(model) == before
        assert [parameter.data_ptr() for parameter in model.parameters()] == data
        assert type(model.conv1) is nn.Conv2d
    with pytest.raises(TypeError):
        prepare_qat(model, QConfig.int8(), {"no_such_argument": x}, inplace=True)
    assert layouts(model) == before
