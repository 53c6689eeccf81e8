"""One matrix of a base and what is added to it: the delta in the parts that rounding and measuring need.

Of what each adapter adds, low-rank parts stay thin: they share one orthonormal basis of the inputs they
read, in which errors are fed back and measured. The rest is looked at densely.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.by_rows import at_once
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum, rank_bound
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.rounding.error_feedback import (
    STRENGTH,
    Feedback,
    Rounded,
    feedback,
    least_read_last,
    row_space,
)
from adaptmerge.rounding.input_moments import Moments, metric_of
from adaptmerge.rounding.metric import Metric
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.walk import refs_of

PIECE = 1 << 20  # entries of a matrix that are worked on at once
THIN = 4  # a factor is low-rank up to this part of the smaller side
BASIS = 2  # errors are fed back in at most this part of all directions


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter adds to a weight, times how much."""

    adapter: str
    weight: float
    factor: Factor


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight (out, in), what is added to it and the rows that are put in its place.

    tokens: (row numbers, values). moments: of what flows into it, where that was measured. coded: it is
    stored as codes, so that float32 is far finer than what it is rounded to.
    """

    site: Site
    weight: TensorRef
    dtype: DType
    parts: tuple[Part, ...] = ()
    tokens: tuple[tuple[tuple[int, ...], TensorRef], ...] = ()
    moments: Moments | None = None
    coded: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def all_at_once(self) -> bool:
        """Whether some rows of it cost as much as all."""
        return any(at_once(part.factor) for part in self.parts)

    @property
    def refs(self) -> list[TensorRef]:
        """Everything stored that goes into it, the weight apart."""
        own = [ref for part in self.parts for ref in refs_of(part.factor)]
        return [ref for ref in own if ref != self.weight] + [ref for _, ref in self.tokens]

    def row_ranges(self, block: int = 1) -> list[tuple[int, int]]:
        """The rows that are worked on at once, in order; they do not depend on the number of workers. They
        end where blocks do that run across rows, unless these are larger than what is worked on."""
        rows, columns = self.shape
        step = rows if self.all_at_once else max(1, PIECE // max(1, columns))
        whole = block // math.gcd(block, max(1, columns))
        step -= step % whole if step >= whole else 0
        return [(start, min(rows, start + step)) for start in range(0, rows, max(1, step))]

    def seed(self, given: int, start: int) -> int:
        """What its rows from one on are drawn with, of a run with the given seed."""
        text = f"{given} {self.site} {start}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


class Thin(NamedTuple):
    """The low-rank part of what one adapter adds: up (out, r) with all scales in it, and its rows in the
    coordinates of the common basis (r, R)."""

    up: torch.Tensor
    down: torch.Tensor
    inside: torch.Tensor
    span: (
        torch.Tensor
    )  # an orthonormal basis (R, r) of the adapter's own directions in the common ones


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to a matrix: the thin and dense side of each part, and the common basis (in, R)."""

    thin: Sequence[Thin | None]
    dense: Sequence[Sequence[tuple[float, Factor]]]
    basis: torch.Tensor

    @property
    def is_thin(self) -> bool:
        return not any(self.dense)

    @property
    def needs_error(self) -> bool:
        """Whether what rounding did to a part is told by all of the error, not by that in the basis."""
        return bool(self.thin) and not (self.is_thin and self.basis.shape[1])


def working_dtype(matrix: Matrix) -> torch.dtype:
    """float64 where weights are stored as float32 or wider, so that rounding shows; else float32."""
    wide = matrix.dtype.bits >= 32 and not matrix.coded
    return torch.float64 if wide else torch.float32


def _delta_of(matrix: Matrix) -> Delta:
    """The delta of a matrix, read and put into a common basis."""
    work, limit = working_dtype(matrix), min(matrix.shape) // THIN
    sides: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    dense = []
    for part in matrix.parts:
        low, full = _split(part.factor, part.weight, limit)
        terms = [(s * t.scale, t) for s, factor in low for t in factor.thin()]
        dense.append(full)
        if terms:
            up = torch.cat([term.up.to(work) * scale for scale, term in terms], dim=1)
            sides.append((up, torch.cat([term.down.to(work) for _, term in terms])))
        else:
            sides.append(None)
    downs = [down for side in sides if side is not None for down in side[1:]]
    # what is not finite spans nothing, and is named once it is written
    spans = bool(downs) and all(bool(torch.isfinite(down).all()) for down in downs)
    basis = row_space(downs) if spans else torch.zeros(matrix.shape[1], 0, dtype=torch.float64)
    if basis.shape[1] > matrix.shape[1] // BASIS:
        basis = basis[:, :0]
    thin = [None if side is None else _thin(*side, basis) for side in sides]
    return Delta(thin, dense, basis.to(work))


def _feedback_of(matrix: Matrix, strength: float = STRENGTH, *, ordered: bool = False) -> Feedback:
    """The feedback of errors in the common basis of a matrix; `ordered`: in an order that leaves least of
    them, where it is so strong that nothing makes up for them afterwards."""
    basis = delta_of(matrix).basis
    last = ordered and strength >= STRENGTH and basis.shape[1] > 0
    order = least_read_last(basis.double()) if last else None
    return feedback(basis, working_dtype(matrix), strength, order, metric_in(matrix))


def _metric_in(matrix: Matrix) -> Metric | None:
    """How errors count in what flows into a matrix; None where they count alike."""
    if matrix.moments is None:
        return None
    return metric_of(matrix.moments, (matrix.shape[1] - delta_of(matrix).basis.shape[1]) // BASIS)


delta_of = remembered(_delta_of, 8)
metric_in = remembered(_metric_in, 8)
feedback_of = remembered(_feedback_of, 8)


def _thin(up: torch.Tensor, down: torch.Tensor, basis: torch.Tensor) -> Thin:
    inside = down.double() @ basis
    _, sigma, rows = decompose.svd(inside, full_matrices=False)
    rank = int((sigma > 1e-9 * sigma[0]).sum()) if sigma.numel() else 0
    return Thin(up, down, inside.to(up.dtype), rows[:rank].T.to(up.dtype))


def _split(
    factor: Factor, scale: float, limit: int
) -> tuple[list[tuple[float, Factor]], list[tuple[float, Factor]]]:
    """A scaled factor as summands of low rank and others."""
    if isinstance(factor, Product) and len(factor.parts) == 1:
        return _split(factor.parts[0], scale * factor.scale, limit)
    if isinstance(factor, Sum):
        found = [_split(part, scale, limit) for part in factor.parts]
        return [x for low, _ in found for x in low], [x for _, full in found for x in full]
    pair = [(scale, factor)]
    return (pair, []) if rank_bound(factor) <= limit else ([], pair)


def weight_rows(matrix: Matrix, rows: tuple[int, int]) -> torch.Tensor:
    """Rows of the weight that the adapters were trained on, in working precision."""
    return matrix.weight.slice(0, *rows).read().to(working_dtype(matrix))


def dense_rows(
    delta: Delta, index: int, rows: tuple[int, int], like: torch.Tensor
) -> torch.Tensor | None:
    """Rows of the dense side of one part."""
    found = None
    for scale, factor in delta.dense[index]:
        value = factor.dense(rows).reshape(like.shape) * scale
        found = value if found is None else found + value
    return None if found is None else found.to(like.dtype)


class TargetRows(NamedTuple):
    """Rows (rows, in) of weight plus delta, of the dense side of each part, and of the weight itself."""

    target: torch.Tensor
    dense: Sequence[torch.Tensor | None]
    weight: torch.Tensor


def target_rows(matrix: Matrix, rows: tuple[int, int]) -> TargetRows:
    """Rows of weight plus delta, with what they are made of."""
    delta = delta_of(matrix)
    weight = weight_rows(matrix, rows)
    target = weight.clone()
    dense = [dense_rows(delta, i, rows, weight) for i in range(len(matrix.parts))]
    for side in delta.thin:
        if side is not None:
            target.addmm_(side.up[slice(*rows)], side.down)
    for value in dense:
        if value is not None:
            target += value
    if matrix.coded and not bool(target.isfinite().all()):
        problems = not_finite(matrix) or [f"{matrix.site}: the sum is beyond the range of floats"]
        raise InputError([*problems[:-1], f"{problems[-1]}; codes have no such value"])
    return TargetRows(target, dense, weight)


def not_finite(matrix: Matrix) -> list[str]:
    """A sentence for each tensor that goes into a matrix and holds NaN or infinity."""
    return [
        f"tensor {ref.name!r} of {matrix.site} holds NaN or infinity"
        for ref in dict.fromkeys([matrix.weight, *matrix.refs])
        if ref.dtype.is_float and not bool(torch.isfinite(ref.read().float()).all())
    ]


def row_factor(matrix: Matrix, delta: Delta, rows: tuple[int, int]) -> torch.Tensor | None:
    """What every row of the weight is multiplied by (rows, 1), where all that is added beside low-rank
    parts are such factors (IA3 on outputs, the norms of DoRA); None where anything else is."""
    total = None
    for scale, factor in (one for dense in delta.dense for one in dense):
        found = _row_scaling(factor, matrix.weight)
        if found is None:
            return None
        added = found.vector.read().double().flatten()[slice(*rows)] * scale * found.scale
        total = added if total is None else total + added
    return None if total is None else (1 + total)[:, None].to(working_dtype(matrix))


class RowScaling(NamedTuple):
    """scale * diag(vector) W of the very weight W that it is added to."""

    vector: TensorRef
    scale: float


def _row_scaling(factor: Factor, weight: TensorRef) -> RowScaling | None:
    """A factor as a scaling of the rows of a weight; None for any other."""
    if not isinstance(factor, Product) or len(factor.parts) != 2:
        return None
    left, right = factor.parts
    own = isinstance(right, Leaf) and right.ref == weight
    return RowScaling(left.ref, factor.scale) if own and isinstance(left, Diag) else None


def own_direction(delta: Delta, rows: tuple[int, int], made: TargetRows) -> torch.Tensor:
    """The direction of each row's whole delta, less what lies in the common basis."""
    total = torch.zeros_like(made.target)
    for side, full in zip(delta.thin, made.dense, strict=True):
        if full is not None:
            total += full
        if side is not None:
            total.addmm_(side.up[slice(*rows)], side.down)
    total -= (total @ delta.basis) @ delta.basis.T
    size = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    return torch.where(size > 0, total / size, torch.zeros_like(total))


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums of squares over some rows of a matrix: of the weight, of the delta, of the rounding error; per
    part of what it adds, of the error in its inputs' space, and error times what it adds. moved: how many
    codes of a quantised weight are others than before."""

    weight: float
    delta: float
    error: float
    added: tuple[float, ...]
    inside: tuple[float | None, ...]
    inner: tuple[float, ...]
    moved: int = 0

    def plus(self, other: Measured) -> Measured:
        """Over the rows of both."""
        return Measured(
            self.weight + other.weight,
            self.delta + other.delta,
            self.error + other.error,
            tuple(map(sum, zip(self.added, other.added, strict=True))),
            tuple(map(_sum_known, self.inside, other.inside)),
            tuple(map(sum, zip(self.inner, other.inner, strict=True))),
            self.moved + other.moved,
        )

    @property
    def gains(self) -> list[float | None]:
        """How much of what each part adds has arrived: 1 is all; None for what adds nothing."""
        return [
            1 + inner / added if added > 0 else None
            for inner, added in zip(self.inner, self.added, strict=True)
        ]

    @property
    def subs(self) -> list[float | None]:
        """The error in the space of each part's inputs, relative to what it adds; None for those of full
        rank."""
        return [
            math.sqrt(inside / added) if inside is not None and added > 0 else None
            for inside, added in zip(self.inside, self.added, strict=True)
        ]

    @property
    def noise(self) -> float:
        """|error| / |weight|."""
        return math.sqrt(self.error / self.weight) if self.weight else 0.0


def _sum_known(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def measure(delta: Delta, rows: tuple[int, int], made: TargetRows, found: Rounded) -> Measured:
    """What rounding did to some rows; of all of its error where the delta needs it."""
    weight, error, inside = made.weight, found.error, found.inside
    total = torch.zeros_like(weight) if error is not None else None
    coordinates: torch.Tensor | None = None
    added, inner = list[float](), list[float]()
    spans = list[float | None]()
    for side, full in zip(delta.thin, made.dense, strict=True):
        if error is None and side is not None:
            own = side.up[slice(*rows)] @ side.inside
            coordinates = own if coordinates is None else coordinates + own
            added.append(_squared(own))
            inner.append(float((inside * own).sum(dtype=torch.float64)))
            spans.append(_squared(inside @ side.span))
            continue
        whole = _whole(side, full, rows, weight)
        assert error is not None and total is not None
        total += whole
        added.append(_squared(whole))
        inner.append(float((error * whole).sum(dtype=torch.float64)))
        thin = None if full is not None or not inside.shape[1] else side
        spans.append(None if thin is None else _squared(inside @ thin.span))
    size = total if total is not None else coordinates
    return Measured(
        _squared(weight),
        0.0 if size is None else _squared(size),
        found.squared,
        tuple(added),
        tuple(spans),
        tuple(inner),
    )


def _whole(
    side: Thin | None, full: torch.Tensor | None, rows: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """All that one part adds to some rows."""
    value = torch.zeros_like(like) if full is None else full
    return value if side is None else value + side.up[slice(*rows)] @ side.down


def _squared(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value)) ** 2
