"""Results that are computed from files, kept until the files may have changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

Result = TypeVar("Result")

_REMEMBERED: list[Any] = []


def remembered(function: Callable[..., Result], most: int = 256) -> Callable[..., Result]:
    """The last results, kept by arguments until `forget()`: refs name files, which may change."""
    kept = lru_cache(maxsize=most)(function)
    _REMEMBERED.append(kept)
    return kept


def forget() -> None:
    """Everything that was computed from files is computed again when it is asked for.

    Whatever opens an input or a base calls this, so that no command need think of it.
    """
    for kept in _REMEMBERED:
        kept.cache_clear()
