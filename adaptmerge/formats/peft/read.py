"""Reading one adapter: every config field judged, every tensor in an edit, all problems at once."""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.factors import refs_of
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.saved import saved_edits
from adaptmerge.formats.peft.tuner import COMMON, Malformed, Parts, Reading
from adaptmerge.graph import Edit, Kind, Note


def edits_of(reading: Reading) -> list[Edit]:
    """The edits of an adapter. Raises InputError with all problems of config and tensors."""
    reading.notes += reading.keys.notes()
    _judge_fields(reading)
    tuner = reading.tuner
    if tuner.read is not None:
        found = _guarded(reading, "", {}, lambda: tuner.read(reading))
    else:
        found = [
            edit
            for module, parts in reading.keys.modules.items()
            for edit in _module(reading, module, parts)
        ]
    edits = [*saved_edits(reading.keys, reading.config, reading.notes), *found]
    reading.keys.finish()
    return edits


def _module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    read = reading.tuner.module
    assert read is not None
    return _guarded(reading, module, parts, lambda: read(reading, module, parts))


def _guarded(reading: Reading, module: str, parts: Parts, read: object) -> list[Edit]:
    """What `read` returns; its complaint and every tensor it made nothing of are problems."""
    problems = reading.keys.problems
    where = f"{module}: " if module else ""
    try:
        edits: Sequence[Edit] = read()  # type: ignore[operator]
    except KeyError as problem:
        found = f"found only {', '.join(parts)}" if parts else "nothing like it is stored"
        problems.append(f"{where}{problem.args[0]} is missing, {found}")
        return []
    except ValueError as problem:
        problems.append(f"{where}{problem}")
        return []
    used = {ref.name for edit in edits for ref in refs_of(edit)}
    problems += [
        f"tensor {ref.name!r} belongs to nothing this format knows"
        for ref in parts.values()
        if ref.name not in used and not problems
    ]
    return list(edits)


def _judge_fields(reading: Reading) -> None:
    """Unknown fields: said when empty, an error when they are set, for they may change the maths."""
    tuner = reading.tuner
    known = COMMON | tuner.maths.keys() | tuner.training | set(tuner.patterns.values())
    unknown = {k: v for k, v in reading.config.raw.items() if k not in known}
    harmless = [name for name, value in unknown.items() if not value]
    if harmless:
        names = ", ".join(sorted(harmless))
        what = f"unknown config fields that are not set are taken as harmless: {names}"
        reading.notes.append(Note(Kind.INFO, what))
    version = reading.config.raw.get("peft_version") or "unknown"
    reading.keys.problems += [
        f"config field {name} is {value!r}, which this version does not know (the file was written by "
        f"peft {version}): it may change what the adapter computes; update adaptmerge"
        for name, value in unknown.items()
        if value
    ]


__all__ = ["Keys", "Malformed", "edits_of"]
