"""Fused models made once for all tests that only look at them: the `fusions` of conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptmerge.commands.fuse import FuseOptions, FuseReport, fuse
from adaptmerge.formats.inputs import InputSpec

Stamps = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Fusion:
    """A fused model, which is never changed, and what was reported."""

    folder: Path
    report: FuseReport


class Fusions:
    """Fused models by base, adapters and options."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._made: dict[str, tuple[Fusion, Stamps]] = {}

    def __call__(self, base: Path, adapters: Sequence[InputSpec], **options: Any) -> Fusion:
        given = FuseOptions(**options)
        key = f"{base} {adapters} {given}"
        if key not in self._made:
            folder = self._new_folder() / "out"
            report = fuse(str(base), adapters, folder, given)
            self._made[key] = Fusion(folder, report), _stamps(folder)
        return self._made[key][0]

    def assert_untouched(self) -> None:
        for made, stamps in self._made.values():
            assert _stamps(made.folder) == stamps, f"a test has changed {made.folder}"


def _stamps(folder: Path) -> Stamps:
    """Sizes and times of all files."""
    found = {}
    for path in folder.rglob("*"):
        said = path.stat()
        found[str(path.relative_to(folder))] = said.st_size, said.st_mtime_ns
    return found
