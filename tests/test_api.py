"""The public names exist, are what their modules define, and cost nothing until used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import adaptmerge


def test_every_public_name_resolves() -> None:
    assert sorted(adaptmerge._HOME_OF) == sorted(adaptmerge.__all__)
    for name in adaptmerge.__all__:
        assert getattr(adaptmerge, name).__name__.split(".")[-1] == name


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(adaptmerge, "no_such_name")


def test_import_is_light() -> None:
    code = "import sys, adaptmerge; print(sorted({'torch', 'click', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["", "import adaptmerge.methods.registry, adaptmerge.formats"])
@pytest.mark.parametrize("name", ["methods", "formats"])
def test_what_is_registered_is_given_at_every_call(name: str, first: str) -> None:
    """Whether the function or the package of its name was imported last."""
    code = f"""
{first}
import adaptmerge
from adaptmerge import {name}
counts = [len(adaptmerge.{name}()) for _ in range(3)] + [len({name}()), len(adaptmerge.{name}())]
assert len(set(counts)) == 1 and counts[0] > 3, counts
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
