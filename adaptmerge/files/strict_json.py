"""JSON that is read strictly: repeated keys are reported, depth and size are bounded."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.files import sniff

DEEPEST = 100  # lists and objects inside each other


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for anything else."""
    where = os.fspath(path)
    sniff.refuse(sniff.head(where), where, "a JSON file", ())
    return object_in(sniff.whole(where), where)


def object_in(text: bytes | str, where: str) -> dict[str, Any]:
    """The object that a JSON text states. Raises InputError for anything else."""
    try:
        table, problems = parse(text)
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text: save it as UTF-8", where=where) from None
    except ValueError as problem:
        raise InputError(f"is not JSON ({problem}): correct it", where=where) from None
    if not isinstance(table, dict):
        problems.append(f"holds a JSON {type(table).__name__}, expected an object in braces")
    if problems:
        raise InputError(capped(problems), where=where)
    found: dict[str, Any] = table
    return found


def parse(text: bytes | str) -> tuple[Any, list[str]]:
    """The value and one sentence per repeated key. Raises ValueError when the text is not JSON."""
    repeated: dict[str, int] = {}

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.update((key, count) for key, count in counts.items() if count > 1)
        return table

    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=collect)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _is_deep(value):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    problems = [f"key {quoted(key)} appears {count} times" for key, count in repeated.items()]
    return value, [*problems, *_not_finite(value)]


def _not_finite(value: Any, place: str = "it") -> Iterator[str]:
    """A sentence for each number that JSON has no word for, though many writers and readers have."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}, which is no number in JSON"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, quoted(key))
    elif isinstance(value, list):
        for part in value:
            yield from _not_finite(part, place)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        parts = (
            p.values() if isinstance(p, dict) else p for p in level if isinstance(p, (dict, list))
        )
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def quoted(name: object, limit: int = 120) -> str:
    """A name from a file as it can be shown: escaped, in quotes, not endless."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[0]}"


def capped(problems: list[str], limit: int = 10) -> list[str]:
    """The first problems, and how many more there are."""
    if len(problems) <= limit + 1:
        return problems
    return [*problems[:limit], f"and {len(problems) - limit} more problems"]


def dump(value: Any, *, ascii_only: bool = False) -> str:
    """The value as JSON text, sorted and indented; a number that JSON lacks (NaN, infinity) is null."""
    plain = _plain(value)
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=ascii_only, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
