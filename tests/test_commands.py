"""Golden command lines: every file of tests/commands, run as it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from console import check, steps
from made import make

CASES = sorted((Path(__file__).parent / "commands").glob("*.md"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder, fixtures)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_command(
    case: Path, made: Path, fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "fixtures").symlink_to(fixtures, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    check(case, tmp_path)


def test_every_case_runs_something() -> None:
    assert CASES
    assert not [case.name for case in CASES if not steps(case.read_text(encoding="utf-8"))]
