"""Numbered layers: what is in every one of them, and what only in some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class InLayer(NamedTuple):
    """A module path around the number of its layer; without a number all of it comes before."""

    before: str
    number: int | None
    after: str

    @classmethod
    def of(cls, module: str) -> InLayer:
        """The path in parts."""
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            return cls(module, None, "")
        return cls(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


class Layers:
    """The layers of a model, by the paths of its modules."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._with: dict[tuple[str, str], set[int]] = {}
        self._all: dict[str, set[int]] = {}
        for before, index, after in map(InLayer.of, modules):
            if index is not None:
                self._with.setdefault((before, after), set()).add(index)
                self._all.setdefault(before, set()).add(index)

    def each_has(self, module: str) -> bool:
        """Whether a module is one of a layer, of which every layer has its own."""
        path = InLayer.of(module)
        own = self._with.get((path.before, path.after), set())
        return path.number is not None and path.number in own and own == self._all[path.before]
