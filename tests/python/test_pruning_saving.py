"""Models whose zeros left the mask: saving them is an error, and what others wrote is masked again."""

import copy
import io
import pickle
from typing import ClassVar

import pytest
import torch
from masks import masks_of, put_masks, stray
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

import rarefy as rf
from rarefy.distillation import EMATeacher
from rarefy.masks import SaveCheck, check_masks, guard, masked, masked_parameters, remask, remove_masks, unguard
from rarefy.pruning.enforce import OptimizerHook


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.bn = nn.BatchNorm2d(7)
        self.head = nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def make(seed=0, **masks):
    torch.manual_seed(seed)
    model = Net()
    put_masks(model, **masks)
    return model


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 3, 8, 8, generator=generator).to(dtype), torch.randint(0, 5, (8,), generator=generator)


def backward(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def attach(model, optimizer, **callbacks):
    return OptimizerHook(optimizer, lambda: masked_parameters(model), **callbacks)


# --- saving -----------------------------------------------------------------------------------------------------------


def break_masks(model, name="head.0.weight"):
    """Set pruned values; returns how many and the first flat index."""
    parameter, kept = masks_of(model)[name]
    index = (~kept).flatten().nonzero().flatten()
    with torch.no_grad():
        parameter.view(-1)[index[2:]] = 0.5
    return len(index) - 2, int(index[2])


def test_saving_a_model_whose_zeros_left_the_mask():
    model = make()
    guard(model)
    model.state_dict()
    count, first = break_masks(model)
    where = rf"but {count} values are not, the first at flat index {first}\."
    message = rf"head\.0\.weight' must be zero where its mask prunes, {where}"
    with pytest.raises(ValueError, match=r"\[state_dict\] '" + message):
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(ValueError, match=r"'student\." + message):
        nn.ModuleDict({"student": model}).state_dict()
    with pytest.raises(ValueError, match=message.replace(r"head\.0\.", "")):
        model.head[0].state_dict()  # a part by itself, whose names are its own
    model.conv.state_dict()  # another part is fine
    with pytest.raises(ValueError, match=r"\[check_masks\] '" + message):
        check_masks(model)
    assert remask(model) == count
    model.state_dict()
    check_masks(model)
    assert remask(model) == 0


def test_several_parameters_are_counted():
    model = make()
    break_masks(model)
    break_masks(model, "conv.weight")
    with pytest.raises(ValueError, match=r"'conv\.weight' must.*and so in 1 more of its parameters"):
        check_masks(model)


def test_one_value_is_said_as_one():
    model = make()
    parameter, kept = masks_of(model)["head.2.weight"]
    first = int((~kept).flatten().nonzero()[0])
    with torch.no_grad():
        parameter.view(-1)[first] = float("nan")
    with pytest.raises(ValueError, match=rf"but 1 value is not, at flat index {first}\."):
        check_masks(model)


def test_saving_can_mask_instead():
    model = make()
    guard(model, "mask")
    break_masks(model)
    state = model.state_dict()
    assert stray(model) == 0
    assert torch.equal(state["head.0.weight"], model.head[0].weight)
    guard(model, "error")  # replaces it
    break_masks(model)
    with pytest.raises(ValueError, match="must be zero"):
        model.state_dict()
    with pytest.raises(ValueError, match=r"\[guard\] on_violation must be 'error' or 'mask', got 'warn'"):
        guard(model, "warn")
    unguard(model)
    model.state_dict()


def test_checks_are_copied_and_pickled_with_the_model():
    model = make()
    guard(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for copied in copies:
        copied.state_dict()
        break_masks(copied)
        with pytest.raises(ValueError, match="must be zero"):
            copied.state_dict()
    model.state_dict()  # of itself alone
    guard(copies[0])
    hooks = [hook for m in copies[0].modules() for hook in m._state_dict_pre_hooks.values()]
    assert sum(isinstance(hook, SaveCheck) for hook in hooks) == 3


def test_rarefys_own_files_are_checked(tmp_path):
    model = make()
    guard(model)
    break_masks(model)
    with pytest.raises(ValueError, match="must be zero where its mask prunes"):
        rf.pruning.save_pruned(model, tmp_path / "pruned.safetensors")
    assert not list(tmp_path.iterdir())


def test_remove_masks():
    model, plain = make(), Net()
    model.register_buffer("pruning_step", torch.tensor(3))
    guard(model)
    remove_masks(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    break_hooks = [hook for m in model.modules() for hook in m._state_dict_pre_hooks.values()]
    assert not break_hooks
    plain.load_state_dict(model.state_dict())


def test_a_state_with_masks_in_a_model_without():
    model, plain = make(), Net()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert set(result.unexpected_keys) == {f"{n}_mask_bits" for n in masks_of(model)}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_dense_state_in_a_model_with_masks():
    model = make()
    guard(model)
    result = model.load_state_dict(Net().state_dict(), strict=False)
    assert len(result.missing_keys) == 3
    with pytest.raises(ValueError, match=r"call remask\(\)"):
        model.state_dict()
    assert remask(model) > 0
    model.state_dict()


# --- weights that others write ----------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Low-rank adaptation of a linear layer, merged as the usual tools do it."""

    def __init__(self, layer, rank=2, scale=0.5):
        super().__init__()
        self.base_layer = layer
        self.a = nn.Parameter(torch.randn(rank, layer.in_features))
        self.b = nn.Parameter(torch.randn(layer.out_features, rank))
        self.scale = scale

    def delta(self):
        return self.b @ self.a * self.scale

    def merge(self):
        self.base_layer.weight.data += self.delta()

    def unmerge(self):
        self.base_layer.weight.data -= self.delta()

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T * self.scale


def test_lora():
    model = make()
    guard(model)
    kept = masks_of(model)["head.0.weight"][1]
    before = model.head[0].weight.detach().clone()
    model.head[0] = LoRA(model.head[0])
    model.state_dict()
    model.head[0].merge()
    with pytest.raises(ValueError, match=r"'head\.0\.base_layer\.weight' must be zero"):
        model.state_dict()
    assert remask(model) == int((~kept).sum())
    expected = torch.where(kept, before + model.head[0].delta(), torch.zeros(()))
    assert torch.equal(model.head[0].base_layer.weight, expected)
    with masked(model) as same:
        assert same is model
        model.head[0].unmerge()
        assert stray(model) > 0
    assert stray(model) == 0
    torch.testing.assert_close(model.head[0].base_layer.weight, before)
    model.head[0] = model.head[0].base_layer
    model.state_dict()


def test_masks_are_applied_after_an_exception_too():
    model = make()

    def merge():
        with masked(model):
            break_masks(model)
            raise KeyError("merge failed")

    with pytest.raises(KeyError):
        merge()
    assert stray(model) == 0


def test_peft():
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    put_masks(model)
    guard(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    merged = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="must be zero"):
        merged.state_dict()
    assert remask(merged) > 0
    merged.state_dict()


def test_averages_are_in_the_final_mask():
    """Weights that were pruned on the way are not zero in the mean of the models."""
    model = make(kept=0.9)
    teacher, averaged = EMATeacher(model, decay=0.5), AveragedModel(model)
    guard(averaged)
    for seed in range(3):
        if seed == 2:
            put_more(model)
        with torch.no_grad():
            for parameter, kept in masks_of(model).values():
                parameter.copy_(torch.where(kept, torch.randn(parameter.shape), torch.zeros(())))
        teacher.update(model)
        averaged.update_parameters(model)
    final = {name: kept for name, (_, kept) in masks_of(model).items()}
    for name, (parameter, kept) in masks_of(teacher.averaged_module).items():
        assert torch.equal(kept, final[name])
        assert not parameter[~kept].any()
        assert parameter[kept].all()
    teacher.state_dict()
    with pytest.raises(ValueError, match=r"'module\.conv\.weight' must be zero"):
        averaged.state_dict()
    assert remask(averaged) > 0  # its buffers are those of the model, so its masks are the final ones
    averaged.state_dict()
    averaged.module.head[0].weight_mask_bits.zero_()  # as with use_buffers, which averages bits
    with torch.no_grad():
        averaged.module.conv.weight.fill_(1.0)
    assert remask(averaged.module, masks_of=model) > 0
    for name, (parameter, kept) in masks_of(averaged.module).items():
        assert torch.equal(kept, final[name])
        assert not parameter[~kept].any()
    averaged.state_dict()
    plain = Net()
    plain.load_state_dict(averaged.module.state_dict(), strict=False)
    with torch.no_grad():
        plain.conv.weight.fill_(1.0)
    assert remask(plain, masks_of=model) == int((~final["conv.weight"]).sum())  # a model without masks of its own
    assert not hasattr(plain.conv, "weight_mask_bits")
    with pytest.raises(
        ValueError, match=r"\[remask\] 'conv\.weight' must be a parameter of the model, but it has no module"
    ):
        remask(nn.Sequential(nn.Linear(2, 2)), masks_of=model)


def put_more(model):
    """Prune more, in the buffers that are there."""
    for module in model.modules():
        if hasattr(module, "weight_mask_bits"):
            other = nn.Module()
            other.weight = nn.Parameter(torch.ones(module.weight.shape))
            put_masks(other, kept=0.5, seed=9)
            module.weight_mask_bits &= other.weight_mask_bits
            torch.ops.rarefy.apply_mask_(module.weight.data, module.weight_mask_bits)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_computed_weights_are_refused():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook = attach(model, optimizer)
    parametrize.register_parametrization(model.head[0], "weight", Halved())
    for call in (lambda: check_masks(model), lambda: remask(model), lambda: optimizer.step()):
        with pytest.raises(
            ValueError, match=r"'head\.0\.weight' must be a parameter, but torch\.nn\.utils\.parametrize"
        ):
            call()
    hook.remove()
    model = make()
    prune.random_unstructured(model.head[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"'head\.0\.weight' must be a parameter, but its module Linear computes it"):
        check_masks(model)
    model = make()
    del model.head[0].weight
    with pytest.raises(ValueError, match=r"'head\.0\.weight' must be a parameter of Linear, which has a mask for it"):
        check_masks(model)


def test_the_parameter_behind_a_parametrization_can_have_a_mask():
    model = Net()
    parametrize.register_parametrization(model.head[0], "weight", Halved())
    put_masks(model.head)
    assert set(masks_of(model)) == {"head.2.weight", "head.0.parametrizations.weight.original"}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        assert stray(model) == 0
    assert not model.head[0].weight[~masks_of(model)["head.0.parametrizations.weight.original"][1]].any()


class Fake(nn.Parameter):
    """A subclass, as FSDP's and tensor parallel's."""

    kind: ClassVar[str] = "fake"


def test_sharded_weights_are_refused():
    model = make()
    model.conv._parameters["weight"] = model.conv.weight.data.as_subclass(Fake)
    with pytest.raises(ValueError, match=r"'conv\.weight' must be a plain tensor, got Fake: weights that are sharded"):
        check_masks(model)


def test_masks_that_do_not_fit():
    model = make()
    model.head[0].weight_mask_bits = torch.zeros(8, dtype=torch.uint8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"the mask of 'head\.0\.weight' must hold 16 bytes \(uint8\) for shape \[13, 7\], got 8"
    ):
        remask(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
