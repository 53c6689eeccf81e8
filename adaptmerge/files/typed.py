"""Plain data from a file as the dataclass that it claims to be: every fault of it, one sentence each.

Types are those of the annotations. What they mean in JSON, where that is not plain: a float may be null,
which stands for NaN; a tuple is a list; `Annotated[str, Literal["a", "b"]]` is one of these words;
`Annotated[Mapping, Class]` stays a mapping, which states such a dataclass. A class that says OPEN may be
stated with more than its fields.
(pydantic could do this, and takes .1 s to import and prepare, which is half of what `inspect` takes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adaptmerge.errors import AdaptmergeError, InputError, did_you_mean
from adaptmerge.files.strict_json import capped, quoted

T = TypeVar("T")
Reader = Callable[[Any, str, list[str]], Any]
Number = Annotated[float, "finite"]  # of a config, in which null is no number
LARGEST = 1 << 63
WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}

MANY: Mapping[Any, str] = {
    bool: "true and false",
    int: "whole numbers",
    float: "numbers",
    str: "texts",
}


def built(kind: type[T], raw: Any, where: str, *, otherwise: str = "") -> T:
    """The dataclass that plain data states. Raises InputError with all that is missing, unknown or of
    another type; `otherwise` says what to do about it."""
    problems: list[str] = []
    hint: Any = kind
    found: T = reader(hint)(raw, "", problems)
    if problems:
        advice = f"; {otherwise}" if otherwise else ""
        raise InputError([f"{problem}{advice}" for problem in capped(problems)], where=where)
    return found


def misfits(hint: Any, value: Any, name: str) -> list[str]:
    """What is wrong with a value that should be of a type, one sentence each."""
    problems: list[str] = []
    reader(hint)(value, name, problems)
    return problems


def checked(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """The dataclass with these values for its fields, which may be objects already. Raises ValueError with
    all that does not fit."""
    problems: list[str] = []
    found: T = _dataclass(kind, values, name, problems)
    if problems:
        raise ValueError("; ".join(problems))
    return found


@cache
def reader(hint: Any) -> Reader:
    """What reads values of a type: given a value, its name and a list to which problems are added."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return lambda value, name, problems: value
    if origin is Annotated:
        return _annotated(args[0], args[1:])
    if origin in (Union, UnionType):
        return partial(_union, hint, args)
    if origin is Literal:
        return partial(_literal, args)
    if hint in WORDS:
        return partial(_plain, hint)
    if is_dataclass(hint):
        return partial(_object, hint)
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _named_tuple(hint)
    if origin is tuple and args[-1] is not Ellipsis:
        return partial(_pair, hint, [reader(arg) for arg in args])
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        key, inner = args or (str, Any)
        return partial(_mapping, reader(key), reader(inner))
    if kind in (list, tuple, Sequence, frozenset):
        return partial(_sequence, hint, kind, reader((args or (Any,))[0]))
    return partial(_instance, hint)


def described(hint: Any) -> str:
    """What a type is, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        words = [one for one in args[1:] if get_origin(one) is Literal]
        return described(words[0] if words else args[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(described, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if hint in WORDS:
        return WORDS[hint]
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} values"
    kind = origin or hint
    if kind in (list, tuple, Sequence, frozenset):
        return f"a list of {MANY[args[0]]}" if args and args[0] in MANY else "a list"
    if is_dataclass(hint) or (isinstance(kind, type) and issubclass(kind, Mapping)):
        return "an object"
    return f"a {getattr(hint, '__name__', 'value').lower()}"


def _wrong(hint: Any, value: Any, name: str, problems: list[str]) -> None:
    shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else quoted(value)
    problems.append(f"{name or 'its content'} is {shown}: expected {described(hint)}")


def _annotated(hint: Any, marks: Sequence[Any]) -> Reader:
    words = [get_args(mark) for mark in marks if get_origin(mark) is Literal]
    if words:
        return partial(_literal, words[0])
    if hint is float and "finite" in marks:
        return partial(_plain, hint, finite=True)
    shapes = [mark for mark in marks if is_dataclass(mark)]
    return partial(_looked_at, shapes[0]) if shapes else reader(hint)


def _looked_at(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    """A value that stays as it is, if it states such an object."""
    reader(kind)(value, name, problems)
    return value


def _plain(hint: Any, value: Any, name: str, problems: list[str], *, finite: bool = False) -> Any:
    if hint is float and value is None and not finite:
        return math.nan
    if not _is(hint, value) or (finite and not math.isfinite(value)):
        _wrong(hint, value, name, problems)
    return value


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of a plain type; a whole number is a number, a truth is none."""
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is int or (hint is float and isinstance(value, int)):
        return isinstance(value, int) and abs(value) < LARGEST
    if hint is float:
        return isinstance(value, float) and not math.isinf(value)
    return isinstance(value, hint)


def _union(hint: Any, args: Sequence[Any], value: Any, name: str, problems: list[str]) -> Any:
    if value is None and NoneType in args:
        return None
    tries = []
    for arg in args:
        if arg is not NoneType:
            said: list[str] = []
            found = reader(arg)(value, name, said)
            if not said:
                return found
            tries.append(said)
    # where one alternative is of the right kind and wrong inside, that is what matters
    inside = [said for said in tries if not any(p.startswith(f"{name} is ") for p in said)]
    if len(inside) == 1:
        problems += inside[0]
    else:
        _wrong(hint, value, name, problems)
    return value


def _literal(words: Sequence[Any], value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, (str, int)) or value not in words:
        known = ", ".join(map(repr, words))
        problems.append(f"{name} is {quoted(value)}: expected one of {known}")
    return value


def _sequence(
    hint: Any, kind: Any, inner: Reader, value: Any, name: str, problems: list[str]
) -> Any:
    if not isinstance(value, (list, tuple)):
        if not (kind is frozenset and isinstance(value, frozenset)):
            _wrong(hint, value, name, problems)
        return value
    found = [inner(part, f"{name}[{i}]", problems) for i, part in enumerate(value)]
    if kind is frozenset:
        return frozenset(found) if not problems else value
    return tuple(found) if kind is tuple else found


def _pair(hint: Any, inner: Sequence[Reader], value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != len(inner):
        _wrong(hint, value, name, problems)
        return value
    parts = enumerate(zip(inner, value, strict=True))
    return tuple(read(part, f"{name}[{i}]", problems) for i, (read, part) in parts)


def _named_tuple(kind: Any) -> Reader:
    """A list with a value for each field."""
    read = reader(tuple.__class_getitem__(tuple(get_type_hints(kind).values())))

    def named(value: Any, name: str, problems: list[str]) -> Any:
        before = len(problems)
        found = read(value, name, problems)
        return value if len(problems) > before else kind(*found)

    return named


def _mapping(key: Reader, inner: Reader, value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        _wrong(Mapping, value, name, problems)
        return value
    return {
        key(k, f"a key of {name}", problems): inner(v, f"{name}.{k}" if name else str(k), problems)
        for k, v in value.items()
    }


def _object(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        _wrong(kind, value, name, problems)
        return value
    return _dataclass(kind, value, name, problems)


@cache
def _fields(kind: Any) -> dict[str, tuple[Reader, bool]]:
    """The reader of each field, and whether it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        part.name: (
            reader(hints[part.name]),
            part.default is MISSING and part.default_factory is MISSING,
        )
        for part in fields(kind)
        if part.init
    }


def _dataclass(kind: Any, values: Mapping[str, Any], name: str, problems: list[str]) -> Any:
    known, before = _fields(kind), len(problems)
    place = f"{name}." if name else ""
    foreign = [] if getattr(kind, "OPEN", False) else sorted(values.keys() - known.keys(), key=str)
    for key in foreign:
        problems.append(f"{place}{key} is unknown: {did_you_mean(str(key), list(known))}")
    problems += [
        f"{place}{k} is missing" for k, (_, must) in known.items() if must and k not in values
    ]
    found = {
        key: known[key][0](value, f"{place}{key}", problems)
        for key, value in values.items()
        if key in known
    }
    return None if len(problems) > before else _made(kind, found, name, problems)


def _made(kind: Any, found: Mapping[str, Any], name: str, problems: list[str]) -> Any:
    """The object, which may find more amiss with its fields itself."""
    try:
        return kind(**found)
    except (AdaptmergeError, ValueError) as problem:
        problems.append(f"{name}: {problem}" if name else str(problem))
        return None


_KNOWN: dict[tuple[type, Any], bool] = {}


def _instance(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """An object that was made already, of a class or with what a protocol asks for."""
    asked = type(value), hint
    if asked not in _KNOWN:
        _KNOWN[asked] = _has_all(value, hint)
    if not _KNOWN[asked]:
        problems.append(
            f"{name} is a {type(value).__name__}: expected a {getattr(hint, '__name__', hint)}"
        )
    return value


def _has_all(value: Any, hint: Any) -> bool:
    """Of a protocol the class decides: to ask the object would compute its properties."""
    if getattr(hint, "_is_protocol", False):
        names = {
            name
            for base in hint.__mro__
            if getattr(base, "_is_protocol", False) and base.__name__ != "Protocol"
            for name in vars(base)
            if not name.startswith("_")
        } | {
            name
            for base in hint.__mro__
            if getattr(base, "_is_protocol", False)
            for name in getattr(base, "__annotations__", ())
            if not name.startswith("_")
        }
        own = {part.name for part in fields(value)} if is_dataclass(value) else set()
        return all(hasattr(type(value), name) or name in own for name in names)
    return isinstance(value, hint) if isinstance(hint, type) else True
