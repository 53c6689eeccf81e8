"""The public names exist, are what their modules define, and cost nothing until used."""

from __future__ import annotations

import subprocess
import sys

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
