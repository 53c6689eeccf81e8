"""Nothing but our own words on stderr, whatever other packages have to say."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

from adaptmerge.lazy import CHATTY, quietly, without_logs

OURS = re.compile(r"(info|assumed|approximated|dropped|error): ")


def spoken(folder: Path, *arguments: str) -> str:
    """What a command that succeeds writes to stderr, in a process of its own."""
    command = [sys.executable, "-m", "adaptmerge", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path, fixtures: Path) -> Path:
    """A folder with a base and two adapters."""
    for name, source in (("base", "base"), ("a", "lora-r8-perl"), ("b", "lora-r8-cheaders")):
        (tmp_path / name).symlink_to(fixtures / "tinyllama" / source, target_is_directory=True)
    return tmp_path


def test_an_nf4_fuse_is_verified_in_silence(folder: Path) -> None:
    assert spoken(folder, "fuse", "base", "a", "--quant", "nf4", "-o", "fused") == ""
    assert spoken(folder, "verify", "fused", "--base", "base") == ""


@pytest.mark.slow  # it loads PEFT in a process of its own
def test_a_merge_is_verified_by_peft_in_silence(folder: Path) -> None:
    pytest.importorskip("peft")
    said = spoken(folder, "combine", "a", "b", "-o", "merged").splitlines()
    assert said and all(map(OURS.match, said))
    assert spoken(folder, "verify", "merged", "--base", "base") == ""


def test_advice_of_other_packages_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(f"{name}.some.module") for name in CHATTY]
    before = [logging.getLogger(name).level for name in CHATTY]
    with quietly():
        for logger in loggers:
            logger.warning("advice")
        warnings.warn("advice", stacklevel=1)
    assert capfd.readouterr().err == ""
    assert [logging.getLogger(name).level for name in CHATTY] == before


def test_what_goes_wrong_is_still_said_and_raised() -> None:
    heard: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, handler = logging.getLogger("torch.some.module"), Heard()
    logger.addHandler(handler)
    with pytest.raises(ValueError, match="wrong"), without_logs():
        logger.warning("advice")
        logger.error("broken")
        raise ValueError("wrong")
    logger.removeHandler(handler)
    assert heard == ["broken"]
    assert logger.getEffectiveLevel() <= logging.WARNING


def test_progress_bars_of_transformers_come_back() -> None:
    from transformers.utils import logging as theirs

    from adaptmerge.bases.classes import quietly as of_models

    before = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    with of_models():
        assert not theirs.is_progress_bar_enabled()
        assert theirs.get_verbosity() == theirs.ERROR
    assert (theirs.is_progress_bar_enabled(), theirs.get_verbosity()) == before
