"""Errors fed back from row to row, in the directions of outputs that adapters write to.

A row's own feedback and its scales spare the inputs that adapters read. To first order an error E costs
<G, E>, for the gradient G of what a model loses on a text. A delta was trained along -G, so G lies mostly
in what adapters write to as well; there, an error that has nothing to do with a text still costs or gains
by chance. With an orthonormal basis U (out, R) of the columns of all ups and the loss |E|^2 + strength
|U^T E|^2, rows are rounded in turn as columns are, each for a target with what the errors before it call
for: the recursion of `rounding` on the transposed weight, whose columns are whole rows here. Along rows and
along columns together it is GPTQ's recursion for a Kronecker product of two Hessians (as in YAQA, Tseng et
al. 2025).

Of |E|, chance makes 1 / sqrt(out in): only in small weights can that be a part of what adapters gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from adaptmerge.files.refs import remembered
from adaptmerge.fuse.matrix import SHARE, Matrix, delta_of
from adaptmerge.grids import BlockGrid
from adaptmerge.lazy import torch
from adaptmerge.rounding import Feedback, feedback, round_adaptive, row_space, turns

STRENGTH = 2  # of errors in the directions, per row and direction: more is noise elsewhere
SMALL = 1 << 18  # entries of a weight up to which chance matters
FEW = 5  # rows per direction below which too few are left to make up with
# codes (rows, in) for a target (rows, in) of some rows, by their numbers
Choose: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"


def _written_of(matrix: Matrix) -> Feedback | None:
    """The feedback from row to row in what the adapters of a small matrix write to; None of others."""
    out, columns = matrix.shape
    ups = [side.up.T for side in delta_of(matrix).thin if side is not None]
    if not ups or out * columns > SMALL:
        return None
    basis = row_space(ups)
    if not 0 < basis.shape[1] * FEW <= out:
        return None
    strength = STRENGTH * out / basis.shape[1]
    return feedback(basis, torch.float32, strength, ranges=turns(out, SHARE))


written_of = remembered(_written_of, 8)


def in_turn(
    target: torch.Tensor, grid: BlockGrid, written: Feedback, choose: Choose
) -> torch.Tensor:
    """Codes (rows, in) of a whole matrix, those of some rows chosen after those of others."""
    whole = _Turned(grid, choose, torch.arange(len(target)))
    return round_adaptive(target.T, whole, written).codes.T.contiguous()


@dataclass(frozen=True, eq=False)
class _Turned:
    """The grid of a transposed weight (in, out), each of whose columns gets its codes at once."""

    grid: BlockGrid
    choose: Choose
    rows: torch.Tensor

    def codes(self, values: torch.Tensor, columns: slice) -> torch.Tensor:
        return self.choose(values.T.contiguous(), self.rows[columns]).T

    def values(self, codes: torch.Tensor, columns: slice, out: torch.Tensor) -> torch.Tensor:
        grid, turned = self.grid.of_rows(self.rows[columns]), codes.T.contiguous()
        return out.copy_(grid.values(turned, slice(0, len(codes)), torch.empty_like(out.T)).T)

    def in_order(self, order: torch.Tensor) -> _Turned:
        return replace(self, rows=self.rows[order])
