"""Models that every runtime must run, trained for a few steps so that ranges, weights and batch norms have moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.export import ExportReport
from rarefy.quantization import FakeQuantizer, MinMax, QConfig, Scheme


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add = rf.nn.Add()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(y, self.shortcut(x)))


class Cnn(nn.Module):
    """Stem with max pooling, two residual blocks, global average pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.MaxPool2d(2)
        self.block1, self.block2 = Block(16, 16, 1), Block(16, 64, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block2(self.block1(self.down(self.stem(x))))).flatten(1))


class Encoder(nn.Module):
    """A transformer block over tokens; attention, layer norms and GELU stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        self.add1, self.add2 = rf.nn.Add(), rf.nn.Add()

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(length))
        h = self.norm1(x)
        q, k, v = (layer(h).view(batch, length, 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 32)
        x = self.add1(x, self.out(h))
        x = self.add2(x, self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))
        return self.head(x[:, 0])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
        nn.Flatten(), nn.Linear(144, 4),
    )  # fmt: skip


def signal() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    config: QConfig
    integer: frozenset[str]  #: modules that run in integers in every runtime of int8
    in_float: frozenset[str] = frozenset()  #: modules that do not: nothing quantizes their result


INT8 = QConfig.int8()
SYMMETRIC = QConfig.int8(activation=Scheme(bits=8, symmetric=True))
BLOCKS = frozenset(f"block{i}.{name}" for i in (1, 2) for name in ("conv1", "conv2", "add"))
CNN = BLOCKS | {"stem.0", "block2.shortcut.0"}
CASES = {
    "cnn": Case(Cnn, lambda: torch.randn(4, 3, 16, 16), INT8, CNN, frozenset({"fc"})),
    "cnn symmetric": Case(Cnn, lambda: torch.randn(4, 3, 16, 16), SYMMETRIC, CNN, frozenset({"fc"})),
    "mlp": Case(mlp, lambda: torch.randn(5, 64), INT8, frozenset({"0", "2"}), frozenset({"4"})),
    "mlp, 4-bit weights": Case(
        mlp,
        lambda: torch.randn(5, 64),
        QConfig.int8(weight=Scheme(bits=4, symmetric=True, granularity=rf.quantization.PerChannel(0))),
        frozenset({"0", "2"}),
        frozenset({"4"}),
    ),
    "encoder": Case(
        Encoder,
        lambda: torch.randint(50, (3, 8)),
        INT8,
        frozenset({"out", "fc2", "add2"}),
        frozenset({"q", "k", "v", "fc1", "head"}),
    ),
    "depthwise": Case(depthwise, lambda: torch.randn(2, 3, 8, 8), INT8, frozenset({"0", "2", "4"}), frozenset({"6"})),
    "signal": Case(signal, lambda: torch.randn(2, 3, 12), INT8, frozenset({"0"}), frozenset({"3"})),
}


def trained(model: nn.Module, x: Tensor, config: QConfig = INT8) -> nn.Module:
    model = rf.quantization.prepare_qat(model.train(), config, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def with_quantized_output(model: nn.Module, x: Tensor) -> nn.Module:
    """The same, its result quantized too, so that its last layer has integers to compute."""
    quantizer = FakeQuantizer(Scheme(bits=8, symmetric=False), MinMax())
    with torch.no_grad():
        quantizer.train()(model(x))
    return nn.Sequential(model, quantizer).eval()


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    case = CASES[name]
    x = case.example()
    return trained(case.make(), x, case.config), x


Export = Callable[..., ExportReport]
Run = Callable[[Path, Tensor], np.ndarray]


def check_case(name: str, export: Export, run: Run, path: Path) -> None:
    """The file computes what the model computes, and the expected modules run in integers, and no others."""
    model, x = make(name)
    state = copy.deepcopy(model.state_dict())
    report = export(model, x, path)
    assert report.path == path
    assert report.bytes == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key

    case, expected = CASES[name], evaluate(model, x)
    got = torch.from_numpy(run(path, x))
    # One step of the inputs of the last layer moves a result by about a 255th of its range.
    torch.testing.assert_close(got, expected, rtol=0, atol=2.5 / 255 * float(expected.max() - expected.min()))
    assert float((got - expected).abs().max()) == pytest.approx(report.max_abs, abs=1e-6)

    integer = {operator.name.rpartition("/")[0] for operator in report.in_integers}
    in_float = {operator.name.rpartition("/")[0] for operator in report.in_float}
    assert case.integer <= integer
    assert case.in_float <= in_float
    assert not (case.integer & in_float)


def check_whole_network_in_integers(export: Export, run: Run, path: Path, steps: int) -> None:
    """With a quantizer behind the last layer nothing is left in float; the file is a quarter of the float one's size."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    float_report = export(Cnn(), x, path)
    assert float_report.in_integers == ()
    assert float_report.max_abs < 1e-5
    model = with_quantized_output(trained(Cnn(), x), x)
    report = export(model, x, path)
    assert report.in_float == ()
    assert len(report.in_integers) == 10
    (difference,) = report.differences
    assert difference.steps <= steps + 1e-3
    scale = float(model[1].scale)
    got = torch.from_numpy(run(path, x))
    assert float((got - evaluate(model, x)).abs().max()) <= (steps + 0.01) * scale
    weights = sum(module.weight.numel() for module in Cnn().modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    assert weights < report.bytes
    assert report.bytes - weights < 0.5 * weights  # the graph, the biases and the scales
    assert float_report.bytes > 2.4 * report.bytes


def check_refusals(export: Export, path: Path) -> None:
    """Bad input is an error with a message before any file is written."""
    function, x = export.__name__, torch.randn(5, 64)
    model, _ = make("mlp")
    with pytest.raises(TypeError, match=rf"\[{function}\] model must be a torch.nn.Module, got int"):
        export(3, x, path)
    with pytest.raises(TypeError, match=rf"\[{function}\] example_inputs must be tensors, got str among them"):
        export(model, ["x"], path)
    with pytest.raises(ValueError, match=rf"\[{function}\] example_inputs must hold at least one tensor, got none"):
        export(model, [], path)
    with pytest.raises(ValueError, match=rf"\[{function}\] path must end in {path.suffix}, got .*file.bin"):
        export(model, x, path.with_name("file.bin"))
    with pytest.raises(FileNotFoundError, match=rf"\[{function}\] path must be in a folder that exists"):
        export(model, x, path.parent / "missing" / path.name)
    untrained = rf.quantization.prepare_qat(mlp(), INT8, x)
    with pytest.raises(ValueError, match=rf"\[{function}\] every quantizer must have observed data"):
        export(untrained, x, path)
    for bits, symmetric, narrow, found in ((4, False, False, "-128 to -113"), (8, True, True, "-127 to 127")):
        scheme = Scheme(bits=bits, symmetric=symmetric, narrow_range=narrow)
        other = trained(mlp(), x, QConfig.int8(activation=scheme))
        message = rf"\[{function}\] activations must have one scale and all 256 integers of 8 bits, got {found} at 0"
        with pytest.raises(ValueError, match=message):
            export(other, x, path)

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match=rf"\[{function}\] torch.export cannot translate the model"):
        export(Branches(), x, path)
    assert list(path.parent.iterdir()) == []


def check_failed_verification(export: Export, run: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that computes something else raises, and the one that had the name stays."""
    model, x = make("mlp")
    path.write_bytes(b"before")
    module = __import__(export.__module__, fromlist=[run])
    original = getattr(module, run)

    def wrong(*arguments: object) -> object:
        result = original(*arguments)
        outputs = result[0] if isinstance(result, tuple) else result
        outputs[0][0, 0] += 1.0
        return result

    monkeypatch.setattr(module, run, wrong)
    with pytest.raises(
        RuntimeError, match=rf"\[{export.__name__}\] verification failed: output_0 differs from the model"
    ):
        export(model, x, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"
