"""Programs that need no decomposition for ONNX are left as they are, and all others are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

from rarefy.export import decompose


class Written(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def overwrites_what_it_reads(x):
    y = x * 2
    return y.relu_() + y


def overwrites_under_a_view(x):
    y = x * 2
    part = y[:, 1:2]
    return y.relu_() + part


CASES = {
    "pooling": (lambda x: F.adaptive_avg_pool2d(x, 1), True),
    "pooling to more": (lambda x: F.adaptive_avg_pool2d(x, 2), False),
    "in place, read by nothing else": (lambda x: (x * 2).relu_(), True),
    "in place, read afterwards": (overwrites_what_it_reads, True),
    "in place, with a view": (overwrites_under_a_view, False),
    "in place, behind dropout": (lambda x: F.dropout(x * 2, 0.5, False).relu_(), False),
    "in place, of a view": (lambda x: x.flatten(1).relu_(), False),
    "in place, of the input": (lambda x: x.relu_() * 1, False),
    "logic": (lambda x: ((x > 0) & (x < 1)).to(torch.float32), True),
    "a composite": (lambda x: torch.diff(x), False),
    "a composite that is no entry of the table": (lambda x: x.movedim(1, 2), False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_shortcut_is_taken_where_nothing_has_to_be_decomposed(tmp_path, monkeypatch, case):
    function, expected = CASES[case]
    answers = []

    def asked(program, table):
        answers.append(original(program, table))
        return answers[-1]

    original = decompose.is_translatable
    monkeypatch.setattr(decompose, "is_translatable", asked)
    x = torch.randn(3, 4, 6, 6)
    wanted = function(x.clone())
    before = torch.export.ExportedProgram.run_decompositions
    rf.export.to_onnx(Written(function), x, tmp_path / "m.onnx", verify=False)
    assert answers == [expected]
    assert torch.export.ExportedProgram.run_decompositions is before
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), wanted)
