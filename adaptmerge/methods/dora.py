"""Weighted sums of DoRA, LoRA and output-side IA3 as one DoRA of rank sum r, exactly.

With c_t = m_t / |W + D_t| per output (1 for a plain delta, l for IA3, where D_t = 0) and
gain = 1 + sum w (c_t - 1), the sum of the effects is

    W + sum w (W'_t - W) = diag(gain) W + sum w diag(c_t) D_t = diag(gain) (W + D)
    with D = sum w diag(c_t / gain) D_t, so m = gain |W + D|.

It needs the base only for the norms of its rows; the dense delta has full rank all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import (
    Dora,
    Scale,
    expect_norms,
    factor_of,
    norms_of,
    share_of,
)
from adaptmerge.algebra.factors import (
    Diag,
    Factor,
    Leaf,
    Product,
    Rows,
    Sum,
    Term,
    Values,
    whole_term,
)
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.methods.method import Meeting, Member
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed, constant

CANCELLED = 1e-12  # a gain below this leaves nothing of a row


@dataclass(frozen=True, slots=True)
class Blend:
    """The members of a sum, each with its weight, on one base weight."""

    weights: tuple[float, ...]
    edits: tuple[Edit, ...]
    weight: TensorRef

    @property
    def axis(self) -> int:
        """The axis that DoRA norms over: that of the inputs, of an embedding that of the tokens."""
        return 0 if self.edits[0].site.layer.kind == "embedding" else 1


def dora_sum(meeting: Meeting) -> Edit:
    """The one DoRA that has the summed effect. Without a base weight only the approximation is left."""
    if meeting.weight is None:
        return _approximate(meeting)
    weights = tuple(member.weight for member in meeting.members)
    blend = Blend(weights, tuple(member.edit for member in meeting.members), meeting.weight)
    factor = Sum(_terms(blend))
    count = meeting.weight.shape[1 - blend.axis]
    kernel = meeting.site.layer.kernel
    shape = (1, count, *(1 for _ in kernel)) if kernel else (count,)
    magnitude = Values(Magnitude(blend, factor), shape, _dtype(meeting.members))
    return Dora(meeting.site, factor, computed(magnitude))


def _terms(blend: Blend) -> tuple[Factor, ...]:
    terms: list[Factor] = []
    for index, (weight, edit) in enumerate(zip(blend.weights, blend.edits, strict=True)):
        added = factor_of(edit)
        if added is not None:
            share = Diag(computed(MagnitudePart(blend, index)))
            parts = (added, share) if blend.axis == 0 else (share, added)
            terms.append(Product(parts, weight))
    return tuple(terms) or (_empty(blend.weight),)


def _empty(weight: TensorRef) -> Factor:
    """A delta of rank 1 that is zero, for sums of scales alone."""
    up, down = (weight.shape[0], 1), (1, weight.shape[1])
    return Product((Leaf(constant(0.0, up, weight.dtype)), Leaf(constant(0.0, down, weight.dtype))))


def _dtype(members: Sequence[Member]) -> DType | None:
    found = [m.edit.magnitude.dtype for m in members if isinstance(m.edit, Dora)]
    return found[0] if found else None


def share(edit: Edit, weight: TensorRef) -> torch.Tensor | float:
    """c of one edit: what its outputs are multiplied by beside what is added."""
    if isinstance(edit, Dora):
        return share_of(edit, weight)
    return edit.vector.read().double().flatten() if isinstance(edit, Scale) else 1.0


@remembered
def gain(blend: Blend) -> torch.Tensor:
    """1 + sum of w (c - 1), (out,). Raises CannotMerge where the weights cancel a whole row."""
    _expect_norms(blend)
    pairs = zip(blend.weights, blend.edits, strict=True)
    total = torch.ones(blend.weight.shape[1 - blend.axis], dtype=torch.float64)
    for weight, edit in pairs:
        total += weight * (share(edit, blend.weight) - 1.0)
    if bool((total.abs() < CANCELLED).any()):
        raise CannotMerge(
            "these weights cancel a row of the base itself, which no DoRA holds: pass --as lora",
            where=str(blend.edits[0].site),
        )
    return total


def _expect_norms(blend: Blend) -> None:
    """The directions of all members: those of the DoRAs, and all of them for the norms of the sum."""
    added = [factor for edit in blend.edits if (factor := factor_of(edit)) is not None]
    expect_norms(blend.weight, added, blend.axis)


@dataclass(frozen=True, slots=True)
class MagnitudePart:
    """c / gain of one member, a tensor still to be computed."""

    blend: Blend
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blend.weight.shape[1 - self.blend.axis],)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        total = gain(self.blend)
        return share(self.blend.edits[self.index], self.blend.weight) / total


@dataclass(frozen=True, slots=True)
class Magnitude:
    """gain |W + D|, as a column."""

    blend: Blend
    factor: Factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.blend.weight.shape[1 - self.blend.axis], 1

    def dense(self, rows: Rows = None) -> torch.Tensor:
        norms = norms_of(self.blend.weight, self.factor, self.blend.axis)
        column: torch.Tensor = (gain(self.blend) * norms)[:, None]
        return column[slice(*rows)] if rows else column

    def thin(self) -> list[Term]:
        return whole_term(self.dense())


def _approximate(meeting: Meeting) -> Edit:
    """Deltas and magnitudes summed apart, for weights that sum to 1: right only for equal magnitudes."""
    members = meeting.members
    if meeting.rest:
        raise CannotMerge(
            f"without the base, DoRA magnitudes can only be averaged: the weights sum to "
            f"{meeting.total:g}, not 1; pass --base DIR",
            where=str(meeting.site),
        )
    first = members[0].edit
    assert isinstance(first, Dora)
    terms = [(m.weight, m.edit) for m in members if isinstance(m.edit, Dora)]
    factor = Sum(tuple(Product((edit.factor,), w) for w, edit in terms))
    magnitudes = Sum(
        tuple(Product((Leaf(e.magnitude.reshape(e.magnitude.count, 1)),), w) for w, e in terms)
    )
    stored = Values(magnitudes, first.magnitude.shape, first.magnitude.dtype)
    return Dora(meeting.site, factor, computed(stored))
