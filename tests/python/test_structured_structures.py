"""Structured pruning of small models: what is left computes what the original computes without what was removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from absence import assert_same, named_tensors, run
from structured_checks import check_attributes, check_expectations, check_function, check_training, prune
from structures import EXPECTATIONS, STRUCTURES, read_expectations

from rarefy.pruning import importance, save_pruned


def test_table():
    assert len(STRUCTURES) >= 44
    assert list(STRUCTURES) == list(read_expectations()), f"the models are not those of {EXPECTATIONS.name}, in order"


@pytest.mark.parametrize("fold", [False, True], ids=["ignored", "folded"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_function(name, scope, fold):
    structure = STRUCTURES[name]
    for seed, channels in enumerate((0.3, 0.5)):
        options = {"channels": channels, "scope": scope, "importance": importance.Random(seed)}
        pruned = prune(structure, seed, fold_constants=fold, **options)
        assert fold or not pruned.report.folds
        check_function(pruned)
        check_attributes(pruned.model)
        check_expectations(pruned, structure.groups, structure.pins)


# Of each model: where the constants of removed channels go, and through what.
FOLDED = {
    "chain": {("fc.bias", "fc.weight")},
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded(name):
    pruned = prune(STRUCTURES[name], channels=0.5, scope="local", importance=importance.Random(0))
    assert {(fold.tensor, fold.weight) for fold in pruned.report.folds} == FOLDED[name]
    check_function(pruned)
    before, after = named_tensors(pruned.original), named_tensors(pruned.model)
    for fold in pruned.report.folds:
        expected = before[fold.tensor] + fold.delta
        for dim, kept in pruned.kept.get(fold.tensor, {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(after[fold.tensor], expected, rtol=0, atol=1e-15)
        assert not torch.equal(after[fold.tensor], before[fold.tensor][: len(expected)])


@pytest.mark.parametrize("name", STRUCTURES)
def test_training_goes_on(name):
    pruned = prune(STRUCTURES[name], trained=True, channels=0.5, importance="l1", scope="local")
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
