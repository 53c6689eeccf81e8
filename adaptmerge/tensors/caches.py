"""What was read or computed from files, kept until the files may have changed or a job is done."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock, local
from typing import Any, TypeVar

Result = TypeVar("Result")

_REMEMBERED: list[Any] = []


def remembered(function: Callable[..., Result], most: int = 256) -> Callable[..., Result]:
    """The last results, kept by arguments until `forget()`: refs name files, which may change."""
    kept = lru_cache(maxsize=most)(function)
    _REMEMBERED.append(kept)
    return kept


class Recent:
    """What was made lately, up to so many bytes in all, until `forget()`; made once, whoever else asks."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._made: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()
        _REMEMBERED.append(self)

    def get(self, make: Callable[[], Result], key: Hashable, size: int) -> Result:
        """What make() gave for the key, or gives now."""
        with self._lock:
            found, _ = self._made.pop(key, None) or (make(), size)
            self._made[key] = found, size
            while sum(size for _, size in self._made.values()) > self.most:
                self._made.popitem(last=False)
        made: Result = found
        return made

    def cache_clear(self) -> None:
        """Keeps nothing of it."""
        self._made.clear()


def forget() -> None:
    """Everything that was computed from files is computed again when it is asked for.

    Whatever opens an input or a base calls this, so that no command need think of it.
    """
    for kept in _REMEMBERED:
        kept.cache_clear()


_HELD = local()


def once(make: Callable[..., Result], *arguments: Hashable) -> Result:
    """What make(*arguments) gives; in a block of `read_once` what it gave there before."""
    held: dict[Hashable, Any] | None = getattr(_HELD, "values", None)
    if held is None:
        return make(*arguments)
    key = (make, *arguments)
    if key not in held:
        held[key] = make(*arguments)
    found: Result = held[key]
    return found


@contextmanager
def read_once() -> Iterator[None]:
    """In this thread and block, a ref that is read again gives the same tensor: do not change it."""
    _HELD.values = {}
    try:
        yield
    finally:
        _HELD.values = None
