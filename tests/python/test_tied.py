"""Layers over one Parameter: one Parameter while they train, one int8 tensor where they are deployed alike."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.quantization import PerTensor, QConfig, Scheme, convert, prepare_qat, report, set_state


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def trained(seed: int = 0, config: QConfig | None = None) -> nn.Module:
    torch.manual_seed(seed)
    prepared = prepare_qat(Language(), config or QConfig.int8(), IDS)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.5)
    for _ in range(3):
        F.cross_entropy(prepared(IDS).flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return prepared


def notes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.note for row in report(model).layers}


def is_tied(model: nn.Module) -> bool:
    return model.embedding.integer_weight is model.head.integer_weight


def test_one_parameter_until_convert():
    prepared = trained()
    assert notes(prepared)["head"].endswith("weight of embedding")
    assert not notes(prepared)["embedding"]
    fresh = prepare_qat(Language(), QConfig.int8(), IDS)
    fresh.load_state_dict(prepared.state_dict())
    for model in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), fresh):
        assert model.embedding.weight is model.head.weight
        assert len(list(model.parameters())) == 3
        assert torch.equal(model.eval()(IDS), prepared.eval()(IDS))


def test_one_int8_tensor_where_scales_are_equal():
    prepared = trained()
    converted = convert(prepared)
    assert is_tied(converted)
    assert notes(converted) == {"embedding": "", "block": "", "head": "weight of embedding"}
    torch.testing.assert_close(converted(IDS), prepared.eval()(IDS), rtol=0, atol=1e-5)
    for model in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), converted.float()):
        assert is_tied(model)
        assert torch.equal(model(IDS), converted(IDS))


def test_two_int8_tensors_where_scales_differ():
    per_tensor = QConfig.int8(weight=Scheme(granularity=PerTensor()))
    prepared = trained(config=QConfig.int8(overrides={"head": per_tensor}))
    assert prepared.embedding.weight is prepared.head.weight
    converted = convert(prepared)
    assert not is_tied(converted)
    assert notes(converted)["head"] == "integers apart from those of embedding: other scales or values"
    torch.testing.assert_close(converted(IDS), prepared.eval()(IDS), rtol=0, atol=1e-5)


def frozen_apart() -> nn.Module:
    """Converted with scales that were frozen at different times, as the rows that no batch reached have others."""
    prepared = trained(5)
    set_state(prepared, observe=False)
    with torch.no_grad():
        prepared.head.quant.weight.scale.mul_(1.5)
    return convert(prepared)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_whether_it_is_tied_or_not(assign):
    tied, apart = convert(trained(1)), frozen_apart()
    assert is_tied(tied)
    assert not is_tied(apart)
    expected = {"tied": tied(IDS), "apart": apart(IDS)}
    states = {"tied": copy.deepcopy(tied.state_dict()), "apart": copy.deepcopy(apart.state_dict())}
    wrapped = nn.Sequential(convert(trained(2)))  # loads as part of a larger model
    for kind in ("apart", "tied", "apart", "tied"):
        wrapped.load_state_dict({f"0.{key}": x.clone() for key, x in states[kind].items()}, assign=assign)
        assert torch.equal(wrapped(IDS), expected[kind])
        assert is_tied(wrapped[0]) == (kind == "tied")


def test_a_file_that_stores_the_tensor_once(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tied, other = convert(trained(1)), convert(trained(2))
    safetensors.save_model(tied, str(tmp_path / "model.safetensors"))
    assert len(safetensors.load_file(tmp_path / "model.safetensors")) == len(tied.state_dict()) - 1
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert is_tied(other)
    assert torch.equal(other(IDS), tied(IDS))
