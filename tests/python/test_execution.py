"""execution="integer" against execution="simulated" on every prepared layer, and what falls back."""

import copy
import re
import sys
import types

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.quantization import PerChannel, PerTensor, QConfig, Scheme, prepare_qat, set_state

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZE = {1: (11,), 2: (7, 9), 3: (4, 5, 6)}

#: Weight and activation. All that a layer with integer kernels accepts: bits, sign, range, granularity.
SCHEMES = {
    "int8": (Scheme(8, narrow_range=True, granularity=PerChannel(0)), Scheme(8, symmetric=False)),
    "int8_full": (Scheme(8, granularity=PerTensor()), Scheme(8, symmetric=True, signed=True)),
    "int8_signed": (Scheme(8, granularity=PerChannel(0)), Scheme(8, symmetric=False, signed=True)),
    "int8_uint8_symmetric": (Scheme(8, granularity=PerTensor()), Scheme(8, symmetric=True, signed=False)),
    "w4a8": (Scheme(4, granularity=PerChannel(0)), Scheme(8, symmetric=False)),
    "w4a4": (Scheme(4, narrow_range=True, granularity=PerChannel(0)), Scheme(4, symmetric=False)),
    "w3a5": (Scheme(3, granularity=PerTensor()), Scheme(5, symmetric=True, narrow_range=True)),
    "w2a2": (Scheme(2, narrow_range=True, granularity=PerChannel(0)), Scheme(2, symmetric=False)),
}


def conv1d_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A class of the name and behaviour of ``transformers.pytorch_utils.Conv1D``."""
    module = types.ModuleType("transformers.pytorch_utils")

    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.t(), self.bias)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return Conv1D


def build(kind: str, relu: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(3)
    if kind in ("linear", "transposed"):
        layer = nn.Linear(16, 12) if kind == "linear" else conv1d_of_gpt2(monkeypatch)(12, 16)
        layers, x = [layer], torch.randn(5, 6, 16)
    else:
        name, dim, variant = kind.split("_")
        options = {
            "plain": {"kernel_size": 3, "padding": 1},
            "strided": {"kernel_size": 2, "stride": 2, "dilation": 2},
            "grouped": {"kernel_size": 3, "groups": 2, "padding": "same"},
            "pointwise": {"kernel_size": 1},
            "wide": {"kernel_size": 3, "padding": 1},
        }[variant]
        dims = int(dim)
        # More output channels than positions: matrix products instead of oneDNN's convolution.
        out = 700 if variant == "wide" else 8
        layers = [CONV[dims](4, out, **options)]
        if name == "convbn":
            layers.append(NORM[dims](out))
            with torch.no_grad():
                # Negative factors, too; none so small that a coarse grid per tensor rounds a whole filter to 0: the result is
                # then constant, and normalizing it magnifies the rounding of its mean.
                layers[1].weight.uniform_(0.75, 1.5)[::2] *= -1
                layers[1].bias.uniform_(-1, 1)
        x = torch.randn(6, 4, *SIZE[dims])
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers), x + 0.3


KINDS = ["linear", "transposed"]
KINDS += [f"{name}_{dim}_{variant}" for name in ("conv", "convbn") for dim in (1, 2, 3)
          for variant in ("plain", "strided", "grouped", "pointwise", "wide")
          if (dim, variant) not in ((3, "grouped"), (1, "wide"), (3, "wide"))]  # fmt: skip


def run(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients, and the state afterwards."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    out = {"y": y.detach(), "x.grad": leaf.grad}
    out |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
    return out | {name: b.clone() for name, b in model.named_buffers()}


def assert_equal_executions(simulated: dict[str, torch.Tensor], integer: dict[str, torch.Tensor]) -> None:
    assert simulated.keys() == integer.keys()
    for name, expected in simulated.items():
        actual = integer[name]
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if ".quant." in name:  # ranges, scales, zero points, counts
            assert torch.equal(actual, expected), name
            continue
        limit = 2e-5 * expected.abs().amax().item()
        if name.endswith(
            "bias.grad"
        ):  # of a convolution before a batch normalization it is 0, up to the rounding of its sum
            limit = max(limit, 1e-5 * simulated["y"].numel() / expected.numel())
        error = (actual.double() - expected.double()).abs()
        assert error.amax().item() <= limit, f"{name}: {error.amax()} of {limit}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_executions_agree(kind, scheme, monkeypatch) -> None:
    weight, activation = SCHEMES[scheme]
    for relu in (False, True):
        model, x = build(kind, relu, monkeypatch)
        configs = (QConfig(weight, activation, execution=execution) for execution in ("simulated", "integer"))
        simulated, integer = (prepare_qat(copy.deepcopy(model), config, x) for config in configs)
        assert simulated[0].relu == integer[0].relu == relu
        for step, training in enumerate((True, True, False)):
            # From one state: running statistics differ by the rounding of sums, and weight scales follow them.
            integer.load_state_dict(simulated.state_dict())
            batch = x * (1 + 0.2 * step)
            assert_equal_executions(*(run(each.train(training), batch) for each in (simulated, integer)))


# --- What falls back --------------------------------------------------------------------------------------------------


def executed(model: nn.Module, x: torch.Tensor) -> set[str]:
    """The integer operators that a forward pass calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return {event.key for event in profile.key_averages() if event.key.startswith("rarefy::integer_")}


FALL_BACK = {
    "float64": (nn.Linear(4, 3).double(), torch.randn(2, 4).double(), "float64 has no integer kernels"),
    "float64_conv": (nn.Conv2d(4, 3, 2).double(), torch.randn(2, 4, 5, 5).double(), "float64 has no integer kernels"),
    "groups_3d": (nn.Conv3d(4, 4, 2, groups=2), torch.randn(2, 4, 3, 3, 3), "there is no integer kernel for groups in"),
    "long_sums": (nn.Linear(65_794, 1), torch.randn(2, 65_794), "int32 does not hold sums of 65794 products"),
}


@pytest.mark.parametrize("case", FALL_BACK)
def test_what_has_no_integer_kernel_is_simulated_or_refused(case) -> None:
    layer, x, reason = FALL_BACK[case]
    results = {}
    for execution in (None, "simulated"):
        model = prepare_qat(nn.Sequential(copy.deepcopy(layer)), QConfig.int8(execution=execution))
        assert executed(model, x) == set()
        results[execution] = model.eval()(x)
    assert torch.equal(results[None], results["simulated"])
    assert results[None].dtype == x.dtype
    model = prepare_qat(nn.Sequential(copy.deepcopy(layer)), QConfig.int8(execution="integer"))
    kind = type(model[0]).__name__
    message = f"[{kind}] execution='integer' must be possible for its input, but {reason}"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(x)
    assert not model[0].quant.input.calibrated  # nothing was observed


def test_default_execution_is_integer_where_possible() -> None:
    x = torch.randn(2, 4, 5, 5)
    model = prepare_qat(nn.Sequential(nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(48, 2)), QConfig.int8())
    assert executed(model, x) == {
        *("rarefy::integer_conv", "rarefy::integer_conv_forward"),
        *("rarefy::integer_linear", "rarefy::integer_linear_forward"),
    }
    for execution in (None, "integer"):  # without quantizing there is nothing to compute in integers
        plain = prepare_qat(nn.Sequential(nn.Linear(4, 3)), QConfig.int8(execution=execution))
        set_state(plain, quantize=False)
        x = torch.randn(2, 4)
        assert executed(plain, x) == set()
        layer = plain[0]
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_weight_only_layers_are_simulated() -> None:
    model = prepare_qat(nn.Sequential(nn.Linear(4, 3)), QConfig(weight=Scheme()))
    assert executed(model, torch.randn(2, 4)) == set()
    message = "layer 0 cannot execute in integers: the input stays in floating point"
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_qat(nn.Sequential(nn.Linear(4, 3)), QConfig(weight=Scheme(), execution="integer"))


def test_processors_without_dot_products_simulate(monkeypatch) -> None:
    monkeypatch.setattr(rf.nn._base, "_EXACT_PRODUCTS", False)
    x = torch.randn(2, 4)
    assert executed(prepare_qat(nn.Sequential(nn.Linear(4, 3)), QConfig.int8()), x) == set()
    model = prepare_qat(nn.Sequential(nn.Linear(4, 3)), QConfig.int8(execution="integer"))
    with pytest.raises(ValueError, match="the processor sums products of bytes in 16 bits"):
        model(x)
