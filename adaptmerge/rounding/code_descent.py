"""Codes exchanged for their neighbours, one or two at a time, where that lowers what the error costs.

Feedback chooses codes column by column, and what the last ones do is made up for by none. In a row with few
columns for each direction in which errors count, that is most of what is left. Looking at whole rows finds
codes with less error in these directions, and with less elsewhere: feedback need not be as strong before.
It is coordinate descent (CDQuant, Nair and Suggala 2024) over pairs of those moves that cost least alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from adaptmerge.lazy import torch
from adaptmerge.rounding.metric import Metric
from adaptmerge.schemes.grids import BlockGrid

POOL = 32  # moves of a row that are looked at together
ROUNDS = 4  # how often they are chosen anew
WINDOW = 16  # columns per direction whose codes move, the last ones: more of them gain little
NARROW = 512  # columns that all move
ROWS = 1024  # whose pairs are held at once
LEAST = 1e-4  # of the squared error: gains below are none
STRENGTH = 6  # of errors in the directions, per column and direction: with half of it deltas shrink
FEW = 16  # columns per direction: with more of them also per so many, where nothing follows
MOST = 48  # columns per direction with which it is worth while, where nothing follows
MEASURED = 4  # times as strong where errors elsewhere count by a metric, which is more
ALONG = 10  # times that along a row's own delta, which would shrink first
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Cost:
    """What an error e (in,) of each row costs: sum of D e^2 + |e B + f|^2 + (e a + g)^2.

    read: B (in, n). along: a vector a (rows, in) of each row. diagonal: D (in,), or 1. before: f, g (rows,
    n + 1), or 0: what there is without it.
    """

    read: torch.Tensor
    along: torch.Tensor
    diagonal: torch.Tensor | float = 1.0
    before: torch.Tensor | float = 0.0

    def of_rows(self, rows: torch.Tensor) -> Cost:
        """That of some rows, by their numbers."""
        before = self.before if isinstance(self.before, float) else self.before[rows]
        return replace(self, along=self.along[rows], before=before)

    def of_last(self, start: int, error: torch.Tensor) -> Cost:
        """That of the columns from one on, beside the error (rows, start) of those before."""
        first = replace(self, read=self.read[:start], along=self.along[:, :start])
        diagonal = self.diagonal if isinstance(self.diagonal, float) else self.diagonal[start:]
        return Cost(self.read[start:], self.along[:, start:], diagonal, first.felt(error))

    def felt(self, error: torch.Tensor) -> torch.Tensor:
        """What an error (rows, in) comes to in B and a, (rows, n + 1)."""
        along = (error * self.along).sum(1, keepdim=True)
        return torch.cat([error @ self.read, along], dim=1) + self.before

    @cached_property
    def _curve(self) -> torch.Tensor:
        """What the square of a step costs by itself (rows, in)."""
        return self.along.square().add_(self.diagonal + self.read.square().sum(1))

    def slope(self, error: torch.Tensor) -> torch.Tensor:
        """Half of how the cost grows with each entry of an error (rows, in)."""
        felt = self.felt(error)
        found = torch.addmm(error * self.diagonal, felt[:, :-1], self.read.T)
        return found.addcmul_(felt[:, -1:], self.along)

    def alone(self, steps: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """What it costs more to take one of the steps (rows, in) and no other."""
        return (steps * self._curve).add_(slope, alpha=2).mul_(steps)

    def together(self, rows: slice, columns: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What two of the steps (rows, n) cost beyond that (rows, n, n); infinity in the same column."""
        own = self.along[rows].gather(1, columns)[:, :, None]
        felt = torch.cat([self.read[columns], own], dim=2) * steps[:, :, None]
        same = columns[:, :, None] == columns[:, None, :]
        return (2 * felt @ felt.transpose(1, 2)).masked_fill_(same, torch.inf)


class Moves(NamedTuple):
    """Some moves of each row (rows, n): their columns, the codes there afterwards, the steps to them, and
    what each costs alone."""

    columns: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    alone: torch.Tensor


def strength_of(columns: int, directions: int, *, last: bool, measured: bool) -> float:
    """The strength of errors in some directions with which an exchange leaves less of them, and less
    elsewhere, than feedback alone; `last`: nothing makes up for what it leaves; `measured`: errors
    elsewhere count by a metric."""
    per = columns / directions
    return STRENGTH * per * max(1.0, per / FEW if last else 1.0) * (MEASURED if measured else 1)


def is_worth_while(columns: int, directions: int, *, last: bool) -> bool:
    """Whether an exchange leaves less than feedback alone; `last`: nothing makes up for what it leaves."""
    return directions > 0 and (not last or columns <= MOST * directions)


def cost_of(
    basis: torch.Tensor, added: torch.Tensor, strength: float, metric: Metric | None = None
) -> Cost:
    """The cost |e|^2 + strength |e V|^2 for an orthonormal basis V (in, R), with what a metric says in
    place of |e|^2, and more of it along what is added to each row (rows, in)."""
    read = basis * math.sqrt(strength)
    size = torch.linalg.vector_norm(added, dim=1, keepdim=True).clamp(min=TINY)
    along = added * (math.sqrt(ALONG * strength) / size)
    if metric is None:
        return Cost(read, along)
    return Cost(torch.cat([metric.sketch.to(read), read], dim=1), along, metric.diagonal.to(read))


def exchanged(
    codes: torch.Tensor, grid: BlockGrid, target: torch.Tensor, cost: Cost
) -> torch.Tensor:
    """Codes (rows, in) with an error that costs no more than that of these."""
    start = _first_that_moves(grid, *cost.read.shape)
    if not start:
        return _descended(codes, grid, target, cost)
    head = slice(0, start)
    error = grid.values(codes[:, head], head, torch.empty_like(target[:, head])) - target[:, head]
    moved = _descended(
        codes[:, start:], grid.of_last(start), target[:, start:], cost.of_last(start, error)
    )
    return torch.cat([codes[:, head], moved], dim=1)


def _first_that_moves(grid: BlockGrid, columns: int, directions: int) -> int:
    """The first column whose codes move: of a block, where columns lie in blocks."""
    start = max(0, columns - max(NARROW, WINDOW * directions))
    return start - start % (grid.width or 1)


def _descended(
    codes: torch.Tensor, grid: BlockGrid, target: torch.Tensor, cost: Cost
) -> torch.Tensor:
    """The codes after some rounds, each in the rows that moved in the one before."""
    codes, rows = codes.clone(), torch.arange(len(codes))
    for _ in range(ROUNDS):
        here, moved = _in_one_round(
            codes[rows], grid.of_rows(rows), target[rows], cost.of_rows(rows)
        )
        codes[rows] = here
        rows = rows[moved]
        if not len(rows):
            break
    return codes


def _in_one_round(
    codes: torch.Tensor, grid: BlockGrid, target: torch.Tensor, cost: Cost
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, in) after the moves of one pool, and in which rows (rows,) there are any; in place."""
    values = grid.all_values(codes, target)
    error = values - target
    moves = _cheapest(codes, grid, values, cost, cost.slope(error))
    taken = _taken(moves, cost, LEAST * error.square().sum(1))
    rows, places = taken.nonzero(as_tuple=True)
    codes[rows, moves.columns[rows, places]] = moves.codes[rows, places]
    return codes, taken.any(1)


def _cheapest(
    codes: torch.Tensor,
    grid: BlockGrid,
    values: torch.Tensor,
    cost: Cost,
    slope: torch.Tensor,
) -> Moves:
    """The moves to a neighbouring code that cost least alone."""
    others = [grid.neighbours(codes, direction) for direction in (-1, 1)]
    steps = [grid.all_values(other, values).sub_(values) for other in others]
    costs = [cost.alone(step, slope).masked_fill_(step == 0, torch.inf) for step in steps]
    all_costs = torch.cat(costs, dim=1)
    count = min(POOL, all_costs.shape[1])
    alone, places = all_costs.topk(count, dim=1, largest=False)
    above, columns = places >= codes.shape[1], places % codes.shape[1]
    step, other = (
        torch.where(above, up.gather(1, columns), down.gather(1, columns))
        for down, up in (steps, others)
    )
    return Moves(columns, other, step, alone)


def _taken(moves: Moves, cost: Cost, least: torch.Tensor) -> torch.Tensor:
    """Which moves (rows, n) to make; a gain of `least` (rows,) or less is none."""
    found = []
    for start in range(0, len(least), ROWS):
        rows = slice(start, start + ROWS)
        together = cost.together(rows, moves.columns[rows], moves.steps[rows])
        found.append(_descent(moves.alone[rows], together, least[rows]))
    return torch.cat(found)


def _descent(alone: torch.Tensor, together: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Which moves (rows, n) are made, taking the one or two that gain most, again and again."""
    count = alone.shape[1]
    taken = torch.zeros_like(alone, dtype=torch.bool)
    rows = torch.arange(len(alone))
    while len(rows):
        pairs = together + alone[:, :, None] + alone[:, None, :]
        pairs.diagonal(dim1=1, dim2=2).copy_(alone)
        costs, best = pairs.flatten(1).min(1)
        better = costs < -least[rows]
        rows, alone, together, best = (x[better] for x in (rows, alone, together, best))
        first, second, every = best // count, best % count, torch.arange(len(rows))
        taken[rows, first] = taken[rows, second] = True
        # infinity for what has been taken, and for the other move in its column
        others = together[every, second].masked_fill_((first == second)[:, None], 0)
        alone = alone + together[every, first] + others
    return taken
