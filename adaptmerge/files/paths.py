"""Names of files: which of them stay inside a folder, and what a mistyped one may have meant."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from adaptmerge.errors import InputError, nearest


def inside(folder: Path, name: str) -> Path | None:
    """folder/name when that lies inside `folder`, else None.

    The last component may be a symbolic link out of the folder, as every file of a Hub cache is;
    the folders on the way may not.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not posix.parts or "\0" in name or "\\" in name:
        return None
    if posix.is_absolute() or windows.drive or ".." in posix.parts:
        return None
    path = folder / name
    return path if path.parent.resolve().is_relative_to(folder.resolve()) else None


def plain(name: str) -> bool:
    """Whether a name is that of a file directly in a folder: no separators, no `..`."""
    return inside(Path(), name) is not None and len(PurePosixPath(name).parts) == 1


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file or folder; False also for what can be no path at all."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def missing(path: str | os.PathLike[str]) -> InputError:
    """The error for a path that does not exist, with the name it may have been meant to be."""
    where, lost = os.fspath(path), Path(path)
    while lost.parent != lost and not exists(lost.parent):
        lost = lost.parent
    try:
        names = sorted(path.name for path in lost.parent.iterdir())
    except OSError:
        names = []
    close = nearest(lost.name, names)
    advice = f"did you mean {str(lost.parent / close)!r}?" if close else "check the path"
    gap = "" if lost == Path(path) else f" (nor does {str(lost)!r})"
    return InputError(f"does not exist{gap}: {advice}", where=where)
