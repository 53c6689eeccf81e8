"""Factors looked at densely, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.tensors.refs import TensorRef

BLOCK = 1 << 19  # entries of a dense matrix looked at at once: small enough for the cache


def at_once(factor: Any) -> bool:
    """Whether some rows of a factor cost as much as all of them, somewhere inside."""
    if isinstance(factor, tuple):
        return any(map(at_once, factor))
    if isinstance(factor, TensorRef):
        return False
    if getattr(factor, "at_once", False):
        return True
    if isinstance(factor, Expanded):
        return at_once(factor.expand())
    inside = fields(factor) if is_dataclass(factor) else ()
    return any(at_once(getattr(factor, part.name)) for part in inside)


def row_ranges(*factors: Factor) -> Iterator[tuple[int, int]]:
    """Row ranges that cover factors of one shape, of about BLOCK entries each where parts are cheap."""
    rows, columns = factors[0].shape
    step = rows if any(map(at_once, factors)) else max(1, BLOCK // max(1, columns))
    for start in range(0, rows, max(1, step)):
        yield start, min(rows, start + step)


def apart(a: Factor, b: Factor) -> tuple[float, float]:
    """|a - b| and |b| (Frobenius), dense in float64, a block of rows at a time."""
    off = size = 0.0
    for rows in row_ranges(a, b):
        meant = b.dense(rows)
        off += float((a.dense(rows) - meant).square().sum())
        size += float(meant.square().sum())
    return math.sqrt(off), math.sqrt(size)
