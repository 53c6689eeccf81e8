"""Killed before any change to its files, a command leaves all of its output or none, and the same command
again writes the bytes that it writes undisturbed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from console import run
from fuse import interrupted
from fuse.models import llama_base
from peft_cases import CASES
from samples import tree

pytest.importorskip("peft")
COMMANDS = {
    "combine": ("combine A:0.7 B:0.3 -o OUT", "convert B -o OUT"),
    "file": ("combine A:0.7 B:0.3 -o OUT.safetensors", "convert B -o OUT.safetensors"),
    "convert": ("convert A --to native -o OUT", "convert B -o OUT"),
    "extract": ("extract BASE TUNED --rank 4 -o OUT", "convert B -o OUT"),
    "nearest": ("fuse BASE A --rounding nearest --allow loss -o OUT", "fuse BASE B -o OUT"),
    "adaptive": ("fuse BASE A --rounding adaptive -o OUT", "fuse BASE B -o OUT"),
    "nf4": ("fuse BASE A --quant nf4 --allow loss -o OUT", "fuse BASE B -o OUT"),
}
OWN = {"out/mine.txt": b"mine", "out/deep/mine.txt": b"mine"}


@dataclass(frozen=True)
class Setting:
    """A base, adapters, and the folders that hold nothing or an output when a command begins."""

    folder: Path

    def words(self, command: str, output: Path) -> list[str]:
        places = {"OUT": output / "out", "OUT.safetensors": output / "out.safetensors"}
        for name, place in {"A": "a", "B": "b", "BASE": "base", "TUNED": "tuned"}.items():
            places[name] = self.folder / place
        return [self._placed(word, places) for word in command.split()]

    @staticmethod
    def _placed(word: str, places: dict[str, Path]) -> str:
        head, colon, weight = word.partition(":")
        return f"{places.get(head, head)}{colon}{weight}"

    def run(self, command: str, output: Path, *more: str) -> None:
        outcome = run(*self.words(command, output), *more)
        assert outcome.code == 0, outcome.stderr


@dataclass(frozen=True)
class Case:
    """One command, what lies there before it and after it, and the changes it makes."""

    words: list[str]
    before: Path
    old: dict[str, bytes | None]
    new: dict[str, bytes | None]
    changes: list[str]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("killed")
    llama_base(folder / "base", shard="60KB")
    CASES["plain"].build(folder / "a", 1)
    CASES["plain"].build(folder / "b", 2)
    run("fuse", str(folder / "base"), str(folder / "a"), "-o", str(folder / "tuned"))
    return Setting(folder)


@pytest.fixture(scope="module")
def case_of(
    setting: Setting, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, bool], Case]]:
    @cache
    def made(name: str, forced: bool) -> Case:
        folder = tmp_path_factory.mktemp(name)
        before, after = folder / "before", folder / "after"
        before.mkdir()
        command, first = COMMANDS[name]
        if forced:
            command += " --force"
            setting.run(first, before)
            (before / "out").mkdir(exist_ok=True)
            for path, data in OWN.items():
                (before / path).parent.mkdir(exist_ok=True)
                (before / path).write_bytes(data)
        shutil.copytree(before, after)
        count = folder / "count"
        words = setting.words(command, after)
        process = interrupted.start(interrupted.dies_at_change, words, after, 10**9, count)
        process.join()
        return Case([command], before, tree(before), tree(after), count.read_text().split())

    yield made


def killed(setting: Setting, case: Case, folder: Path, number: int) -> None:
    """A command killed at a change; then it is run again."""
    output = folder / "place"
    shutil.copytree(case.before, output)
    words = setting.words(case.words[0], output)
    process = interrupted.start(interrupted.dies_at_change, words, output, number, folder / "count")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = shown(tree(output))
    whole = left == shown(case.new)
    assert whole or is_absent(left) or left == shown(case.old), sorted(left)
    if not whole or case.words[0].endswith("--force"):
        outcome = run(*words)
        assert outcome.code == 0, outcome.stderr
        assert tree(output) == case.new
    else:
        assert "exists" in run(*words).stderr


def shown(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """What is there for the eye: files, none of them hidden."""
    return {name: data for name, data in found.items() if data is not None and name[0] != "."}


def is_absent(found: dict[str, bytes | None]) -> bool:
    """Whether there is no output, but at most what belongs to somebody else or what explains one."""
    names = found.keys() - OWN.keys()
    return names <= {"out.adaptmerge.json"}


@pytest.mark.parametrize("forced", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_while_files_are_moved(
    name: str,
    forced: bool,
    setting: Setting,
    case_of: Callable[[str, bool], Case],
    tmp_path: Path,
) -> None:
    case = case_of(name, forced)
    before_the_last = len(case.changes) - case.changes[::-1].index("os.rename")
    killed(setting, case, tmp_path, before_the_last)


@pytest.mark.slow
@pytest.mark.parametrize("forced", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_change(
    name: str,
    forced: bool,
    setting: Setting,
    case_of: Callable[[str, bool], Case],
    tmp_path: Path,
) -> None:
    case = case_of(name, forced)
    for number in range(1, len(case.changes) + 1):
        killed(setting, case, tmp_path / str(number), number)
