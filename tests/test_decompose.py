"""Matrices that cannot be decomposed end in a sentence that names the site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import console
import numpy as np
import pytest
import samples
import torch
from safetensors.torch import save_file
from strategies import ref_of

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Leaf
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


def test_shapes_that_do_not_go_together_end_in_a_sentence() -> None:
    """Whoever builds a factor of what a file holds: readers that check shapes say more, and first."""
    with pytest.raises(InputError, match="a matrix has two dimensions"):
        Leaf(ref_of(np.ones(3)))


def test_narrow_floats_are_looked_at_for_nan(tmp_path: Path) -> None:
    sides = samples.random_sides(1)
    for a, b in sides.values():
        a[0, 0] = b[0, 0] = torch.nan
    narrow = {m: (a.to(torch.float8_e5m2), b) for m, (a, b) in sides.items()}
    bad = samples.write(tmp_path / "bad", narrow)
    outcome = console.run("convert", str(bad), "-o", str(tmp_path / "out"), "--to", "native")
    assert outcome.code == 1
    assert "lora_A.weight' of" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(word: str, tmp_path: Path) -> None:
    """They would be in the output, which other readers of JSON then refuse."""
    path = samples.adapter(tmp_path / "a", 1) / samples.CONFIG
    path.write_text(path.read_text().replace("{", f'{{"megatron_config": [{word}], ', 1))
    outcome = console.run("convert", str(path.parent), "-o", str(tmp_path / "out"))
    assert outcome.code == 1
    assert "'megatron_config' is" in outcome.stderr
    assert "which is no number in JSON" in outcome.stderr


def test_a_weight_without_rows_is_one(tmp_path: Path) -> None:
    save_file({"model.x.weight": torch.ones(0, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weight = open_base(str(tmp_path)).weight(Site("model.x", "weight"))
    assert weight is not None
    assert weight.shape == (0, 3)
