"""Cases of a test that repeat what others of them prove: `make test-full` runs these, too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def repeats(*values: Any) -> Any:
    """The values of all parameters of a case that repeats."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow(*values: Any) -> list[Any]:
    """These values of one parameter, of which each is a case that repeats."""
    return [repeats(value) for value in values]


def first_of(
    values: Iterable[T], kind: Callable[[T], object], also: Collection[T] = ()
) -> list[Any]:
    """All values, of which the first of each kind, and those named, are no repetition."""
    seen: set[object] = set()
    found: list[Any] = []
    for value in values:
        found += slow(value) if kind(value) in seen and value not in also else [value]
        seen.add(kind(value))
    assert set(also) <= {value for value in found if isinstance(value, str)}, "names of no value"
    return found
