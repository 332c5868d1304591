"""What torch.nn.utils.prune has pruned becomes an ordinary model with masks beside its parameters, and the way back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rarefy as rf
from rarefy.pruning import export_torch_pruning, import_torch_pruning


def torch_pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 7))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[3], "weight", amount=0.3)
    prune.l1_unstructured(model[3], "weight", amount=0.5)  # a container of two
    prune.random_unstructured(model[3], "bias", amount=3)
    return model


def kept(bits: torch.Tensor, like: torch.Tensor) -> np.ndarray:
    return np.unpackbits(bits.numpy(), bitorder="little")[: like.numel()].astype(bool).reshape(like.shape)


def test_state_dict():
    model = torch_pruned()
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    out = import_torch_pruning(state)
    assert set(out) == {
        "0.weight", "0.bias", "3.weight", "3.bias", "4.weight", "4.bias", "0.weight_mask_bits", "3.weight_mask_bits",
        "3.bias_mask_bits", "pruning_step",
    }  # fmt: skip
    for name in ("0.weight", "3.weight", "3.bias"):
        mask = state[f"{name}_mask"]
        assert torch.equal(out[name], state[f"{name}_orig"] * mask)
        assert not out[name][mask == 0].signbit().any()
        np.testing.assert_array_equal(kept(out[f"{name}_mask_bits"], mask), mask.numpy() == 1)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    back = export_torch_pruning(out)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state if not name.endswith("_orig"))
    assert all(
        torch.equal(back[n], state[n] * state[n.replace("_orig", "_mask")]) for n in state if n.endswith("_orig")
    )


def test_a_state_goes_into_a_pruner():
    model = torch_pruned()
    state = import_torch_pruning(model.state_dict())
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 7))
    names = ["0.weight", "3.weight", "3.bias"]
    schedule = rf.pruning.PolynomialSchedule(begin=1, end=3, initial=0.5)
    pruner = rf.pruning.MagnitudePruner(fresh, 0.9, include=names, schedule=schedule)
    fresh.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), model(x))
    for _ in range(3):
        pruner.step()
    assert abs(pruner.sparsity - 0.9) < 1e-3
    for name in names:  # what was pruned stays pruned
        module, parameter = fresh.get_submodule(name[0]), name[2:]
        assert not kept(getattr(module, f"{parameter}_mask_bits"), getattr(module, parameter))[
            model.state_dict()[f"{name}_mask"].numpy() == 0
        ].any()


def test_a_live_model():
    model = torch_pruned()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x).detach()
    originals = {name: parameter for name, parameter in model.named_parameters() if name.endswith("_orig")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    assert import_torch_pruning(model) is model
    assert torch.equal(model(x), expected)
    for name, parameter in originals.items():
        module = model.get_submodule(name[0])
        assert getattr(module, name[2:].removesuffix("_orig")) is parameter
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight", "0.bias", "3.weight", "3.bias", "4.weight", "4.bias"
    ]  # fmt: skip
    assert all(p in set(model.parameters()) for group in optimizer.param_groups for p in group["params"])
    copy.deepcopy(model)  # which torch's pruned models refuse after a forward pass
    pruner = rf.pruning.MagnitudePruner(model, 0.6, include=["0.weight", "3.weight", "3.bias"])
    assert pruner.steps == 0
    before = pruner.sparsity
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        pruner.step()
    assert pruner.sparsity >= before
    assert not prune.is_pruned(model)


def test_the_model_itself_may_be_the_layer():
    layer = prune.l1_unstructured(nn.Linear(6, 4), "weight", amount=0.5)
    weight = layer.weight.detach().clone()
    import_torch_pruning(layer)
    assert torch.equal(layer.weight, weight)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask_bits", "pruning_step"]


def test_spectral_norm_is_left_alone():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    out = import_torch_pruning(model.state_dict())
    assert "0.weight_orig" in out
    assert "1.weight_mask_bits" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight_mask"), "'0.weight_orig' must come with '0.weight_mask', got none"),
        (lambda s: s.update({"0.weight": torch.ones(1)}), "'0.weight' must not be there beside '0.weight_orig'"),
        (lambda s: s["0.weight_mask"].view(-1)[0].fill_(0.5), "'0.weight_mask' must be 0 or 1 everywhere"),
        (lambda s: s["0.weight_mask"].view(-1)[0].fill_(float("nan")), "'0.weight_mask' must be 0 or 1 everywhere"),
        (
            lambda s: s.update({"0.weight_mask": torch.ones(8)}),
            r"'0.weight_mask' must have the shape of '0.weight_orig', \[8, 3, 3, 3\]",
        ),
        (lambda s: s.update({"0.weight_mask_bits": torch.ones(8)}), "'0.weight_mask_bits' must not be there already"),
    ],
)
def test_state_errors(change, message):
    state = torch_pruned().state_dict()
    change(state)
    with pytest.raises(ValueError, match=rf"\[import_torch_pruning\] {message}"):
        import_torch_pruning(state)


def test_nothing_to_do():
    for nothing in (nn.Linear(2, 2), nn.Linear(2, 2).state_dict()):
        with pytest.raises(ValueError, match=r"\[import_torch_pruning\] the state must be that of a model pruned by"):
            import_torch_pruning(nothing)
    with pytest.raises(ValueError, match=r"\[export_torch_pruning\] the state must have masks"):
        export_torch_pruning(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"'w_mask_bits' must come with 'w', got none"):
        export_torch_pruning({"w_mask_bits": torch.zeros(8, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"'w_mask_bits' must hold 8 bytes \(uint8\) for shape \[3\], got 16"):
        export_torch_pruning({"w": torch.ones(3), "w_mask_bits": torch.zeros(16, dtype=torch.uint8)})


def test_a_model_that_is_refused_stays_as_it_was():
    model = torch_pruned()
    with torch.no_grad():
        model[3].bias_mask[0] = 2.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'3.bias_mask' must be 0 or 1 everywhere"):
        import_torch_pruning(model)
    assert before.keys() == model.state_dict().keys()
    assert len(model[3]._forward_pre_hooks) == 2
    model = torch_pruned()
    model[0]._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="0 must have torch's pruning hook for 'weight', got none"):
        import_torch_pruning(model)
