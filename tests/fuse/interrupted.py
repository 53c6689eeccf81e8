"""Commands in a process of their own that dies, or waits, where a test wants it to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")  # imports what is slow to import once
SERVER.set_forkserver_preload(
    ["torch", "transformers", "bitsandbytes", "console", "adaptmerge.rounding.matrix"]
    + ["adaptmerge.commands.combine", "adaptmerge.commands.extract", "adaptmerge.commands.fuse"]
    + ["adaptmerge.formats.peft.write", "adaptmerge.schemes.bitsandbytes.quantiser"]
)


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def dies_at_piece(base: Path, adapter: Path, output: Path, number: int) -> None:
    """Killed when the piece of that number has been written."""
    _fuse(base, adapter, output, _Countdown(number, die))


def dies_at_commit(base: Path, adapter: Path, output: Path, number: int) -> None:
    """Killed when everything is written, at that file of those that are made sure to be on the disk."""
    from adaptmerge.files import commit

    countdown, sync = _Countdown(number, die), commit.sync

    def counted(path: Path) -> None:
        countdown(0, 0)
        sync(path)

    commit.sync = counted
    _fuse(base, adapter, output, lambda done, total: None)


def runs(base: Path, adapter: Path, output: Path) -> None:
    """To its end, unless it is killed."""
    _fuse(base, adapter, output, lambda done, total: None)


def waits(base: Path, adapter: Path, output: Path, go_on: Path) -> None:
    """After the first piece, until a file exists."""

    def wait() -> None:
        (go_on.parent / f"{go_on.name}.waiting").touch()
        until(go_on.exists)

    _fuse(base, adapter, output, _Countdown(1, wait))


def dies_at_change(words: Sequence[str], folder: Path, number: int, count: Path) -> None:
    """Killed just before the change of that number to what is below a folder. A command that ends says
    which changes there were."""
    from console import run

    left = _Countdown(number, die)
    changes: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_change(event, arguments) and any(str(a).startswith(str(folder)) for a in arguments):
            changes.append(event)
            left(0, 0)

    os.fsync = lambda fd: None
    sys.addaudithook(hook)
    outcome = run(*words)
    made = list(changes)
    assert outcome.code == 0, outcome.stderr
    count.write_text(" ".join(made))


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
CHANGES |= {"os.chmod", "os.utime", "shutil.rmtree", "shutil.copyfile"}


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event != "open":
        return event in CHANGES
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or any(c in (mode or "") for c in "wax+")


def until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._left, self._then = number, then

    def __call__(self, done: int, total: int) -> None:
        self._left -= 1
        if self._left == 0:
            self._then()


def _fuse(base: Path, adapter: Path, output: Path, progress: Callable[[int, int], None]) -> None:
    from adaptmerge.commands.fuse import FuseOptions, fuse
    from adaptmerge.formats.inputs import InputSpec

    fuse(str(base), [InputSpec(str(adapter))], output, FuseOptions(jobs=1), progress)
