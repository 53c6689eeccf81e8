"""Anonymous memory of processes, as Linux tells it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLING = 0.005  # seconds


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes of anonymous memory seen so far, sampled until the block ends."""
    most, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def anonymous(process: int | str = "self") -> int:
    """Bytes of anonymous memory that a process has, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        lines = []
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    if process != "self":
        return 0
    raise SystemExit("memory is measured on Linux only: /proc/self/status has no RssAnon here")
