"""Compressed files: what goes in comes out bit for bit, in few bytes; what is broken is refused by name."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy as rf
from rarefy.pruning import load_sparse, save_sparse, sparse_size

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


def no_negative_zero(x: torch.Tensor) -> torch.Tensor:
    """What a sparse tensor comes back as."""
    if not x.is_floating_point():
        return x
    return torch.where(x.float() == 0, torch.zeros((), dtype=torch.float32).to(x.dtype), x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def sparse(shape, density, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    return (x * 50).to(dtype) if not dtype.is_floating_point else no_negative_zero(x.to(dtype))


def one_of_four(shape, axis, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).movedim(axis, -1)
    score = torch.rand(x.shape, generator=generator).unflatten(-1, (-1, 4))
    kept = (score == score.amax(-1, keepdim=True)).flatten(-2)
    return no_negative_zero(x * kept).movedim(-1, axis).contiguous()


def header(path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path, change) -> None:
    """The file with another header, or other data."""
    head, data = header(path)
    head, data = change(head, bytearray(data)) or (head, data)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_round_trips(tmp_path, dtype):
    tensors = {
        "sparse": sparse((70, 33), 0.1, dtype),
        "dense": sparse((20, 30), 2.0, dtype) if dtype != torch.bool else torch.ones(20, 30, dtype=dtype),
        "empty": torch.empty(0, 3).to(dtype),
        "scalar": torch.tensor(0.0).to(dtype),
        "zeros": torch.zeros(1000).to(dtype),
        "transposed": sparse((64, 50), 0.1, dtype, 1).t(),
        "channels last": sparse((8, 6, 5, 7), 0.1, dtype, 2).contiguous(memory_format=torch.channels_last),
        "slice": sparse((100, 60), 0.1, dtype, 3)[::2, 1:50],
    }
    report = save_sparse(tensors, tmp_path / "x", {"made": "by a test"})
    loaded = load_sparse(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert (tmp_path / "x").stat().st_size == report.bytes
    assert report.bytes == save_sparse(tensors, tmp_path / "y", {"made": "by a test"}).bytes
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    forms = {tensor.name: tensor.form for tensor in report.tensors}
    assert forms["dense"] == forms["empty"] == forms["scalar"] == "dense"
    assert forms["zeros"] != "dense"
    assert load_file(tmp_path / "x").keys() >= {"dense", "zeros.values"}  # any reader opens it
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata()["made"] == "by a test"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0]),
    pattern=st.sampled_from(["random", "1:4 last", "1:4 channels"]),
    seed=st.integers(0, 1000),
)
def test_round_trip_of_any_shape(tmp_path_factory, shape, density, pattern, seed):
    x = sparse(shape, density, seed=seed)
    if pattern == "1:4 last":
        x = one_of_four([*shape[:-1], 4 * shape[-1]], len(shape) - 1, seed)
    elif pattern == "1:4 channels" and len(shape) > 1:
        x = one_of_four([shape[0], 4 * shape[1], *shape[2:]], 1, seed)
    path = tmp_path_factory.mktemp("sparse") / "x"
    report = save_sparse({"x": x}, path)
    assert report.bytes == sparse_size({"x": x}).bytes == path.stat().st_size
    assert same_bits(load_sparse(path)["x"], x)
    assert report.tensors[0].bytes <= report.tensors[0].dense_bytes


def test_special_values_keep_their_bits(tmp_path):
    x = torch.zeros(500)
    x[:6] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1e-45, -1.0])
    x.view(torch.int32)[7] = 0x7F800001  # a signaling NaN
    x.view(torch.int32)[8] = -1  # a NaN with every bit
    save_sparse({"x": x}, tmp_path / "x")
    assert header(tmp_path / "x")[0]["x.values"]["shape"] == [7]
    expected = x.clone()
    expected[1] = 0.0  # -0 is a zero
    assert same_bits(load_sparse(tmp_path / "x")["x"], expected)
    dense = torch.tensor([-0.0, 1.0])
    save_sparse({"x": dense}, tmp_path / "x")
    assert same_bits(load_sparse(tmp_path / "x")["x"], dense)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point])
def test_zeros_of_a_product_with_a_mask(tmp_path, dtype):
    """w * mask is -0 where w is negative, and compresses as if it were not."""
    x = torch.randn(4096).to(dtype)
    mask = torch.rand(4096) < 0.1
    product = (x.float() * mask).to(dtype)
    report = save_sparse({"x": product}, tmp_path / "x")
    assert report.tensors[0].kept == int((product.float() != 0).sum())
    assert same_bits(load_sparse(tmp_path / "x")["x"], no_negative_zero(product))
    y = torch.where(torch.arange(64) % 4 == 1, -1.0, -0.0).repeat(40)  # 1:4
    y[1] = -0.0
    assert save_sparse({"y": y}, tmp_path / "y").tensors[0].form == "1:4"
    assert same_bits(load_sparse(tmp_path / "y")["y"], no_negative_zero(y))


def test_one_of_four_takes_two_bits(tmp_path):
    conv, linear = one_of_four((16, 8, 3, 3), 1), one_of_four((32, 64), 1)
    report = save_sparse({"conv": conv, "linear": linear}, tmp_path / "x")
    for tensor in report.tensors:
        assert tensor.form == "1:4"
        assert tensor.bytes == tensor.elements // 4 * 4 + tensor.elements // 16
    head, _ = header(tmp_path / "x")
    described = json.loads(head["__metadata__"]["rarefy.sparse"])
    assert described["tensors"]["conv"] == {"form": "1:4", "shape": [16, 8, 3, 3], "axis": 1}
    loaded = load_sparse(tmp_path / "x")
    assert same_bits(loaded["conv"], conv)
    assert same_bits(loaded["linear"], linear)


def test_two_of_four_is_a_bitmask(tmp_path):
    x = torch.randn(64, 64).unflatten(1, (16, 4))
    x = (x * (x.abs().argsort(2).argsort(2) >= 2)).flatten(1)
    report = save_sparse({"x": x}, tmp_path / "x")
    assert (report.tensors[0].form, report.tensors[0].kept) == ("bitmask", 64 * 32)


def test_layout_is_the_documented_one(tmp_path):
    """Read with numpy alone, by the words of the documentation."""
    x = sparse((30, 41), 0.15)
    save_sparse({"x": x}, tmp_path / "x")
    parts = load_file(tmp_path / "x")
    kept = np.unpackbits(parts["x.bits"].numpy(), bitorder="little")[: x.numel()].astype(bool)
    assert len(parts["x.bits"]) == -(-x.numel() // 64) * 8
    out = np.zeros(x.numel(), np.float32)
    out[kept] = parts["x.values"].numpy()
    np.testing.assert_array_equal(out.reshape(x.shape), x.numpy())

    y = one_of_four((8, 6, 5), 0).movedim(0, 1).contiguous()  # along axis 1
    save_sparse({"y": y}, tmp_path / "y")
    parts = load_file(tmp_path / "y")
    places = np.stack([parts["y.indices"].numpy() >> (2 * k) & 3 for k in range(4)], 1).reshape(-1)
    values, out = iter(parts["y.values"].numpy()), np.zeros(y.shape, np.float32)
    groups = [(a, b, c) for a in range(y.shape[0]) for b in range(0, y.shape[1], 4) for c in range(y.shape[2])]
    for (a, b, c), place in zip(groups, places, strict=False):
        out[a, b + place, c] = next(values)
    np.testing.assert_array_equal(out, y.numpy())


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 100))


def pruned_model(sparsity=0.9) -> tuple[nn.Sequential, rf.pruning.MagnitudePruner]:
    torch.manual_seed(0)
    model = net()
    pruner = rf.pruning.MagnitudePruner(model, sparsity)
    pruner.step()
    return model, pruner


def test_size_at_90_percent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    pruner = rf.pruning.MagnitudePruner(model, 0.9)
    pruner.step()
    assert sparse_size(model).ratio <= 0.135
    pruner.finalize()
    assert sparse_size(model).ratio <= 0.135


def test_masks_come_back_and_pruning_goes_on(tmp_path):
    model, pruner = pruned_model(0.5)
    with torch.no_grad():  # kept, and zero: stays kept
        index = int(model[4].weight.flatten().abs().argmax())
        model[4].weight.view(-1)[index] = 0.0
    report = save_sparse(model, tmp_path / "x")
    assert "4.weight_mask_bits" not in {tensor.name for tensor in report.tensors}
    state = load_sparse(tmp_path / "x")
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(state[name], value) for name, value in model.state_dict().items())

    fresh = net()
    assert load_sparse(tmp_path / "x", fresh) is fresh
    assert all(same_bits(fresh.state_dict()[name], value) for name, value in model.state_dict().items())
    again = rf.pruning.MagnitudePruner(fresh, 0.8)
    assert again.steps == 1
    again.step()
    assert again.sparsity == pruner.sparsity  # constant schedule: due at step 1 only

    with_pruner, _ = pruned_model(0.2)
    load_sparse(tmp_path / "x", with_pruner)
    assert torch.equal(with_pruner[4].weight_mask_bits, model[4].weight_mask_bits)


def test_a_1_to_4_mask_comes_back(tmp_path):
    x = one_of_four((16, 32), 1)
    bits = np.zeros(512, np.uint8)
    bits[: x.numel()] = (x != 0).flatten().numpy()
    mask = torch.from_numpy(np.packbits(bits, bitorder="little"))
    report = save_sparse({"w": x, "w_mask_bits": mask}, tmp_path / "x")
    assert report.tensors[0].form == "1:4"
    loaded = load_sparse(tmp_path / "x")
    assert same_bits(loaded["w"], x)
    assert torch.equal(loaded["w_mask_bits"], mask)


def test_values_outside_of_the_mask(tmp_path):
    model, _ = pruned_model()
    weight = model[4].weight
    place = int((weight.flatten() == 0).nonzero()[0])
    with torch.no_grad():
        weight.view(-1)[place] = -0.0
    save_sparse(model, tmp_path / "x")
    assert not load_sparse(tmp_path / "x")["4.weight"].view(-1)[place].signbit()
    before = (tmp_path / "x").read_bytes()
    with torch.no_grad():
        weight.view(-1)[place] = 1e-30
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    message = f"what a mask prunes must be zero, got another value in '4.weight' at flat index {place}"
    with pytest.raises(ValueError, match=rf"\[save_sparse\] {message}"):
        save_sparse(tensors, tmp_path / "x")
    with pytest.raises(ValueError, match=r"'4.weight' must be zero where its mask prunes"):
        save_sparse(model, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before


def test_tied_tensors_are_written_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 40), nn.Linear(40, 50, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    with torch.no_grad():
        model.head.weight.copy_(sparse((50, 40), 0.1))
    report = save_sparse(model, tmp_path / "x")
    assert [tensor.name for tensor in report.tensors] == ["embedding.weight"]
    state = load_sparse(tmp_path / "x")
    assert state["head.weight"] is state["embedding.weight"]
    fresh = load_sparse(tmp_path / "x", Tied())
    assert fresh.head.weight is fresh.embedding.weight
    assert same_bits(fresh.head.weight, model.head.weight)


def test_files_of_safetensors_are_read(tmp_path):
    save_file({"a": torch.randn(3)}, tmp_path / "x")
    assert load_sparse(tmp_path / "x").keys() == {"a"}


def sparse_entry(head):
    described = json.loads(head["__metadata__"]["rarefy.sparse"])
    return described, described["tensors"]["w"]


def change_description(**fields):
    def change(head, data):
        described, entry = sparse_entry(head)
        for name, value in fields.items():
            if value is None:
                entry.pop(name)
            else:
                entry[name] = value
        head["__metadata__"]["rarefy.sparse"] = json.dumps(described)

    return change


def change_data(name, at, xor):
    def change(head, data):
        begin, end = head[name]["data_offsets"]
        data[end + at if at < 0 else begin + at] ^= xor
        return head, data

    return change


def rename(old, new):
    def change(head, data):
        head[new] = head.pop(old)

    return change


def set_format(number):
    def change(head, data):
        described, _ = sparse_entry(head)
        described["format"] = number
        head["__metadata__"]["rarefy.sparse"] = json.dumps(described)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_data("w.bits", 0, 1), "'w.values' must have as many values as are kept"),
        (change_data("w.bits", -1, 128), "the padding of 'w.bits' must be zero"),
        (change_description(shape=[300, 41]), r"'w.bits' must be 1544 bytes \(uint8\) for the shape of 'w', got 160"),
        (change_description(shape=[2**40, 2**40]), "must give a shape of at least 1 and fewer than 2\\^59 elements"),
        (change_description(shape=[0, 5]), "must give a shape of at least 1"),
        (change_description(form="other"), "must give the form 'bitmask' or '1:4' to 'w', got 'other'"),
        (change_description(form=None), "must give the form"),
        (change_description(form="1:4"), "must give an axis to 'w'"),
        (change_description(form="1:4", axis=0), "an axis whose size is a multiple of 4, got 0"),
        (change_description(form="1:4", axis=7), "an axis whose size is a multiple of 4, got 7"),
        (change_description(axis=0), "must give an axis to 'w' if its form is '1:4' only"),
        (change_description(mask=3), "must say true or false for the mask of 'w', got 3"),
        (change_description(other=3), "must describe 'w' by form, shape, axis and mask, got 'other'"),
        (rename("w.values", "v.values"), "'w.values' must be there"),
        (rename("w.bits", "w"), "'w.bits' must be there"),
        (rename("other", "w"), "'w' must be there once"),
        (set_format(2), "must be of format 1, got 2 \\(made by another version"),
    ],
)
def test_broken_descriptions_are_refused(tmp_path, change, message):
    path = tmp_path / "broken"
    save_sparse({"w": sparse((30, 41), 0.1), "other": torch.ones(3)}, path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"^\[load_sparse\] {path}: .*{message}"):
        load_sparse(path)


def test_broken_indices_are_refused(tmp_path):
    save_sparse({"w": one_of_four((62, 12), 1)}, tmp_path / "x")  # 186 groups: the last byte has two
    rewrite(tmp_path / "x", change_data("w.indices", -1, 0xC0))
    with pytest.raises(ValueError, match=r"the padding of 'w.indices' must be zero"):
        load_sparse(tmp_path / "x")


def test_bytes_that_are_no_bool_are_refused(tmp_path):
    save_sparse({"w": torch.rand(1000) < 0.1}, tmp_path / "x")
    rewrite(tmp_path / "x", change_data("w.values", 3, 4))
    with pytest.raises(ValueError, match="the bytes of bool tensor 'w' must be 0 or 1"):
        load_sparse(tmp_path / "x")


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "x"
    save_sparse({"w": sparse((30, 41), 0.1), "other": torch.ones(3)}, path)
    good = path.read_bytes()
    for length in [*range(0, len(good), 37), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=str(path)):
            load_sparse(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="the tensors must cover the data"):
        load_sparse(path)
    with pytest.raises(RuntimeError, match=r"cannot open .*missing: No such file"):
        load_sparse(tmp_path / "missing")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_headers_never_crash(tmp_path, seed):
    generator, path = np.random.default_rng(seed), tmp_path / "x"
    save_sparse({"w": sparse((30, 41), 0.1), "v": one_of_four((8, 8), 1), "other": torch.ones(3)}, path)
    good = path.read_bytes()
    for _ in range(150):
        at = generator.integers(len(good))
        path.write_bytes(good[:at] + bytes([generator.integers(256)]) + good[at + 1 :])
        refused = None
        try:
            load_sparse(path)
        except ValueError as error:
            refused = str(error)
        assert refused is None or str(path) in refused


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path):
    model, _ = pruned_model()
    save_sparse(model, tmp_path / "x")
    other = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 100))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"\[load_sparse\] .* shapes and types must be those of the model"):
        load_sparse(tmp_path / "x", other)
    with pytest.raises(
        ValueError, match=r"missing are: other.weight, other.bias; unexpected are: .*0.weight_mask_bits"
    ):
        load_sparse(tmp_path / "x", nn.ModuleDict({"other": nn.Linear(3, 4)}))
    assert before.keys() == other.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    empty = load_sparse(tmp_path / "x", nn.Sequential(nn.Identity()), strict=False)
    assert list(empty.state_dict()) == ["pruning_step"]  # no mask without its parameter


def test_refused_tensors(tmp_path):
    with pytest.raises(ValueError, match=r"no tensor may be called as a part of a sparse one, got 'w.values'"):
        save_sparse({"w": torch.zeros(1000), "w.values": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(ValueError, match="must be dense and have values"):
        save_sparse({"w": torch.eye(3).to_sparse()}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"must be tensors, got int at w"):
        save_sparse({"w": 3}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"metadata must not have the key rarefy.sparse"):
        save_sparse({"w": torch.ones(3)}, tmp_path / "x", {"rarefy.sparse": ""})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match=r"\[save_sparse\] cannot open .*folder/x: No such file"):
        save_sparse({"w": torch.ones(3)}, tmp_path / "folder" / "x")


FULL_DISK = """
import resource, signal, sys, torch, rarefy as rf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    rf.pruning.save_sparse({"w": torch.randn(300, 300) * (torch.rand(300, 300) < 0.3)}, sys.argv[1])
except RuntimeError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    save_sparse({"w": torch.zeros(1000)}, path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=120)
    assert f"[save_sparse] cannot write {path}: File too large" in done.stdout, done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


MEMORY = """
import resource, sys, torch, rarefy as rf
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
x = torch.zeros(50_000_000)  # 200 MB
x[::17] = 1.0
before = peak()
rf.pruning.save_sparse({"x": x}, sys.argv[1])
written = peak()
y = rf.pruning.load_sparse(sys.argv[1])["x"]
print(written - before, peak() - written, torch.equal(x, y))
"""


def test_no_second_copy_is_made(tmp_path):
    """Writing takes far less than the tensor besides; reading takes the tensor and far less."""
    command = [sys.executable, "-c", MEMORY, tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written, read, equal = done.stdout.split()
    assert equal == "True"
    assert int(written) < 60_000
    assert int(read) < 260_000


def test_report_prints(tmp_path):
    report = save_sparse(pruned_model()[0], tmp_path / "x")
    assert "bitmask" in str(report)
    assert "<table>" in report._repr_html_()
    assert report.ratio == report.bytes / report.dense_bytes
