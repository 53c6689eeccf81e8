"""The scales of a quantised weight, which are numbers and no codes: kept or solved for.

Rows are independent of each other, and one whose new scales make things worse keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.rounding.code_descent import Cost, cost_of, is_worth_while, strength_of
from adaptmerge.rounding.error_feedback import Rounded
from adaptmerge.rounding.metric import Metric
from adaptmerge.rounding.scale_solver import (
    SOFT,
    TINY,
    blocks_of,
    solved_scales,
    stored_scales,
    strength_for,
    take_up_all,
)
from adaptmerge.schemes.coded import CodedWeight
from adaptmerge.schemes.grids import BlockGrid

KEEP, SOLVE, ONLY = "keep", "solve", "only"
SCALES = (KEEP, SOLVE, ONLY)
LEAST = 1e-3  # a factor of a scale: with 0 there would be nothing to choose codes for


class Settled(NamedTuple):
    """Codes (rows, in) on a grid, and their error, all of it (rows, in) and in a basis (rows, R)."""

    codes: torch.Tensor
    grid: BlockGrid
    error: torch.Tensor
    inside: torch.Tensor

    def where(self, rows: torch.Tensor, other: Settled) -> Settled:
        """These rows (rows,) of it, the others of the same codes with other scales."""
        own = rows[:, None]
        scale = torch.where(own, self.grid.scale, other.grid.scale)
        return Settled(
            self.codes,
            self.grid.rescaled(scale),
            torch.where(own, self.error, other.error),
            torch.where(own, self.inside, other.inside),
        )

    def rounded(self, *, keep: bool) -> Rounded:
        """What rounding did, as a sum; `keep` its error."""
        squared = float(torch.linalg.vector_norm(self.error)) ** 2
        return Rounded(self.codes, self.inside, squared, self.error if keep else None)


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Some rows of a coded weight, the grid that they start from, what they should be (rows, in), the
    basis (in, R) in which errors count most, and how they count elsewhere, if not alike. cost: of errors,
    where codes are exchanged after feedback."""

    weight: CodedWeight
    rows: tuple[int, int]
    grid: BlockGrid
    target: torch.Tensor
    basis: torch.Tensor
    metric: Metric | None = None
    cost: Cost | None = None

    def nearest(self, scale: torch.Tensor) -> torch.Tensor | None:
        """The storable scales nearest to these; None where they are not free."""
        return self.weight.nearest_scales(scale, self.rows)

    def stretched(self, codes: torch.Tensor) -> CodedRows:
        """The rows on scales with which the target reaches as far into each block's grid as codes do now,
        where scales are free: what lies beyond an end is cut off, and feedback cannot make up for it.

        A grid with zeros grows for one end and gets coarser towards the other: where scales take up all
        errors afterwards, that costs more than what is cut off.
        """
        shifted = self.grid.zero is not None or self.grid.offset is not None
        if shifted and take_up_all(self.grid.blocks, self.basis.shape[1]):
            return self
        before = self.grid.reached(self.values(codes))
        factor = self.grid.reached(self.target) / before.clamp(min=TINY)
        factor = torch.where(before > 0, factor.clamp(min=LEAST), 1.0)
        wanted = self.grid.scale * factor.to(self.grid.scale.dtype)
        scale = wanted if self.grid.across else self.nearest(wanted)
        return self if scale is None else replace(self, grid=self.grid.rescaled(scale))

    def moves(self, scales: str) -> bool:
        """Whether the scales can be moved as asked."""
        if scales == KEEP or self.nearest(self.grid.scale) is None:
            return False
        return self.basis.shape[1] > 0 and self.grid.blocks > 1

    def strength(self, scales: str) -> float:
        """The strength of feedback: all of it where no scales make up for what is left."""
        columns, directions = self.basis.shape
        if self.exchanges(scales):
            last, measured = not self._solves(scales), self.metric is not None
            return strength_of(columns, directions, last=last, measured=measured)
        if not self.moves(scales):
            return SOFT
        return strength_for(self.grid.blocks, columns // self.grid.blocks, directions)

    def exchanges(self, scales: str) -> bool:
        """Whether codes are exchanged after feedback: where scales cannot make up for all it leaves."""
        columns, directions = self.basis.shape
        solves = self._solves(scales)
        if scales == ONLY or (solves and take_up_all(self.grid.blocks, directions)):
            return False
        return is_worth_while(columns, directions, last=not solves)

    def exchanging(
        self, scales: str, codes: torch.Tensor, weight: torch.Tensor | None
    ) -> CodedRows:
        """The rows with what errors cost, if codes are exchanged. codes: those without what is added, of
        `weight` where that is on no grid."""
        if not self.exchanges(scales):
            return self
        weight = self.values(codes) if weight is None else weight
        added = self.target - weight
        return replace(self, cost=cost_of(self.basis, added, self.strength(scales), self.metric))

    def _solves(self, scales: str) -> bool:
        return scales == SOLVE and self.moves(scales)

    def with_codes(self, codes: torch.Tensor) -> Settled:
        """These codes on the grid."""
        error = self.values(codes).sub_(self.target)
        return Settled(codes, self.grid, error, error @ self.basis)

    def read(self, settled: Settled) -> torch.Tensor:
        """The error (rows, k + R) along the sketch of the metric, if there is one, and in the basis."""
        if self.metric is None:
            return settled.inside
        felt = settled.error @ self.metric.sketch.to(settled.error)
        return torch.cat([felt, settled.inside], dim=1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for (rows, in)."""
        return self.grid.all_values(codes, self.target)


def solved(rows: CodedRows, before: Settled) -> Settled:
    """Codes with the scales that take their error in the basis to zero with least noise."""
    grid = rows.grid
    blocks = blocks_of(grid, rows.target + before.error, rows.basis, rows.metric)
    wanted = solved_scales(grid, blocks, rows.read(before))
    scale = stored_scales(wanted, grid, blocks, rows.nearest)
    after = replace(rows, grid=grid.rescaled(scale)).with_codes(before.codes)
    return before.where(_squared(after.inside) > _squared(before.inside), after)


def _squared(error: torch.Tensor) -> torch.Tensor:
    return error.square().sum(1)


def check_free(coded: Iterable[CodedWeight], scales: str) -> None:
    """Raises CannotMerge with all weights whose scales alone are to move and are not free to."""
    bound = [one.module for one in coded if scales == ONLY and not _is_free(one)]
    if bound:
        what = "has scales that cannot take up what is added"
        why = "one a row, for several rows, across rows, or powers of two"
        problems = [f"{module}: {what}" for module in bound]
        problems[-1] += f" ({why}): leave out --scales {ONLY}"
        raise CannotMerge(problems)


def _is_free(weight: CodedWeight) -> bool:
    first = (0, min(1, weight.shape[0]))
    grid = weight.grid(first)[1]
    return grid.blocks > 1 and weight.nearest_scales(grid.scale, first) is not None
