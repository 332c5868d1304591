"""Checkpoints between Python and C++: safetensors files of one language in the other."""

import json
import random
import re
import struct
import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_parity import Parity, parity_program  # noqa: F401, a fixture
from torch import nn

from rarefy.quantization import QConfig, convert, prepare_qat

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, load_model, save_file, save_model  # noqa: E402


def trained_parity() -> nn.Module:
    torch.manual_seed(3)
    model = prepare_qat(Parity(), QConfig.int8())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 2, 6, 6)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    return model.eval()


def test_a_prepared_model_round_trips(tmp_path):
    model = trained_parity()
    save_model(model, tmp_path / "m.safetensors")
    fresh = prepare_qat(Parity(), QConfig.int8()).eval()
    x = torch.randn(4, 2, 6, 6)
    with pytest.raises(ValueError, match="must observe data before it quantizes"):
        fresh(x)
    assert load_model(fresh, tmp_path / "m.safetensors") == (set(), [])
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(convert(fresh)(x), convert(model)(x))


def test_a_float_file_loads_into_a_prepared_model(tmp_path):
    torch.manual_seed(0)
    model = Parity()
    save_model(model, tmp_path / "m.safetensors")
    prepared = prepare_qat(Parity(), QConfig.int8())
    missing, unexpected = load_model(prepared, tmp_path / "m.safetensors", strict=False)
    assert unexpected == []
    assert missing
    assert all(".quant." in name for name in missing)
    assert torch.equal(prepared.fc.weight, model.fc.weight)


def test_python_to_cpp_and_back(parity_program, tmp_path):  # noqa: F811
    model = trained_parity()
    x = torch.randn(4, 2, 6, 6)
    save_model(model, tmp_path / "python.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    files = [tmp_path / name for name in ("python.safetensors", "x.safetensors", "cpp.safetensors")]
    subprocess.run([parity_program, "--continue", *files], check=True, timeout=120)
    with torch.no_grad():
        evaluated = load_file(tmp_path / "cpp.safetensors.evaluated")["evaluated"]
        torch.testing.assert_close(evaluated, model(x), rtol=1e-5, atol=1e-5)

    returned = load_file(tmp_path / "cpp.safetensors")
    assert set(returned) == set(load_file(tmp_path / "python.safetensors"))
    assert all(torch.equal(returned[name], value) for name, value in model.state_dict().items())
    fresh = prepare_qat(Parity(), QConfig.int8()).eval()
    load_model(fresh, tmp_path / "cpp.safetensors")
    assert torch.equal(fresh(x), model(x))


def corrupted(generator: random.Random, good: bytes) -> bytes:
    """The file with one thing wrong with it, or with nothing wrong in effect."""
    (length,) = struct.unpack("<Q", good[:8])
    header, data = good[8 : 8 + length], good[8 + length :]
    kind = generator.randrange(6)
    if kind == 0:  # any byte
        at = generator.randrange(8 + length)
        return good[:at] + bytes([generator.randrange(256)]) + good[at + 1 :]
    if kind == 1:  # cut short, or longer
        cut = generator.randrange(len(good))
        return good[:cut] if generator.random() < 0.5 else good + bytes(1 + cut % 16)
    if kind == 2:  # another length
        wrong = generator.choice([0, 1, length - 1, length + 1, length + len(data), 2**63, 2**64 - 1, 10**8, 10**8 + 1])
        return struct.pack("<Q", wrong) + good[8:]
    if kind == 3:  # a piece of the header is gone or twice
        a, b = sorted(generator.sample(range(length), 2))
        changed = header[:a] + header[b:] if generator.random() < 0.5 else header[:b] + header[a:b] + header[b:]
        return struct.pack("<Q", len(changed)) + changed + data
    if kind == 4:  # another number
        numbers = list(re.finditer(rb"\d+", header))
        number = generator.choice(numbers)
        other = generator.choice(
            [b"0", b"-1", b"1.5", b"1e3", b"01", b"18446744073709551615", b"99999999999999999999", b'"1"']
        )
        changed = header[: number.start()] + other + header[number.end() :]
        return struct.pack("<Q", len(changed)) + changed + data
    table = json.loads(header)  # another field
    name = generator.choice([key for key in table if key != "__metadata__"])
    change = generator.randrange(4)
    if change == 0:
        table[name]["dtype"] = generator.choice(["F32", "I32", "F33", "", None, 3])
    elif change == 1:
        table[name]["shape"] = generator.choice([[2, 3], [6], [], [0], [1, 6], [2**62, 4], "6", None])
    elif change == 2:
        other = generator.choice([key for key in table if key != "__metadata__"])
        table[name]["data_offsets"] = table[other]["data_offsets"]
    else:
        del table[name][generator.choice(["dtype", "shape", "data_offsets"])]
    changed = json.dumps(table).encode()
    return struct.pack("<Q", len(changed)) + changed + data


def is_loose(file: bytes) -> bool:
    """Whether the header repeats a name or has a field of its own: the reference lets the last one win, and ignores it."""
    loose = False

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal loose
        keys = [key for key, _ in items]
        is_tensor = {"dtype", "shape", "data_offsets"} & set(keys)
        loose = loose or len(set(keys)) < len(keys) or (is_tensor and len(keys) != 3)
        return dict(items)

    (length,) = struct.unpack("<Q", file[:8])
    json.loads(file[8 : 8 + length], object_pairs_hook=pairs)
    return bool(loose)


def test_corrupted_files_are_refused_where_the_reference_refuses_them(parity_program, tmp_path):  # noqa: F811
    """C++ and the package safetensors agree on 600 files with something wrong, but for what C++ alone calls wrong."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(6, dtype=torch.int32), "é\n": torch.tensor([1, 0, 1]).bool()}
    save_file(tensors, tmp_path / "good", metadata={"made": "by a test"})
    good = (tmp_path / "good").read_bytes()
    generator = random.Random(0)
    files = []
    for i in range(600):
        file = tmp_path / f"{i}"
        file.write_bytes(corrupted(generator, good))
        files.append(file)
    done = subprocess.run([parity_program, "--read", *files], check=True, timeout=120, capture_output=True)
    verdicts = done.stdout.decode(errors="replace").split("\n")[:-1]
    assert len(verdicts) == len(files)
    accepted = 0
    for file, verdict in zip(files, verdicts, strict=True):
        try:
            theirs = load_file(file)
        except Exception:
            assert verdict.startswith(f"[load_safetensors] {file}"), f"accepted: {file.read_bytes()!r}"
            continue
        if verdict.startswith("read"):
            accepted += 1
            expected = sum(int(t.contiguous().view(-1).view(torch.uint8).sum()) for t in theirs.values() if t.numel())
            assert verdict == f"read {expected}"
        else:
            assert is_loose(file.read_bytes()), verdict
    assert 0 < accepted < 200
