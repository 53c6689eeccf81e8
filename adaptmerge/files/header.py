"""The header of a safetensors file: JSON text to checked entries, and tensors to JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from adaptmerge.errors import InputError, OutputError
from adaptmerge.files.strict_json import capped, parse, quoted
from adaptmerge.tensors.dtypes import BY_NAME, DType
from adaptmerge.tensors.refs import Shape, TensorRef

LIMIT = 100_000_000
METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_AXES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; begin and end count from the end of the header."""

    name: str
    dtype: DType
    shape: Shape
    begin: int
    end: int


def read(text: bytes, room: int, where: str) -> tuple[list[Entry], dict[str, str]]:
    """The entries by offset and the metadata of a header whose file has `room` bytes of data.

    Raises InputError with every problem: bad JSON, bad entries, overlaps, holes, missing data.
    """
    table, problems = _table(text, where)
    metadata = table.pop(METADATA, None) or {}
    problems += _metadata_problems(metadata)
    found = [_entry(name, value, problems) for name, value in table.items()]
    entries = sorted((e for e in found if e is not None), key=lambda e: (e.begin, e.end))
    problems += _overlaps(entries) + _missing_data(entries, room)
    if len(entries) == len(found):
        problems += _unused_data(entries, room)
    if problems:
        raise InputError(capped(problems), where=where)
    return entries, metadata


def build(
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    where: str,
    order: Sequence[str] | None = None,
) -> tuple[bytes, list[str]]:
    """The first bytes of a file up to its data, and the names in the order of their data.

    Unless an order is given wide elements come first, so that every tensor is aligned to its own
    elements. Raises OutputError when a name or the size of the header cannot be stored.
    """
    order = list(order or sorted(tensors, key=lambda name: -tensors[name].dtype.bits))
    offsets, position = {}, 0
    for name in order:
        offsets[name] = [position, position := position + tensors[name].nbytes]
    table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name, ref in tensors.items():
        fields = {"dtype": ref.dtype.name, "shape": list(ref.shape), "data_offsets": offsets[name]}
        table[name] = fields
    text = _encoded(table, METADATA in tensors, where)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _encoded(table: dict[str, Any], reserved: bool, where: str) -> bytes:
    if reserved:
        raise OutputError(f"a tensor cannot be called {METADATA!r}: rename it", where=where)
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as problem:
        bad = quoted(problem.object[max(problem.start - 20, 0) : problem.end])
        sentence = f"a name cannot be stored as UTF-8 ({bad}): rename it"
        raise OutputError(sentence, where=where) from None
    if len(text) > LIMIT - 8:
        raise OutputError(
            f"the header would take {len(text)} bytes, safetensors allows {LIMIT}: "
            "write several files",
            where=where,
        )
    return text


def _table(text: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    try:
        table, problems = parse(text)
    except ValueError as problem:
        raise InputError(
            f"the header is not JSON ({problem}): the file is damaged; copy or download it again",
            where=where,
        ) from None
    if text[:1] != b"{" or not isinstance(table, dict):
        raise InputError("the header is JSON but not an object: the file is damaged", where=where)
    return table, [f"{problem} in the header, expected once" for problem in problems]


def _metadata_problems(metadata: object) -> list[str]:
    if not isinstance(metadata, dict):
        return [f"{METADATA} is {quoted(metadata)}, expected an object of strings"]
    return [
        f"{METADATA} entry {quoted(key)} is {quoted(value)}, expected a string"
        for key, value in metadata.items()
        if not (_is_text(key) and _is_text(value))
    ]


def _entry(name: str, value: object, problems: list[str]) -> Entry | None:
    label = f"tensor {quoted(name)}"
    if not isinstance(value, dict) or set(value) != _FIELDS:
        problems.append(f"{label} is {quoted(value)}, expected dtype, shape and data_offsets")
        return None
    before = len(problems)
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _is_text(name):
        problems.append(f"{label} has a name that is not valid Unicode")
    if not (isinstance(kind, str) and kind in BY_NAME):
        problems.append(f"{label} has the unknown dtype {quoted(kind)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        problems.append(f"{label} has the shape {quoted(shape)}, expected whole numbers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"{label} has the offsets {quoted(offsets)}, expected [begin, end]")
    if len(problems) > before:
        return None
    entry = Entry(name, BY_NAME[kind], tuple(shape), *offsets)
    problems += _size_problems(entry, label)
    return entry


def _size_problems(entry: Entry, label: str) -> list[str]:
    bits = math.prod(entry.shape) * entry.dtype.bits
    if bits % 8:
        return [f"{label} of {entry.dtype.name} {list(entry.shape)} does not fill whole bytes"]
    if bits // 8 == entry.end - entry.begin:
        return []
    return [
        f"{label} has {entry.end - entry.begin} bytes of data, but {entry.dtype.name} "
        f"{list(entry.shape)} takes {bits // 8}"
    ]


def _overlaps(entries: list[Entry]) -> list[str]:
    return [
        f"tensors {quoted(one.name)} and {quoted(two.name)} overlap by {one.end - two.begin} bytes"
        for one, two in pairwise(entries)
        if two.begin < one.end
    ]


def _missing_data(entries: list[Entry], room: int) -> list[str]:
    beyond = [entry for entry in entries if entry.end > room]
    if not beyond:
        return []
    lost = max(entry.end for entry in beyond) - room
    names = quoted(beyond[0].name) + (f" and {len(beyond) - 1} more" if len(beyond) > 1 else "")
    return [
        f"{lost} bytes are missing: {names} reach beyond the end of the file, which was cut off or "
        "damaged; copy or download it again"
    ]


def _unused_data(entries: list[Entry], room: int) -> list[str]:
    problems, position = [], 0
    for entry in entries:
        if entry.begin > position:
            gap = entry.begin - position
            problems.append(f"{gap} bytes before {quoted(entry.name)} belong to no tensor")
        position = max(position, entry.end)
    if room > position:
        problems.append(f"{room - position} bytes after the last tensor belong to no tensor")
    return problems


def _are_sizes(value: object) -> bool:
    # bool is an int in Python, but not a size in a file
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
