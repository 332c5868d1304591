"""Pruned models in files: cut again, saved again, loaded in a fresh process and in the other language."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.pruning import Cut, Surgery, load_pruned, save_pruned

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402
from test_parity import Parity, parity_program  # noqa: E402, F401, a fixture
from test_surgery import attention_cuts, make, net_cuts, snapshot  # noqa: E402


def prune(model, cuts):
    with Surgery(model) as surgery:
        surgery.apply(cuts)
        surgery.commit()
    return model


def manifest_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["rarefy.pruned"])


class Encoder(nn.Module):
    """Attention that changes its class, a config, a tied head, a buffer that is not saved."""

    class Config:
        def __init__(self):
            self.heads = 4

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.table = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 2)
        self.register_buffer("scale", torch.arange(1.0, 17.0), persistent=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.encoder(self.table(ids)))


def encoder_cuts(kept):
    cuts = [Cut("scale", 0, kept)]
    for i in range(2):
        cuts += attention_cuts(8, [0, 1, 4, 5], f"encoder.layers.{i}.self_attn.")
        cuts += [Cut(f"encoder.layers.{i}.linear1.{n}", 0, kept) for n in ("weight", "bias")]
        cuts.append(Cut(f"encoder.layers.{i}.linear2.weight", 1, kept))
    return cuts


def pruned_encoder():
    model = make(model=Encoder).eval()
    with Surgery(model) as surgery:
        surgery.apply(encoder_cuts([0, 3, 8, 15]))
        surgery.set_attribute(model, "config.heads", 2)
        surgery.commit()
    return model


def test_indices_compose_over_prunings_copies_and_submodules(tmp_path):
    model = prune(make(), net_cuts([0, 2, 3, 6, 7]))
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    prune(model, net_cuts([0, 1, 4]))
    prune(model.conv1, [Cut("weight", 1, [0, 2])])  # a part of the model, by itself
    save_pruned(model, tmp_path / "m.safetensors")
    manifest = manifest_of(tmp_path / "m.safetensors")
    kept = {name: {dim: manifest["kept"][n] for dim, n in t["kept"]} for name, t in manifest["tensors"].items()}
    assert kept["conv1.weight"] == {0: [0, 2, 7], 1: [0, 2]}
    assert kept["offset"] == {1: [0, 2, 7]}
    assert manifest["tensors"]["conv1.weight"]["shape"] == [8, 3, 3, 3]
    assert len(manifest["kept"]) == 2
    assert manifest["format"] == 1
    assert manifest["modules"]["depthwise"] == {"groups": 3, "in_channels": 3, "out_channels": 3}

    fresh = make(seed=1)
    parameters = dict(fresh.named_parameters())
    assert load_pruned(fresh, tmp_path / "m.safetensors") is fresh
    assert {n: id(p) for n, p in fresh.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    x = torch.randn(4, 2, 2, 2)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert repr(fresh) == repr(model)
    save_pruned(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_class_swaps_ties_and_attributes_of_the_model(tmp_path):
    model = pruned_encoder()
    save_pruned(model, tmp_path / "m.safetensors")
    assert len(load_file(tmp_path / "m.safetensors")) == len(model.state_dict()) - 1
    fresh = load_pruned(Encoder(), tmp_path / "m.safetensors").eval()
    assert type(fresh.encoder.layers[1].self_attn) is rf.nn.MultiheadAttention
    assert fresh.head.weight is fresh.table.weight
    assert fresh.config.heads == 2
    assert torch.equal(fresh.scale, torch.tensor([1.0, 4.0, 9.0, 16.0]))
    ids = torch.randint(0, 11, (2, 5))
    assert torch.equal(fresh(ids), model(ids))


def test_a_fresh_process(tmp_path):
    model = pruned_encoder()
    ids = torch.randint(0, 11, (2, 5))
    save_pruned(model, tmp_path / "m.safetensors")
    save_file({"ids": ids, "expected": model(ids).detach()}, tmp_path / "data.safetensors")
    code = (
        "import sys; from safetensors.torch import load_file; import torch; import rarefy as rf\n"
        "from test_manifest import Encoder\n"
        "folder = sys.argv[1]\n"
        "model = rf.pruning.load_pruned(Encoder(), folder + '/m.safetensors').eval()\n"
        "data = load_file(folder + '/data.safetensors')\n"
        "assert torch.equal(model(data['ids']), data['expected'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120, cwd=Path(__file__).parent)


def parity_cuts(kept):
    names = ("conv.weight", "conv.bn.weight", "conv.bn.bias", "conv.bn.running_mean", "conv.bn.running_var")
    cuts = [Cut(name, 0, kept) for name in (*names, "plain.weight", "plain.bias")]
    return [*cuts, Cut("plain.weight", 1, kept), Cut("fc.weight", 1, kept)]


def test_python_to_cpp_and_back(parity_program, tmp_path):  # noqa: F811
    model = prune(make(model=Parity).eval(), parity_cuts([0, 1, 3]))
    x = torch.randn(2, 2, 6, 6)
    save_pruned(model, tmp_path / "python.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    files = [tmp_path / name for name in ("python.safetensors", "x.safetensors", "cpp.safetensors")]
    subprocess.run([parity_program, "--pruned", *files], check=True, timeout=120)
    evaluated = load_file(tmp_path / "cpp.safetensors.evaluated")["evaluated"]
    torch.testing.assert_close(evaluated, model(x).detach())

    returned = load_pruned(Parity(), tmp_path / "cpp.safetensors").eval()
    prune(model, parity_cuts([1, 2]))
    assert torch.equal(returned(x), model(x))
    save_pruned(model, tmp_path / "python.safetensors")
    assert manifest_of(tmp_path / "python.safetensors") == manifest_of(tmp_path / "cpp.safetensors")
    assert manifest_of(tmp_path / "cpp.safetensors")["modules"]["conv"] == {"out_channels": 2}


def test_models_that_were_prepared_before_or_after(tmp_path):
    x = torch.randn(2, 3, 2, 2)
    config = rf.quantization.QConfig.int8()
    for prepare_first in (False, True):
        model = make()
        if not prepare_first:
            prune(model, net_cuts())
        model = rf.quantization.prepare_qat(model, config, x)
        model(x)
        if prepare_first:
            prune(model, net_cuts())
            model(x)
        save_pruned(model, tmp_path / "m.safetensors")
        fresh = rf.quantization.prepare_qat(make(seed=1), config, x)
        load_pruned(fresh, tmp_path / "m.safetensors")
        assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_model_that_was_not_pruned(tmp_path):
    model = make()
    save_pruned(model, tmp_path / "m.safetensors")
    fresh = load_pruned(make(seed=1), tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "m.safetensors"
    model = prune(make(), net_cuts())
    save_pruned(model, path)
    manifest, values = manifest_of(path), load_file(path)

    def refused(target, message, given=None, metadata=manifest):
        before = snapshot(target)
        file = tmp_path / "bad.safetensors"
        save_file(
            values if given is None else given,
            file,
            {} if metadata is None else {"rarefy.pruned": json.dumps(metadata)},
        )
        with pytest.raises(ValueError, match=message):
            load_pruned(target, file)
        assert snapshot(target) == before

    refused(model, r"conv1.weight must be \[8, 3, 3, 3\], got \[5, 3, 3, 3\]")
    refused(nn.Linear(2, 2), "bn.bias is not of the model")
    refused(make(), "must have been written by save_pruned, but has no manifest", metadata=None)
    refused(make(), "the manifest must be of format 1, got 2", metadata=manifest | {"format": 2})
    without = {k: v for k, v in values.items() if k != "conv2.bias"}
    refused(make(), r"missing are: conv2.bias; unexpected are: more", {**without, "more": torch.zeros(2)})
    refused(
        make(),
        r"fc.bias \(torch.int64 \[5\] into torch.float32",
        values | {"fc.bias": torch.zeros(5, dtype=torch.int64)},
    )
    refused(make(), r"fc.bias \(torch.float32 \[4\] into torch.float32 \[5\]", values | {"fc.bias": torch.zeros(4)})
    unknown = manifest["modules"] | {"conv1": {"out_channels": 5, "spin": 3}}
    refused(make(), "the model must have conv1.spin, which is 3", metadata=manifest | {"modules": unknown})
    unknown = manifest["modules"] | {"conv1": {"__class__": "torch.nn.modules.conv.Conv3d"}}
    refused(make(), "conv1.__class__ must be torch.nn.modules.conv.Conv3d", metadata=manifest | {"modules": unknown})
    refused(make(), "module 'body' must be of the model", metadata=manifest | {"modules": {"body": {"a": 1}}})
    (tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="the tensors must cover the data"):
        load_pruned(make(), tmp_path / "bad.safetensors")
    with pytest.raises(RuntimeError, match="cannot open"):
        load_pruned(make(), tmp_path / "none.safetensors")


def test_ties_of_file_and_model_must_agree(tmp_path):
    model = pruned_encoder()
    save_pruned(model, tmp_path / "m.safetensors")
    apart = make(model=Encoder)
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    before = snapshot(apart)
    with pytest.raises(ValueError, match=r"missing are: table\.weight"):
        load_pruned(apart, tmp_path / "m.safetensors")
    assert snapshot(apart) == before
    with torch.no_grad():
        apart.head.weight.add_(1)
    prune(apart, encoder_cuts([0, 3, 8, 15]))
    save_pruned(apart, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="are one tensor of the model and must be equal"):
        load_pruned(Encoder(), tmp_path / "m.safetensors")


def test_a_failed_write_leaves_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    model = prune(make(), net_cuts())
    save_pruned(model, path)
    before = path.read_bytes()
    model.conv1.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"conv1\.weight must have the shape that its record says, \[5, 3, 3, 3\]"):
        save_pruned(model, path)
    model.conv1 = nn.Conv2d(3, 5, 3).to("meta")
    with pytest.raises(ValueError, match="must be dense and have values"):
        save_pruned(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
