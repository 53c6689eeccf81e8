"""Every tensor of every family in another shape or dtype: refused in a sentence, or computed with."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import console
import pytest
from damage import damaged
from families.built import Built, BuiltCases
from families.cases import all_cases
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def codes(found: Built, folder: Path, step: int) -> set[int]:
    """The exit codes of comparing an adapter with itself, each time with a tensor changed."""
    shutil.copytree(found.path, folder / "a")
    seen = set()
    for said, tensors in islice(damaged(load_file(found.path / WEIGHTS)), 0, None, step):
        save_file(tensors, folder / "a" / WEIGHTS)
        outcome = console.run("diff", str(folder / "a"), str(found.path), "--base", str(found.base))
        seen.add(outcome.code)
        refused = outcome.code == 1 and outcome.stderr.startswith("error: ")
        assert refused or outcome.code in (0, 3), said
    return seen


@pytest.mark.parametrize("name", ["adalora", "frod", "glora"])
def test_a_changed_tensor_is_refused_or_computed_with(
    name: str, built: BuiltCases, tmp_path: Path
) -> None:
    assert 1 in codes(built(name), tmp_path, 11)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_cases())
def test_each_changed_tensor_is_refused_or_computed_with(
    name: str, built: BuiltCases, tmp_path: Path
) -> None:
    assert 1 in codes(built(name), tmp_path, 1)
