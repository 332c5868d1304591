"""Structured pruning of small models: what is left computes what the original computes without what was removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from absence import assert_same, run
from structured_checks import check_attributes, check_expectations, check_function, check_training, prune
from structures import EXPECTATIONS, STRUCTURES, read_expectations

from rarefy.pruning import importance, save_pruned


def test_table():
    assert len(STRUCTURES) >= 44
    assert list(STRUCTURES) == list(read_expectations()), f"the models are not those of {EXPECTATIONS.name}, in order"


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_function(name, scope):
    structure = STRUCTURES[name]
    removed = 0
    for channels in (0.3, 0.5):
        for seed in range(3):
            options = {"channels": channels, "scope": scope, "importance": importance.Random(seed)}
            pruned = prune(structure, seed, fold_constants=False, **options)
            check_function(pruned)
            check_attributes(pruned.model)
            removed += pruned.removed
    assert removed > 0
    check_expectations(pruned, structure.groups, structure.pins)


@pytest.mark.parametrize("name", STRUCTURES)
def test_training_goes_on(name):
    pruned = prune(STRUCTURES[name], trained=True, channels=0.5, importance="l1", scope="local", fold_constants=False)
    assert pruned.removed > 0
    check_function(pruned)
    check_training(pruned)
    check_attributes(pruned.model)


LOADER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from absence import run
from structured_checks import check_attributes
from structures import STRUCTURES
from rarefy.pruning import load_pruned
folder = Path(sys.argv[2])
for name, structure in STRUCTURES.items():
    model = structure.build(7)  # other weights
    load_pruned(model, folder / f"{name}.safetensors")
    check_attributes(model)
    torch.save(run(model, structure.make_inputs(60)), folder / f"{name}.outputs")
"""


def test_loaded_in_another_process(tmp_path):
    expected = {}
    for name, structure in STRUCTURES.items():
        pruned = prune(structure, channels=0.5, scope="local", importance=importance.Random(0))
        save_pruned(pruned.model, tmp_path / f"{name}.safetensors")
        expected[name] = run(pruned.model, structure.make_inputs(60))
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", LOADER, here, str(tmp_path)], check=True, timeout=300)
    for name, outputs in expected.items():
        assert_same(outputs, torch.load(tmp_path / f"{name}.outputs", weights_only=True), 0.0)
