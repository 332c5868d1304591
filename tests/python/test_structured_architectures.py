"""Structured pruning of real architectures: the checks of test_structured_structures.py, and their configurations."""

from __future__ import annotations

import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from absence import assert_same, run, run_without
from architectures import ARCHITECTURES
from structured_checks import check_attributes, check_function, check_training, prune

from rarefy.pruning import importance, save_pruned

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_removed(name):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.make_inputs()
    expected = run(model, inputs, architecture.forward)
    assert_same(expected, run_without(model, {}, inputs, architecture.forward), 1e-11)


def check_configuration(pruned):
    """Where all layers have one width, the configuration says it."""
    for field, widths in pruned.subject.fields.items():
        found = widths(pruned.model)
        if len(found) == 1:
            assert reduce(getattr, field.split("."), pruned.model.config) == found.pop(), field


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_function(name, scope):
    for channels, seed in ((0.3, 0), (0.5, 1)):
        options = {"channels": channels, "scope": scope, "importance": importance.Random(seed)}
        pruned = prune(ARCHITECTURES[name], seed, fold_constants=False, **options)
        assert pruned.removed > 0
        check_function(pruned)
        check_attributes(pruned.model)
        check_configuration(pruned)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_goes_on(name):
    pruned = prune(ARCHITECTURES[name], trained=True, channels=0.4, scope="local", fold_constants=False)
    assert pruned.removed > 0
    check_function(pruned)
    check_training(pruned)


LOADER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from absence import run
from architectures import ARCHITECTURES
from structured_checks import check_attributes
from rarefy.pruning import load_pruned
folder = Path(sys.argv[2])
for i, (name, architecture) in enumerate(ARCHITECTURES.items()):
    model = architecture.build(7)  # other weights
    load_pruned(model, folder / f"{i}.safetensors")
    check_attributes(model)
    torch.save(run(model, architecture.make_inputs(60), architecture.forward), folder / f"{i}.outputs")
"""


def test_loaded_in_another_process(tmp_path):
    expected = []
    for i, architecture in enumerate(ARCHITECTURES.values()):
        pruned = prune(architecture, channels=0.5, scope="local", importance=importance.Random(0))
        save_pruned(pruned.model, tmp_path / f"{i}.safetensors")
        expected.append(run(pruned.model, architecture.make_inputs(60), architecture.forward))
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", LOADER, here, str(tmp_path)], check=True, timeout=300)
    for i, outputs in enumerate(expected):
        assert_same(outputs, torch.load(tmp_path / f"{i}.outputs", weights_only=True), 0.0)


def test_all_are_here():
    assert len(ARCHITECTURES) >= 19
