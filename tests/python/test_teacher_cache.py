"""A cache of teacher outputs: what comes back, what may be lost, and files that were not written whole."""

import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import rarefy as rf

D = rf.distillation


def logits_of(rows, classes=50, seed=0, spread=4.0):
    return torch.randn(*rows, classes, generator=torch.Generator().manual_seed(seed)) * spread


def write(path, logits, ids=None, k=8, dtype="float16", batch=4, temperature=2.0, mask=None, **options):
    ids = torch.arange(logits.shape[0]) * 7 - 10 if ids is None else ids
    key = "string" if isinstance(ids, list) else "int64"
    options = D.TeacherCacheOptions(logits.shape[-1], k, temperature, dtype, key, **options)
    writer = D.TeacherCacheWriter(path, options)
    for i in range(0, logits.shape[0], batch):
        part = slice(i, i + batch)
        writer.append(ids[part], logits[part], None if mask is None else mask[part])
    writer.finish()
    return ids


def dense_loss(student, teacher, temperature):
    """T^2 KL of every row in float64."""
    log_q = torch.log_softmax(student.double() / temperature, -1)
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("classes", [50, 70000])  # indices of 16 and of 32 bits
def test_what_is_written_comes_back(tmp_path, dtype, classes):
    logits = logits_of((10,), classes)
    ids = write(tmp_path / "c", logits, dtype=dtype)
    cache = D.CachedTeacher(tmp_path / "c")
    assert (len(cache), cache.options.classes, cache.options.k) == (10, classes, 8)
    order = torch.tensor([3, 0, 9, 3])
    read, exact = cache(ids[order]), D.topk_logits(logits[order], 8, 2.0)
    assert torch.equal(read.indices, exact.indices)
    assert (read.temperature, read.classes) == (2.0, classes)
    span = (exact.values[:, :1] - exact.values[:, -1:]).double()
    step = span / 254 / 2 if dtype == "uint8" else span * 2.0**-11
    assert ((read.values - exact.values).abs() <= step + 1e-5).all()
    torch.testing.assert_close(read.tail, exact.tail, rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "c.partial").exists()


def test_strings_and_minus_infinity(tmp_path):
    logits = logits_of((3,))
    logits[1, 4:] = -torch.inf
    logits[2, 1:] = -torch.inf
    for dtype in ("float16", "uint8"):
        write(tmp_path / dtype, logits, ids=["a", "β", "long name" * 30], dtype=dtype)
        cache = D.CachedTeacher(tmp_path / dtype)
        read = cache(["β", "a", "long name" * 30])
        assert torch.isneginf(read.values).sum(1).tolist() == [4, 0, 7]
        assert torch.isneginf(read.tail).tolist() == [True, False, True]
        assert cache.bound().teacher_range == torch.inf
        student = logits_of((3,), seed=1).requires_grad_()
        loss = D.top_k_distillation_loss(student, read, temperature=2.0, alpha=1.0)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


def test_sequences_of_several_lengths(tmp_path):
    logits = logits_of((4, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    ids = write(tmp_path / "c", logits, mask=mask, batch=3)
    cache = D.CachedTeacher(tmp_path / "c", mask_key="attention_mask")
    exact = D.topk_logits(logits, 8, 2.0)
    read = cache({"sample_id": ids, "attention_mask": mask.long()})
    assert read.values.shape == (4, 5, 8)
    torch.testing.assert_close(read.values[mask], exact.values[mask], rtol=0, atol=0.02)
    assert torch.equal(read.indices[mask], exact.indices[mask])
    # Other padding than when it was written: rows go where the mask is.
    wide = torch.zeros(2, 7, dtype=torch.bool)
    wide[0, 2:5], wide[1, :2] = True, True
    moved = cache({"sample_id": ids[1:3], "attention_mask": wide})
    assert torch.equal(moved.values[0, 2:5], read.values[1, 2:])
    # Without a mask the rows come first, up to the longest.
    plain = D.CachedTeacher(tmp_path / "c")(ids[1:3])
    assert plain.values.shape == (2, 3, 8)
    assert torch.equal(plain.values[0], read.values[1, 2:])
    wide[1, 4] = True
    with pytest.raises(ValueError, match="mask must be true at 2 positions for sample 4, got 3"):
        cache({"sample_id": ids[1:3], "attention_mask": wide})


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("k", [3, 20])
def test_the_bound_holds_for_random_and_adversarial_students(tmp_path, dtype, temperature, k):
    teacher = logits_of((60,), 20)
    ids = write(tmp_path / "c", teacher, k=k, dtype=dtype, temperature=temperature)
    cache = D.CachedTeacher(tmp_path / "c")
    top = cache(ids)
    tail_first = teacher.argsort(1)  # against the order of the teacher's tail
    students = [
        logits_of((60,), 20, seed=1),
        logits_of((60,), 20, seed=2, spread=12.0),
        -teacher,
        teacher.clone(),
        torch.zeros_like(teacher).scatter(1, tail_first[:, :1], 30.0),
        torch.zeros_like(teacher).scatter(1, top.indices[:, -1:], -30.0),
        torch.where(torch.rand(60, 20, generator=torch.Generator().manual_seed(5)) > 0.5, 10.0, -10.0),
    ]
    for student in students:
        student = student.double().requires_grad_()
        exact = dense_loss(student, teacher, temperature)
        cached = D.top_k_distillation_loss(student, top, temperature=temperature, alpha=1.0, reduction="none")
        bound = cache.bound(student_range=(student.max(1).values - student.min(1).values).max().item())
        difference = (exact - cached).abs()
        assert difference.max() <= bound.loss_error_max + 1e-9
        assert difference.mean() <= bound.loss_error_mean + 1e-9
        gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (exact, cached)]
        error = (gradients[0] - gradients[1]).abs().sum(1)
        assert error.max() <= bound.gradient_error_max + 1e-9
        assert error.mean() <= bound.gradient_error_mean + 1e-9
    p = torch.softmax(teacher.double() / temperature, 1).gather(1, top.indices).sum(1)
    assert bound.tail_mass_max == pytest.approx((1 - p).max().item(), abs=1e-12)
    assert bound.tail_mass_mean == pytest.approx((1 - p).mean().item(), abs=1e-12)
    assert (bound.tail_mass_max == 0.0) == (k == 20)
    assert bound.logit_error_max > 0.0
    exact_values = teacher.double().gather(1, top.indices)
    assert bound.logit_error_max >= (exact_values - top.values).abs().max().item()
    assert bound.log_probability_error_max == pytest.approx(2 * bound.logit_error_max / temperature)
    assert "probability left to the tail" in repr(bound)
    assert cache.bound().loss_error_max is None


class Teacher(torch.nn.Module):
    def __init__(self, stop_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.dropout = torch.nn.Linear(3, 50), torch.nn.Dropout(0.5)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.dropout(self.fc(x))


def batches(n=6, size=4):
    x = torch.randn(n * size, 3, generator=torch.Generator().manual_seed(3))
    return [
        {"sample_id": torch.arange(i, i + size), "x": x[i : i + size], "labels": torch.zeros(size)}
        for i in range(0, n * size, size)
    ]


def test_cache_teacher_resumes_and_is_done_once(tmp_path, capsys):
    loader = batches()
    teacher = Teacher(stop_at=4).train()
    with pytest.raises(KeyboardInterrupt):
        D.cache_teacher(teacher, loader, tmp_path / "c", k=5, progress=False)
    assert teacher.training
    assert teacher.dropout.training
    assert not (tmp_path / "c").exists()
    teacher = Teacher()
    bound = D.cache_teacher(teacher, loader, tmp_path / "c", k=5)
    # The first batch is computed again, since the file's options have its number of classes; 2 and 3 are not.
    assert teacher.calls == 4
    assert bound.samples == 24
    assert "TeacherCacheBound of 24 samples" in capsys.readouterr().out
    again = Teacher()
    assert D.cache_teacher(again, loader, tmp_path / "c", k=5, progress=False).samples == 24
    assert again.calls == 0
    cache = D.CachedTeacher(tmp_path / "c", fingerprint=D.fingerprint(teacher), classes=50, temperature=4.0)
    expected = D.topk_logits(teacher.eval()(loader[5]["x"]), 5, 4.0)
    assert torch.equal(cache(loader[5]).indices, expected.indices)
    with pytest.raises(ValueError, match="is there already and must have k 6, got 5"):
        D.cache_teacher(again, loader, tmp_path / "c", k=6, progress=False)
    with torch.no_grad():
        again.fc.bias.add_(1)
    with pytest.raises(ValueError, match="is there already and must have fingerprint"):
        D.cache_teacher(again, loader, tmp_path / "c", k=5, progress=False)


def test_repeated_samples_are_written_once(tmp_path):
    loader = batches(2)
    loader.append({name: torch.cat([value, value]) for name, value in loader[0].items()})
    loader.append({name: torch.cat([value[:1], value[:1]]) for name, value in batches(4)[3].items()})
    assert D.cache_teacher(Teacher(), loader, tmp_path / "c", k=5, progress=False).samples == 9


WRITER = textwrap.dedent("""
    import sys, torch, rarefy as rf
    writer = rf.distillation.TeacherCacheWriter(sys.argv[1], rf.distillation.TeacherCacheOptions(50, 8, 2.0))
    for i in range(int(sys.argv[2])):
        writer.append(torch.arange(i * 4, i * 4 + 4), torch.randn(4, 50, generator=torch.Generator().manual_seed(i)))
        print(len(writer), flush=True)
""")


def test_a_killed_process_is_resumed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "c", "100000"], stdout=subprocess.PIPE)
    seen = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    writer = D.TeacherCacheWriter(tmp_path / "c", D.TeacherCacheOptions(50, 8, 2.0))
    assert len(writer) >= seen[-1] == 20
    assert len(writer) % 4 == 0
    count = len(writer)
    assert count - 1 in writer
    assert count not in writer
    writer.finish()
    cache = D.CachedTeacher(tmp_path / "c")
    cache.cache.verify()
    last = torch.randn(4, 50, generator=torch.Generator().manual_seed(count // 4 - 1))
    assert torch.equal(cache(torch.arange(count - 4, count)).indices, D.topk_logits(last, 8, 2.0).indices)


def test_a_torn_tail_is_cut_wherever_it_was_torn(tmp_path):
    logits = logits_of((12,))
    options = D.TeacherCacheOptions(50, 8, 2.0)
    partial = tmp_path / "c.partial"
    sizes = []
    writer = D.TeacherCacheWriter(tmp_path / "c", options)
    sizes.append(partial.stat().st_size)
    for i in range(3):
        writer.append(torch.arange(i * 4, i * 4 + 4), logits[i * 4 : i * 4 + 4])
        sizes.append(partial.stat().st_size)
    del writer
    whole = partial.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1, *sizes]:
        partial.write_bytes(whole[:length])
        writer = D.TeacherCacheWriter(tmp_path / "c", options)
        expected = sum(length >= size for size in sizes[1:])
        assert len(writer) == 4 * expected
        assert partial.stat().st_size == sizes[expected]
        del writer
    # A page of zeros in place of the last bytes, as after a power cut.
    partial.write_bytes(whole[: sizes[2] + 200] + bytes(len(whole) - sizes[2] - 200))
    writer = D.TeacherCacheWriter(tmp_path / "c", options)
    assert len(writer) == 8
    writer.append(torch.arange(8, 12), logits[8:])
    writer.finish()
    assert (tmp_path / "c").read_bytes()[: len(whole)] == whole


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "c"
    ids = write(path, logits_of((12,)))
    whole = path.read_bytes()
    found = {"open": 0, "read": 0}
    for position in range(0, len(whole), 11):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            cache = D.CachedTeacher(path)
        except ValueError:
            found["open"] += 1
            continue
        with pytest.raises(ValueError, match="is damaged: the rows at bytes"):
            cache(ids)
        with pytest.raises(ValueError, match="is damaged: the rows at bytes"):
            cache.cache.verify()
        found["read"] += 1
    assert min(found.values()) > 10
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="must be finished and whole, got 12 samples"):
        D.CachedTeacher(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="must be finished and whole"):
        D.CachedTeacher(path)
    path.write_bytes(b"no cache" * 50)
    with pytest.raises(ValueError, match="got another kind of file"):
        D.CachedTeacher(path)
    path.write_bytes(whole[:8] + struct.pack("<I", 99) + whole[12:])
    with pytest.raises(ValueError, match="must be of version 1, got 99"):
        D.CachedTeacher(path)


def test_a_full_disk_loses_nothing_that_was_complete(tmp_path):
    # A limit on the size of files stands for the full disk.
    code = textwrap.dedent("""
        import resource, signal, sys, torch, rarefy as rf
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        D = rf.distillation
        writer = D.TeacherCacheWriter(sys.argv[1], D.TeacherCacheOptions(50, 8, 2.0))
        logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
        writer.append(torch.arange(4), logits[:4])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            writer.append(torch.arange(4, 400), logits[4:])
        except RuntimeError as error:
            print(str(error).splitlines()[0])
        writer.append(torch.arange(4, 8), logits[4:8])  # there is room for this one
        print(len(writer))
    """)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    message, count = done.stdout.splitlines()
    assert "[TeacherCache] cannot write" in message
    assert "The 4 samples before are kept: make room and run again" in message
    assert count == "8"
    assert len(D.TeacherCacheWriter(tmp_path / "c", D.TeacherCacheOptions(50, 8, 2.0))) == 8


def test_one_writer_at_a_time(tmp_path):
    options = D.TeacherCacheOptions(50, 8, 2.0)
    writer = D.TeacherCacheWriter(tmp_path / "c", options)
    with pytest.raises(RuntimeError, match="is being written by another process"):
        D.TeacherCacheWriter(tmp_path / "c", options)
    del writer
    with pytest.raises(ValueError, match="delete the file to begin anew"):
        D.TeacherCacheWriter(tmp_path / "c", D.TeacherCacheOptions(50, 9, 2.0))


def test_mismatches_are_said(tmp_path):
    path = tmp_path / "c"
    ids = write(path, logits_of((6,)), fingerprint="abc")
    with pytest.raises(ValueError, match=r"must have temperature 4\.0, got 2\.0"):
        D.CachedTeacher(path, temperature=4.0)
    with pytest.raises(ValueError, match="must have classes 51, got 50"):
        D.CachedTeacher(path, classes=51)
    with pytest.raises(ValueError, match="must have fingerprint 'abd', got 'abc'"):
        D.CachedTeacher(path, fingerprint="abd")
    cache = D.CachedTeacher(path)
    with pytest.raises(IndexError, match=r"a sample id must be one of the 6 in .*, got 12345"):
        cache(torch.tensor([ids[0].item(), 12345]))
    with pytest.raises(TypeError, match="sample ids must be int64 as the file's, got string"):
        cache(["a"])
    with pytest.raises(KeyError, match="a batch must hold 'sample_id'"):
        cache({"x": ids})
    with pytest.raises(ValueError, match="must not exist: it is a finished cache"):
        D.TeacherCacheWriter(path, cache.options)


def test_bad_batches_write_nothing(tmp_path):
    options = D.TeacherCacheOptions(50, 8, 2.0)
    writer = D.TeacherCacheWriter(tmp_path / "c", options)
    writer.append(torch.arange(3), logits_of((3,)))
    size = os.path.getsize(tmp_path / "c.partial")
    bad = logits_of((2,))
    bad[1, 7] = torch.nan
    for error, message, ids, logits in [
        (ValueError, "finite maximum in every row and no NaN", torch.tensor([5, 6]), bad),
        (ValueError, "finite maximum", torch.tensor([5, 6]), torch.full((2, 50), -torch.inf)),
        (ValueError, "sample ids must differ, got 2 twice", torch.tensor([5, 2]), logits_of((2,))),
        (ValueError, "sample ids must differ, got 5 twice", torch.tensor([5, 5]), logits_of((2,))),
        (ValueError, r"logits must have shape \[2, 50\]", torch.tensor([5, 6]), logits_of((2,), 49)),
        (TypeError, "sample ids must be int64 or strings", torch.tensor([5.0, 6.0]), logits_of((2,))),
        (TypeError, "sample ids must be int64 as the file's, got string", ["a", "b"], logits_of((2,))),
    ]:
        with pytest.raises(error, match=message):
            writer.append(ids, logits)
        assert (len(writer), os.path.getsize(tmp_path / "c.partial")) == (3, size)
    for arguments, message in [
        ((0, 1), "classes must be in"),
        ((50, 51), r"k must be in \[1, 50\]"),
        ((50, 8, 0.0), "temperature must be positive"),
        ((50, 8, 1.0, "int4"), "dtype must be 'float16' or 'uint8', got 'int4'"),
        ((50, 8, 1.0, "uint8", "float"), "key must be 'int64' or 'string', got 'float'"),
        ((50, 8, 1.0, "uint8", "string", "x" * 129), "fingerprint must have at most 128 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            D.TeacherCacheOptions(*arguments)


def test_a_cache_that_cannot_get_its_name_goes_on(tmp_path):
    path, partial = tmp_path / "c", tmp_path / "c.partial"
    options = D.TeacherCacheOptions(50, 8, 2.0)
    writer = D.TeacherCacheWriter(path, options)
    logits = logits_of((12,))
    writer.append(torch.arange(4), logits[:4])
    whole = partial.read_bytes()
    path.write_text("somebody else's")
    for _ in range(2):
        with pytest.raises(ValueError, match="c must not exist: it was made while the cache was written"):
            writer.finish()
        assert path.read_text() == "somebody else's"
        assert partial.read_bytes() == whole
    writer.append(torch.arange(4, 8), logits[4:8])
    path.unlink()
    moved = tmp_path / "moved"
    partial.rename(moved)
    with pytest.raises(RuntimeError, match=r"cannot rename .*c\.partial to .*c: No such file"):
        writer.finish()
    moved.rename(partial)
    writer.append(torch.arange(8, 12), logits[8:])
    writer.finish()
    assert not partial.exists()
    top = D.CachedTeacher(path)(torch.arange(12))
    assert torch.equal(top.indices[:, 0], logits.argmax(-1))
    with pytest.raises(ValueError, match="is finished already"):
        writer.finish()


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0.5, 1.5, 2.0]),
        [0.5, 1.5, 2.0],
        [0, 1, 2.0],
        np.array([0.0, 1.0, 2.0]),
        torch.tensor([True, False, True]),
        ["a", "b", 3],
        [1, 2, "c"],
    ],
)
def test_ids_are_integers_or_strings(tmp_path, ids):
    path = tmp_path / "c"
    loader = [{"sample_id": ids, "x": logits_of((3,))}]
    with pytest.raises(TypeError, match="sample ids must be integers, or all of them strings, got "):
        D.cache_teacher(lambda x: x, loader, path, k=8, input_key="x", fingerprint="f", progress=False)
    assert list(tmp_path.iterdir()) == []
    write(path, logits_of((3,)), torch.arange(3))
    with pytest.raises(TypeError, match="sample ids must be integers, or all of them strings, got "):
        D.CachedTeacher(path)(ids)


def test_kinds_of_integers_as_ids(tmp_path):
    write(tmp_path / "c", logits_of((3,)), torch.arange(3))
    cached = D.CachedTeacher(tmp_path / "c")
    expected = cached(torch.arange(3)).values
    one_by_one = list(torch.arange(3))
    for ids in (torch.arange(3, dtype=torch.int32), np.arange(3), [0, 1, 2], (np.int64(0), 1, 2), one_by_one):
        assert torch.equal(cached(ids).values, expected)
