"""A stored weight that is moved by thin deltas: the norms of its rows, and how far two deltas are apart
that also stretch them. Both cost one pass over the weight, and are exact where that pass cannot tell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from adaptmerge.algebra.by_rows import Distance, distance
from adaptmerge.algebra.factors import Diag, Expanded, Factor, Leaf, Product, Sum
from adaptmerge.algebra.weight_rows import WeightRows, rows_of
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef

OF_NORM = 2.0**-16  # what the norm of a moved row may be off, of itself
OF_MOVE = 2.0**-10  # and of what moves it
OF_SQUARE = 2.0**-12  # what the square of a distance may be off
THIN = 4  # a delta of a rank above one of so many is looked at densely


def moved_norms(rows: WeightRows, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """|w + delta| of every row, float64, of delta = up @ down: off by no more than OF_NORM of itself and
    OF_MOVE of |delta|, in truth by some thousand times less; a row that may be further off is summed."""
    up, down = up.double(), down.double()
    if len(down) * THIN > rows.width:
        return rows.moved(torch.arange(rows.count), up, down)
    moves = torch.linalg.vector_norm(up @ _core(down), dim=1)
    squares = 2 * (rows.products(down) * up).sum(1) + rows.squares + moves.square()
    norms: torch.Tensor = squares.clamp(min=0).sqrt()
    error = 2 * rows.error(up, down)
    sure = (error <= 2 * OF_NORM * squares) & (error <= 2 * OF_MOVE * norms * moves)
    doubtful = (~(sure & torch.isfinite(squares))).nonzero().flatten()
    if len(doubtful):
        norms[doubtful] = rows.moved(doubtful, up, down)
    return norms


def _core(down: torch.Tensor) -> torch.Tensor:
    """What has the same norms as down behind any up; a Gram matrix would lose half of the digits."""
    core: torch.Tensor = torch.linalg.qr(down.T, mode="r").R.T
    return core


class Moved(NamedTuple):
    """diag(stretch) W + up @ down in float64; the transpose of it where columns are normed."""

    stretch: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def distance_on(weight: TensorRef | None, axis: int, a: Factor, b: Factor) -> Distance:
    """How far two deltas are apart, which may stretch the weight that they are on. They are looked at
    densely where one has a form that is not thin, or where products in float32 cannot tell."""
    found = [_as_moved(factor, weight, axis) for factor in (a, b)]
    left, right = found
    if left is None or right is None:
        return distance(a, b)
    down, at = torch.unique(torch.cat([left.down, right.down]), dim=0, return_inverse=True)
    ranks = [len(left.down), len(right.down)]
    left, right = (
        Moved(one.stretch, _summed(one.up, places, len(down)), down)
        for one, places in zip((left, right), at.split(ranks), strict=True)
    )
    apart = Moved(left.stretch - right.stretch, left.up - right.up, down)
    squares = _squares(
        (apart, left, right), down, None if weight is None else rows_of(weight, axis)
    )
    return distance(a, b) if squares is None else Distance(*map(math.sqrt, squares))


def _summed(up: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Columns added up that have the same place."""
    return up.new_zeros(len(up), count).index_add_(1, places, up)


def _squares(
    moves: Sequence[Moved], down: torch.Tensor, rows: WeightRows | None
) -> list[float] | None:
    """The squared Frobenius norms; None where one may be off by more than OF_SQUARE."""
    core = _core(down)
    totals = [float((one.up @ core).square().sum()) for one in moves]
    if rows is None:
        return totals
    products = rows.products(down)
    for at, one in enumerate(moves):
        between = (products * one.up).sum(1)
        totals[at] += float(one.stretch @ (one.stretch * rows.squares + 2 * between))
        error = float(2 * one.stretch.abs() @ rows.error(one.up, down))
        if not (math.isfinite(totals[at]) and error <= OF_SQUARE * totals[at]):
            return None
    return totals


def _as_moved(factor: Factor, weight: TensorRef | None, axis: int) -> Moved | None:
    """A factor as its stretch of the weight and its thin rest; None where it is made of something else."""
    rows, columns = factor.shape if axis else factor.shape[::-1]
    stretch = torch.zeros(rows, dtype=torch.float64)
    ups, downs = [stretch.new_zeros(rows, 0)], [stretch.new_zeros(0, columns)]
    for scale, parts in _addends(factor):
        inner = [part for part in parts if not isinstance(part, Diag)]
        if weight is not None and inner == [Leaf(weight)]:
            scales = parts[:-1] if axis else parts[1:]
            if not all(isinstance(part, Diag) for part in scales):
                return None
            stretch += scale * _diagonal(scales, stretch)
            continue
        sides = _sides(scale, parts)
        if sides is None:
            return None
        up, down = sides if axis else (sides[1].T, sides[0].T)
        ups.append(up)
        downs.append(down)
    return Moved(stretch, torch.cat(ups, dim=1), torch.cat(downs))


def _addends(factor: Factor) -> Iterator[tuple[float, tuple[Factor, ...]]]:
    """The factor as a sum of products, each with its scale."""
    if isinstance(factor, Expanded):
        yield from _addends(factor.expand())
    elif isinstance(factor, Sum):
        for part in factor.parts:
            yield from _addends(part)
    elif isinstance(factor, Product):
        for chosen in itertools.product(*map(_addends, factor.parts)):
            scale = math.prod((scale for scale, _ in chosen), start=factor.scale)
            yield scale, tuple(part for _, parts in chosen for part in parts)
    else:
        yield 1.0, (factor,)


def _diagonal(parts: Sequence[Factor], like: torch.Tensor) -> torch.Tensor:
    """The diagonal of a product of diagonals, none of them being the identity."""
    value = torch.ones_like(like)
    for part in parts:
        assert isinstance(part, Diag)
        value = value * part.ref.read().double().flatten()
    return value


def _sides(scale: float, parts: Sequence[Factor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both sides of a thin product of stored matrices in float64, by its plain definition; else None."""
    cut = min(range(1, len(parts)), key=lambda at: parts[at].shape[0], default=0)
    shape = parts[0].shape[0], parts[-1].shape[1]
    stored = all(isinstance(part, (Leaf, Diag)) for part in parts)
    if not stored or not cut or parts[cut].shape[0] * THIN > min(shape):
        return None
    return Product(tuple(parts[:cut]), scale).dense(), Product(tuple(parts[cut:])).dense()
