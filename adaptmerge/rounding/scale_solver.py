"""Scales that take up what codes leave: the least change of a row's scales that takes an error along some
directions to zero, or nearly, and those nearest to it that can be stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from adaptmerge.algebra import decompose
from adaptmerge.lazy import torch
from adaptmerge.rounding.metric import Metric, slack
from adaptmerge.schemes.grids import BlockGrid

EXACT = 1.5  # blocks per direction from which on the scales can take up every error
SOFT = 1e4  # strength of a solve that cannot: more would cost noise
MOST = 0.5  # the largest relative change of a scale
TURNS = 8  # a part of the blocks that are left whose scales are rounded together
PROBES = 8  # places around a scale where it is looked how far apart those are that can be stored
APART = 4e-3  # of the scale between these places
NOTHING = 1e-12  # of the sizes in a system that is solved, so that it can be
TINY = 1e-30
# the scales nearest to some that can be stored; in quotes, for torch is not to be imported yet
Nearest: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"


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
    grid: BlockGrid, values: torch.Tensor, basis: torch.Tensor, metric: Metric | None
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
    nearest: Nearest,
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
    nearest: Nearest,
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
    nearest: Nearest,
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
    mean = along.square().sum(1).mean(1).clamp(min=TINY)
    loose = ridge + NOTHING * mean[:, None]
    if along.shape[1] < along.shape[2] and bool((ridge > 0).all()):
        weak = along / loose[:, None, :]
        gram = weak @ along.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(1)
        found: torch.Tensor = decompose.solve(gram, torch.einsum("nbr,nr->nb", weak, state))
        return found
    gram = along.transpose(1, 2) @ along if square is None else square.clone()
    gram.diagonal(dim1=1, dim2=2).add_(loose)
    return torch.einsum("nbr,nr->nb", along, decompose.solve(gram, state))
