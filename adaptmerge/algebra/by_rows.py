"""Factors looked at densely, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from adaptmerge.algebra.factors import Expanded, Factor, Rows
from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.lazy import torch
from adaptmerge.parallel import workers_default
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


def row_ranges(*factors: Factor, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Row ranges that cover factors of one shape, of about `block` entries each where parts are cheap."""
    rows, columns = factors[0].shape
    step = rows if any(map(at_once, factors)) else max(1, block // max(1, columns))
    for start in range(0, rows, max(1, step)):
        yield start, min(rows, start + step)


@dataclass(frozen=True, slots=True)
class Distance:
    """|a - b|, |a| and |b| (Frobenius) of two factors."""

    apart: float = 0.0
    left: float = 0.0
    right: float = 0.0

    @property
    def relative(self) -> float:
        """|a - b| / |a|; 0 when both are zero, infinite when only a is."""
        if self.left == 0.0:
            return 0.0 if self.apart == 0.0 else math.inf
        return self.apart / self.left


def distance(a: Factor, b: Factor, block: int = BLOCK) -> Distance:
    """How far two factors are apart, dense in float64, one block of rows after the other."""
    blocks = row_ranges(a, b, block=block)
    return _distance(_squares(a, b, rows, _summed) for rows in blocks)


def distance_in_parallel(a: Factor, b: Factor) -> Distance:
    """The same on all cores and by faster sums, that differ in the last digits."""
    with one_thread_each(), ThreadPoolExecutor(max_workers=workers_default()) as pool:
        return _distance(pool.map(lambda rows: _squares(a, b, rows, _dotted), row_ranges(a, b)))


def _distance(blocks: Iterable[tuple[float, float, float]]) -> Distance:
    """From the squares of each block, which are added in order."""
    return Distance(*(math.sqrt(sum(part)) for part in zip(*blocks, strict=True)))


def _squares(
    a: Factor, b: Factor, rows: Rows, square: Callable[[torch.Tensor], float]
) -> tuple[float, float, float]:
    """|a - b|^2, |a|^2 and |b|^2 over some rows."""
    left, right = a.dense(rows), b.dense(rows)
    return square(left - right), square(left), square(right)


def _summed(values: torch.Tensor) -> float:
    """The sum of squares, to the last digit as reports have it."""
    return float(values.square().sum())


def _dotted(values: torch.Tensor) -> float:
    """The sum of squares as one product."""
    flat = values.flatten()
    return float(flat @ flat)
