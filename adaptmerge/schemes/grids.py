"""The grids of quantised weights: what values a row of codes stands for, and the code nearest to a value.

A weight (out, in) is cut into blocks along its inputs; in each, value = scale * (level - zero) + offset.
Levels are whole numbers or the entries of a table. What a format stores of it is a scheme's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch

MOST_CELLS = 4096  # beyond these a search is as fast


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
        try:
            point = self.points.index_select(0, cell).view(values.shape)
        except IndexError:  # NaN is in no cell
            raise InputError(
                "its values are so large that rounding them overflows float32: inspect --values names "
                "tensors of such norms"
            ) from None
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
    def _next(self) -> Mapping[int, torch.Tensor]:
        """Per direction the code of the next other level in a table, or the same where there is none."""
        assert self.table is not None
        below = torch.searchsorted(self.table, self.table) - 1
        above = torch.searchsorted(self.table, self.table, right=True)
        last = len(self.table) - 1
        found = {-1: below, 1: above}
        return {way: codes.clamp(0, last).to(torch.uint8) for way, codes in found.items()}

    def neighbours(self, codes: torch.Tensor, direction: int) -> torch.Tensor:
        """The codes of the next levels below (-1) or above (1); the same code at an end."""
        if self.table is not None:
            return self._next[direction].index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return codes.to(torch.int16).add_(direction).clamp_(0, self.count - 1).to(torch.uint8)

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

    def all_values(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The values of the codes of all columns, as a tensor like another of their shape."""
        return self.values(codes, slice(0, codes.shape[1]), torch.empty_like(like))

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

    def of_rows(self, rows: torch.Tensor) -> BlockGrid:
        """The grid of some rows, by their numbers; of no whole blocks where these run across rows."""
        zero, offset = (None if of is None else of[rows] for of in (self.zero, self.offset))
        return replace(self, scale=self.scale[rows], zero=zero, offset=offset, across=0)

    def of_last(self, start: int) -> BlockGrid:
        """The grid of the columns from one on, the first of a block where columns lie in blocks."""
        block = 0 if self.width is None else start // self.width

        def part(stored: torch.Tensor | None) -> torch.Tensor | None:
            return None if stored is None else stored[:, block:]

        zero, offset, groups = part(self.zero), part(self.offset), self.groups[start:] - block
        scale = self.scale[:, block:]
        return replace(self, scale=scale, groups=groups, zero=zero, offset=offset, across=0)

    def rescaled(self, scale: torch.Tensor) -> BlockGrid:
        """The same grid with other scales."""
        return replace(self, scale=scale)
