"""Both languages on the layers that the network of test_parity.py has not: the same training, integers and folders."""

import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_parity import TOLERANCE, assert_equal_states, make_batch, parity_program  # noqa: F401, a fixture
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import QConfig, convert, load_quantized, prepare_qat, save_quantized

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402


class MoreLayers(nn.Module):
    """The third network of tests/cpp/parity.h."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 4, num_layers=2, batch_first=True)
        self.lstm_cell, self.gru_cell = nn.LSTMCell(4, 4), nn.GRUCell(4, 4)
        self.bag = nn.EmbeddingBag(7, 4, mode="sum", padding_idx=1)
        self.up3 = nn.ConvTranspose3d(2, 2, (1, 2, 2))
        self.up2 = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, groups=2)
        self.up1 = nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1)
        self.attention, self.norm = rf.nn.SDPA(), rf.nn.LayerNorm(4)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, ids: Tensor, volumes: Tensor) -> Tensor:
        states = self.gru(self.lstm(self.words(ids))[0])[0]
        states = self.norm(self.attention(states, states, states))
        states = states + self.heads(states, states, states, need_weights=False)[0]
        a = self.gru_cell(self.lstm_cell(states[:, 4])[0])
        b = self.up1(torch.relu(self.up2(self.up3(volumes).flatten(1, 2))).mean(3)).mean(2)
        return self.out(torch.cat([a, b, self.bag(ids)], 1))


def prepared(model: nn.Module, execution: str) -> nn.Module:
    model = prepare_qat(model, QConfig.int8(execution=execution), make_batch())
    # A result that nothing but floating point reads has a quantizer in Python alone, which sees how values flow.
    for module in model.modules():
        quant = getattr(module, "quant", None)
        if isinstance(quant, rf.nn.QuantState) and quant.output is not None and not isinstance(module, rf.nn.LayerNorm):
            del quant.output
            quant.__dict__["output"] = None
    return model


@pytest.fixture(params=["integer", "simulated"])
def training(request, parity_program, tmp_path):  # noqa: F811
    torch.manual_seed(3)
    batches = [(*make_batch(), torch.randint(3, (8,))) for _ in range(3)]
    tensors = {}
    for i, batch in enumerate(batches):
        tensors |= {f"{name}{i}": t for name, t in zip(("ids", "volumes", "labels"), batch, strict=True)}
    save_file(tensors, tmp_path / "data")

    def in_cpp(model: str, first: int, last: int, out: str) -> dict[str, Tensor]:
        files = tmp_path / model, tmp_path / "data", str(first), str(last), tmp_path / out
        subprocess.run([parity_program, "--train-more", request.param, *files], check=True, timeout=120)
        return load_file(tmp_path / f"{out}.results")

    def serve(*files: str) -> None:
        subprocess.run([parity_program, "--serve-more", *(tmp_path / name for name in files)], check=True, timeout=120)

    return request.param, batches, in_cpp, serve, tmp_path


def in_python(model: nn.Module, batches) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for ids, volumes, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids, volumes), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_same_training_conversion_and_folder(training):
    execution, batches, in_cpp, serve, folder = training
    floating = MoreLayers()
    save_model(floating, folder / "float")
    returned = in_cpp("float", 0, 2, "trained")
    model = prepared(floating, execution)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, rf.nn.QuantizableLayer)}
    assert kinds == {
        "Embedding", "LSTM", "GRU", "LSTMCell", "GRUCell", "EmbeddingBag", "ConvTranspose1d", "ConvTranspose2d",
        "ConvTranspose3d", "SDPA", "MultiheadAttention", "LayerNorm", "Linear",
    }  # fmt: skip
    torch.testing.assert_close(returned["losses"], in_python(model, batches[:2]), **TOLERANCE)
    assert_equal_states(load_file(folder / "trained"), model.state_dict())

    integer = convert(model)
    converted = load_file(folder / "trained.converted")
    assert_equal_states(converted, integer.state_dict())
    assert sum(value.dtype == torch.int8 for value in converted.values()) == 1 + 4 + 4 + 2 + 2 + 1 + 3 + 4 + 1
    batch = batches[0][:2]
    with torch.no_grad():
        torch.testing.assert_close(returned["evaluated"], model.eval()(*batch), **TOLERANCE)
        torch.testing.assert_close(returned["converted"], integer(*batch), **TOLERANCE)

        loaded = load_quantized(MoreLayers(), folder / "trained.folder")
        torch.testing.assert_close(loaded(*batch), returned["converted"], rtol=0, atol=0)
        save_quantized(integer, folder / "python")
        save_file({"ids": batch[0], "volumes": batch[1]}, folder / "serve")
    serve("python", "serve", "cpp")
    with torch.no_grad():
        assert torch.equal(load_file(folder / "cpp.results")["scores"], integer(*batch))
        assert torch.equal(load_quantized(MoreLayers(), folder / "cpp")(*batch), integer(*batch))


def test_a_model_of_python_continues_in_cpp(training):
    execution, batches, in_cpp, _, folder = training
    model = prepared(MoreLayers(), execution)
    in_python(model, batches[:2])
    save_model(model, folder / "trained")
    returned = in_cpp("trained", 2, 3, "further")
    torch.testing.assert_close(returned["losses"], in_python(model, batches[2:]), **TOLERANCE)
    assert_equal_states(load_file(folder / "further"), model.state_dict())
    fresh = prepared(MoreLayers(), execution)
    assert load_model(fresh, folder / "further") == (set(), [])
