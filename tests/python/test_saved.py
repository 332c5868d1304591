"""Converted models in folders: the same outputs in a fresh model of either language, and nothing half done."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import zlib

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.quantization import (
    QConfig,
    calibrate,
    convert,
    load_quantized,
    prepare,
    prepare_qat,
    report,
    save_quantized,
)

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402
from test_parity import EveryLayer, make_batch, parity_program  # noqa: E402, F401, a fixture


class Net(nn.Module):
    """Words and images: convolutions with batch normalizations beside them, a residual, a concatenation, a tied table."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.Identity(),
        )  # fmt: skip
        self.add, self.cat = rf.nn.Add(), rf.nn.Cat(1)
        self.loose = nn.BatchNorm2d(width)
        self.words = nn.Embedding(11, width)
        self.head = nn.Linear(2 * width, 11)
        self.tied = nn.Linear(width, 11, bias=False)
        self.tied.weight = self.words.weight
        self.same = self.head
        self.register_buffer("offset", torch.randn(11))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.loose(torch.relu(self.add(x, self.block(x))))
        words = self.words(ids).mean(1)
        return self.same(self.cat(x.mean((2, 3)), words)) + self.tied(words) + self.offset


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.randint(11, (4, 5))


def converted(
    model: nn.Module | None = None, example: bool = True, linked: bool = False, **changes: object
) -> nn.Module:
    model = Net() if model is None else model
    model.train()
    model(*batch())  # statistics that are not the initial ones
    prepared = prepare(model, QConfig.int8(**changes), batch() if example else None)
    calibrate(prepared, [batch()], forward=lambda m, b: m(*b))
    return convert(prepared, batch() if linked else None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("example", "linked", "changes"),
    [(True, True, {}), (True, False, {}), (False, True, {}), (False, False, {}), (True, False, {"activation": None})],
)
def test_a_fresh_model_gives_the_same_outputs(tmp_path, example, linked, changes):
    model = converted(example=example, linked=linked, **changes)
    assert any(".quant.next." in name for name in model.state_dict()) == linked
    save_quantized(model, tmp_path / "int8")
    assert sorted(os.listdir(tmp_path / "int8")) == ["model.safetensors", "quantization.json"]
    assert os.listdir(tmp_path) == ["int8"]
    fresh = Net()
    before = state_of(fresh)
    loaded = load_quantized(fresh, tmp_path / "int8")
    assert_same_state(fresh, before)
    assert type(fresh.stem) is nn.Conv2d
    assert not loaded.training
    x = batch()
    with torch.no_grad():
        assert torch.equal(loaded(*x), model(*x))
    assert_same_state(loaded, state_of(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert loaded.same is loaded.head
    # The file is of the loaded model too, byte for byte.
    save_quantized(loaded, tmp_path / "again")
    for name in ("model.safetensors", "quantization.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()


def test_reports_are_alike(tmp_path):
    model = converted(overrides={"block.3": None})
    save_quantized(model, tmp_path / "int8")
    rows = {row.name: row for row in report(load_quantized(Net(), tmp_path / "int8")).layers}
    for row in report(model).layers:
        assert (rows[row.name].kind, rows[row.name].state) == (row.kind, row.state)
        assert (rows[row.name].weight, rows[row.name].activation) == (row.weight, row.activation)
    assert rows["block.3"].state == "fp32"
    assert rows["block.3"].note == "saved in floating point"


def test_inplace_and_on_the_meta_device(tmp_path):
    model = converted()
    save_quantized(model, tmp_path / "int8")
    with torch.device("meta"):
        fresh = Net()
    loaded = load_quantized(fresh, tmp_path / "int8", inplace=True)
    assert loaded is fresh
    x = batch()
    with torch.no_grad():
        assert torch.equal(loaded(*x), model(*x))


def test_weights_that_are_not_finite_do_not_matter(tmp_path):
    save_quantized(converted(), tmp_path / "int8")
    fresh = Net()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    assert torch.isfinite(load_quantized(fresh, tmp_path / "int8")(*batch())).all()


def test_tied_integers_are_in_the_file_once(tmp_path):
    model = converted()
    assert model.words.integer_weight is model.tied.integer_weight
    save_quantized(model, tmp_path / "int8")
    assert "words.weight" not in load_file(tmp_path / "int8" / "model.safetensors")
    loaded = load_quantized(Net(), tmp_path / "int8")
    assert loaded.words.integer_weight is loaded.tied.integer_weight
    assert [row.note for row in report(loaded).layers if row.name == "tied"] == [
        row.note for row in report(model).layers if row.name == "tied"
    ]


def test_float_weights_that_are_tied_stay_so(tmp_path):
    model = converted(overrides={"words": None, "tied": None})
    assert model.words.weight is model.tied.weight
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(Net(), tmp_path / "int8")
    assert loaded.words.weight is loaded.tied.weight
    x = batch()
    with torch.no_grad():
        assert torch.equal(loaded(*x), model(*x))


def test_layout_stays(tmp_path):
    model = prepare_qat(Net(), QConfig.int8(), batch())
    model(*batch())
    model = convert(model)
    assert model.stem.integer_weight.is_contiguous(memory_format=torch.channels_last)
    save_quantized(model, tmp_path / "int8")
    loaded = load_quantized(Net(), tmp_path / "int8")
    assert loaded.stem.integer_weight.stride() == model.stem.integer_weight.stride()
    x = batch()
    with torch.no_grad():
        assert torch.equal(loaded(*x), model(*x))


def test_a_linear_layer_of_hugging_face_whose_weight_lies_the_other_way(tmp_path):
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        return nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4), nn.Linear(6, 3))

    model = prepare_qat(make(), QConfig.int8())
    x = torch.randn(5, 4)
    model(x)
    model = convert(model)
    save_quantized(model, tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(load_quantized(make(), tmp_path / "int8")(x), model(x))


def test_an_encoder_leaves_its_fast_path(tmp_path):
    def make() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    config = QConfig.int8(overrides={"*self_attn*": None})
    x = torch.randn(2, 5, 8)
    model = prepare_qat(make(), config, strict=False)
    model(x)
    model = convert(model)
    save_quantized(model, tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(load_quantized(make(), tmp_path / "int8")(x), model(x))


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    first, second = converted(), converted()
    folder = tmp_path / "a" / "int8"
    save_quantized(first, folder)
    save_quantized(second, f"{folder}/")
    assert_same_state(load_quantized(Net(), folder), state_of(second))
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        second.head.quant.input.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"\[save_quantized\] layer (head|same): quant.input.scale must be finite and"):
        save_quantized(second, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert os.listdir(tmp_path / "a") == ["int8"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    model = converted()
    save_quantized(model, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save_quantized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("name", ["net", "net/", "./net", "a/net"])
def test_a_relative_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(4, 3)
    model = prepare(nn.Sequential(nn.Linear(3, 2)), QConfig.int8())
    calibrate(model, [x])
    model = convert(model)
    save_quantized(model, name)
    assert torch.equal(load_quantized(nn.Sequential(nn.Linear(3, 2)), name)(x), model(x))


def test_other_files_are_not_lost(tmp_path):
    folder = tmp_path / "int8"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"must hold no other files.*got 'notes.txt'"):
        save_quantized(converted(), folder)
    assert os.listdir(folder) == ["notes.txt"]
    assert os.listdir(tmp_path) == ["int8"]


def test_what_cannot_be_written(tmp_path):
    model = converted()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, or not be there"):
        save_quantized(model, tmp_path / "file")
    with pytest.raises(RuntimeError, match=r"\[save_quantized\] cannot"):
        save_quantized(model, tmp_path / "file" / "int8")
    with pytest.raises(ValueError, match="must have a name"):
        save_quantized(model, "")
    with pytest.raises(ValueError, match=r"\[save_quantized\] the model must have converted layers"):
        save_quantized(Net(), tmp_path / "int8")
    with pytest.raises(ValueError, match=r"layer stem must be converted, but is only prepared: call convert first"):
        save_quantized(prepare(Net(), QConfig.int8()), tmp_path / "int8")
    assert os.listdir(tmp_path) == ["file"]


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("saved") / "int8"
    save_quantized(converted(overrides={"block.3": None}), path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    """A copy to damage: its description, its tensors, and a function that writes both."""
    description = json.loads((folder / "quantization.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()

    class Copy:
        path = tmp_path / "copy"

        def write(self) -> None:
            self.path.mkdir(exist_ok=True)
            save_file(self.tensors, self.path / "model.safetensors", self.metadata)
            data = (self.path / "model.safetensors").read_bytes()
            self.description["tensors"] |= {"bytes": len(data), "crc32": zlib.crc32(data)}
            (self.path / "quantization.json").write_text(json.dumps(self.description))

    result = Copy()
    result.description, result.tensors, result.metadata = description, tensors, metadata
    return result


def refused(folder, message: str, model: nn.Module | None = None, inplace: bool = True) -> None:
    """The message, with the model unchanged."""
    model = Net() if model is None else model
    state, modules = state_of(model), list(model.modules())
    with pytest.raises(ValueError, match=message) as error:
        load_quantized(model, folder, inplace=inplace)
    assert str(error.value).startswith("[load_quantized] ")
    assert_same_state(model, state)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_copy_that_is_not_damaged_loads(copied, folder):
    """What the tests below are about."""
    copied.write()
    assert_same_state(load_quantized(Net(), copied.path), state_of(load_quantized(Net(), folder)))


def test_files_that_are_missing(folder, tmp_path):
    refused(tmp_path / "none", "none must be a folder that save_quantized has written")
    for missing in ("model.safetensors", "quantization.json"):
        half = tmp_path / f"without_{missing}"
        half.mkdir()
        for name in {"model.safetensors", "quantization.json"} - {missing}:
            (half / name).write_bytes((folder / name).read_bytes())
        refused(half, f"must hold quantization.json and model.safetensors, but {missing} is missing")


def test_tensors_of_another_save(folder, tmp_path):
    mixed = tmp_path / "mixed"
    save_quantized(converted(), mixed)
    (mixed / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused(mixed, r"model.safetensors must be as it was written, of \d+ bytes with checksum \d+, got \d+ bytes")


@pytest.mark.parametrize("position", [40, -40])
def test_one_flipped_bit(copied, position):
    copied.write()
    data = bytearray((copied.path / "model.safetensors").read_bytes())
    data[position] ^= 4
    (copied.path / "model.safetensors").write_bytes(data)
    refused(copied.path, "must be as it was written")


DESCRIPTIONS = {
    "version": (lambda d: d.update(format=2), r"must be of format 1, got 2 \(made by another version of rarefy\)"),
    "mode": (lambda d: d.update(mode="prepared"), "must be of a converted model, got mode 'prepared'"),
    "no format": (lambda d: d.pop("format"), "must say its format"),
    "no layers": (lambda d: d.update(layers={}), "must have layers, got none"),
    "no such layer": (
        lambda d: d["layers"].update(other=d["layers"]["stem"]),
        "layer other: weight must be there, but is missing",
    ),
    "layer left out": (lambda d: d["layers"].pop("stem"), "missing are: none; unexpected are: .*stem.quant"),
    "kind": (lambda d: d["layers"]["stem"].update(kind="Linear"), "layer stem must be a Linear in the model, got a Conv2d"),
    "kind of an operation": (
        lambda d: d["layers"]["add"].update(kind="Mul"), "layer add must be a Mul in the model, got a Add",
    ),
    "no kind": (lambda d: d["layers"]["stem"].pop("kind"), "must say the kind of layer stem"),
    "no quantizers": (lambda d: d["layers"]["stem"].update(quantizers={}), "must say the quantizers of layer stem"),
    "no weight": (lambda d: d["layers"]["stem"]["quantizers"].pop("weight"), r"layer stem \(Conv2d\) must have a weight"),
    "relu": (lambda d: d["layers"]["stem"].update(relu=1), "must have true or false as relu, got 1"),
    "bits": (
        lambda d: d["layers"]["stem"]["quantizers"]["input"].update(bits=9), "2 to 8 or 16 bits at stem.quant.input, got 9",
    ),
    "range": (
        lambda d: d["layers"]["stem"]["quantizers"]["input"].update(qmax=127),
        "must have the integers 0 to 255 of a grid of 8 bits at stem.quant.input, got 0 to 127",
    ),
    "axis": (
        lambda d: d["layers"]["stem"]["quantizers"]["weight"].update(axis=4),
        "layer stem: the axis of quant.weight must be a dimension of the weight, got 4",
    ),
    "axis of an input": (
        lambda d: d["layers"]["stem"]["quantizers"]["input"].update(axis=0),
        "layer stem: quant.input must have one scale",
    ),
    "weight that is not symmetric": (
        lambda d: d["layers"]["stem"]["quantizers"]["weight"].update(symmetric=False),
        "layer stem: weights must be symmetric and of 8 bits or fewer, got int8 asymmetric",
    ),
    "unknown quantizer": (
        lambda d: d["layers"]["stem"]["quantizers"].update(inputs=d["layers"]["stem"]["quantizers"]["input"]),
        "layer stem: quantizers must be of input, input0, input1, weight, output, query, key, probabilities, value, "
        "got 'inputs'",
    ),
    "unknown target": (
        lambda d: d["layers"]["stem"].update(target="tpu"), "layer stem: target must be one of onnxruntime, .*, got 'tpu'",
    ),
    "another file": (lambda d: d["tensors"].update(file="../x"), "must belong to model.safetensors, got '../x'"),
    "batch normalization": (lambda d: d["folded"].append("block.2"), "block.2 must be a batch normalization in the model"),
    "not folded": (lambda d: d["folded"].remove("bn"), "missing are: bn.weight, bn.bias"),
    "one module": (
        lambda d: d["layers"]["same"].update(relu=True),
        "layers head and same are one in the model and must be equal in the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_descriptions_that_are_wrong(copied, case):
    damage, message = DESCRIPTIONS[case]
    damage(copied.description)
    copied.write()
    refused(copied.path, message)


def test_a_checksum_of_more_bits(copied):
    copied.write()
    file = copied.path / "quantization.json"
    description = json.loads(file.read_text())
    description["tensors"]["crc32"] += 2**32
    file.write_text(json.dumps(description))
    refused(copied.path, "must have a checksum of 32 bits, got")


def test_text_that_is_no_json(copied):
    copied.write()
    text = (copied.path / "quantization.json").read_text()
    (copied.path / "quantization.json").write_text(text[: len(text) // 2])
    refused(copied.path, "quantization.json: the description must")


TENSORS = {
    "integers": (lambda t: t.update({"stem.weight": t["stem.weight"].float()}), "layer stem: weight must be Char, got Float"),
    "beyond the grid": (
        lambda t: t["stem.weight"].view(-1)[3].fill_(-128),
        r"layer stem: integers must be in \[-127, 127\], got -128 to",
    ),
    "missing": (lambda t: t.pop("head.quant.input.scale"), "layer (head|same): quant.input.scale must be there"),
    "scale": (
        lambda t: t["stem.quant.weight.scale"][1].fill_(-1),
        "layer stem: quant.weight.scale must be finite and positive, got -1 to",
    ),
    "zero point of a weight": (
        lambda t: t["stem.quant.weight.zero_point"][1].fill_(1),
        "layer stem: the zero points of quant.weight must be 0",
    ),
    "zero point": (
        lambda t: t["stem.quant.input.zero_point"].fill_(300),
        r"layer stem: quant.input.zero_point must be in \[0, 255\], got 300 to 300",
    ),
    "channels": (
        lambda t: t.update({"stem.quant.weight.scale": t["stem.quant.weight.scale"][:-1].clone()}),
        r"layer stem: quant.weight.scale must have shape \[8\], got \[7\]",
    ),
    "bias": (lambda t: t["stem.bias"].fill_(float("inf")), "layer stem: bias must be finite"),
    "bias too short": (
        lambda t: t.update({"stem.bias": t["stem.bias"][1:].clone()}), "the bias of layer stem must have 8 elements, got 7",
    ),
    "no bias": (lambda t: t.pop("head.bias"), "layer (head|same) must have a bias, as in the model"),
    "shape": (
        lambda t: t.update({"stem.weight": t["stem.weight"][..., :1].clone()}),
        r"the weight of layer stem must have the model's shape \[8, 3, 3, 3\], got \[8, 3, 3, 1\]",
    ),
    "rest missing": (lambda t: t.pop("loose.weight"), "missing are: loose.weight; unexpected are: none"),
    "rest unexpected": (lambda t: t.update({"x": torch.ones(1)}), "missing are: none; unexpected are: x"),
    "rest of another shape": (
        lambda t: t.update({"offset": torch.ones(10)}),
        r"are not for: offset \(torch.float32 \[10\] into torch.float32 \[11\]\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_wrong(copied, case):
    damage, message = TENSORS[case]
    damage(copied.tensors)
    copied.write()
    refused(copied.path, message)


def test_models_that_are_others(folder):
    refused(folder, r"layer head must have the model's shape|weight of layer", Net(width=16))
    without = Net()
    del without.block
    refused(folder, r"layer block.0 \(Conv2d\) must be of the model, which has none", without)
    refused(
        folder, "layer add must be floating point in the model, but is already prepared", prepare(Net(), QConfig.int8())
    )
    refused(folder, "layer add must be floating point in the model, but is already converted", converted())
    subclass = Net()
    subclass.stem = type("Padded", (nn.Conv2d,), {})(3, 8, 3, padding=1, bias=False)
    refused(
        folder, r"layer stem must be a Conv2d in the model, got a Padded \(Padded is a subclass of Conv2d\)", subclass
    )


# ---- both languages -------------------------------------------------------------------------------------------------


def trained(example: bool, linked: bool) -> nn.Module:
    model = prepare_qat(EveryLayer(), QConfig.int8(), make_batch() if example else None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(*make_batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return convert(model, make_batch() if linked else None)


@pytest.mark.parametrize(("example", "linked"), [(True, True), (True, False), (False, True), (False, False)])
def test_cpp_serves_a_model_of_python_and_gives_it_back(parity_program, tmp_path, example, linked):  # noqa: F811
    model = trained(example, linked)
    ids, volumes = make_batch()
    save_quantized(model, tmp_path / "python")
    save_file({"ids": ids, "volumes": volumes}, tmp_path / "data")
    files = [tmp_path / name for name in ("python", "data", "cpp")]
    subprocess.run([parity_program, "--serve", *files], check=True, timeout=120)
    with torch.no_grad():
        expected = model(ids, volumes)
        returned = load_quantized(EveryLayer(), tmp_path / "cpp")
        assert torch.equal(load_file(tmp_path / "cpp.results")["scores"], expected)
        assert torch.equal(returned(ids, volumes), expected)
    assert_same_state(returned, state_of(model))


def test_python_loads_a_model_that_cpp_converted(parity_program, tmp_path):  # noqa: F811
    ids, volumes = make_batch()
    save_file({"ids0": ids, "volumes0": volumes, "labels0": torch.randint(3, (8,))}, tmp_path / "data")
    safetensors.torch.save_model(EveryLayer(), tmp_path / "float")
    files = [tmp_path / "float", tmp_path / "data", "0", "1", tmp_path / "out"]
    subprocess.run([parity_program, "--train", "integer", *files], check=True, timeout=120)
    loaded = load_quantized(EveryLayer(), tmp_path / "out.folder")
    with torch.no_grad():
        assert torch.equal(loaded(ids, volumes), load_file(tmp_path / "out.results")["converted"])
    assert_same_state_by_name(loaded, load_file(tmp_path / "out.converted"))


def assert_same_state_by_name(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_copy_of_a_loaded_model_is_one(folder):
    loaded = load_quantized(Net(), folder)
    x = batch()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(*x), loaded(*x))
