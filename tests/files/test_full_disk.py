"""A disk that is full when any file is written, or any folder made: one sentence, and no output."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import console
import made
import pytest
import samples
import torch
from fuse.models import llama_base

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Counts what is opened to be written, made and renamed below a folder; one of these fails."""

    def __init__(self) -> None:
        self.folder, self.fails_at, self.count = "", 0, 0
        sys.addaudithook(self.look)

    def look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or not _writes(event, args) or self.folder not in str(args[0]):
            return
        self.count += 1
        if self.count == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))


def _writes(event: str, args: tuple[Any, ...]) -> bool:
    if event != "open":
        return event in ("os.mkdir", "os.rename", "os.truncate")
    return isinstance(args[2], int) and bool(args[2] & WRITING) and args[1] is not None


@pytest.fixture(scope="module")
def disk() -> Disk:
    """Hooks of this kind stay until the end: one for all tests."""
    return Disk()


def line(command: str, folder: Path) -> list[str]:
    """A command with its inputs in a folder, its output in out/."""
    out = ["-o", str(folder / "out" / "result")]
    if command == "extract":
        made.model(folder / "base", 0.0)
        made.model(folder / "tuned", 1.0)
        return [command, str(folder / "base"), str(folder / "tuned"), "--rank", "2", *out]
    adapters = [str(samples.adapter(folder / name, number)) for number, name in enumerate("ab")]
    if command == "combine":
        return [command, *adapters, *out]
    if command == "convert":
        return [command, adapters[0], "--dtype", "fp16", *out]
    base = llama_base(folder / "base")
    sides = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 2))}
    return ["fuse", str(base), str(samples.write(folder / "c", sides)), "--allow", "loss", *out]


def left(out: Path) -> list[str]:
    """What lies there, but for what a fusion goes on with."""
    return [
        path.name for path in out.iterdir() if not path.name.startswith(".result.adaptmerge-plan")
    ]


@contextmanager
def small_files() -> Iterator[None]:
    """Files of more than a hundred bytes cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


COMMANDS = ("combine", "convert", "extract", "fuse")


@pytest.mark.parametrize("command", COMMANDS)
def test_any_file_that_cannot_be_made(command: str, disk: Disk, tmp_path: Path) -> None:
    arguments, out = line(command, tmp_path), tmp_path / "out"
    refused = 0
    for number in range(1, 40):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        disk.count, disk.fails_at, disk.folder = 0, number, str(out)
        try:
            outcome = console.run(*arguments)
        finally:
            disk.folder = ""
        if disk.count < number:
            break
        refused += outcome.code
        if outcome.code:
            assert "the disk is full: free some space" in " ".join(outcome.stderr.split())
            assert outcome.code == 1
            assert not left(out), number
    assert outcome.code == 0
    assert refused > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_to_its_end(command: str, tmp_path: Path) -> None:
    arguments, out = line(command, tmp_path), tmp_path / "out"
    out.mkdir()
    with small_files():
        outcome = console.run(*arguments)
    assert outcome.code == 1
    assert "than the file system or a limit (ulimit -f) allows" in " ".join(outcome.stderr.split())
    assert not left(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_does_not_reach_the_disk(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, out = line(command, tmp_path), tmp_path / "out"
    out.mkdir()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcome = console.run(*arguments)
    assert outcome.code == 1
    assert "the disk is full: free some space" in " ".join(outcome.stderr.split())
    assert not left(out)
