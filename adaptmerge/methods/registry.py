"""All merge methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from adaptmerge.discovery import collect
from adaptmerge.errors import UsageError, did_you_mean
from adaptmerge.methods.method import Method


@cache
def methods() -> Mapping[str, Method]:
    """All merge methods by name."""
    return collect("adaptmerge.methods", "METHOD")


def method_named(name: str) -> Method:
    """The method of that name. Raises UsageError with a suggestion."""
    if name not in methods():
        raise UsageError(f"no method is named {name!r}: {did_you_mean(name, list(methods()))}")
    return methods()[name]
