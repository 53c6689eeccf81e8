"""Fusing in a process of its own that dies, or waits, where a test wants it to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")  # imports what is slow to import once
SERVER.set_forkserver_preload(
    ["adaptmerge.commands.fuse", "adaptmerge.rounding.matrix", "torch", "transformers"]
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
    from adaptmerge.files import staging

    countdown, sync = _Countdown(number, die), staging._sync

    def counted(path: Path) -> None:
        countdown(0, 0)
        sync(path)

    staging._sync = counted
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
