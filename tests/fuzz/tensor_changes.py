"""Changes of tensors: names, dtypes, shapes, values; files stay whole but for what is said of them."""

from __future__ import annotations

import json
import math
from operator import index
from random import Random
from typing import Any, NamedTuple

from fuzz import json_changes

SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1},
    **{"BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "F8_E8M0": 1},
}
FILLS = {  # little-endian float32: the bytes of other dtypes are as odd
    "NaN": b"\x00\x00\xc0\x7f",
    "infinity": b"\x00\x00\x80\x7f",
    "-infinity": b"\x00\x00\x80\xff",
    "denormal": b"\x01\x00\x00\x00",
    "largest": b"\xff\xff\x7f\x7f",
    "zero": b"\x00\x00\x00\x00",
    "ones": b"\x00\x00\x80\x3f",
    "all bits": b"\xff\xff\xff\xff",
    "-zero": b"\x00\x00\x00\x80",
    "half of ones": b"\x00\x3c\x00\x3c",
}


class Held(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Held]


def unframed(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header and the data of a safetensors file, if it is one."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 + size or content[8:9] != b"{":
        return None
    try:
        return json.loads(content[8 : 8 + size]), content[8 + size :]
    except (ValueError, RecursionError):
        return None


def framed(header: str, data: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def changed(content: bytes, random: Random) -> tuple[bytes, str]:
    """The file with a change of one tensor, still a whole file of tensors."""
    parts = unframed(content)
    if parts is None:
        return content, "no tensors"
    header, data = parts
    tensors: Tensors = {}
    metadata = header.pop("__metadata__", None)
    try:
        for name, entry in header.items():
            begin, end = map(index, entry["data_offsets"])
            tensors[name] = Held(entry["dtype"], tuple(map(index, entry["shape"])), data[begin:end])
    except (AttributeError, KeyError, TypeError, ValueError):
        return content, "no tensors any more"
    if not tensors:
        return content, "no tensors"
    said = _change(tensors, random)
    return written(tensors, metadata), said


def written(tensors: Tensors, metadata: Any) -> bytes:
    """A file of these tensors."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, held in tensors.items():
        span = [len(data), len(data) + len(held.data)]
        table[name] = {"dtype": held.dtype, "shape": list(held.shape), "data_offsets": span}
        data += held.data
    return framed(json.dumps(table), data)


def _change(tensors: Tensors, random: Random) -> str:
    name = random.choice(sorted(tensors))
    how = random.choice(
        (_renamed, _renamed, _gone, _once_more, _typed, _typed, _shaped, _shaped, _cut, _filled)
        + (_filled, _one_value, _swapped, _state)
    )
    return f"{name}: {how(tensors, name, random)}"


def _renamed(tensors: Tensors, name: str, random: Random) -> str:
    parts = name.split(".")
    number = random.randrange(len(parts))
    dropped = ".".join(parts[:number] + parts[number + 1 :])
    twice = ".".join(parts[: number + 1] + parts[number:])
    other = ".".join(
        [*parts[:number], random.choice(("0", "7", "99", "x", "weight")), *parts[number + 1 :]]
    )
    new = random.choice((dropped, twice, other, f"{name}.x", f"base_model.model.{name}"))
    if random.random() < 0.1:
        new = random.choice(("", ".", "..", "a" * 3000, "\x00", "__metadata__x", "é", "w\n"))
    tensors[new] = tensors.pop(name)
    return f"is named {new[:200]!r}"


def _gone(tensors: Tensors, name: str, random: Random) -> str:
    del tensors[name]
    return "is gone"


def _once_more(tensors: Tensors, name: str, random: Random) -> str:
    _renamed(tensors, name, random)
    new = next(reversed(tensors))
    tensors[name] = tensors[new]
    return f"is also {new[:200]!r}"


def _typed(tensors: Tensors, name: str, random: Random) -> str:
    """Another dtype for the same bytes, or as many values of another dtype."""
    held, dtype = tensors[name], random.choice(sorted(SIZES))
    count = math.prod(held.shape)
    data = (held.data * 8)[: count * SIZES[dtype]]
    if random.random() < 0.3 or len(data) < count * SIZES[dtype]:
        data = held.data[: len(held.data) // SIZES[dtype] * SIZES[dtype]]
        tensors[name] = Held(dtype, (len(data) // SIZES[dtype],), data)
    else:
        tensors[name] = Held(dtype, held.shape, data)
    return f"is {dtype} {list(tensors[name].shape)}"


def _shaped(tensors: Tensors, name: str, random: Random) -> str:
    """Another shape for the same values."""
    held = tensors[name]
    shape = held.shape
    choices = [shape[::-1], (*shape, 1), (1, *shape), (math.prod(shape),), (1,) * 9 + shape]
    if len(shape) > 1:
        choices.append((shape[0] * shape[1], *shape[2:]))
    if shape and shape[0] % 2 == 0:
        choices.append((2, shape[0] // 2, *shape[1:]))
        choices.append((shape[0] // 2, *shape[1:-1], shape[-1] * 2) if len(shape) > 1 else shape)
    if math.prod(shape) == 1:
        choices.append(())
    tensors[name] = held._replace(shape=random.choice(choices))
    return f"has the shape {list(tensors[name].shape)}, not {list(shape)}"


def _cut(tensors: Tensors, name: str, random: Random) -> str:
    """Fewer rows, or more, or none at all."""
    held = tensors[name]
    if not held.shape or not held.data:
        return "stays"
    row = len(held.data) // max(held.shape[0], 1)
    rows = random.choice((0, 1, held.shape[0] - 1, held.shape[0] + 1, held.shape[0] * 2))
    data = (held.data * 2)[: row * rows]
    tensors[name] = Held(held.dtype, (rows, *held.shape[1:]), data)
    return f"has {rows} rows, not {held.shape[0]}"


def _filled(tensors: Tensors, name: str, random: Random) -> str:
    held, what = tensors[name], random.choice(sorted(FILLS))
    data = (FILLS[what] * (len(held.data) // 4 + 1))[: len(held.data)]
    tensors[name] = held._replace(data=data)
    return f"is all {what}"


def _one_value(tensors: Tensors, name: str, random: Random) -> str:
    held, what = tensors[name], random.choice(sorted(FILLS))
    place = random.randrange(max(len(held.data) // 4, 1)) * 4
    data = held.data[:place] + FILLS[what] + held.data[place + 4 :]
    tensors[name] = held._replace(data=data[: len(held.data)])
    return f"has a {what} at byte {place}"


def _swapped(tensors: Tensors, name: str, random: Random) -> str:
    other = random.choice(sorted(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"is swapped with {other[:200]}"


def _state(tensors: Tensors, name: str, random: Random) -> str:
    """A change of JSON that is held in bytes, as bitsandbytes does it."""
    states = {n: table for n, held in sorted(tensors.items()) if (table := _table(held.data))}
    if not states:
        return _filled(tensors, name, random)
    state = random.choice(list(states))
    value, said = json_changes.changed(states[state], random)
    data = json_changes.text(value).encode()
    tensors[state] = Held("U8", (len(data),), data)
    return f"unchanged; in {state}: {said}"


def _table(data: bytes) -> Any:
    """What bytes of JSON say, if they are of a table."""
    try:
        return json.loads(data) if data.startswith(b"{") else None
    except (ValueError, RecursionError):
        return None
