"""Are the files of an output those that were written? By their sha256 in the report, and by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from adaptmerge.bases.open import MODEL_CONFIG, WEIGHT_FILES
from adaptmerge.commands.verify.checks import FAIL, PASS, SKIPPED, Check
from adaptmerge.files.listing import sha256_of
from adaptmerge.files.paths import inside
from adaptmerge.formats.registry import formats
from adaptmerge.outputs.companions import CARD, LICENCES

SHOWN = 3
PROSE = (CARD, *LICENCES)  # people write in these, and no library reads them
UNSEALED = "the report is of an earlier version and has no sha256 of {}"


def check_files(output: Path, recorded: Mapping[str, str] | None) -> Check:
    """Whether every file still is what was written, and none was put beside them that is read instead.

    recorded: their sha256 as the report has them; None where it has none.
    """
    if not recorded:
        return Check("files", SKIPPED, UNSEALED.format("what was written"))
    found = dict(_places(output, recorded))
    wrong = {name: what for name, path in found.items() if (what := _wrong(path, recorded[name]))}
    prose = [name for name in wrong if is_prose(name)]
    problems = [f"{name} {what}" for name, what in wrong.items() if name not in prose]
    problems += [f"the sha256 of {name} is none" for name in prose if not is_digest(recorded[name])]
    problems += [f"{name} was not written with them" for name in _beside(output, recorded)]
    if problems:
        return Check("files", FAIL, "; ".join(problems[:SHOWN]), {"problems": problems})
    return Check("files", PASS, _sentence(output, recorded, prose))


def _places(output: Path, recorded: Mapping[str, str]) -> Iterator[tuple[str, Path | None]]:
    """Where each file lies. A file by itself may have been renamed, its report with it."""
    if not output.is_dir():
        yield from ((name, output) for name in recorded)
        return
    yield from ((name, inside(output, name)) for name in recorded)


def _wrong(path: Path | None, digest: str) -> str | None:
    """What is amiss with a file."""
    if path is None or not path.is_file():
        return "is missing"
    return (
        None
        if sha256_of(path) == digest
        else "is not the file that was written (its sha256 differs)"
    )


def _beside(output: Path, recorded: Collection[str]) -> list[str]:
    """Files that were not written, but that a library or a reader takes for part of the output."""
    if not output.is_dir():
        return []
    read = {MODEL_CONFIG, *WEIGHT_FILES, *(name for f in formats().values() for name in f.files)}
    if not _is_whole(recorded):
        read.discard(MODEL_CONFIG)
    folders = dict.fromkeys(str(PurePosixPath(name).parent) for name in recorded)
    names = [str(PurePosixPath(folder, name)) for folder in folders for name in sorted(read)]
    return [name for name in names if name not in recorded and (output / name).is_file()]


def _is_whole(recorded: Collection[str]) -> bool:
    """Whether all files are recorded, as they are since reports have the model card's."""
    return CARD in recorded


def is_digest(value: object) -> bool:
    """Whether it is a sha256 as reports have them."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_prose(name: str) -> bool:
    return name.rpartition("/")[2].startswith(PROSE)


def _sentence(output: Path, recorded: Collection[str], edited: Collection[str]) -> str:
    count = len(recorded) - len(edited)
    said = "the file is what was" if count == 1 else f"{count} files are those that were"
    notes = [f"{name} has changed since" for name in edited]
    if output.is_dir() and not _is_whole(recorded):
        notes.append(UNSEALED.format("the others"))
    return "; ".join([f"{said} written", *notes])
