"""What is kept of files: made once, bounded in bytes, forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from adaptmerge.tensors.caches import Recent, forget, once, read_once


def made(kept: Recent, key: str, size: int, log: list[str]) -> str:
    def make() -> str:
        log.append(key)
        return key.upper()

    return kept.get(make, key, size)


def test_what_is_recent_is_made_once_and_what_is_old_again() -> None:
    kept, log = Recent(10), list[str]()
    assert [made(kept, key, 5, log) for key in "abab"] == ["A", "B", "A", "B"]
    assert log == ["a", "b"]
    assert made(kept, "a", 5, log) == "A"
    made(kept, "c", 5, log)  # in place of b, which was asked for before a
    made(kept, "a", 5, log)
    assert log == ["a", "b", "c"]
    made(kept, "b", 5, log)
    assert log == ["a", "b", "c", "b"]


def test_what_is_too_large_is_not_kept() -> None:
    kept, log = Recent(10), list[str]()
    assert [made(kept, "a", 11, log) for _ in range(2)] == ["A", "A"]
    assert log == ["a", "a"]


def test_nothing_is_kept_when_files_may_have_changed() -> None:
    kept, log = Recent(10), list[str]()
    made(kept, "a", 1, log)
    forget()
    made(kept, "a", 1, log)
    assert log == ["a", "a"]


def test_two_that_ask_together_have_it_made_once() -> None:
    kept, log, both = Recent(10), list[str](), Barrier(2)

    def ask() -> str:
        both.wait()
        return made(kept, "a", 1, log)

    with ThreadPoolExecutor(2) as pool:
        assert [job.result() for job in [pool.submit(ask), pool.submit(ask)]] == ["A", "A"]
    assert log == ["a"]


def test_what_cannot_be_made_is_asked_for_again() -> None:
    kept, log = Recent(10), list[str]()

    def fails() -> str:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        kept.get(fails, "a", 1)
    assert made(kept, "a", 1, log) == "A"


def test_a_block_of_read_once_keeps_what_was_made_in_it() -> None:
    log: list[int] = []

    def make(value: int) -> int:
        log.append(value)
        return value

    assert [once(make, 1), once(make, 1)] == [1, 1]
    with read_once():
        assert [once(make, 2), once(make, 2), once(make, 3)] == [2, 2, 3]
    assert once(make, 2) == 2
    assert log == [1, 1, 2, 3, 2]
