"""benchmarks/accuracy.py --ladder runs, in its quick form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_ladder():
    pytest.importorskip("sklearn")
    command = [sys.executable, ROOT / "benchmarks/accuracy.py", "--ladder", "--quick", "--json", "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    rows = [line for line in lines if "seed" in line]
    kinds = ["FP32", "W8A8 PTQ", "W3A3 rounded", "W2A2 rounded", "W3A3 LSQ", "W2A2 LSQ"]
    assert [row["kind"] for row in rows] == kinds
    summary = {line["kind"]: line for line in lines if "seeds" in line}
    assert [kind for kind, line in summary.items() if "goal" in line] == ["W8A8 PTQ", "W3A3 LSQ", "W2A2 LSQ"]
    assert all("reached" not in line for line in lines)
