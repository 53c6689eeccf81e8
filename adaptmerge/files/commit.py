"""Moving staged files to where they belong, so that a kill at any moment leaves all of it or nothing.

A folder appears, or changes places with the one before it, by renaming. Where that cannot be, the main file
goes first and comes last, and a journal says what lay there before: the next run takes it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptmerge.files.disk import failure
from adaptmerge.files.paths import inside

OUT = "out"
BEFORE, _NEXT = "before", "next"  # folders that change places with the target
_JOURNAL = "moves.json"


def install(
    root: Path, target: Path, files: Sequence[str], obsolete: Collection[str], *, single: bool
) -> None:
    """Moves the staged files below `root` to the target, the main one being the last of them; of an output
    that is replaced, files called `obsolete` go. Raises OSError, or OutputError, after taking it back."""
    out = root / OUT
    for name in files:
        sync(out / name)
    for folder in [out, *(path for path in sorted(out.rglob("*")) if path.is_dir())]:
        sync(folder)
    made = _made_folders(target.parent)
    try:
        if single:
            _replace(root, target.parent, files, ())
        elif not target.exists():
            out.rename(target)
        elif root.is_relative_to(target):
            _replace(root, target, files, obsolete)
        else:
            _swap(root, target, files, obsolete)
    except BaseException:
        take_back(root, target, single=single)
        _remove_empty(made)
        raise
    sync(target.parent)


def take_back(root: Path, target: Path, *, single: bool) -> bool:
    """Puts back what a commit that did not end has moved, unless it had moved everything.

    False where somebody else's output is in the way of the one before, which `root` still has.
    """
    _take_back_moves(root, target.parent if single else target)
    before = root / BEFORE
    if before.is_dir() and (root / _NEXT).is_dir():
        if os.path.lexists(target):
            return False
        before.rename(target)
    return True


def _swap(root: Path, target: Path, files: Sequence[str], obsolete: Collection[str]) -> None:
    """The new folder, with what of the one before is not replaced, takes its place."""
    following, before = root / _NEXT, root / BEFORE
    for left in (following, before):  # of a commit that was killed, before or after it was done
        shutil.rmtree(left, ignore_errors=True)
    following.mkdir()
    for name in files:
        path = following / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _second_name(root / OUT / name, path, move=True)
    for path in _others(target, {*files, *obsolete}):
        copy = following / path.relative_to(target)
        if os.path.lexists(copy):
            raise failure(IsADirectoryError(0, "a folder is in the way"), path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            copy.mkdir()
        else:
            _second_name(path, copy)
    shutil.copymode(target, following)
    sync(following)
    target.rename(before)
    following.rename(target)


def _others(target: Path, names: Collection[str]) -> Iterator[Path]:
    """All files of a folder but those called so, and its empty folders."""
    for at, folders, files in os.walk(target):
        inner = [Path(at, name) for name in folders]
        for path in inner:
            if path.relative_to(target).as_posix() in names:
                raise failure(IsADirectoryError(0, "a folder is in the way"), path)
            if path.is_symlink() or not any(path.iterdir()):
                yield path
        for path in (Path(at, name) for name in files):
            if path.relative_to(target).as_posix() not in names:
                yield path


def _replace(root: Path, folder: Path, files: Sequence[str], obsolete: Collection[str]) -> None:
    """File by file. Without its main file what is there meanwhile is no output."""
    entries = [_entry(root, folder, name, n) for n, name in enumerate([*files, *sorted(obsolete)])]
    _write_journal(root, entries)
    main = files[-1]
    for name in [main, *obsolete]:
        (folder / name).unlink(missing_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (root / OUT / name).replace(folder / name)
    sync(folder)
    (root / _JOURNAL).unlink()


def _entry(root: Path, folder: Path, name: str, number: int) -> dict[str, Any]:
    """What a journal says of a file: its name, the inode of what takes its place and its other name."""
    path, copy = folder / name, root / f"old-{number}"
    there = os.path.lexists(path)
    if there:
        copy.unlink(missing_ok=True)
        _second_name(path, copy)
    return {
        "name": name,
        "inode": _inode(root / OUT / name),
        "old": copy.name if there else None,
        "folders": [
            parent.relative_to(folder).as_posix()
            for parent in path.parents
            if parent.is_relative_to(folder) and not parent.exists()
        ],
    }


def _write_journal(root: Path, entries: Sequence[dict[str, Any]]) -> None:
    part = root / f"{_JOURNAL}.part"
    part.write_text(json.dumps(entries), encoding="utf-8")
    sync(part)
    part.replace(root / _JOURNAL)
    sync(root)


def _take_back_moves(root: Path, folder: Path) -> None:
    journal = root / _JOURNAL
    try:
        entries = json.loads(journal.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not all(_inode(folder / entry["name"]) == entry["inode"] for entry in entries):
        for entry in reversed(entries):
            path = inside(folder, entry["name"])
            if path is not None:
                _take_back_move(root, path, entry)
                _remove_empty([folder / name for name in reversed(entry["folders"])])
    journal.unlink()


def _inode(path: Path) -> int | None:
    return path.lstat().st_ino if os.path.lexists(path) else None


def _take_back_move(root: Path, path: Path, entry: dict[str, Any]) -> None:
    """What was put there goes back to where it was staged; what lay there before comes back."""
    staged = root / OUT / entry["name"]
    if entry["inode"] is not None and _inode(path) == entry["inode"]:
        with suppress(OSError):
            staged.parent.mkdir(parents=True, exist_ok=True)
            path.replace(staged)
    if entry["old"] is not None and not os.path.lexists(path):
        with suppress(OSError):
            (root / entry["old"]).replace(path)


def _made_folders(folder: Path) -> list[Path]:
    """The folders that had to be made, outermost first."""
    lost = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in lost:
        path.mkdir()
    return lost


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def _second_name(path: Path, other: Path, *, move: bool = False) -> None:
    """Another name of a file; where the file system has no such thing a copy, or its only name from now."""
    try:
        os.link(path, other, follow_symlinks=False)
    except (OSError, NotImplementedError):
        if path.is_dir() and not path.is_symlink():
            raise failure(IsADirectoryError(0, "a folder is in the way"), path) from None
        if move:
            path.replace(other)
        else:
            shutil.copy2(path, other, follow_symlinks=False)


def sync(path: Path) -> None:
    """Brings a file or folder to the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
