"""Families that adaptmerge can show and must not merge: their tensors, each in an Opaque edit."""

from __future__ import annotations

from collections.abc import Callable

from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.stored_edits import Opaque
from adaptmerge.formats.peft.tuner import Parts, Reading


def read_module(what: str, why: str) -> Callable[[Reading, str, Parts], list[Edit]]:
    """The reader of a family with tensors per module."""

    def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
        return [Opaque(Site(module), what, why, tuple(parts.values()))]

    return module


def read_all(what: str, why: str, mark: str) -> Callable[[Reading], list[Edit]]:
    """The reader of a family whose keys have `mark` in them, whatever module they belong to."""

    def read(reading: Reading) -> list[Edit]:
        names = sorted(key for key in reading.keys.refs if mark in key)
        refs = tuple(ref for key in names if (ref := reading.keys.take(key)) is not None)
        if not refs:
            raise KeyError(mark)
        return [Opaque(Site("", what), what, why, refs)]

    return read
