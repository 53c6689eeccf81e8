"""The sha256 of every file of an output: what its report holds so that a later change is seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adaptmerge.files.listing import sha256_of
from adaptmerge.files.staging import Staging


def checksums(staging: Staging, known: Mapping[Path, str], report: str) -> dict[str, str]:
    """The sha256 of all that is staged, by name, but for the report that will hold them: one may be there
    that an interrupted run left. known: of files that were hashed as they were written."""
    files = {name: path for name, path in staging.staged().items() if name != report}
    return {name: known.get(path) or sha256_of(path) for name, path in files.items()}
