"""The grids of quantised weights: what values a row of codes stands for, and the code nearest to a value.

A weight (out, in) is cut into blocks along its inputs; in each, value = scale * (level - zero) + offset.
Levels are whole numbers or the entries of a table. What a format stores of it is a scheme's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from adaptmerge.lazy import torch
from adaptmerge.metric import Metric, slack

MOST_CELLS = 4096  # beyond these a search is as fast
EXACT = 1.5  # blocks per direction from which on the scales can take up every error
SOFT = 1e4  # strength of a solve that cannot: more would cost noise
MOST = 0.5  # the largest relative change of a scale
NOTHING = 1e-12  # of the sizes in a system that is solved, so that it can be
PROBES, APART = (
    8,
    4e-3,
)  # where storable scales are looked for, and how far apart, relative to the scale
TINY = 1e-30
TURNS = 8  # a part of the blocks that are left whose scales are rounded together


@dataclass(frozen=True, eq=False)
class Cells:
    """Equal cells on an axis, each with at most one of the points that part one code from the next: the
    code of a value is the number of points in the cells before its own, and one comparison.

    Which cell a value is in may be rounded, but is monotone, so the answer is exact.
    """

    start: float
    step: float
    points: torch.Tensor  # of each cell; infinity where it has none
    before: torch.Tensor  # how many points there are in earlier cells, int32

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The cells of values, int32."""
        cell = values.sub(self.start).mul_(self.step)
        return cell.clamp_(0, len(self.points) - 1).to(torch.int32)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of values, uint8; on a point the lower one."""
        cell = self.of(values).reshape(-1)
        point = self.points.index_select(0, cell).view(values.shape)
        above = torch.gt(values, point, out=point).to(torch.int32)
        return self.before.index_select(0, cell).view(values.shape).add_(above).to(torch.uint8)


def cells_of(points: torch.Tensor) -> Cells | None:
    """The cells for ascending points; None where they would be too many."""
    gaps = points.diff()
    least = float(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else 0.0
    width = float(points[-1] - points[0]) if len(points) else 0.0
    count = int(2 * width / least) + 2 if least > 0 else MOST_CELLS + 1
    if count > MOST_CELLS or bool((gaps <= 0).any()):
        return None
    cells = Cells(float(points[0]) - least, 2 / least, torch.zeros(count + 2), torch.zeros(1))
    owners = cells.of(points).long()
    if len(set(owners.tolist())) < len(points):
        return None
    held = points.new_full((count + 2,), torch.inf).index_put_((owners,), points)
    before = (owners < torch.arange(count + 2)[:, None]).sum(1)
    return replace(cells, points=held, before=before.to(torch.int32))


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Some rows of a quantised weight without its codes.

    table: ascending levels, whose codes are their places; None for the whole numbers low..high, whose codes
    are level - low. scale, zero, offset: (rows, blocks) in working precision; where blocks do not end with
    rows, (rows, in). groups: the block of each column (in,). across: the size of blocks that run across
    rows, if their scales can be any and these rows are those of whole blocks; else 0.
    """

    scale: torch.Tensor
    groups: torch.Tensor
    table: torch.Tensor | None = None
    low: int = 0
    high: int = 0
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    across: int = 0

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.scale.shape[1]

    @cached_property
    def width(self) -> int | None:
        """Columns of a block, where all have as many that follow each other; else None."""
        size = len(self.groups) // max(1, self.blocks)
        even = torch.arange(len(self.groups)) // max(1, size)
        return size if torch.equal(self.groups, even.to(self.groups)) else None

    @property
    def count(self) -> int:
        """How many codes there are."""
        return self.high - self.low + 1 if self.table is None else len(self.table)

    def step_error(self, codes: torch.Tensor) -> float:
        """The squared error, over all entries, that rounding to this grid has by itself: a twelfth of the
        squared step around each."""
        scale = self.at(self.scale, slice(0, codes.shape[1])).square()
        if self.table is None:
            return float(scale.sum() * (codes.shape[1] // scale.shape[1])) / 12
        ends = torch.nn.functional.pad(self._middles, (1, 1))
        ends[0], ends[-1] = self.table[0], self.table[-1]
        steps = ends.diff().square()
        return float((steps[codes.int()] * scale).sum()) / 12

    @cached_property
    def _middles(self) -> torch.Tensor:
        assert self.table is not None
        return (self.table[:-1] + self.table[1:]) / 2

    @cached_property
    def _cells(self) -> Cells | None:
        return cells_of(self._middles)

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return torch.where(self.scale == 0, 0.0, 1 / self.scale)

    def codes(self, values: torch.Tensor, columns: slice) -> torch.Tensor:
        """The codes (rows, columns), uint8, of the nearest values; where the scale is 0 that of level 0."""
        level = values if self.offset is None else values - self.at(self.offset, columns)
        level = level * self.at(self._inverse, columns)
        if self.zero is not None:
            level += self.at(self.zero, columns)
        if self.table is None:
            return level.round_().clamp_(self.low, self.high).sub_(self.low).to(torch.uint8)
        if self._cells is None:
            return torch.bucketize(level, self._middles).to(torch.uint8)
        return self._cells.nearest(level)

    def values(self, codes: torch.Tensor, columns: slice, out: torch.Tensor) -> torch.Tensor:
        """The values of codes, written into `out`."""
        if self.table is not None:
            level = self.table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        else:
            level = codes.to(out.dtype).add_(self.low)
        if self.zero is not None:
            level = level - self.at(self.zero, columns)
        torch.mul(level, self.at(self.scale, columns), out=out)
        return out if self.offset is None else out.add_(self.at(self.offset, columns))

    def at(self, stored: torch.Tensor, columns: slice) -> torch.Tensor:
        """What is stored per block, for some columns; one column where all are of one block."""
        width = self.width
        if width is None:
            return stored[:, self.groups[columns]]
        start, stop, _ = columns.indices(len(self.groups))
        first, last = start // width, -(-stop // width)
        if last - first <= 1:
            return stored[:, first : first + 1]
        spread = stored[:, first:last, None].expand(-1, -1, width).reshape(len(stored), -1)
        return spread[:, start - first * width : stop - first * width]

    def reached(self, values: torch.Tensor) -> torch.Tensor:
        """How far values (rows, in) reach towards an end of the grid in each block (rows, blocks): 1 is to
        it, more is beyond; 0 where the scale is."""
        least, most = self._extremes(values)
        if self.offset is not None:
            least, most = least - self.offset, most - self.offset
        levels = torch.stack((least, most)) * self._inverse
        low, high = (self.low, self.high) if self.table is None else self.table[[0, -1]].tolist()
        zero = torch.zeros_like(self.scale) if self.zero is None else self.zero
        above = torch.where(zero < high, levels.amax(0) / (high - zero), 0.0)
        below = torch.where(zero > low, levels.amin(0) / (low - zero), 0.0)
        return torch.maximum(above, below).clamp(min=0)

    def _extremes(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest value of each block, as scales are held."""
        if self.across:
            return self._extremes_across(values)
        if self.width is not None:
            least, most = values.view(len(values), self.blocks, -1).aminmax(dim=2)
            return least, most
        index, empty = self.groups.expand(len(values), -1), values.new_empty(self.scale.shape)
        least, most = (
            empty.scatter_reduce(1, index, values, how, include_self=False)
            for how in ("amin", "amax")
        )
        return least, most

    def _extremes_across(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest value (rows, in) of the block that each entry is in."""
        short = -values.numel() % self.across  # the last block of a weight may be
        flat = torch.cat((values.flatten(), values.flatten()[-1:].expand(short)))
        least, most = (
            found.repeat_interleave(self.across)[: values.numel()].view(values.shape)
            for found in flat.view(-1, self.across).aminmax(dim=1)
        )
        return least, most

    def in_order(self, order: torch.Tensor) -> BlockGrid:
        """The grid of a matrix whose columns are these (in,) of this one."""
        return replace(self, groups=self.groups[order])

    def rescaled(self, scale: torch.Tensor) -> BlockGrid:
        """The same grid with other scales."""
        return replace(self, scale=scale)


def take_up_all(blocks: int, directions: int) -> bool:
    """Whether the scales of a row are enough to take up every error in some directions."""
    return blocks >= EXACT * max(1, directions)


def strength_for(blocks: int, width: int, directions: int) -> float:
    """The strength of feedback that leaves least noise when scales are solved for afterwards; without
    enough of them that of feedback alone."""
    if not take_up_all(blocks, directions) or blocks <= directions + 1:
        return SOFT
    return width * blocks / (blocks - directions - 1)


@dataclass(frozen=True)
class Blocks:
    """Per row and block its scaled values as directions read them (rows, blocks, k + R), the first k those
    of a sketch, and their squared norm."""

    inside: torch.Tensor
    squared: torch.Tensor
    sketched: int = 0

    @property
    def directions(self) -> int:
        """R, how many directions an error must not have."""
        return self.inside.shape[2] - self.sketched


def blocks_of(
    grid: BlockGrid, values: torch.Tensor, basis: torch.Tensor, metric: Metric | None = None
) -> Blocks:
    """The scaled part of values (rows, in), block by block, in an orthonormal basis (in, R)."""
    read, sketched = basis, 0
    if metric is not None:
        read = torch.cat([metric.sketch.to(basis), basis], dim=1)
        sketched = metric.sketch.shape[1]
    if grid.offset is not None:
        values = values - grid.at(grid.offset, slice(0, values.shape[1]))
    weighted = values if metric is None else values * metric.diagonal.to(values)
    if grid.width is not None:
        part = values.view(len(values), grid.blocks, -1)
        inside = torch.einsum("nbw,bwr->nbr", part, read.view(grid.blocks, grid.width, -1))
        return Blocks(inside, (part * weighted.view(part.shape)).sum(2), sketched)
    return _uneven(grid, values, weighted, read, sketched)


def _uneven(
    grid: BlockGrid,
    values: torch.Tensor,
    weighted: torch.Tensor,
    read: torch.Tensor,
    sketched: int,
) -> Blocks:
    """The same for blocks whose columns lie anywhere."""
    order = torch.argsort(grid.groups, stable=True)
    counts = torch.bincount(grid.groups, minlength=grid.blocks).tolist()
    inside, squared = [], []
    start = 0
    for count in counts:
        columns = order[start : start + count]
        start += count
        part = values[:, columns]
        inside.append(part @ read[columns])
        squared.append((part * weighted[:, columns]).sum(1))
    return Blocks(torch.stack(inside, 1), torch.stack(squared, 1), sketched)


def stored_scales(
    wanted: torch.Tensor,
    grid: BlockGrid,
    found: Blocks,
    nearest: Callable[[torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """Storable scales near the wanted ones (rows, blocks): those, or rounded with the errors of earlier
    blocks made up for by later ones, by the same recursion as codes; the coarsest come first."""
    plain = nearest(wanted)
    assert plain is not None
    if torch.equal(plain, wanted):
        return plain
    scale = grid.scale.double().abs().clamp(min=TINY)
    size = (found.squared.double().sqrt() / scale).clamp(min=TINY)
    # what a change of each scale does to the error in the basis, per unit of error that it makes
    along = found.inside.double() * (grid.scale.sign() / (scale * size))[:, :, None]
    order = _coarsest_first(wanted, size * torch.linalg.vector_norm(along, dim=2), nearest)
    along = along.gather(1, order[:, :, None].expand_as(along))
    return _rounded_in_turn(wanted, order, size.gather(1, order), along, found, nearest)


def _coarsest_first(
    wanted: torch.Tensor,
    felt: torch.Tensor,
    nearest: Callable[[torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """The blocks of each row (rows, blocks) by what rounding their scales does, per unit `felt`, the most
    first: what the last ones do is made up for by none. How far apart storable scales are is looked up."""
    square = torch.zeros_like(felt)
    for place in range(PROBES):
        probe = (wanted * (1 + APART * (place - (PROBES - 1) / 2))).to(wanted.dtype)
        stored = nearest(probe)
        assert stored is not None
        square += (stored - probe).double().square()
    return (square.sqrt() * felt).argsort(dim=1, descending=True, stable=True)


def _rounded_in_turn(
    wanted: torch.Tensor,
    order: torch.Tensor,
    size: torch.Tensor,
    along: torch.Tensor,
    found: Blocks,
    nearest: Callable[[torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """The wanted scales, rounded in an order; size and along are in it."""
    back, meant = order.argsort(dim=1), wanted.gather(1, order)
    ridge = slack(found.sketched, found.directions, SOFT)
    gram = along.transpose(1, 2) @ along
    state = torch.zeros(along.shape[0], along.shape[2], dtype=torch.float64)
    result = meant.clone()
    for start, stop in _turns(order.shape[1]):
        turn, part = slice(start, stop), along[:, start:stop]
        change = _least_change(along[:, start:], ridge, state, gram)[:, : stop - start]
        result[:, turn] -= (change / size[:, turn]).to(result.dtype)
        stored = nearest(result.gather(1, back))
        assert stored is not None
        result[:, turn] = stored.gather(1, order)[:, turn]
        off = (result - meant)[:, turn].double() * size[:, turn]
        state += torch.einsum("nb,nbr->nr", off, part)
        gram -= part.transpose(1, 2) @ part
    return result.gather(1, back)


def _turns(blocks: int) -> list[tuple[int, int]]:
    """Ranges of blocks whose scales are rounded together: fewer and fewer towards the end."""
    found, start = [], 0
    while start < blocks:
        stop = min(blocks, start + max(1, (blocks - start) // TURNS))
        found.append((start, stop))
        start = stop
    return found


def fitted_scales(grid: BlockGrid, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scales (rows, blocks) with which values (rows, in) are nearest to a target, by least squares in each
    block; at most half as large or half as small again."""
    if grid.offset is not None:
        offset = grid.at(grid.offset, slice(0, values.shape[1]))
        values, target = values - offset, target - offset
    sums = torch.zeros(2, *grid.scale.shape, dtype=torch.float64)
    for into, of in zip(sums, (target, values), strict=True):
        into.index_add_(1, grid.groups, (of.double() * values))
    along, size = sums
    factor = torch.where(size > 0, along / size, torch.ones_like(size))
    return (grid.scale * factor.clamp(1 - MOST, 1 + MOST)).to(grid.scale.dtype)


def solved_scales(grid: BlockGrid, found: Blocks, state: torch.Tensor) -> torch.Tensor:
    """Scales (rows, blocks) that take the error `state` (rows, k + R) to zero in the basis.

    The solution of least noise of sum over b of d_b p_b = -state for relative changes d; a ridge where
    there are too few blocks, and along a sketch, where an error counts but need not be zero.
    """
    squared = found.squared.double()
    size = torch.where(squared > 0, squared.rsqrt(), torch.zeros_like(squared))
    along = found.inside.double() * size[:, :, None]
    exact = take_up_all(grid.blocks, found.directions)
    ridge = slack(found.sketched, found.directions, math.inf if exact else SOFT)
    change = -size * _least_change(along, ridge, state.double())
    return (grid.scale * (1 + change.clamp(-MOST, MOST))).to(grid.scale.dtype)


def _least_change(
    along: torch.Tensor,
    ridge: torch.Tensor,
    state: torch.Tensor,
    square: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (rows, n) with the least |x|^2 + y diag(1 / ridge) y^T, y = A^T x - state, for A (rows, n, m); by
    whichever of n and m is smaller. square: A^T A, where it is known."""
    mean = along.square().sum(1).mean(1).clamp(min=1e-30)
    loose = ridge + NOTHING * mean[:, None]
    if along.shape[1] < along.shape[2] and bool((ridge > 0).all()):
        weak = along / loose[:, None, :]
        gram = weak @ along.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(1)
        found: torch.Tensor = torch.linalg.solve(gram, torch.einsum("nbr,nr->nb", weak, state))
        return found
    gram = along.transpose(1, 2) @ along if square is None else square.clone()
    gram.diagonal(dim1=1, dim2=2).add_(loose)
    return torch.einsum("nbr,nr->nb", along, torch.linalg.solve(gram, state))
