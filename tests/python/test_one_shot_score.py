"""SNIP, GraSP and SynFlow against direct computations, and models that are left exactly as they were."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import rarefy as rf

scores = rf.pruning.scores


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 25, 3)
    ).to(dtype)


def batches(count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 2, 5, 5, generator=generator, dtype=dtype), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "tensors": [(id(t), t.data_ptr(), t.dtype) for t in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_same(model, before):
    after = snapshot(model)
    assert after["tensors"] == before["tensors"]
    assert after["needs"] == before["needs"]
    assert after["modes"] == before["modes"]
    assert after["hooks"] == before["hooks"]
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key], value), key
    for now, then in zip(after["gradients"], before["gradients"], strict=True):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then)


def weights(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() >= 2}


def test_snip_is_the_sensitivity_of_gates():
    """The definition: the derivative of the loss by gates c in c * w, at c = 1."""
    model = make_model()
    data = batches()
    result = scores.snip(model, loss_fn, data)
    gates = {name: torch.ones_like(p, requires_grad=True) for name, p in weights(model).items()}
    total = 0.0
    for batch in data:
        gated = {name: gate * weights(model)[name].detach() for name, gate in gates.items()}
        logits = functional_call(copy.deepcopy(model), gated, (batch[0],))
        total = total + nn.functional.cross_entropy(logits, batch[1]) / len(data)
    gradients = dict(zip(gates, torch.autograd.grad(total, list(gates.values())), strict=True))
    norm = sum(g.abs().sum() for g in gradients.values())
    assert set(result) == set(gates)
    for name, gradient in gradients.items():
        torch.testing.assert_close(result[name], gradient.abs() / norm, rtol=1e-10, atol=1e-14)
    assert sum(s.sum() for s in result.values()).item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_grasp_is_the_change_of_the_gradients_norm(temperature):
    """w (H g) is half the derivative of |g|^2 by a gate on w, here by central differences."""
    model = make_model().eval()
    data = batches()
    result = scores.grasp(model, loss_fn, data, temperature=temperature)
    tensors = weights(model)

    def squared_norm():
        total = sum(nn.functional.cross_entropy(model(x) / temperature, y) / len(data) for x, y in data)
        return sum(g.square().sum() for g in torch.autograd.grad(total, list(tensors.values()))).item()

    for name, index in (("0.weight", (1, 0, 2, 1)), ("0.weight", (3, 1, 0, 0)), ("4.weight", (2, 57))):
        weight = tensors[name]
        value = weight.detach()[index].item()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] = value * (1 + sign * 1e-5)
            sides.append(squared_norm())
        with torch.no_grad():
            weight[index] = value
        assert result[name][index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5 / 2, rel=1e-4, abs=1e-12)


def relu_network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def test_synflow_first_round_is_a_product_of_absolute_matrices():
    model = relu_network(torch.float64)
    for layer in (0, 2, 4):
        nn.init.zeros_(model[layer].bias)
    result = scores.synflow(model, torch.randn(2, 6, dtype=torch.float64), rounds=1)
    a, b, c = (model[i].weight.detach().abs() for i in (0, 2, 4))
    ones = torch.ones(6, dtype=torch.float64)
    for i in range(8):
        for j in range(6):
            below = torch.ones(3, dtype=torch.float64) @ c @ b
            assert result["0.weight"][i, j].item() == pytest.approx((2 * below[i] * a[i, j] * ones[j]).item())
    torch.testing.assert_close(
        result["4.weight"], 2 * c * (b @ (a @ ones))[None, :].expand_as(c), rtol=1e-12, atol=1e-12
    )


def test_synflow_rounds_are_those_of_the_algorithm():
    model = relu_network(torch.float64)
    sparsity, rounds = 0.6, 4
    result = scores.synflow(model, torch.ones(1, 6), sparsity=sparsity, rounds=rounds)
    copies = {k: p.detach().abs() for k, p in model.named_parameters()}
    total = sum(p.numel() for p in weights(model).values())
    for k in range(1, rounds + 1):
        leaves = {n: v.clone().requires_grad_() for n, v in copies.items()}
        functional_call(model, leaves, (torch.ones(1, 6, dtype=torch.float64),)).sum().backward()
        score = {n: (leaves[n].grad * leaves[n]).detach() for n in weights(model)}
        if k < rounds:
            flat = torch.cat([s.flatten() for s in score.values()])
            prune = round(total * (1 - (1 - sparsity) ** (k / rounds)))
            order = flat.sort(stable=True).indices[:prune]
            keep = torch.ones(total, dtype=torch.float64)
            keep[order] = 0
            start = 0
            for n in score:
                size = copies[n].numel()
                copies[n] = copies[n] * keep[start : start + size].view_as(copies[n])
                start += size
    for name, expected in score.items():
        torch.testing.assert_close(result[name], expected, rtol=1e-10, atol=1e-14)


def test_synflow_does_not_collapse_where_magnitude_would():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
    result = scores.synflow(model, torch.ones(1, 20), sparsity=0.99)
    flat = torch.cat([s.flatten() for s in result.values()])
    threshold = flat.sort().values[round(0.99 * flat.numel())]
    assert all((s >= threshold).any() for s in result.values())
    magnitudes = torch.cat([p.detach().abs().flatten() for p in weights(model).values()])
    largest = magnitudes.sort().values[round(0.99 * flat.numel())]
    assert not (model[4].weight.abs() >= largest).any()


def test_synflow_of_a_deep_network_stays_finite():
    """Products over 60 layers leave float32."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(60) for m in (nn.Linear(64, 64), nn.ReLU())))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(4)
    result = scores.synflow(model, torch.ones(1, 64), rounds=2)
    assert max(s.max().item() for s in result.values()) > torch.finfo(torch.float32).max
    assert all(s.isfinite().all() for s in result.values())


def call(name, model, data):
    if name == "synflow":
        return scores.synflow(model, data[0][0], rounds=3)
    return getattr(scores, name)(model, loss_fn, data)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(name, training):
    model = make_model(torch.float32).train(training)
    model[3].train(not training)
    model[0].weight.requires_grad_(False)
    data = batches(dtype=torch.float32)
    model(data[0][0]).sum().backward()
    before = snapshot(model)
    result = call(name, model, data)
    assert_same(model, before)
    assert set(result) == {"0.weight", "4.weight"}
    assert result["0.weight"].any()
    for key, score in result.items():
        assert score.shape == weights(model)[key].shape
        assert not score.requires_grad


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_a_failure_leaves_the_model_as_it_was(name):
    model = make_model(torch.float32)
    before = snapshot(model)
    data = batches(dtype=torch.float32)
    calls = []

    def fail(_, __, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop here")
        return output

    handle = model[4].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        call(name, model, data)
    handle.remove()
    assert_same(model, before)


def test_include_and_exclude():
    model, data = make_model(), batches()
    assert set(scores.snip(model, loss_fn, data, include=["4"])) == {"4.weight"}
    assert set(scores.grasp(model, loss_fn, data, exclude=["4"])) == {"0.weight"}
    assert set(scores.synflow(model, data[0][0], include=["0.weight"])) == {"0.weight"}
    with pytest.raises(ValueError, match="'nowhere'"):
        scores.snip(model, loss_fn, data, include=["nowhere"])
    with pytest.raises(TypeError, match="must be a list of names, got the string '4'"):
        scores.snip(model, loss_fn, data, include="4")


def test_errors():
    model, data = make_model(), batches()
    before = snapshot(model)
    for name in ("snip", "grasp"):
        with pytest.raises(ValueError, match=rf"\[{name}\] needs at least one batch, got none"):
            getattr(scores, name)(model, loss_fn, [])
        with pytest.raises(ValueError, match=rf"\[{name}\] a loss must be one number, got sizes \[6, 3\]"):
            getattr(scores, name)(model, lambda m, b: m(b[0]), data)
        with pytest.raises(ValueError, match=rf"\[{name}\] a loss must be finite, got nan"):
            getattr(scores, name)(model, lambda m, b: loss_fn(m, b) * math.nan, data)
        with pytest.raises(ValueError, match=rf"\[{name}\] a loss must depend on the parameters"):
            getattr(scores, name)(model, lambda m, b: torch.tensor(1.0), data)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        scores.synflow(model, data[0][0], sparsity=1.0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        scores.synflow(model, data[0][0], rounds=0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        scores.grasp(model, loss_fn, data, temperature=0)
    assert_same(model, before)
    bad = make_model()
    with torch.no_grad():
        bad[4].weight[0, 0] = math.nan
    for name in ("snip", "grasp", "synflow"):
        with pytest.raises(ValueError, match=rf"\[{name}\] weights must be finite, got NaN or infinity in '4.weight'"):
            call(name, bad, data)


def test_a_model_whose_output_is_a_dict_needs_temperature_one():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, x):
            return {"logits": self.inner(x)}

    model = Wrapped()

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0])["logits"], batch[1])

    with pytest.raises(TypeError, match="a temperature needs a model whose output is a tensor, got dict"):
        scores.grasp(model, loss, batches())
    result = scores.grasp(model, loss, batches(), temperature=1)
    expected = scores.grasp(model.inner, loss_fn, batches(), temperature=1)
    for name, score in expected.items():
        assert torch.equal(result[f"inner.{name}"], score)
    assert set(scores.synflow(model, batches()[0][0], rounds=1)) == set(result)
