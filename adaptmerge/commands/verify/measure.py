"""How far a stored edit is from its promise: by Gram matrices of thin sides, else densely."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adaptmerge.algebra.by_rows import Distance, distance_in_parallel
from adaptmerge.algebra.factors import Factor, Leaf
from adaptmerge.algebra.forms import Form, WeightedSum, added, form_of
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.commands.verify.normed import Ground, ground
from adaptmerge.lazy import torch
from adaptmerge.tensors.held import Held
from adaptmerge.tensors.refs import TensorRef, computed

RESOLVED = 1e-6  # of a norm, that rounding in Gram matrices may reach
ROUNDING = 32 * 2.0**-52  # of squared norms of parts, in the squared norm of their sum
PROBED = 8  # rows that are compared with the definition
ALIKE = 1e-9  # relative to what the parts of a row could add up to


class Measured(NamedTuple):
    """|whole - stored|, |whole| and |stored|; |weight * term| of each term; |W| where it was looked at.

    columns: the norms of the columns of up and the rows of down that are stored, scaled in up.
    """

    apart: Distance
    sizes: Sequence[float]
    base: float | None = None
    columns: tuple[torch.Tensor, torch.Tensor] | None = None


def measured(
    whole: WeightedSum, stored: Factor | None, weight: TensorRef | None = None
) -> Measured:
    """The norms of a promise and of what is stored of it, zero where nothing is."""
    found = _by_forms(whole, stored, weight)
    return _densely(whole, stored, weight) if found is None else found


def _by_forms(
    whole: WeightedSum, stored: Factor | None, weight: TensorRef | None
) -> Measured | None:
    terms = [form_of(factor, weight) for _, factor in whole.terms]
    last = None if stored is None else form_of(stored, weight)
    forms = [form.times(by) for (by, _), form in zip(whole.terms, terms, strict=True) if form]
    if len(forms) < len(terms) or (stored is not None and last is None):
        return None
    pairs = [*zip((factor for _, factor in whole.terms), terms, strict=True), (stored, last)]
    if not all(_as_defined(factor, form, weight) for factor, form in pairs if factor and form):
        return None
    return _Norms(forms, last, weight).found()


Norm = Callable[[Sequence[float]], float]


class _Norms:
    """Squared norms of sums of forms, from one Gram matrix of all their sides."""

    def __init__(self, terms: list[Form], stored: Form | None, weight: TensorRef | None) -> None:
        self.terms, self.stored = terms, stored
        self.forms = terms if stored is None else [*terms, stored]
        self.all = added(self.forms)
        self.core = (self.all.up.T @ self.all.up) * (self.all.down @ self.all.down.T)
        self.met: Ground | None = None
        if weight is not None:
            self.met = ground(weight, self.all.down)
            self.across = self.met.met * self.all.up

    def found(self) -> Measured | None:
        """All norms; None where parts cancel so far that rounding would be seen."""
        count = len(self.terms)
        rest = [-1.0] * (len(self.forms) - count)
        whole, stored = [1.0] * count + [0.0 for _ in rest], [0.0] * count + [1.0 for _ in rest]
        apart = [1.0] * count + rest
        left = self.norm(whole)
        norm: Norm = self.norm
        if math.sqrt(ROUNDING) * max(self.reach(whole), self.reach(apart)) > RESOLVED * left:
            if any(form.rows is not None for form in self.forms):
                return None
            norm = self._by_triangles()
        sizes = [self.norm([float(i == k) for i in range(len(self.forms))]) for k in range(count)]
        base = None if self.met is None else math.sqrt(float(self.met.squares.sum()))
        columns = None
        if self.stored is not None:
            columns = self.stored.up.norm(dim=0), self.stored.down.norm(dim=1)
        return Measured(Distance(norm(apart), norm(whole), norm(stored)), sizes, base, columns)

    def norm(self, signs: Sequence[float]) -> float:
        """|sum of signs * forms|."""
        by = self._columns(signs)
        squared = float(by @ self.core @ by)
        rows = self._rows(signs)
        if rows is not None and self.met is not None:
            squared += float(rows.square() @ self.met.squares + 2 * rows @ (self.across @ by))
        return math.sqrt(squared) if squared > 0.0 or math.isnan(squared) else 0.0

    def reach(self, signs: Sequence[float]) -> float:
        """What the norm would be if nothing cancelled."""
        squared = float(self._columns(signs).square() @ self.core.diagonal())
        rows = self._rows(signs)
        if rows is not None and self.met is not None:
            squared += float(rows.square() @ self.met.squares)
        return math.sqrt(squared)

    def _columns(self, signs: Sequence[float]) -> torch.Tensor:
        widths = torch.tensor([form.up.shape[1] for form in self.forms])
        return torch.tensor(signs, dtype=torch.float64).repeat_interleave(widths)

    def _rows(self, signs: Sequence[float]) -> torch.Tensor | None:
        parts = [
            form.rows * sign
            for form, sign in zip(self.forms, signs, strict=True)
            if form.rows is not None
        ]
        return torch.stack(parts).sum(0) if parts else None

    def _by_triangles(self) -> Norm:
        left, right = triangle(self.all.up), triangle(self.all.down.T)
        return lambda signs: float(((left * self._columns(signs)) @ right.T).norm())


def triangle(columns: torch.Tensor) -> torch.Tensor:
    """R of QR: the columns in coordinates of the space they span."""
    found: torch.Tensor = torch.linalg.qr(columns, mode="r").R
    return found


def _as_defined(factor: Factor, form: Form, weight: TensorRef | None) -> bool:
    """Whether a form is its factor at some rows, by its plain definition; two stored sides are that."""
    if as_low_rank(factor) is not None:
        return True
    count = factor.shape[0]
    start = int(torch.randint(max(1, count - PROBED), (), generator=_seeded(count)))
    rows = (start, min(count, start + PROBED))
    meant, up = factor.dense(rows), form.up[slice(*rows)]
    value = up @ form.down
    reach = up.norm(dim=1) * float(form.down.norm())
    if form.rows is not None and weight is not None:
        own = weight.slice(0, *rows).read().double() * form.rows[slice(*rows), None]
        value, reach = value + own, reach + own.norm(dim=1)
    return bool(((meant - value).norm(dim=1) <= ALIKE * reach).all())


def _seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _densely(whole: WeightedSum, stored: Factor | None, weight: TensorRef | None) -> Measured:
    base = None if weight is None else float(weight.read().double().norm())
    if stored is None:
        size = distance_in_parallel(whole, whole).left
        apart = Distance(size, size, 0.0)
    else:
        apart = distance_in_parallel(whole, stored)
    if len(whole.terms) == 1:
        return Measured(apart, [apart.left], base)
    sizes = [abs(by) * distance_in_parallel(part, part).left for by, part in whole.terms]
    return Measured(apart, sizes, base)


def in_coordinates(
    whole: Form, up: torch.Tensor, down: torch.Tensor
) -> tuple[Factor, torch.Tensor, torch.Tensor]:
    """whole, up and down in orthonormal coordinates of the spaces that they span: small, with the same
    norms, angles and singular values."""
    left = triangle(torch.cat([whole.up, up], dim=1))
    right = triangle(torch.cat([whole.down, down]).T)
    count = whole.up.shape[1]
    core = left[:, :count] @ right[:, :count].T
    return Leaf(computed(Held(core))), left[:, count:], right[:, count:].T.contiguous()
