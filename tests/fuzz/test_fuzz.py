"""Changed files of every kind for every command: python -m tests.fuzz runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import running
from fuzz.command import SEED

pytest.importorskip("peft")
pytest.importorskip("gguf")
FEW, MANY = 200, 2000
STEP = 20  # cases of one test


def blocks(first: int, end: int) -> list[range]:
    return [range(start, start + STEP) for start in range(first, end, STEP)]


def fine(numbers: range, folder: Path) -> None:
    summary = running.timed(running.run_here(SEED, numbers, folder))
    assert summary.cases == STEP
    assert not summary.failed, "\n".join(summary.lines(SEED))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("numbers", blocks(0, FEW), ids=str)
def test_commands_refuse_or_do_what_is_asked(numbers: range, folder: Path) -> None:
    fine(numbers, folder)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", blocks(FEW, MANY), ids=str)
def test_more_of_them(numbers: range, folder: Path) -> None:
    fine(numbers, folder)
