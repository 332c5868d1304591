"""Masks that hold: around optimizers' steps, before saving, after merges, and under what else training does."""

import copy
import pickle

import pytest
import torch
from masks import masks_of, put_masks, stray
from torch import nn
from torch.utils.checkpoint import checkpoint

import rarefy as rf
from rarefy.masks import guard, masked_parameters
from rarefy.pruning.enforce import OptimizerHook, enforce, moments_of


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


def pruned_state(model, optimizer):
    """Every tensor of a parameter's shape that an optimizer keeps, at pruned places."""
    found = {}
    for name, (parameter, kept) in masks_of(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                found[f"{name}.{key}"] = value[~kept]
    return found


class Lamb(torch.optim.Optimizer):
    """An optimizer that torch does not have: a trust ratio over the whole tensor, state in a dict of a list."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["moments"] = [torch.zeros_like(p), torch.zeros_like(p)]
                state["step"] += 1
                first, second = state["moments"]
                first.lerp_(p.grad, 0.1)
                second.lerp_(p.grad**2, 0.01)
                update = first / (second.sqrt() + 1e-6) + 0.01 * p
                p.add_(update, alpha=-group["lr"] * float(p.norm() / update.norm()))


class Langevin(torch.optim.SGD):
    """Adds noise to every weight: zeros do not stay zeros by themselves."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3)


def only_matrices(make_optimizer):
    def build(parameters):
        return make_optimizer([p for p in parameters if p.dim() == 2])

    return build


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, maximize=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adam eps 0": lambda p: torch.optim.Adam(p, 0.01, eps=0.0),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1, weight_decay=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "lamb": Lamb,
    "langevin": lambda p: Langevin(p, 0.1, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = only_matrices(lambda p: torch.optim.Muon(p, 0.01))
# What maps zeros to zeros in exact arithmetic and in floating point, whatever the hyper-parameters: nothing is written.
KEEP_ZEROS = [name for name in OPTIMIZERS if name.split()[0] in (
    "sgd", "momentum", "nesterov", "dampening", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adadelta",
) and name != "adam eps 0"]  # fmt: skip


def held(model, optimizer, names=None):
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: pair for name, pair in masks_of(model).items() if id(pair[0]) in parameters}


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_gradients_and_moments_after_each_step(name):
    """Also where optimizer and weights come from dense training: moments are set to zero where masks prune."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(3):
        backward(model, step)
        optimizer.step()
    put_masks(model)
    attach_to = model if name != "muon" else model.head
    if name == "muon":
        for key in ("conv.weight_mask_bits",):
            delattr(model.conv, key.split(".")[1])
    attach(attach_to, optimizer)
    for step in range(3, 9):
        backward(model, step)
        assert any(p.grad[~kept].any() for p, kept in held(model, optimizer).values())
        optimizer.step()
        assert stray(model) == 0
        assert all(not p.grad[~kept].any() for p, kept in held(model, optimizer).values())
        state = pruned_state(model, optimizer)
        assert not any(value.any() for value in state.values()), [key for key, value in state.items() if value.any()]
        assert all(torch.isfinite(p).all() for p, _ in held(model, optimizer).values()) or name == "adam eps 0"
    if name not in ("sgd", "adafactor", "lamb"):
        assert state
    assert any(p[kept].all() for p, kept in held(model, optimizer).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_enforcement_zeros_come_back(name):
    """What the others guard against: every one of these optimizers moves pruned weights."""
    model = make()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert stray(model) > 0


@pytest.mark.parametrize("name", KEEP_ZEROS)
def test_zero_gradients_and_moments_keep_zeros(name):
    """Why nothing needs to be written after a step of these: masked gradients alone keep values and moments at zero."""
    model = make()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    backward(model, 0)
    optimizer.step()
    enforce(masked_parameters(model), optimizer)
    for step in range(1, 20):
        backward(model, step)
        assert rf._core.pruning.mask_gradients(masked_parameters(model))
        optimizer.step()
        assert stray(model) == 0, step
        assert not any(value.any() for value in pruned_state(model, optimizer).values()), step


@pytest.mark.parametrize("name", KEEP_ZEROS)
def test_a_step_writes_only_gradients(name):
    """The version counters of values and moments rise by what the optimizer writes, and no more."""
    models, versions = [make(), make()], []
    for model, hooked in zip(models, (False, True), strict=True):
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        if hooked:
            attach(model, optimizer)
        for step in range(3):
            if step == 2:
                before = [p._version for p in model.parameters()]
            backward(model, step)
            optimizer.step()
        versions.append([p._version - b for p, b in zip(model.parameters(), before, strict=True)])
    assert versions[0] == versions[1]


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam amsgrad", "adamw fused", "rmsprop"])
def test_kept_weights_train_as_with_a_mask_in_the_loop(name):
    """Bit for bit what gradients, values and moments times a dense mask give."""
    models = [make(), make()]
    optimizers = [OPTIMIZERS[name](list(model.parameters())) for model in models]
    attach(models[0], optimizers[0])
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step)
            if model is models[1]:
                for parameter, kept in masks_of(model).values():
                    parameter.grad.mul_(kept)
            optimizer.step()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b)


def test_masks_that_change_are_enforced_at_once():
    """Values and moments of weights that a step prunes, and a history that starts anew for those that it grows."""
    model = make(kept=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, amsgrad=True)
    calls = []

    def after(_):
        calls.append(stray(model))
        if len(calls) != 4:
            return False
        for module in (model.conv, model.head[0], model.head[2]):
            del module.weight_mask_bits
        put_masks(model, kept=0.3, seed=5, apply=False)
        return True

    attach(model, optimizer, after=after)
    for step in range(6):
        backward(model, step)
        optimizer.step()
        assert stray(model) == 0
        assert not any(value.any() for value in pruned_state(model, optimizer).values())
    assert len(calls) == 6
    assert calls[3] == 0  # after() runs before anything is written: the masks it finds hold already


def test_dense_gradients_are_there_for_what_accumulates():
    model, seen = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def before():
        seen.append(sum(int((p.grad[~kept] != 0).sum()) for p, kept in masks_of(model).values()))
        return masked_parameters(model), False

    attach(model, optimizer, before=before)
    backward(model, 0)
    optimizer.step()
    assert seen[0] > 0
    assert all(not p.grad[~kept].any() for p, kept in masks_of(model).values())


def test_dense_steps_mask_values_alone():
    """Soft masks: the optimizer works on dense weights until the first step that is not dense, which cleans up."""
    model, dense = make(), [True]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer, before=lambda: (masked_parameters(model), dense[0]))
    backward(model, 0)
    optimizer.step()
    assert stray(model) == 0
    assert any(value.any() for value in pruned_state(model, optimizer).values())
    assert any(p.grad[~kept].any() for p, kept in masks_of(model).values())
    dense[0] = False
    backward(model, 1)
    optimizer.step()
    assert stray(model) == 0
    assert not any(value.any() for value in pruned_state(model, optimizer).values())


def test_a_value_that_someone_else_writes_is_held():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                model.conv.weight.add_(1.0)
        backward(model, step)
        optimizer.step()
        assert stray(model) == 0


def test_a_loaded_optimizer_state():
    model, other = make(), make()
    optimizer, dense = (torch.optim.Adam(m.parameters(), 0.01) for m in (model, other))
    attach(model, optimizer)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        backward(other, step)
        dense.step()
    optimizer.load_state_dict(dense.state_dict())
    assert any(value.any() for value in pruned_state(model, optimizer).values())
    backward(model, 3)
    optimizer.step()
    assert stray(model) == 0
    assert not any(value.any() for value in pruned_state(model, optimizer).values())


@pytest.mark.parametrize("keyword", [False, True])
def test_closures(keyword):
    model, counted = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer, after=lambda _: counted.append(1))
    for step in range(4):
        closure = lambda step=step: backward(model, step)  # noqa: E731
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.item() > 0
        assert stray(model) == 0
        assert not any(value.any() for value in pruned_state(model, optimizer).values())
    assert len(counted) == 4


def test_lbfgs():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=5, line_search_fn="strong_wolfe")
    attach(model, optimizer)
    losses = []
    for _ in range(3):
        losses.append(optimizer.step(lambda: backward(model, 0)).item())
        assert stray(model) == 0
    assert losses[-1] < losses[0]


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Flatten(), nn.Linear(18, 2))
    put_masks(model)
    optimizers = [
        torch.optim.SparseAdam([model[0].weight], 0.1),
        torch.optim.SGD([model[2].weight, model[2].bias], 0.1, momentum=0.9),
    ]
    OptimizerHook(optimizers, lambda: masked_parameters(model))
    for step in range(4):
        model.zero_grad()
        model(torch.arange(6).view(2, 3) + step).pow(2).sum().backward()
        assert model[0].weight.grad.layout == torch.sparse_coo
        for optimizer in optimizers:
            optimizer.step()
        assert stray(model) == 0
        assert not any(v.any() for o in optimizers for v in pruned_state(model, o).values())


def test_two_optimizers_count_one_step():
    model, counted = make(), []
    optimizers = [
        torch.optim.SGD(model.conv.parameters(), 0.1, momentum=0.9),
        torch.optim.Adam([*model.bn.parameters(), *model.head.parameters()], 0.01),
    ]
    OptimizerHook(optimizers, lambda: masked_parameters(model), after=lambda _: counted.append(1))
    for step in range(3):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
        assert stray(model) == 0
        assert len(counted) == step + 1


def test_gradients_that_are_none_and_frozen_parameters():
    model = make()
    model.conv.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    attach(model, optimizer)
    optimizer.step()  # no gradients yet
    backward(model, 0)
    optimizer.step()
    assert stray(model) == 0


def test_moments_are_found_in_any_structure_and_step_counts_are_left():
    model = make()
    optimizer = Lamb(model.parameters())
    backward(model, 0)
    optimizer.step()
    values = [parameter for parameter, _ in masks_of(model).values()]
    owners, moments = moments_of(values, optimizer)
    assert owners == [0, 0, 1, 1, 2, 2]
    assert all(m.shape == values[o].shape for o, m in zip(owners, moments, strict=True))
    one = nn.Parameter(torch.ones(()))
    adam = torch.optim.Adam([one])
    one.grad = torch.ones(())
    adam.step()
    assert moments_of([one], adam) == ([], [])  # its step count has the parameter's shape


def test_detach():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    hook = attach(model, optimizer)
    hook.remove()
    hook.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    backward(model, 0)
    optimizer.step()
    assert stray(model) > 0
    attach(model, optimizer)  # again
    backward(model, 1)
    optimizer.step()
    assert stray(model) == 0


def test_what_can_be_attached():
    model, other = make(), make(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"\[attach\] SGD must hold pruned parameters of the model, but holds none"):
        attach(model, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"must hold every pruned parameter that trains, but lacks 'conv\.weight'"):
        attach(model, torch.optim.SGD(model.head.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"\[attach\] an optimizer must have register_step_post_hook.*got object"):
        attach(model, object())
    with pytest.raises(ValueError, match="there must be an optimizer, got none"):
        OptimizerHook([], lambda: masked_parameters(model))
    attach(model, optimizer)
    with pytest.raises(ValueError, match=r"SGD must not be attached already: call detach\(\) first"):
        attach(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1)
    first = attach(model, both)
    attach(other, both)  # two models in one optimizer
    first.remove()


def test_wrapped_optimizers():
    """As accelerate and Lightning wrap them."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = make()
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    attach(model, wrapper)
    backward(model, 0)
    wrapper.step()
    assert stray(model) == 0


def test_hooks_are_neither_copied_nor_pickled():
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    attach(model, optimizer)
    backward(model, 0)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not copied._optimizer_step_post_hooks
        assert not copied._optimizer_step_pre_hooks
    assert optimizer._optimizer_step_post_hooks
    copied_model, _ = copy.deepcopy((model, optimizer))
    assert stray(copied_model) == 0


def test_learning_rate_schedules():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        assert stray(model) == 0


# --- AMP, accumulation, clipping, compilation -------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips(fused):
    model, counted = make(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=fused)
    attach(model, optimizer, after=lambda _: counted.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 1:
            model.conv.weight.grad[0, 0, 0, 0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert stray(model) == 0
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (step == 1)
    assert len(counted) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = make()
    masks = {name: kept for name, (_, kept) in masks_of(model).items()}
    model.to(dtype)
    assert all(torch.equal(kept, masks[name]) for name, (_, kept) in masks_of(model).items())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    attach(model, optimizer)
    for step in range(3):
        backward(model, step, dtype)
        optimizer.step()
        assert stray(model) == 0
        assert not any(value.any() for value in pruned_state(model, optimizer).values())


def test_channels_last():
    model = make().to(memory_format=torch.channels_last)
    assert stray(model) == 0
    assert not model.conv.weight.is_contiguous()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        assert stray(model) == 0


def test_accumulation_and_clipping():
    """Gradients add up over batches as they are, and are masked in the step; clipping before it sees all of them."""
    model, reference = make(), make()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, reference)]
    attach(model, optimizers[0])
    for step in range(3):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            for part in range(3):
                x, y = batch(10 * step + part)
                nn.functional.cross_entropy(m(x), y).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            if m is reference:
                for parameter, kept in masks_of(m).values():
                    parameter.grad.mul_(kept)
            optimizer.step()
        assert stray(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_compiled_models_are_not_compiled_again():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pending = []

    def after(_):
        if not pending:
            return False
        with torch.no_grad():  # new masks, in the buffers that are there
            model.conv.weight_mask_bits.copy_(pending.pop())
        return True

    attach(model, optimizer, after=after)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(5):
        if step in (1, 3):
            other = make(kept=0.2, seed=step)
            pending.append(other.conv.weight_mask_bits)
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(fast(x), y).backward()
        optimizer.step()
        assert stray(model) == 0
    assert len(compiled) == 1
    assert not any("mask" in str(node.target) for node in compiled[0].graph.nodes)
    torch._dynamo.reset()


def test_gradient_checkpointing():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        features = checkpoint(lambda x: model.bn(model.conv(x)).relu().mean((2, 3)), x, use_reentrant=False)
        nn.functional.cross_entropy(model.head(features), y).backward()
        optimizer.step()
        assert stray(model) == 0


def test_no_bytes_are_saved_for_the_backward_pass():
    counts = []
    for model in (Net(), make()):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.nbytes) or t, lambda t: t):
            model(batch(0)[0]).sum()
        counts.append(sum(saved))
    assert counts[0] == counts[1]


def test_tied_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    put_masks(model["a"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, optimizer)
    guard(model)
    for _ in range(3):
        optimizer.zero_grad()
        model["b"](model["a"](torch.randn(4, 6))).pow(2).sum().backward()
        optimizer.step()
        assert stray(model) == 0
    assert torch.equal(model["a"].weight, model["b"].weight)
    with torch.no_grad():
        model["b"].weight.add_(1)
    with pytest.raises(ValueError, match=r"'a\.weight' must be zero where its mask prunes"):
        model.state_dict()
