"""Settling a matrix: which rounding, and the stored rows with what rounding did to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from adaptmerge.lazy import torch
from adaptmerge.rounding.error_feedback import (
    ADAPTIVE,
    NEAREST,
    STOCHASTIC,
    FloatGrid,
    Rounded,
    round_adaptive,
    round_nearest,
    round_stochastic,
)
from adaptmerge.rounding.matrix import (
    Matrix,
    Measured,
    delta_of,
    feedback_of,
    measure,
    own_direction,
    target_rows,
    working_dtype,
)
from adaptmerge.tensors.dtypes import BY_NAME

AUTO = "auto"
ENOUGH, LITTLE = 0.99, 0.05  # a gain and a sub with which nearest rounding is as good
SAMPLE, RUNS = 16, 4  # rows that a prediction looks at, and in how many places
WIDE = 32  # bits from which on rounding loses nothing that matters
GRID_ERROR = 0.2125  # |error| / |w| of rounding to nearest, in units of eps, for Gaussian weights


class Choice(NamedTuple):
    """How a matrix is rounded, and how much of each part nearest rounding would keep."""

    rounding: str
    predicted: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Stored rows of a matrix (rows, in), and what rounding did to them."""

    value: torch.Tensor
    measured: Measured


def choose(matrix: Matrix, asked: str) -> Choice:
    """How a matrix is rounded: as asked; `auto` decides by what nearest rounding does to some rows."""
    if not matrix.parts or 1 in matrix.shape:
        return Choice(NEAREST, ())
    if asked == STOCHASTIC or matrix.dtype.bits >= WIDE:
        return Choice(STOCHASTIC if asked == STOCHASTIC else NEAREST, ())
    found = _predicted(matrix)
    lost = any(gain is not None and abs(gain - 1) > 1 - ENOUGH for gain in found.gains)
    lost = lost or any(sub is not None and sub > LITTLE for sub in found.subs)
    return Choice((ADAPTIVE if lost else NEAREST) if asked == AUTO else asked, tuple(found.gains))


def _predicted(matrix: Matrix) -> Measured:
    """What nearest rounding does to a few rows evenly spread."""
    count = matrix.shape[0]
    if matrix.all_at_once or count <= SAMPLE * RUNS:
        return settle_rows(matrix, (0, count), NEAREST, 0).measured
    starts = range(0, count - SAMPLE, (count - SAMPLE) // (RUNS - 1))
    found = [
        settle_rows(matrix, (start, start + SAMPLE), NEAREST, 0).measured for start in starts[:RUNS]
    ]
    return reduce(Measured.plus, found)


def settle_rows(matrix: Matrix, rows: tuple[int, int], rounding: str, seed: int) -> StoredRows:
    """Rows of a matrix, rounded once to its dtype, and what that did to each part."""
    made, delta = target_rows(matrix, rows), delta_of(matrix)
    target, keep = made.target, delta.needs_error
    grid = FloatGrid(BY_NAME[matrix.dtype.name].torch, working_dtype(matrix))
    if rounding == ADAPTIVE:
        own = own_direction(delta, rows, made) if keep else None
        found = round_adaptive(target, grid, feedback_of(matrix), own, keep=keep)
    elif rounding == STOCHASTIC:
        found = round_stochastic(target, grid, delta.basis, matrix.seed(seed, rows[0]), keep=keep)
    else:
        found = round_nearest(target, grid, delta.basis, keep=keep)
    return StoredRows(_with_tokens(matrix, rows, found), measure(delta, rows, made, found))


def _with_tokens(matrix: Matrix, rows: tuple[int, int], found: Rounded) -> torch.Tensor:
    """The stored rows, with rows of tokens put in place of those computed."""
    value = found.codes
    for numbers, ref in matrix.tokens:
        here = [(i, n - rows[0]) for i, n in enumerate(numbers) if rows[0] <= n < rows[1]]
        if here:
            stored = ref.read().to(value.dtype)
            value[[at for _, at in here]] = stored[[i for i, _ in here]]
    return value


def grid_error(matrix: Matrix) -> float:
    """|error| / |w| that the dtype of a matrix has by itself, for Gaussian weights."""
    return GRID_ERROR * matrix.dtype.eps
