"""The language model example as a program, and the order of methods on a model that is trained a little longer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prune_gpt(*arguments):
    script = ROOT / "examples/python/prune_gpt.py"
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_prune_gpt(tmp_path, pattern):
    result = prune_gpt("--quick", "--pattern", pattern, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in report["methods"]] == [
        "dense",
        "magnitude",
        "Wanda",
        "SparseGPT",
        "SparseGPT, refit",
    ]
    assert [round(row["zeros"], 4) for row in report["methods"]] == [0.0, 0.5, 0.5, 0.5, 0.5]
    for row in report["methods"]:
        assert re.search(
            rf"^{row['method']} +{row['zeros']:.4f} +{row['perplexity']:.4f} ", result.stdout, re.MULTILINE
        )
    assert f"CalibrationReport: sparse_gpt, {pattern}, refit: sparsity 0.5000" in result.stdout
    assert re.search(r"^The last one writes: ['\"].{100}", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing"], "missing/train.tsv must be a text file that can be read"),
        (["--pattern", "4:2"], "n < m"),
        (["--sparsity", "1"], r"--sparsity: must be in \[0, 1\), got 1"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = prune_gpt("--quick", *arguments, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_perplexities_of_a_quick_run():
    script = ROOT / "benchmarks/accuracy_sparsity_text.py"
    result = subprocess.run(
        [sys.executable, script, "--quick", "--seeds", "0"], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["dense", "magnitude", "wanda", "sparse_gpt", "refit", "order"]
    values = [line["perplexity"] for line in lines[:-1]]
    assert values[0] == min(values)
    # So short a training tells magnitudes and Wanda hardly apart; the whole benchmark does.
    assert max(values[3:]) < min(values[1:3])
