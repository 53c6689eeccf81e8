"""Where two tables differ, entry by entry."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from adaptmerge.files.strict_json import quoted


def differences(where: str, wanted: Any, found: Any) -> Iterator[str]:
    """What is found otherwise than wanted."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if key not in found:
                yield f"{where} {quoted(key)} is missing"
            elif key not in wanted:
                yield f"{where} {quoted(key)} is no entry that is written"
            else:
                yield from differences(f"{where} {key}", wanted[key], found[key])
    elif type(wanted) is not type(found) or wanted != found:
        yield f"{where} is {quoted(found)}, written is {quoted(wanted)}"


def entries(
    where: str, said: Mapping[str, Any], wanted: Collection[str], also: Collection[str] = ()
) -> Iterator[str]:
    """Entries that a table lacks, and those that it should not have."""
    yield from (f"{where}: {name} is missing" for name in wanted if name not in said)
    known = {*wanted, *also}
    yield from (f"{where}: {quoted(name)} is no entry" for name in said if name not in known)


def listed(value: Any) -> Any:
    """With lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: listed(inner) for key, inner in value.items()}
    return [listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value
