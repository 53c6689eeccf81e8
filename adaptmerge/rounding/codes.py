"""Settling a quantised weight: codes that keep what was added, then scales that take up what is left.

A quantised weight lies on its grid, and most deltas are smaller than half a step: nearest codes return the
base. Codes are rounded with error feedback in the space of the adapters' inputs; then the scales of the
blocks, which are numbers and no codes, are moved by the least that brings the rest of the error there to
zero. Rows are independent of each other, and are worked on a few at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.rounding.code_descent import exchanged
from adaptmerge.rounding.error_feedback import (
    ADAPTIVE,
    NEAREST,
    STOCHASTIC,
    Feedback,
    Rounded,
    measured_codes,
    round_adaptive,
    round_nearest,
)
from adaptmerge.rounding.floats import AUTO, Choice
from adaptmerge.rounding.matrix import (
    Delta,
    Matrix,
    Measured,
    delta_of,
    feedback_of,
    measure,
    metric_in,
    own_direction,
    row_factor,
    target_rows,
)
from adaptmerge.rounding.scales import KEEP, LEAST, ONLY, SOLVE, CodedRows, Settled, solved
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid

SAMPLE = 64  # rows that a prediction looks at
BLOCK = 64  # entries of the blocks that may run across rows


class CodedMatrix(NamedTuple):
    """A coded weight and what is added to it; anew: its grid and codes are of that sum already."""

    weight: CodedWeight
    matrix: Matrix
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Requantised:
    """Codes (rows, in) on a grid, and what rounding did to each part."""

    codes: torch.Tensor
    grid: BlockGrid
    measured: Measured


def choose_coded(coded: CodedMatrix, asked: str) -> Choice:
    """How a coded weight is rounded: as asked; `auto` is adaptive, for nearest codes are the base's."""
    if not coded.matrix.parts:
        return Choice(NEAREST, ())
    return Choice(ADAPTIVE if asked == AUTO else asked, tuple(sampled(coded).gains))


def sampled(coded: CodedMatrix) -> Measured:
    """What nearest codes do to some rows; to all where some cost as much."""
    count = coded.matrix.shape[0]
    rows = (0, count if coded.matrix.all_at_once else min(count, SAMPLE))
    return requantise_rows(coded, rows, NEAREST, KEEP, 0).measured


def coded_error(weight: CodedWeight) -> float:
    """|error| / |W| that the grid of a coded weight has by itself, from a look at some rows."""
    rows = (0, min(weight.shape[0], SAMPLE))
    codes, grid = weight.grid(rows)
    values = grid.values(codes, slice(0, weight.shape[1]), torch.empty(codes.shape))
    return math.sqrt(grid.step_error(codes)) / max(float(values.norm()), 1e-30)


def requantise(coded: CodedMatrix, rounding: str, scales: str, seed: int) -> Requantised:
    """All rows of a coded weight, some at a time."""
    try:
        found = [
            requantise_rows(coded, rows, rounding, scales, seed)
            for rows in coded.matrix.row_ranges(BLOCK)
        ]
    except InputError as problem:
        raise problem.located(str(coded.matrix.site)) from None
    total = reduce(Measured.plus, [one.measured for one in found])
    codes = torch.cat([one.codes for one in found])
    return Requantised(codes, joined([one.grid for one in found]), total)


def joined(grids: list[BlockGrid]) -> BlockGrid:
    """The grid of all rows from those of some."""
    first = grids[0]

    def together(name: str) -> torch.Tensor | None:
        parts = [getattr(grid, name) for grid in grids]
        return None if parts[0] is None else torch.cat(parts)

    scale = together("scale")
    assert scale is not None
    return replace(first, scale=scale, zero=together("zero"), offset=together("offset"))


def requantise_rows(
    coded: CodedMatrix, rows: tuple[int, int], rounding: str, scales: str, seed: int
) -> Requantised:
    """Some rows of a coded weight."""
    matrix = coded.matrix
    before, grid = coded.weight.grid(rows)
    made, delta = target_rows(matrix, rows), delta_of(matrix)
    target, keep = made.target, delta.needs_error
    if rounding == ADAPTIVE:
        grid, folded = _with_row_factor(coded, rows, grid, delta, scales)
        here = CodedRows(coded.weight, rows, grid, target, delta.basis, metric_in(matrix))
        here = here.exchanging(scales, before, made.weight if coded.anew else None)
        here = here.stretched(before) if scales == SOLVE and not coded.anew else here
        own = own_direction(delta, rows, made) if keep and not folded else None
        found, grid = _adaptive(matrix, here, before, own, scales, keep=keep)
    elif rounding == STOCHASTIC:
        found = _stochastic(target, grid, delta, matrix.seed(seed, rows[0]))
    elif coded.anew:
        found = measured_codes(before, target, grid, delta.basis, keep=keep)
    else:
        found = round_nearest(target, grid, delta.basis, keep=keep)
    measured = measure(delta, rows, made, found)
    moved = int((found.codes != before).sum())
    return Requantised(found.codes, grid, replace(measured, moved=moved))


def _adaptive(
    matrix: Matrix,
    here: CodedRows,
    before: torch.Tensor,
    own: torch.Tensor | None,
    scales: str,
    *,
    keep: bool,
) -> tuple[Rounded, BlockGrid]:
    """Codes with feedback, also along each row's `own` direction; and scales as asked, where they can be
    chosen."""
    moves = here.moves(scales)
    if scales == ONLY:
        settled = here.with_codes(before)
        settled = solved(here, settled) if moves else settled
        return settled.rounded(keep=keep), settled.grid
    feed = feedback_of(matrix, here.strength(scales), ordered=True)
    found = _with_feedback(here, feed, own, keep=keep or moves)
    if not moves:
        return found, here.grid
    assert found.error is not None
    settled = solved(here, Settled(found.codes, here.grid, found.error, found.inside))
    return settled.rounded(keep=keep), settled.grid


def _with_feedback(
    here: CodedRows, feed: Feedback, own: torch.Tensor | None, *, keep: bool
) -> Rounded:
    """Codes with feedback along each row, also in its `own` direction, and exchanged afterwards where that
    is worth while; `keep` the error."""
    if here.cost is None:
        return round_adaptive(here.target, here.grid, feed, own, keep=keep)
    codes = round_adaptive(here.target, here.grid, feed, own).codes
    codes = exchanged(codes, here.grid, here.target, here.cost)
    return here.with_codes(codes).rounded(keep=keep)


def _with_row_factor(
    coded: CodedMatrix, rows: tuple[int, int], grid: BlockGrid, delta: Delta, scales: str
) -> tuple[BlockGrid, bool]:
    """The grid with what multiplies whole rows in its scales, and whether it is: codes then stay right."""
    wanted = scales != KEEP and not coded.anew
    factor = row_factor(coded.matrix, delta, rows) if wanted else None
    if factor is None or bool((factor.abs() < LEAST).any()):
        return grid, False
    scale = (grid.scale * factor).to(grid.scale.dtype)
    stored = coded.weight.nearest_scales(scale, rows)
    if stored is None or grid.offset is not None:
        return grid, False
    return grid.rescaled(stored), True


def _stochastic(target: torch.Tensor, grid: BlockGrid, delta: Delta, seed: int) -> Rounded:
    """Each entry to one of the two values around it, with probabilities that make it exact on average."""
    everywhere = slice(0, target.shape[1])
    codes = grid.codes(target, everywhere)
    near = grid.all_values(codes, target)
    rising = (target > near) == (grid.at(grid.scale, everywhere) >= 0)
    last = grid.count - 1
    other = (codes.int() + torch.where(rising, 1, -1)).clamp(0, last).to(torch.uint8)
    far = grid.all_values(other, target)
    share = (target - near).abs() / (far - near).abs().clamp(min=1e-30)
    generator = torch.Generator().manual_seed(seed)
    taken = (torch.rand(target.shape, generator=generator) < share) & (other != codes)
    codes = torch.where(taken, other, codes)
    error = torch.where(taken, far, near).sub_(target)
    return Rounded(codes, error @ delta.basis, float(error.norm()) ** 2, error)
