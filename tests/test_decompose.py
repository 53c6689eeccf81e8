"""Matrices that cannot be decomposed end in a sentence that names the site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import console
import pytest
import samples
import torch
from safetensors.torch import save_file

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.bases.open import open_base
from adaptmerge.errors import InputError

NONE, SINGULAR = torch.full((3, 3), torch.nan), torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("ask", "matrix"),
    [
        (decompose.svd, NONE),
        (decompose.svdvals, NONE),
        (decompose.eigh, NONE),
        (lambda matrix: decompose.svd_lowrank(matrix, 2, 1), NONE),
        (decompose.inv, SINGULAR),
        (lambda matrix: decompose.solve(matrix, NONE), SINGULAR),
    ],
)
def test_what_cannot_be_decomposed(ask: Callable[[Any], Any], matrix: torch.Tensor) -> None:
    with pytest.raises(InputError, match="NaN or infinity, or has no inverse"):
        ask(matrix)
    ask(torch.eye(3))


@pytest.mark.parametrize("budget", [("--rank", "1"), ("--energy", "0.9")])
def test_values_that_are_not_finite_have_no_rank(budget: tuple[str, str], tmp_path: Path) -> None:
    sides = samples.random_sides(1)
    sides[samples.MODULES[0]][0][0, 0] = torch.inf
    bad = samples.write(tmp_path / "bad", sides)
    line = ("combine", str(bad), "-o", str(tmp_path / "out"), "--allow", "nonfinite", *budget)
    outcome = console.run(*line)
    assert outcome.code == 1
    assert outcome.stderr.startswith(f"error: {samples.MODULES[0]}: a matrix holds NaN or infinity")
    assert not (tmp_path / "out").exists()


def test_a_weight_without_rows_is_one(tmp_path: Path) -> None:
    save_file({"model.x.weight": torch.ones(0, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weight = open_base(str(tmp_path)).weight(Site("model.x", "weight"))
    assert weight is not None
    assert weight.shape == (0, 3)
