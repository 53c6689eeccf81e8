"""What a file is by its first bytes, and what to say when it is not what its name claims."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from adaptmerge.errors import InputError
from adaptmerge.files.paths import missing

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
    try:
        if not stat.S_ISREG(Path(where).stat().st_mode):
            sentence = "is not a plain file: name the file that holds the tensors"
            raise InputError(sentence, where=where)
        with Path(where).open("rb", buffering=0) as file:
            first = file.read(count)
    except FileNotFoundError:
        raise missing(where) from None
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror}", where=where) from None
    if not first:
        raise InputError("is empty (0 bytes): copy or download it again", where=where)
    return first


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
