"""What a file is by its first bytes, and what to say when it is not what its name claims."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

from adaptmerge.errors import InputError
from adaptmerge.files.paths import missing

MOST = 100_000_000  # bytes of a file that is read as a whole
_ADVICE = {
    "lfs": "is a Git LFS pointer, not {expected}: run git lfs pull where it was cloned",
    "html": "is an HTML page, not {expected}: a login or error page was saved in its place; "
    "download the file itself",
    "zip": "is a zip archive, not {expected}: if torch.save wrote it, rename it to end in .bin",
    "pickle": "is a pickle, not {expected}: if torch.save wrote it, rename it to end in .bin",
    "gguf": "is a GGUF file, not {expected}: rename it to end in .gguf",
    "safetensors": "is a safetensors file, not {expected}: rename it to end in .safetensors",
}
_HTML = (b"<!doctype html", b"<html", b"<head", b"<!-- ", b"<?xml")


def head(path: str | os.PathLike[str], count: int = 512) -> bytes:
    """The first bytes of a file. Raises InputError when it is missing, unreadable or empty."""
    where = os.fspath(path)
    with plain_file(where) as file:
        first = file.read(count)
    if not first:
        raise InputError("is empty (0 bytes): copy or download it again", where=where)
    return first


def whole(path: str | os.PathLike[str], most: int = MOST) -> bytes:
    """All bytes of a file. Raises InputError when it is missing, unreadable or larger than `most`."""
    where = os.fspath(path)
    with plain_file(where) as file:
        size = os.fstat(file.fileno()).st_size
        found = file.read(most + 1) if size <= most else b""
    if size > most or len(found) > most:
        raise InputError(
            f"has {size} bytes, expected at most {most}: is it what its name says?", where=where
        )
    return found


def text(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises InputError when it is missing, unreadable, too large or no UTF-8."""
    found = whole(path)
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text: save it as UTF-8", where=os.fspath(path)) from None


@contextmanager
def plain_file(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """A file opened to be read. Raises InputError when it is missing, unreadable or no plain file.

    Pipes, sockets and devices have no end, or never begin.
    """
    where = os.fspath(path)
    try:
        with _opened(where) as file:
            yield file
    except FileNotFoundError:
        raise missing(where) from None
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror}", where=where) from None


def _opened(where: str) -> BufferedReader:
    # without O_NONBLOCK, to open a pipe waits for someone to write into it
    how = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(where, how)
    except ValueError:
        raise missing(where) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("is not a plain file: name the file itself", where=where)
    return os.fdopen(descriptor, "rb")


def kind(first: bytes) -> str | None:
    """One of lfs, html, zip, pickle, gguf, safetensors by the first bytes; None when unknown."""
    if first[8:9] == b"{" and first[5:8] == bytes(3):
        return "safetensors"
    if first.startswith(b"version https://git-lfs"):
        return "lfs"
    if first.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return "html"
    if first.startswith(b"PK\x03\x04"):
        return "zip"
    if first.startswith(b"GGUF"):
        return "gguf"
    return "pickle" if first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05" else None


def refuse(first: bytes, where: str, expected: str, accepted: tuple[str, ...]) -> None:
    """Raise InputError when the first bytes show another kind of file than the `accepted` ones."""
    found = kind(first)
    if found is not None and found not in accepted:
        raise InputError(_ADVICE[found].format(expected=expected), where=where)
