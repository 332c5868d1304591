"""The examples run, as a user runs them."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rarefy.pruning import load_sparse

ROOT = Path(__file__).resolve().parents[2]
COMPRESS_CNN = ROOT / "examples/python/compress_cnn.py"
PRUNE_STRUCTURED = ROOT / "examples/python/prune_structured.py"
PRUNE_WEIGHTS = ROOT / "examples/python/prune_weights.py"
DISTILL_SENTIMENT = ROOT / "examples/python/distill_sentiment.py"
DISTILL_CLIP = ROOT / "examples/python/distill_clip.py"
DEPLOY_ALL = ROOT / "examples/python/deploy_all.py"
COMPRESS_MLP = ROOT / "build/dev/examples/cpp/compress_mlp"
PRUNE_WEIGHTS_CPP = ROOT / "build/dev/examples/cpp/prune_weights"
PRUNE_CNN = ROOT / "build/dev/examples/cpp/prune_cnn"
SERVE_INT8 = ROOT / "build/dev/examples/cpp/serve_int8"
DISTILL_CNN = ROOT / "build/dev/examples/cpp/distill_cnn"


pytest.importorskip("matplotlib")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")


def compress_cnn(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, COMPRESS_CNN, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def common():
    """The helpers of the Python examples, which are not a package."""
    spec = importlib.util.spec_from_file_location("_common", COMPRESS_CNN.with_name("_common.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["_common"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_common"]


# ---- compress_cnn.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    result = compress_cnn("--quick", "--out", folder)
    assert result.returncode == 0, result.stderr
    assert "| student, pruned, int8 | ONNX Runtime |" in result.stdout
    return folder


def stages(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["stage"], row["runtime"]): row for row in json.loads((folder / "report.json").read_text())["stages"]}


@pytest.mark.slow
def test_report_of_a_quick_run(quick_run):
    rows = stages(quick_run)
    assert list(rows) == [
        ("teacher", "FP32"),
        ("student, distilled", "FP32"),
        ("student, pruned", "FP32"),
        ("student, pruned, QAT", "training"),
        ("student, pruned, int8", "PyTorch"),
        ("student, pruned, int8", "ONNX Runtime"),
    ]
    teacher, distilled, pruned, qat, converted, onnx = rows.values()
    assert min(row["accuracy"] for row in rows.values()) > 80  # three epochs each
    one_image = 100 / 360
    assert abs(converted["accuracy"] - qat["accuracy"]) <= 2 * one_image
    assert abs(onnx["accuracy"] - qat["accuracy"]) <= 2 * one_image
    assert distilled["parameters"] < teacher["parameters"] / 4
    assert distilled["nonzero"] > 0.95 * distilled["parameters"]
    for row in (pruned, qat, converted, onnx):
        assert row["nonzero"] < 0.27 * row["parameters"]  # three of four weights; biases and batch norms are left alone
    assert onnx["bytes"] < pruned["bytes"] / 3
    assert onnx["compressed_bytes"] < onnx["bytes"] / 2
    for row in rows.values():
        if row["file"] is not None:
            assert (quick_run / row["file"]).stat().st_size == row["bytes"]
    assert all(row["onnx_ms"] > 0 for row in (teacher, distilled, pruned, onnx))
    assert all(row["torch_ms"] > 0 for row in (teacher, distilled, pruned, converted))
    text = (quick_run / "report.md").read_text()
    assert f"| {onnx['accuracy']:.2f} |" in re.sub(" +", " ", text)
    assert (quick_run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in quick_run.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_numbers(quick_run, tmp_path):
    command = [sys.executable, str(COMPRESS_CNN), "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    in_the_middle = tmp_path / "checkpoints/pruned.pt"
    end = time.monotonic() + 300
    while not in_the_middle.exists():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "report.json").exists()

    result = compress_cnn("--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "teacher: 3 epochs, 3 of them done" in said
    assert re.search("pruned: 3 epochs, [123] of them done", said)
    whole, resumed = stages(quick_run), stages(tmp_path)
    for name, row in whole.items():
        for key in ("accuracy", "parameters", "nonzero"):
            assert resumed[name][key] == row[key], (name, key)


@pytest.mark.slow
def test_other_options_are_named_and_nothing_is_lost(quick_run):
    before = {path: path.stat().st_mtime_ns for path in quick_run.rglob("*")}
    result = compress_cnn("--quick", "--out", quick_run, "--seed", 1, "--sparsity", 0.5)
    assert result.returncode == 2
    assert "seed was 0, is 1; sparsity was 0.75, is 0.5" in result.stderr
    assert "--fresh" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in quick_run.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.npz"], "missing.npz must be an .npz file that can be read"),
        (["--sparsity", "1"], r"--sparsity: must be in \[0, 1\), got 1.0"),
        (["--epochs", "1", "0", "1", "1"], "--epochs: must be positive, got 1 0 1 1"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = compress_cnn(*arguments, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_colour_images(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 512), ("test", 300)):
        labels = generator.integers(0, 3, count)
        images = generator.integers(0, 60, (count, 32, 32, 3))
        images[np.arange(count), :, :, labels] += 150  # red, green or blue
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    np.savez(tmp_path / "colours.npz", **arrays)
    result = compress_cnn("--data", tmp_path / "colours.npz", "--epochs", 6, 6, 3, 2, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = stages(tmp_path / "out")
    assert rows["student, pruned, int8", "ONNX Runtime"]["accuracy"] > 90


def good_arrays() -> dict[str, np.ndarray]:
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "must hold test_labels, got train_images"),
        ({"train_images": np.zeros((4, 32, 32, 3), np.float32)}, r"uint8 \[N, height, width, 3\], got float32"),
        ({"test_images": np.zeros((4, 3, 32, 32), np.uint8)}, r"test_images must be .* got uint8 \[4, 3, 32, 32\]"),
        ({"train_labels": np.zeros(3, np.int64)}, r"train_labels must be integers from 0 on, \[4\], got int64 \[3\]"),
        ({"test_labels": np.full(4, -1)}, "integers from 0 on"),
        ({"test_labels": np.full(4, 7)}, "test_labels must be labels of train_labels, below 1, got 7"),
        ({"test_images": np.zeros((4, 16, 16, 3), np.uint8)}, "must be of one size"),
    ],
)
def test_bad_npz(common, tmp_path, changes, message):
    arrays = {name: value for name, value in (good_arrays() | changes).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        common.load_npz(tmp_path / "bad.npz")


def test_not_an_npz(common, tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text.npz must be an .npz file that can be read"):
        common.load_npz(tmp_path / "text.npz")


@pytest.mark.parametrize("flip", [False, True])
def test_training_batches(common, flip):
    """Every image of a batch is a crop of the padded original, mirrored or not, under the original's label."""
    torch.manual_seed(0)
    images = torch.randn(10, 2, 5, 4)
    data = common.Images("x", 10, images, torch.arange(10), images, torch.arange(10), flip=flip, shift=1)
    seen, mirrored = [], 0
    batches = common.TrainingBatches(data, batch_size=5)
    for x, y in batches:
        assert x.shape == (5, 2, 5, 4)
        for image, label in zip(x, y, strict=True):
            padded = torch.nn.functional.pad(images[label], [1] * 4)
            crops = [padded[:, i : i + 5, j : j + 4] for i in range(3) for j in range(3)]
            plain = any(torch.equal(image, crop) for crop in crops)
            mirrored += not plain
            assert plain or (flip and any(torch.equal(image, crop.flip(2)) for crop in crops))
            seen.append(int(label))
    assert sorted(seen) == list(range(10))
    assert (mirrored > 0) == flip
    assert len(batches) == 2


def test_interrupted_write_leaves_the_old_file(common, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with common.atomic(path) as temporary:
            temporary.write_text("new, and")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# ---- prune_structured.py --------------------------------------------------------------------------------------------


def prune_structured(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PRUNE_STRUCTURED, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_prune_structured(tmp_path):
    result = prune_structured("--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    row = re.compile(r"^\| (\w+) +\| +([\d.]+) \| +([\d,]+) \| +([\d,]+) \| +([\d.]+) \| +([\d.]+) \|$", re.M)
    rows = {match[1]: [float(x.replace(",", "")) for x in match.groups()[1:]] for match in row.finditer(result.stdout)}
    assert list(rows) == ["original", "pruned"]
    original, pruned = rows.values()
    assert min(original[0], pruned[0]) > 80  # few epochs
    assert 0.45 < pruned[2] / original[2] < 0.55
    assert pruned[1] < 0.7 * original[1]
    assert "outputs equal those of the masked model" in result.stdout
    loaded = f"fresh process: {int(pruned[1]):,} parameters loaded, equal outputs"
    assert loaded in result.stdout
    again = prune_structured("--load", "--out", tmp_path)
    assert (again.returncode, again.stdout) == (0, loaded + "\n")
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.npz"], "missing.npz must be an .npz file that can be read"),
        (["--macs", "1"], r"--macs: must be in \[0, 1\), got 1.0"),
        (["--epochs", "1", "0"], "--epochs: must be positive, got 1 0"),
    ],
)
def test_prune_structured_bad_arguments(tmp_path, arguments, message):
    result = prune_structured(*arguments, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


# ---- prune_weights.py -----------------------------------------------------------------------------------------------


def prune_weights(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PRUNE_WEIGHTS, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_prune_weights(tmp_path):
    result = prune_weights("--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    row = re.compile(r"^\| (\w+) +\| +([\d.]+) \| +([\d,]+) \| +([\d,]+) \| +([\d.]+) \|$", re.M)
    rows = {match[1]: [float(x.replace(",", "")) for x in match.groups()[1:]] for match in row.finditer(result.stdout)}
    assert list(rows) == ["dense", "pruned", "sparse"]
    dense, pruned, sparse = rows.values()
    assert min(dense[0], pruned[0]) > 70  # few epochs
    assert abs(sparse[0] - pruned[0]) < 1
    assert pruned[1] < 0.11 * dense[1]
    assert pruned[2] < 0.16 * dense[2]
    loaded = f"fresh process: {int(pruned[2]):,} bytes read, equal outputs"
    assert loaded in result.stdout
    assert (tmp_path / "pruned.safetensors").stat().st_size == pruned[2]
    assert (tmp_path / "report.png").stat().st_size > 10_000
    again = prune_weights("--load", "--out", tmp_path)
    assert (again.returncode, again.stdout) == (0, loaded + "\n")
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.npz"], "missing.npz must be an .npz file that can be read"),
        (["--sparsity", "1"], r"--sparsity: must be in \[0, 1\), got 1.0"),
        (["--epochs", "1", "0"], "--epochs: must be positive, got 1 0"),
        (["--batch", "0"], "--batch: must be positive, got 0"),
    ],
)
def test_prune_weights_bad_arguments(tmp_path, arguments, message):
    result = prune_weights(*arguments, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


needs_prune_weights = pytest.mark.skipif(
    not PRUNE_WEIGHTS_CPP.exists(), reason="needs the C++ examples in build/dev (-DRAREFY_BUILD_EXAMPLES=ON)"
)


@needs_prune_weights
@pytest.mark.slow
def test_prune_weights_in_cpp(tmp_path):
    command = [PRUNE_WEIGHTS_CPP, "--out", tmp_path, "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    dense, pruned = map(float, re.search(r"accuracy: dense ([\d.]+) %, pruned ([\d.]+) %", result.stdout).groups())
    assert min(dense, pruned) > 70
    bytes_of, ratio = re.search(r"(\d+) of \d+ bytes \((0\.\d+)\), equal outputs", result.stdout).groups()
    assert (tmp_path / "pruned.safetensors").stat().st_size == int(bytes_of)
    assert float(ratio) < 0.16
    state = load_sparse(tmp_path / "pruned.safetensors")
    assert set(state) == {f"{layer}.{name}" for layer in ("first", "second", "last") for name in ("weight", "bias")}


@needs_prune_weights
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--out must be given"), (["--fast"], "unknown or incomplete option --fast"), (["--out"], "unknown or inc")],
)
def test_prune_weights_usage(arguments, message):
    result = subprocess.run([PRUNE_WEIGHTS_CPP, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr
    assert "usage: prune_weights --out DIR" in result.stderr


# ---- distill_sentiment.py, distill_clip.py --------------------------------------------------------------------------


def distill(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("transformers")
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=590)


def rows_of(result: subprocess.CompletedProcess[str]) -> dict[str, list[float]]:
    """The table that a distillation example prints: numbers by the name of the model."""
    assert result.returncode == 0, result.stderr
    row = re.compile(r"^\| (\w[\w, ]*?) +((?:\| +[\d.,]+ )+)\|$", re.M)
    return {
        match[1]: [float(x.replace(",", "")) for x in match[2].split("|")[1:]] for match in row.finditer(result.stdout)
    }


def assert_all_there(folder: Path, names: list[str]) -> None:
    assert sorted(path.name for path in folder.glob("*.onnx")) == sorted(f"{name}.onnx" for name in names)
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
def test_distill_sentiment(tmp_path):
    rows = rows_of(distill(DISTILL_SENTIMENT, "--quick", "--out", tmp_path / "first"))
    assert list(rows) == ["teacher", "student alone", "student distilled", "distilled, QAT"]
    teacher, alone, distilled, qat = rows.values()
    assert alone[0] == distilled[0] == qat[0] < teacher[0] / 2  # parameters
    assert abs(qat[1] - distilled[1]) < 6
    assert qat[2] < 0.35 * distilled[2]  # KiB
    assert_all_there(tmp_path / "first", ["teacher", "student_alone", "student_distilled", "distilled_QAT"])

    # A teacher that is there is used as it is.
    again = distill(DISTILL_SENTIMENT, "--quick", "--teacher", tmp_path / "first/teacher", "--out", tmp_path / "second")
    assert rows_of(again)["teacher"][:3] == teacher[:3]
    assert "teacher:" not in again.stderr  # no bar: not trained


@pytest.mark.slow
def test_distill_sentiment_reads_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    words = ["dull", "tedious", "awful", "weak"], ["fine", "moving", "great", "funny"]
    for part, count in (("train", 400), ("dev", 100)):
        labels = generator.integers(0, 2, count)
        lines = [f"a film that is {' and '.join(generator.choice(words[y], 2))}\t{y}" for y in labels]
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    rows = rows_of(distill(DISTILL_SENTIMENT, "--data", tmp_path, "--epochs", 6, 16, 2, "--out", tmp_path / "out"))
    assert min(accuracy for _, accuracy, *_ in rows.values()) > 90


@pytest.mark.slow
def test_distill_clip(tmp_path):
    result = distill(DISTILL_CLIP, "--quick", "--out", tmp_path)
    rows = rows_of(result)
    names = ["teacher", "student alone", "student distilled", "distilled, pruned", "distilled, pruned, QAT"]
    assert list(rows) == names
    teacher, alone, distilled, pruned, qat = rows.values()
    assert (
        min(zero_shot for *_, zero_shot, _, _ in (teacher, alone, distilled, pruned, qat)) > 15
    )  # of ten digits, after a few epochs
    assert alone[0] == distilled[0] < teacher[0] / 5  # parameters
    assert pruned[0] == qat[0] < 0.8 * distilled[0]
    assert qat[4] < 0.7 * pruned[4] < 0.7 * distilled[4]  # KiB
    assert "outputs equal those of the masked model" in result.stderr + result.stdout
    assert_all_there(tmp_path, [name.replace(", ", "_").replace(" ", "_") for name in names])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (DISTILL_SENTIMENT, ["--data", "missing"], "missing/train.tsv must be a text file that can be read"),
        (DISTILL_SENTIMENT, ["--epochs", "1", "0", "1"], "--epochs: must be positive, got 1 0 1"),
        (DISTILL_SENTIMENT, ["--teacher", "missing"], "missing must hold a BERT for sentences"),
        (DISTILL_CLIP, ["--data", "missing.npz"], "missing.npz must be an .npz file that can be read"),
        (DISTILL_CLIP, ["--macs", "1"], r"--macs: must be in \[0, 1\), got 1.0"),
        (DISTILL_CLIP, ["--epochs", "1", "1", "1", "0"], "--epochs: must be positive, got 1 1 1 0"),
    ],
)
def test_distill_bad_arguments(tmp_path, script, arguments, message):
    result = distill(script, *arguments, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def sentences():
    pytest.importorskip("tokenizers")
    spec = importlib.util.spec_from_file_location("_sentences", DISTILL_SENTIMENT.with_name("_sentences.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["_sentences"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_sentences"]


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ("good\t1\n", "bad\t0\nno label\n", r"dev.tsv, line 2 must be a sentence, a tab and a label .* got 'no label'"),
        ("good\t1\n", "bad\tzero\n", "dev.tsv, line 1 must be"),
        ("good\t1\n", "bad\t-1\n", "dev.tsv, line 1 must be"),
        ("good\t1\n\t0\n", "bad\t0\n", "train.tsv, line 2 must be"),
        ("good\t1\n", "", "dev.tsv must hold sentences, got none"),
        ("good\t1\n", "bad\t2\n", "labels must be those of train.tsv, below 2, got 2"),
    ],
)
def test_bad_tsv(sentences, tmp_path, train, dev, message):
    (tmp_path / "train.tsv").write_text(train)
    (tmp_path / "dev.tsv").write_text(dev)
    with pytest.raises(ValueError, match=message):
        sentences.read_tsv(tmp_path)


def test_sentences_of_the_documentation(sentences):
    """Training and test share no sentence, every topic is in both, and a seed gives the same again."""
    data = sentences.python_documentation(0)
    train, test = ({sentence for sentence, _ in part} for part in (data.train, data.test))
    assert not train & test
    assert (len(train), len(test)) == (len(data.train), len(data.test))
    assert len(test) > 1000
    for part in (data.train, data.test):
        assert {label for _, label in part} == set(range(len(data.labels)))
    shares = np.bincount([label for _, label in data.test]) / len(data.test)
    assert shares.max() < 0.45  # a constant answer is no good one
    assert sentences.python_documentation(0) == data


def test_sentence_batches(sentences):
    """Every sentence once, cut to the longest of its batch, with a mask that is 0 on padding."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 20, (50,))
    tokens = torch.arange(1, 21).repeat(50, 1) * (torch.arange(20) < lengths[:, None])
    batches = sentences.SentenceBatches(tokens, torch.arange(50), 8)
    assert len(batches) == 7
    seen = []
    for batch in batches:
        assert batch["input_ids"].shape[1] == lengths[batch["labels"]].max()
        assert torch.equal(batch["attention_mask"].sum(1), lengths[batch["labels"]])
        assert torch.equal(batch["input_ids"], tokens[batch["labels"], : batch["input_ids"].shape[1]])
        seen += batch["labels"].tolist()
    assert sorted(seen) == list(range(50))


# ---- notebooks ------------------------------------------------------------------------------------------------------


def run_notebook(name: str, folder: Path) -> list[str]:
    """The outputs of a notebook, as text."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples/notebooks" / name, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
def test_notebook(tmp_path):
    texts = run_notebook("quickstart.ipynb", tmp_path)
    assert sum("image/png" in text for text in texts) == 3
    assert any("batch norm folded" in text for text in texts)
    table = next(text for text in texts if "| model in ONNX Runtime |" in text)
    scores = {name: float(score) for name, score in re.findall(r"\| (\w+) \| ([\d.]+) \|", table)}
    assert list(scores) == ["teacher", "student", "pruned", "int8"]
    assert min(scores.values()) > 93
    qat = next(float(found[1]) for text in texts if (found := re.search(r"QAT model ([\d.]+) %", text)))
    assert abs(scores["int8"] - qat) < 0.6


@pytest.mark.slow
def test_structured_pruning_notebook(tmp_path):
    texts = run_notebook("structured_pruning.ipynb", tmp_path)
    assert sum("image/png" in text for text in texts) == 1
    assert sum("<svg" in text for text in texts) == 1
    assert sum("text/html" in text and "<table" in text for text in texts) >= 2  # preview and report
    curves = "\n".join(text for text in texts if "image/png" not in text and "<svg" not in text)
    scores = {
        name: [float(x) for x in row.split()] for name, row in re.findall(r"(l1|taylor|random) +([\d. ]+)", curves)
    }
    assert scores["l1"][2] > scores["random"][2]  # a fifth of the MACs is gone
    tuned = [float(score) for text in texts for score in re.findall(r"after training ([\d.]+) %", text)]
    assert len(tuned) == 2
    assert min(tuned) > 93
    assert any("equal outputs: True" in text for text in texts)


# ---- deploy_all.py --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_deploy_all(tmp_path):
    command = [sys.executable, DEPLOY_ALL, "--quick", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "deploy.json").read_text())
    rows = {row["runtime"]: row for row in content["runtimes"]}
    assert list(rows) == [
        "PyTorch FP32", "PyTorch int8", "ONNX Runtime FP32", "ONNX Runtime", "OpenVINO", "ExecuTorch", "LiteRT", "Core ML",
    ]  # fmt: skip
    assert content["trained_accuracy"] > 85
    packages = {"OpenVINO": "openvino", "ExecuTorch": "executorch", "LiteRT": "litert_torch", "Core ML": "coremltools"}
    missing = {name for name, package in packages.items() if importlib.util.find_spec(package) is None}
    for name, row in rows.items():
        assert f"| {name} " in result.stdout
        if name in missing:
            assert row["note"].startswith("not installed: pip install rarefy[")
            assert row["bytes"] is row["accuracy"] is row["ms"] is None
        elif name != "Core ML":
            assert row["ms"] > 0
            assert row["ratio"] == pytest.approx(row["ms"] / rows["ONNX Runtime FP32"]["ms"])
    whole = rows["ONNX Runtime FP32"]["bytes"]
    for name in {"ONNX Runtime", "OpenVINO", "ExecuTorch", "LiteRT"} - missing:
        assert rows[name]["agreement"] > 99
        assert rows[name]["steps"] <= 6
        assert rows[name]["bytes"] < 0.4 * whole
        done, _, every = rows[name]["integer"].split()
        assert done == every
    assert rows["PyTorch int8"]["agreement"] > 99
    assert (tmp_path / "deploy.png").read_bytes()[:4] == b"\x89PNG"
    assert "| OpenVINO " in (tmp_path / "deploy.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing"], "missing/cifar10_subset.npz must be an .npz file that can be read"),
        (["--fast"], "--fast"),
    ],
)
def test_deploy_all_usage(arguments, message, tmp_path):
    command = [sys.executable, DEPLOY_ALL, *arguments, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


# ---- compress_mlp ---------------------------------------------------------------------------------------------------

needs_compress_mlp = pytest.mark.skipif(
    not COMPRESS_MLP.exists(), reason="needs the C++ examples in build/dev (-DRAREFY_BUILD_EXAMPLES=ON)"
)


def compress_mlp(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMPRESS_MLP, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def digits_csv(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("csv") / "digits.csv"
    script = ROOT / "examples/cpp/write_digits_csv.py"
    subprocess.run([sys.executable, script, path], check=True, capture_output=True, timeout=300)
    return path


@needs_compress_mlp
@pytest.mark.slow
def test_compress_mlp(digits_csv, tmp_path):
    result = compress_mlp(digits_csv, "--out", tmp_path, "--quick", "--seed", 3)
    assert result.returncode == 0, result.stderr
    line = re.compile(r"^(\S[\w, ]+?) {2,}([\d.]+) +(\d+) +(\d+) +([\d.]+) +([\d.]+|-)$", re.M)
    rows = {match[1]: [float(value) for value in match.groups()[1:4]] for match in line.finditer(result.stdout)}
    assert list(rows) == [
        "teacher",
        "student, distilled",
        "student, pruned",
        "student, pruned, QAT",
        "student, pruned, int8",
    ]
    assert all(accuracy > 85 for accuracy, _, _ in rows.values())
    for stage in ("student, pruned", "student, pruned, QAT", "student, pruned, int8"):
        assert rows[stage][2] < 0.22 * rows[stage][1]
    assert abs(rows["student, pruned, int8"][0] - rows["student, pruned, QAT"][0]) < 0.6
    assert (tmp_path / "student_int8.pt").stat().st_size < (tmp_path / "student.pt").stat().st_size / 2
    assert (tmp_path / "student.onnx").stat().st_size < (tmp_path / "student.pt").stat().st_size / 3
    again = compress_mlp(digits_csv, "--out", tmp_path, "--quick", "--seed", 3)
    accuracies = {match[1]: float(match[2]) for match in line.finditer(again.stdout)}
    assert accuracies == {stage: values[0] for stage, values in rows.items()}


@needs_compress_mlp
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a CSV file must be given"),
        (["digits.csv"], "--out must be given"),
        (["digits.csv", "--out"], "--out must be followed by a value"),
        (["digits.csv", "--out", "x", "--seed", "-1"], "--seed must be an integer from 0 to 2147483647, got '-1'"),
        (["digits.csv", "--out", "x", "--fast"], "unknown option --fast"),
        (["digits.csv", "other.csv", "--out", "x"], "one CSV file must be given, got also 'other.csv'"),
    ],
)
def test_compress_mlp_usage(arguments, message):
    result = compress_mlp(*arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"compress_mlp: {message}",
        "usage: compress_mlp DIGITS.csv --out DIR [--seed N] [--quick]",
    ]


@needs_compress_mlp
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0," * 63 + "0", "line 2: 65 fields expected (64 pixels and a label), got 64"),
        ("0," * 65 + "0", "line 2: 65 fields expected (64 pixels and a label), got 66"),
        ("", "line 2: 65 fields expected (64 pixels and a label), got 1"),
        ("17," + "0," * 63 + "0", "line 2: a pixel from 0 to 16 expected in column 1, got '17'"),
        ("0," * 63 + "x,0", "line 2: a pixel from 0 to 16 expected in column 64, got 'x'"),
        ("0," * 64 + "10", "line 2: a label from 0 to 9 expected in column 65, got '10'"),
        (None, "at least 640 images expected, got 1"),
    ],
)
def test_compress_mlp_bad_csv(tmp_path, line, message):
    path = tmp_path / "digits.csv"
    path.write_text("0," * 64 + "0\n" + ("" if line is None else line + "\n"))
    result = compress_mlp(path, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == f"compress_mlp: {path}{':' if line is None else ','} {message}\n"
    assert not (tmp_path / "out").exists()


@needs_compress_mlp
def test_compress_mlp_missing_csv(tmp_path):
    result = compress_mlp(tmp_path / "missing.csv", "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (1, f"compress_mlp: {tmp_path / 'missing.csv'} cannot be read\n")


# ---- distill_cnn ----------------------------------------------------------------------------------------------------

needs_distill_cnn = pytest.mark.skipif(
    not DISTILL_CNN.exists(), reason="needs the C++ examples in build/dev (-DRAREFY_BUILD_EXAMPLES=ON)"
)


def distill_cnn(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DISTILL_CNN, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@needs_distill_cnn
@pytest.mark.slow
def test_distill_cnn(digits_csv):
    result = distill_cnn(digits_csv, "--quick")
    assert result.returncode == 0, result.stderr
    line = re.compile(r"^(\S[\w ]+?) {2,}([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +[\d.]+$", re.M)
    rows = {match[1]: [float(value) for value in match.groups()[1:]] for match in line.finditer(result.stdout)}
    assert list(rows) == ["teacher", "student alone", "student distilled"]
    teacher, alone, distilled = rows.values()
    assert teacher[0] > 95
    assert distilled[3] == alone[3] < teacher[3] / 25
    assert teacher[1:3] == [100.0, 0.0]
    assert distilled[0] > alone[0] + 2
    assert distilled[1] > alone[1]
    assert distilled[2] < alone[2]  # nearer to the teacher


@needs_distill_cnn
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a CSV file must be given"),
        (["digits.csv", "--seed"], "--seed must be followed by a value"),
        (["digits.csv", "--seed", "-1"], "--seed must be an integer from 0 to 2147483647, got '-1'"),
        (["digits.csv", "--fast"], "unknown option --fast"),
        (["digits.csv", "other.csv"], "one CSV file must be given, got also 'other.csv'"),
    ],
)
def test_distill_cnn_usage(arguments, message):
    result = distill_cnn(*arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"distill_cnn: {message}",
        "usage: distill_cnn DIGITS.csv [--seed N] [--quick]",
    ]


@needs_distill_cnn
def test_distill_cnn_missing_csv(tmp_path):
    result = distill_cnn(tmp_path / "missing.csv")
    assert (result.returncode, result.stderr) == (1, f"distill_cnn: {tmp_path / 'missing.csv'} cannot be read\n")


# ---- prune_cnn ------------------------------------------------------------------------------------------------------

needs_prune_cnn = pytest.mark.skipif(
    not PRUNE_CNN.exists(), reason="needs the C++ examples in build/dev (-DRAREFY_BUILD_EXAMPLES=ON)"
)


@needs_prune_cnn
@pytest.mark.slow
def test_prune_cnn(tmp_path):
    result = subprocess.run([PRUNE_CNN, "--out", tmp_path, "--quick"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    line = re.compile(r"^(original|pruned|loaded) +([\d.]+) +(\d+) +(\d+) +[\d.]+$", re.M)
    rows = {match[1]: [float(value) for value in match.groups()[1:]] for match in line.finditer(result.stdout)}
    assert list(rows) == ["original", "pruned", "loaded"]
    assert min(accuracy for accuracy, _, _ in rows.values()) > 80
    assert 0.4 < rows["pruned"][2] / rows["original"][2] < 0.6
    assert rows["loaded"] == rows["pruned"]
    assert "loaded into a fresh model, equal outputs" in result.stdout


@needs_prune_cnn
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out must be given"),
        (["--out"], "--out must be followed by a value"),
        (["--out", "x", "--seed", "-1"], "--seed must be an integer from 0 to 4294967295, got '-1'"),
        (["--out", "x", "--fast"], "unknown option --fast"),
    ],
)
def test_prune_cnn_usage(arguments, message):
    result = subprocess.run([PRUNE_CNN, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"prune_cnn: {message}", "usage: prune_cnn --out DIR [--seed N] [--quick]"]


# ---- serve_int8 -----------------------------------------------------------------------------------------------------

needs_serve_int8 = pytest.mark.skipif(
    not SERVE_INT8.exists(), reason="needs the C++ examples in build/dev (-DRAREFY_BUILD_EXAMPLES=ON)"
)


def serve_int8(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SERVE_INT8, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@needs_serve_int8
@pytest.mark.slow
def test_serve_int8(tmp_path):
    made = serve_int8("--out", tmp_path, "--quick", "--batch", 1, "--batch", 8)
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.safetensors", "int8"]
    row = re.compile(r"^(fp32|int8) +([\d.]+) +([\d.]+)$", re.M)
    rows = {match[1]: (float(match[2]), float(match[3])) for match in row.finditer(made.stdout)}
    assert rows["fp32"][0] > 50  # a few steps of training; chance is 10
    assert rows["int8"][0] > rows["fp32"][0] - 3
    assert rows["int8"][1] < 0.35 * rows["fp32"][1]
    assert float(re.search(r"same class for ([\d.]+) %", made.stdout)[1]) > 97
    latencies = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+$", made.stdout, re.M)
    assert [int(line[0]) for line in latencies] == [1, 8]
    assert all(float(line[i]) <= float(line[i + 1]) for line in latencies for i in (1, 3))  # p50 and p95

    # Another process serves the folder, without the float weights.
    served = serve_int8("--checkpoint", tmp_path / "int8", "--quick", "--batch", 4, "--threads", 2)
    assert served.returncode == 0, served.stderr
    again = {match[1]: float(match[2]) for match in row.finditer(served.stdout)}
    assert list(again) == ["int8"]
    assert again["int8"] > 50


@needs_serve_int8
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch"], "--batch must be followed by a value"),
        (["--batch", "0"], "--batch must be an integer from 1 to 4096, got '0'"),
        (["--threads", "two"], "--threads must be an integer from 1 to 256, got 'two'"),
        (["--float", "x"], "--float must come with --checkpoint"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_serve_int8_usage(arguments, message):
    result = serve_int8(*arguments)
    assert result.returncode == 2
    first, usage = result.stderr.splitlines()
    assert first == f"serve_int8: {message}"
    assert usage.startswith("usage: serve_int8 [--checkpoint DIR")


@needs_serve_int8
def test_serve_int8_bad_folder(tmp_path):
    result = serve_int8("--checkpoint", tmp_path / "none")
    assert result.returncode == 1
    assert result.stderr == (
        f"serve_int8: [load_quantized] {tmp_path / 'none'} must be a folder that save_quantized has written, but is none\n"
    )
    (tmp_path / "empty").mkdir()
    result = serve_int8("--checkpoint", tmp_path / "empty")
    assert (result.returncode, "but quantization.json is missing" in result.stderr) == (1, True)
