"""Jobs done side by side, with results in the order of the jobs."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # told what is done and how much there is
WINDOW = 2  # jobs in flight per worker
TURN = 5e-4  # seconds


def workers_default() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads ask for the interpreter often: jobs need it briefly, between long stretches without."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ordered(
    pool: ThreadPoolExecutor, workers: int, work: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    """Results in the order of the jobs, with a bounded number under way."""
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > workers * WINDOW:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


Tell = Callable[[str, int, int], None]  # told what is worked on, what is done and how much there is


def untold(what: str, done: int, total: int) -> None:
    """A callback of that kind that says nothing."""


def silent(done: int, total: int) -> None:
    """A progress callback that says nothing."""
