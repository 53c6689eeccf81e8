"""What is finished of an interrupted fusion: shards by their checksums, never by being there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adaptmerge.errors import AdaptmergeError
from adaptmerge.files.disk import write_text, writing
from adaptmerge.files.listing import sha256_of
from adaptmerge.files.strict_json import read_object
from adaptmerge.files.typed import built
from adaptmerge.rounding.floats import Choice
from adaptmerge.rounding.matrix import Measured


@dataclass(frozen=True, slots=True)
class Record:
    """A finished shard: the sha256 of its file, what was chosen for each matrix, and its numbers."""

    sha256: str
    choices: tuple[Choice, ...]
    measured: tuple[Measured, ...]


class Journal:
    """One JSON file beside the shards for each that is finished, with its sha256 and its numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self, name: str, path: Path, matrices: int) -> Record | None:
        """The record of a shard of so many matrices, if its file still is what was recorded."""
        entry = self._entry(name)
        try:
            found = built(Record, read_object(entry), str(entry))
            whole = found.sha256 == sha256_of(path)
        except AdaptmergeError:
            return None
        fits = len(found.choices) == len(found.measured) == matrices
        return found if whole and fits else None

    def record(self, name: str, found: Record) -> None:
        """Says that a shard is finished; appears whole or not at all."""
        entry = self._entry(name)
        part = entry.with_suffix(".part")
        write_text(part, json.dumps(asdict(found)))
        with writing(entry):
            part.replace(entry)

    def _entry(self, name: str) -> Path:
        return self._folder / f"{name}.json"
