"""VeRA kept as VeRA: the best two vectors for the weighted sum of several around the same matrices.

With up U and down D in common, sum w diag(b) U diag(d) D = (U * C) D with C = sum w b d^T. One VeRA has
C of rank 1, so its best approximation is the first singular pair of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptmerge.adapters.families.vera import Vera
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import factor_of, refitted
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Rows, Term, values, whole_term
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.methods.method import Meeting
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class FirstPair:
    """One side of the best rank-1 approximation of sum w left right^T, as a column."""

    weights: tuple[float, ...]
    lefts: tuple[TensorRef, ...]
    rights: tuple[TensorRef, ...]
    side: str

    @property
    def shape(self) -> tuple[int, int]:
        return (self.lefts if self.side == "left" else self.rights)[0].count, 1

    def dense(self, rows: Rows = None) -> torch.Tensor:
        left, right = _columns(self.lefts), _columns(self.rights)
        left = left * torch.tensor(self.weights, dtype=torch.float64)
        (q, r), (p, s) = torch.linalg.qr(left), torch.linalg.qr(right)
        u, sigma, vh = decompose.svd(r @ s.T)
        unit: torch.Tensor = q @ u[:, :1] if self.side == "left" else p @ vh[:1].T
        column: torch.Tensor = unit * sigma[0].sqrt()
        return column[slice(*rows)] if rows else column

    def thin(self) -> list[Term]:
        return whole_term(self.dense())


def _columns(refs: Sequence[TensorRef]) -> torch.Tensor:
    return torch.stack([ref.read().double().flatten() for ref in refs], dim=1)


def nearest_vera(meeting: Meeting) -> Edit:
    """The VeRA nearest to the weighted sum. Raises CannotMerge where the matrices are not the same."""
    factors = [factor_of(member.edit) for member in meeting.members]
    veras = [factor for factor in factors if isinstance(factor, Vera)]
    if len(veras) < len(factors):
        raise CannotMerge("only VeRA can stay VeRA: leave --as vera out", where=str(meeting.site))
    first = veras[0]
    for member, other in zip(meeting.members, veras, strict=True):
        if not (_same(first.up, other.up) and _same(first.down, other.down)):
            raise CannotMerge(
                f"{member.adapter} has other projections than {meeting.members[0].adapter}: their sum "
                "is no VeRA; use --as lora",
                where=str(meeting.site),
            )
    weights = tuple(member.weight for member in meeting.members)
    outer, inner = tuple(v.up_scale for v in veras), tuple(v.down_scale for v in veras)
    kept = replace(
        first,
        up_scale=values(FirstPair(weights, outer, inner, "left"), first.up_scale),
        down_scale=values(FirstPair(weights, outer, inner, "right"), first.down_scale),
    )
    return refitted(meeting.members[0].edit, kept)


@remembered
def _same(a: TensorRef, b: TensorRef) -> bool:
    return a == b or (a.shape == b.shape and same_values(a, b))
