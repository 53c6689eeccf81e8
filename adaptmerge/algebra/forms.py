"""Factors as rows * W + up @ down in float64, W being a base's weight: no dense delta where that is thin.

For running and verifying, hence written apart from `thin()`, which merges compute with: parts are read by
their plain definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from adaptmerge.algebra.factors import (
    Diag,
    Expanded,
    Factor,
    Hadamard,
    Leaf,
    Place,
    Product,
    Rows,
    Sum,
    rank_bound,
)
from adaptmerge.algebra.linalg import in_float64
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef

LEFT = (
    1e-6  # share of a squared row that is left of it, below which the expansion of its norm is weak
)
THIN = 4  # a rank of at most this part of the shorter side is worth two sides


@runtime_checkable
class Sided(Protocol):
    """A factor that has its two sides at hand."""

    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, r) and (r, in), float64."""


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Weighted factors as a factor, summed densely: the definition, not the merge."""

    terms: tuple[tuple[float, Factor], ...]
    shape: tuple[int, int]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        (weight, factor), *others = self.terms
        total = factor.dense(rows) * weight
        for weight, factor in others:
            total.add_(factor.dense(rows), alpha=weight)
        return total

    def thin(self) -> Any:
        raise NotImplementedError("a promise is only ever dense")


class Form(NamedTuple):
    """rows * W + up @ down: rows (out,), or None where W has no part; up (out, r), down (r, in)."""

    up: torch.Tensor
    down: torch.Tensor
    rows: torch.Tensor | None = None

    def on(self, device: torch.device) -> Form:
        """The form with its tensors there."""
        rows = None if self.rows is None else self.rows.to(device)
        return Form(self.up.to(device), self.down.to(device), rows)

    def times(self, scale: float) -> Form:
        """The form scaled."""
        rows = None if self.rows is None else self.rows * scale
        return Form(self.up * scale, self.down, rows)


def form_of(factor: Factor, weight: TensorRef | None = None) -> Form | None:
    """The factor as a form on a weight; None where it is not thin, or no such sum."""
    try:
        return _form(factor, weight)
    except _NotThin:
        return None


class _NotThin(Exception):
    pass


def _form(factor: Any, weight: TensorRef | None) -> Form:
    match factor:
        case WeightedSum(terms=terms):
            return added([_form(part, weight).times(by) for by, part in terms])
        case Sum(parts=parts):
            return added([_form(part, weight) for part in parts])
        case Product(parts=(Diag(ref=rows), Leaf(ref=ref)), scale=scale) if ref == weight:
            up, down = _nothing(ref.shape)
            return Form(up, down, rows.read().double().flatten() * scale)
        case Product(parts=(Sum() | WeightedSum() as only,), scale=scale):
            return _form(only, weight).times(scale)
    if isinstance(factor, Sided):
        return Form(*factor.sides())
    if THIN * rank_bound(factor) > min(factor.shape):
        raise _NotThin
    return Form(*_sides(factor))


def norms_beside(weight: torch.Tensor, form: Form) -> torch.Tensor | None:
    """|W + up @ down| of each row, float64, with W in float64 by some rows at a time; None where the delta
    takes away nearly all of a row, so that what is left would be rounding."""
    up, down = form.up, form.down
    inside = ((up @ (down @ down.T)) * up).sum(1)
    squares, crossed = torch.empty_like(inside), torch.empty_like(inside)
    for rows, block in in_float64(weight.shape, lambda *span: weight[slice(*span)]):
        squares[rows] = torch.linalg.vector_norm(block, dim=1).square()
        crossed[rows] = ((block @ down.T) * up[rows]).sum(1)
    moved = squares + 2 * crossed + inside
    return moved.sqrt() if bool((moved >= LEFT * (squares + inside)).all()) else None


def _nothing(shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(shape[0], 0, dtype=torch.float64),
        torch.zeros(0, shape[1], dtype=torch.float64),
    )


def added(forms: Sequence[Form]) -> Form:
    """The sum of forms, side by side."""
    scaled = [form.rows for form in forms if form.rows is not None]
    rows = torch.stack(scaled).sum(0) if scaled else None
    up = torch.cat([form.up for form in forms], dim=1)
    return Form(up, torch.cat([form.down for form in forms]), rows)


def _sides(factor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, r) and (r, in) whose product is a thin factor."""
    match factor:
        case Product(parts=parts, scale=scale):
            return _cut(parts, scale)
        case Sum(parts=parts):
            pairs = [_sides(part) for part in parts]
            return torch.cat([up for up, _ in pairs], dim=1), torch.cat([d for _, d in pairs])
        case Hadamard(left=left, right=right):
            return _row_wise(_sides(left), _sides(right))
        case Place():
            return _placed(factor)
        case Expanded():
            return _sides(factor.expand())
    raise _NotThin


def _cut(parts: Sequence[Any], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain cut where it is narrowest, both ends by their definition."""
    if len(parts) == 1:
        up, down = _sides(parts[0])
        return up * scale, down
    at = min(range(1, len(parts)), key=lambda i: parts[i].shape[0])
    if parts[at].shape[0] < min(parts[0].shape[0], parts[-1].shape[1]):
        return Product(tuple(parts[:at]), scale).dense(), Product(tuple(parts[at:])).dense()
    first, last = isinstance(parts[0], Diag), isinstance(parts[-1], Diag)
    if not (first or last):
        raise _NotThin
    up, down = _cut(parts[1:] if first else parts[:-1], scale)
    vector = parts[0 if first else -1].ref.read().double().flatten()
    return (vector[:, None] * up, down) if first else (up, down * vector)


def _row_wise(
    left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sides of an element-wise product: all products of a direction of one with one of the other."""
    (up, down), (other_up, other_down) = left, right
    wide = (up[:, :, None] * other_up[:, None, :]).flatten(1)
    return wide, (down[:, None, :] * other_down[None, :, :]).flatten(0, 1)


def _placed(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = _sides(place.block)
    wide = up.new_zeros(place.shape[0], up.shape[1])
    long = down.new_zeros(down.shape[0], place.shape[1])
    wide[place.row : place.row + up.shape[0]] = up
    long[:, place.column : place.column + down.shape[1]] = down
    return wide, long
