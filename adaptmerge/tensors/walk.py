"""The TensorRefs inside of data: listed, and replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from adaptmerge.tensors.refs import TensorRef


def refs_of(node: Any) -> Iterator[TensorRef]:
    """Every TensorRef inside a factor, an edit or a tuple of them, in field order."""
    if isinstance(node, TensorRef):
        yield node
    elif isinstance(node, tuple):
        for part in node:
            yield from refs_of(part)
    else:
        for name in _fields(type(node)):
            yield from refs_of(getattr(node, name))


def refs_by_field(node: Any, field: str = "") -> Iterator[tuple[str, TensorRef]]:
    """The same refs, each with the name of the field that it is in."""
    if isinstance(node, TensorRef):
        yield field, node
    elif isinstance(node, tuple):
        for part in node:
            yield from refs_by_field(part, field)
    else:
        for name in _fields(type(node)):
            yield from refs_by_field(getattr(node, name), name)


def mapped(node: Any, change: Callable[[TensorRef], TensorRef]) -> Any:
    """The same data with every TensorRef inside it changed."""
    if isinstance(node, TensorRef):
        return change(node)
    if isinstance(node, tuple):
        return tuple(mapped(part, change) for part in node)
    if not _fields(type(node)):
        return node
    before = {name: getattr(node, name) for name in _fields(type(node))}
    after = {name: mapped(value, change) for name, value in before.items()}
    changed = {name: value for name, value in after.items() if value is not before[name]}
    return replace(node, **changed) if changed else node


_FIELDS: dict[type, tuple[str, ...]] = {}


def _fields(kind: type) -> tuple[str, ...]:
    """The field names of a dataclass, looked up once; none for other classes."""
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()
    return _FIELDS[kind]
