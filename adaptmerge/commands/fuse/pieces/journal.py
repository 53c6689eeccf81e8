"""What is finished of an interrupted fusion: shards by their checksums, never by being there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptmerge.errors import AdaptmergeError
from adaptmerge.files.listing import sha256_of
from adaptmerge.rounding.floats import Choice
from adaptmerge.rounding.matrix import Measured


class Journal:
    """One JSON file beside the shards for each that is finished, with its sha256 and its numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self, name: str, path: Path) -> dict[str, Any] | None:
        """The record of a shard, if its file still is what was recorded."""
        try:
            found: dict[str, Any] = json.loads(self._entry(name).read_text(encoding="utf-8"))
            whole = found["sha256"] == sha256_of(path)
        except (OSError, ValueError, KeyError, TypeError, AdaptmergeError):
            return None
        return found if whole else None

    def record(self, name: str, found: Mapping[str, Any]) -> None:
        """Says that a shard is finished; appears whole or not at all."""
        entry = self._entry(name)
        part = entry.with_suffix(".part")
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(entry)

    def _entry(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def to_record(sha256: str, choices: list[Choice], measured: list[Measured]) -> dict[str, Any]:
    """The record of a written shard as plain data."""
    return {
        "sha256": sha256,
        "choices": [list(choice) for choice in choices],
        "measured": [asdict(one) for one in measured],
    }


def from_record(found: Mapping[str, Any]) -> tuple[str, list[Choice], list[Measured]]:
    """The record of a written shard, read back."""
    choices = [Choice(rounding, tuple(gains)) for rounding, gains in found["choices"]]
    measured = [Measured(**{k: _tupled(v) for k, v in one.items()}) for one in found["measured"]]
    return str(found["sha256"]), choices, measured


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
