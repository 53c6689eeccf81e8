"""A case: a folder of valid files, what is changed in it, and the command that is run on it.

All of a case follows from its number and the seed of the run alone, so that it is the same in whatever run,
and after whatever has been mended.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import command_lines, file_changes, valid

KINDS = {"json": 3, "tensors": 3, "bytes": 2, "kind": 1}  # of changes, and how often
MANY = (1, 1, 1, 1, 2, 2, 3, 4, 0)  # changes of a case
NUMBERS = 2**32


@dataclass(frozen=True)
class Change:
    """One change: of what kind, and the numbers that choose the file and the rest."""

    kind: str
    file: int
    number: int


@dataclass(frozen=True)
class Case:
    """A folder by name, changes in their order, and the number that chooses the command."""

    inputs: str
    changes: tuple[Change, ...]
    command: int


def numbered(run: int, number: int) -> Case:
    """The case of this number; each kind of folder is as likely as another."""
    random = Random(f"{run} {number}")
    group = random.choice(sorted(valid.kinds()))
    inputs = random.choice(sorted(valid.kinds()[group]))
    changes = tuple(_drawn(random) for _ in range(random.choice(MANY)))
    return Case(inputs, changes, random.randrange(NUMBERS))


def _drawn(random: Random) -> Change:
    (kind,) = random.choices(list(KINDS), list(KINDS.values()))
    return Change(kind, random.randrange(NUMBERS), random.randrange(NUMBERS))


@dataclass(frozen=True)
class Laid:
    """A case on the disk: the command line, and what has been changed."""

    folder: Path
    line: list[str]
    said: list[str]


def lay(case: Case, folder: Path) -> Laid:
    """Puts the files of a case into a folder, those that stay as they are as links."""
    source = valid.made(case.inputs)
    shutil.copytree(source, folder, copy_function=os.link, symlinks=True)
    said = [_changed(folder, change) for change in case.changes]
    inputs = command_lines.Inputs(folder, source)
    return Laid(folder, command_lines.line(inputs, Random(case.command)), said)


def _changed(folder: Path, change: Change) -> str:
    """What has been done to which file."""
    files = sorted(_files(folder, change.kind))
    if not files:
        return "nothing is left to change"
    # by folders first: those of few files are as interesting as others
    tops = sorted({path.relative_to(folder).parts[0] for path in files})
    random = Random(change.file)
    top = random.choice(tops)
    inside = [path for path in files if path.relative_to(folder).parts[0] == top]
    texts = [path for path in inside if path.suffix in (".json", ".yaml")]
    path = random.choice(
        texts if change.kind == "json" and texts and random.random() < 0.8 else inside
    )
    said = file_changes.CHANGES[change.kind](path, Random(change.number))
    return f"{path.relative_to(folder)}: {said}"


def _files(folder: Path, kind: str) -> Iterator[Path]:
    suffixes = {
        "json": (".json", ".safetensors", ".yaml"),
        "tensors": (".safetensors", ".bin"),
    }.get(kind)
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        if suffixes is None or path.suffix in suffixes:
            yield path
