"""The files of an input, read once for everyone who asks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adaptmerge.errors import InputError
from adaptmerge.files import sniff
from adaptmerge.files.paths import exists, missing, plain
from adaptmerge.files.pickles import read_pickle
from adaptmerge.files.safetensors import read_header, read_index
from adaptmerge.files.strict_json import quoted, read_object
from adaptmerge.files.tensor_file import TensorFile

_T = TypeVar("_T")
_CHUNK = 1 << 20
_READERS: dict[str, Callable[[Path], TensorFile]] = {
    ".index.json": read_index,
    ".safetensors": read_header,
    ".bin": read_pickle,
    ".pt": read_pickle,
    ".pth": read_pickle,
    ".ckpt": read_pickle,
}


@dataclass(frozen=True, eq=False)
class Listing:
    """The files directly in a folder, or one file. What is read from them is kept.

    origin: the input as the user wrote it; single: the file's name when the input is one file;
    names and folders: sorted. Beside a single file, `<stem>.json` and `adapter_config.json` are no
    names of the listing, but can be asked for. Every method raises InputError for a file that is
    missing or unreadable, and for a name that is not directly in the folder.
    """

    origin: str
    root: Path
    single: str | None
    names: tuple[str, ...]
    folders: tuple[str, ...]
    _kept: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, path: Path, origin: str) -> Listing:
        """The listing of a folder or file. Raises InputError when there is none."""
        if not exists(path):
            raise missing(path)
        if not path.is_dir():
            sniff.head(path, 1)
            return cls(origin, path.parent, path.name, (path.name,), ())
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as problem:
            raise InputError(f"cannot be listed: {problem.strerror}", where=str(path)) from None
        names = tuple(entry.name for entry in entries if _is(entry.is_file))
        folders = tuple(entry.name for entry in entries if _is(entry.is_dir))
        return cls(origin, path, None, names, folders)

    @property
    def on_disk(self) -> bool:
        """Whether there are files: what is in memory is asked in the same way."""
        return True

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        path = self._path(name)
        return name in self.names or (name in self._siblings() and path.is_file())

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises InputError for anything else."""
        return self._once("json", name, read_object)

    def tensors(self, name: str) -> TensorFile:
        """The tensors of a file, which its suffix says how to read."""
        return self._once("tensors", name, self._read_tensors)

    def head(self, name: str, n: int = 64) -> bytes:
        """The first `n` bytes of a file."""
        return sniff.head(self._present(name), n)

    def sha256(self, *names: str) -> dict[str, str]:
        """The digests of the files named, or of all files listed, in hexadecimal."""
        return {name: self._once("sha256", name, sha256_of) for name in names or self.names}

    @property
    def used(self) -> tuple[str, ...]:
        """The files whose JSON or tensors were read so far, sorted."""
        return tuple(sorted({name for what, name in self._kept if what in ("json", "tensors")}))

    def _once(self, what: str, name: str, read: Callable[[Path], _T]) -> _T:
        key = (what, name)
        if key not in self._kept:
            self._kept[key] = read(self._present(name))
        found: _T = self._kept[key]
        return found

    def _siblings(self) -> tuple[str, ...]:
        return (f"{Path(self.single).stem}.json", "adapter_config.json") if self.single else ()

    def _path(self, name: str) -> Path:
        if not plain(name):
            raise InputError(
                f"refers to the file {quoted(name)}, expected a file directly in the folder",
                where=str(self.root),
            )
        return self.root / name

    def _present(self, name: str) -> Path:
        path = self._path(name)
        if not self.has(name):
            raise missing(path)
        return path

    def _read_tensors(self, path: Path) -> TensorFile:
        for suffix, read in _READERS.items():
            if path.name.endswith(suffix):
                return read(path)
        known = ", ".join(_READERS)
        raise InputError(f"holds no tensors by its name, expected one of {known}", where=str(path))


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry says of itself; a link that leads back to itself is nothing."""
    try:
        return kind()
    except OSError:
        return False


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hexadecimal. Raises InputError when it cannot be read."""
    digest, view = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with sniff.plain_file(path) as file:
        while step := file.readinto(view):
            digest.update(view[:step])
    return digest.hexdigest()
