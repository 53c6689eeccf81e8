"""Writing bytes: failures of the disk become errors that say what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from adaptmerge.errors import OutputError
from adaptmerge.files import sniff
from adaptmerge.lazy import torch

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or choose another -o",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another -o",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows: "
    "choose another -o or raise the limit",
    errno.EACCES: "permission denied: choose another -o or change the folder's permissions",
    errno.EPERM: "permission denied: choose another -o or change the folder's permissions",
    errno.EROFS: "the file system is read-only: choose another -o",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter -o",
}


def failure(problem: OSError, where: str | os.PathLike[str]) -> OutputError:
    """The OutputError that explains why `where` could not be written."""
    reason = problem.strerror or str(problem)
    sentence = _ADVICE.get(problem.errno or 0, f"cannot be written: {reason}; choose another -o")
    return OutputError(sentence, where=os.fspath(where))


@contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an OSError is raised again as the OutputError that explains it."""
    try:
        yield
    except OSError as problem:
        raise failure(problem, where) from problem


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text. Raises OutputError when the disk fails.

    Half a pair of UTF-16, which JSON and names of files can hold and UTF-8 cannot, is written as JSON
    escapes it.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file. Raises OutputError when the disk fails."""
    with writing(path):
        path.write_bytes(data)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file. Raises InputError when it cannot be read, OutputError when the disk fails."""
    with sniff.plain_file(source) as file, writing(path), path.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)


class Flusher:
    """Sets the disk to work, in a thread, whenever enough was written to a file; waits at the end."""

    EVERY = 16 << 20

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._since = descriptor, 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: list[Future[None]] = []

    def written(self, count: int) -> None:
        """Count bytes that were written."""
        self._since += count
        if self._since >= self.EVERY:
            self._since = 0
            self._pending.append(self._thread.submit(os.fsync, self._descriptor))

    def finish(self) -> None:
        """Wait. Raises OSError when a flush failed."""
        self._thread.shutdown()
        for flush in self._pending:
            flush.result()

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()


def tensor_bytes(value: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor, without a copy where it is contiguous."""
    flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
