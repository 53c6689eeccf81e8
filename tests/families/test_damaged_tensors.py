"""Every tensor of every family of another shape or dtype: read, or refused in a sentence that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damage import damaged
from families.built import BuiltCases
from families.cases import all_cases, family
from safetensors.torch import load_file, save_file
from tiers import first_of

from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.errors import AdaptmergeError
from adaptmerge.formats.inputs import InputSpec, open_input
from adaptmerge.schemes.view import open_values

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", first_of(all_cases(), family, ()))
def test_a_changed_tensor_is_read_or_refused(name: str, built: BuiltCases, tmp_path: Path) -> None:
    found = built(name)
    base = open_values(str(found.base))
    shutil.copytree(found.path, tmp_path / "a")
    refused = 0
    for said, tensors in damaged(load_file(found.path / WEIGHTS)):
        save_file(tensors, tmp_path / "a" / WEIGHTS)
        try:
            adapter = open_input(InputSpec(str(tmp_path / "a")), base).adapter
            for edit in adapter.edits:
                factor = factor_of(edit)
                assert factor is None or min(factor.shape) > 0, said
        except AdaptmergeError as problem:
            refused += 1
            assert WEIGHTS in str(problem) or "a:" in str(problem), said
        except Exception as problem:
            raise AssertionError(f"{name}: {said}") from problem
    assert refused > 5
