"""How a fused matrix agrees with weight plus delta: entry by entry, and by its certificate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeAlias

from adaptmerge.commands.fuse.pieces.layout import Fused
from adaptmerge.lazy import torch
from adaptmerge.rounding.codes import CodedMatrix, coded_error
from adaptmerge.rounding.error_feedback import FloatGrid
from adaptmerge.rounding.floats import GRID_ERROR
from adaptmerge.rounding.matrix import Matrix, Measured, delta_of, weight_rows
from adaptmerge.schemes.coded import CodedWeight, dequantised
from adaptmerge.tensors.refs import TensorRef

NEAR = 1e-2  # of a step: how far from the middle between two values a tie may seem to be
RESOLVED = 1e-6  # of weight and delta: what float32 sums of them may differ by
EXACT, TIES, DOUBLE, MEASURED = "exact", "near ties", "rounded twice", "measured"
Nearest: TypeAlias = "Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is stored of one matrix: how it agrees, in how many entries it does not, and the certificate."""

    tensor: str
    matrix: Matrix
    how: str
    apart: int
    measured: Measured
    grid: float  # |error| / |weight| that its dtype or quantisation has by itself


class Agreement(NamedTuple):
    """How some rows agree with weight plus delta: the certificate, the entries that are not the nearest
    value, those of them that are no near tie, and whether all are what rounding first the delta and then
    the sum gives."""

    measured: Measured
    differing: int
    far: int
    rounded_twice: bool

    def plus(self, other: Agreement) -> Agreement:
        """Over the rows of both."""
        return Agreement(
            self.measured.plus(other.measured),
            self.differing + other.differing,
            self.far + other.far,
            self.rounded_twice and other.rounded_twice,
        )

    @property
    def how(self) -> str:
        if not self.differing:
            return EXACT
        if not self.far:
            return TIES
        return DOUBLE if self.rounded_twice else MEASURED


def compare_stored(name: str, part: Fused, stored: TensorRef) -> Finding:
    """How a stored matrix agrees with weight plus delta."""
    ref = part.seen(stored)
    dtype = ref.dtype.torch

    def nearest(target: torch.Tensor, _: tuple[int, int]) -> torch.Tensor:
        return FloatGrid(dtype, torch.float64).near(target)

    grid = GRID_ERROR * ref.dtype.eps if ref.dtype.is_float else 0.0
    return _compared(name, part.matrix, lambda rows: ref.slice(0, *rows).read(), nearest, grid)


def compare_coded(name: str, coded: CodedMatrix, stored: CodedWeight) -> Finding:
    """How a stored quantised matrix agrees with weight plus delta."""
    columns = slice(0, coded.matrix.shape[1])

    def nearest(target: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        codes, grid = coded.weight.grid(rows)
        codes = codes if coded.anew else grid.codes(target.float(), columns)
        return grid.values(codes, columns, torch.empty(target.shape)).double()

    grid = coded_error(coded.weight)
    return _compared(name, coded.matrix, lambda rows: dequantised(stored, rows), nearest, grid)


def _compared(
    name: str,
    matrix: Matrix,
    read: Callable[[tuple[int, int]], torch.Tensor],
    nearest: Nearest,
    grid: float,
) -> Finding:
    """Stored rows against the nearest to weight plus delta, a few at a time."""
    pieces = (_rows(matrix, rows, read(rows), nearest) for rows in matrix.row_ranges())
    found = reduce(Agreement.plus, pieces)
    return Finding(name, matrix, found.how, found.differing, found.measured, grid)


def _rows(
    matrix: Matrix, rows: tuple[int, int], value: torch.Tensor, nearest_to: Nearest
) -> Agreement:
    """How the stored values of some rows agree."""
    stored, kept = value.double(), _other_rows(matrix, rows)
    weight = weight_rows(matrix, rows).double()
    deltas = [part.factor.dense(rows).reshape(weight.shape) * part.weight for part in matrix.parts]
    added = torch.zeros_like(weight)
    for delta in deltas:
        added += delta
    nearest = nearest_to(weight + added, rows)
    differ = ((stored != nearest) & ~(stored.isnan() & nearest.isnan()))[kept]
    tie = _near_tie(weight, added, stored, nearest)[kept]
    double = weight.to(value.dtype) + added.to(value.dtype)
    twice = bool((double.double() == stored)[kept].all())
    error = (stored - (weight + added))[kept]
    measured = _certificate(matrix, kept, weight, deltas, error)
    return Agreement(measured, int(differ.sum()), int((differ & ~tie).sum()), twice)


def _near_tie(
    weight: torch.Tensor, added: torch.Tensor, stored: torch.Tensor, nearest: torch.Tensor
) -> torch.Tensor:
    """Where the sum lies as far from what is stored as from the nearest value, up to what float32 sums
    resolve: a delta is a sum itself, whose terms may cancel."""
    gap = (stored - nearest).abs()
    terms = added.abs() + added.square().mean(1, keepdim=True).sqrt()
    blur = RESOLVED * (weight.abs() + terms)
    farther = (stored - (weight + added)).abs() - (nearest - weight - added).abs()
    return torch.isfinite(stored) & (farther <= NEAR * gap + blur)


def _other_rows(matrix: Matrix, rows: tuple[int, int]) -> torch.Tensor:
    """The rows that no token replaces."""
    taken = {n - rows[0] for numbers, _ in matrix.tokens for n in numbers}
    kept = [i for i in range(rows[1] - rows[0]) if i not in taken]
    return torch.tensor(kept, dtype=torch.long)


def _certificate(
    matrix: Matrix,
    kept: torch.Tensor,
    weight: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    error: torch.Tensor,
) -> Measured:
    delta = delta_of(matrix)
    basis = delta.basis.double()
    inside = error @ basis
    dense = [value[kept] for value in deltas]
    total = sum(dense, torch.zeros_like(error))
    thin = [
        side if not full and basis.shape[1] else None
        for side, full in zip(delta.thin, delta.dense, strict=True)
    ]
    return Measured(
        float(weight.square().sum()),
        float(total.square().sum()),
        float(error.square().sum()),
        tuple(float(value.square().sum()) for value in dense),
        tuple(
            None if s is None else float((inside @ s.span.double()).square().sum()) for s in thin
        ),
        tuple(float((error * value).sum()) for value in dense),
    )
