"""Changes of JSON values: other types, sizes, nesting, names that are missing, added or there twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

Place = tuple[Any, Any]  # a table or list, and a key or number in it
# what texts have instead: lists in lists, of which Python itself can write only some
DEEP = {"<deep>": 40, "<deeper>": 400, "<deepest>": 100_000}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-320, 1e308, -1e308),
    *(2**31 - 1, 2**31, 2**32, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40, 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "0", "None", "null", "nan", "true", "\x00", "\n", "é", "\ud800", "😀"),
    *("../..", "/", "/dev/zero", ".", "~", "a" * 5000, "(", "(a+)+$", ".*", "[", "{", "{0}", "%s"),
    *("LORA", "lora", "float16", "bfloat16", "float8_e4m3fn", "all-linear", "llama", "nf4", "none"),
    *([], [[]], [None], [0], [1, 2], [-1], [""], ["a"], [{}], [1, "a"], [float("nan")]),
    *({}, {"a": 1}, {"": 0}, {"a": None}, {"q_proj": "x"}, {".*": 3}, {"0": []}, {"is": "Leaf"}),
)


def places(value: Any) -> Iterator[Place]:
    """Every value inside, by what holds it."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield value, key
        yield from places(inner)


def odd(random: Random) -> Any:
    """Any value."""
    if random.random() < 0.05:
        return random.choice(sorted(DEEP))
    return copy.deepcopy(random.choice(ODD))


def near(value: Any, random: Random) -> Any:
    """A value of the same type that is not far."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, 2 * value, value // 2, 0, float(value)))
    if isinstance(value, float):
        return random.choice((-value, 0.0, 1e3 * value, 1e-3 * value, int(value) if value else 1))
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice((value[:cut], value[cut:], value.upper(), f"{value}x", value * 2))
    if isinstance(value, list):
        return random.choice((value[1:], value[:-1], value * 2, value[::-1], [*value, odd(random)]))
    if isinstance(value, dict):
        return {key: value[key] for key in sorted(value) if random.random() < 0.6}
    return odd(random)


def changed(value: Any, random: Random) -> tuple[Any, str]:
    """A copy with one change, and what it is."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found or random.random() < 0.02:
        whole = odd(random)
        return whole, f"all of it is {shown(whole)}"
    # tables of many alike values must not hide those of which there is one
    first = [place for place in found if place[0] is value]
    holder, key = random.choice(first if random.random() < 0.4 else found)
    return value, _change(holder, key, found, random)


def _change(holder: Any, key: Any, found: list[Place], random: Random) -> str:
    how = random.choice(("odd", "odd", "odd", "near", "near", "gone", "other", "renamed", "more"))
    inner = _as_table(holder[key])
    if inner is not None and random.random() < 0.8:
        other, said = changed(inner, random)
        holder[key] = text(other)
        return f"in {key!r}: {said}"
    if how == "gone":
        del holder[key]
        return f"{key!r} is gone"
    if how in ("renamed", "more") and isinstance(holder, dict):
        name = random.choice((near(str(key), random), str(odd(random))[:6000]))
        holder[name] = holder.pop(key) if how == "renamed" else copy.deepcopy(holder[key])
        return f"{key!r} is {how}: {shown(name)}"
    if how == "other":
        other_holder, other_key = random.choice(found)
        holder[key] = copy.deepcopy(other_holder[other_key])
    else:
        holder[key] = near(holder[key], random) if how == "near" else odd(random)
    return f"{key!r} is {shown(holder[key])}"


def _as_table(value: Any) -> Any:
    """What a string of JSON says, if it is one of a table."""
    if not isinstance(value, str) or not value.startswith("{"):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def text(value: Any) -> str:
    """As JSON, with NaN and lone surrogates as Python writes them."""
    found = json.dumps(value)
    for word, levels in DEEP.items():
        found = found.replace(json.dumps(word), "[" * levels + "]" * levels)
    return found


def twice(source: str, random: Random) -> str:
    """The text of a table with one of its names once more."""
    value = json.loads(source)
    if not isinstance(value, dict) or not value:
        return source
    name = random.choice(sorted(value))
    again = f"{json.dumps(name)}: {text(random.choice((value[name], odd(random))))}"
    return source.rstrip()[:-1] + f", {again}}}"


def shown(value: Any) -> str:
    """Short, and printable."""
    return ascii(value)[:80]
