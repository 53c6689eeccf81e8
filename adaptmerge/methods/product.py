"""product: IA3 vectors multiplied, l = prod of l_i ** w, as if the adapters acted one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Scale
from adaptmerge.algebra.factors import Rows, Term, values, whole_term
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.methods.method import Meeting, Method
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Powers:
    """prod of vector ** weight, entry by entry, as a column."""

    vectors: tuple[TensorRef, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors[0].count, 1

    def dense(self, rows: Rows = None) -> torch.Tensor:
        total = torch.ones(self.shape, dtype=torch.float64)
        for ref, weight in zip(self.vectors, self.weights, strict=True):
            total = total * self._power(ref, weight)
        return total[slice(*rows)] if rows else total

    def _power(self, ref: TensorRef, weight: float) -> torch.Tensor:
        column = ref.read().double().reshape(self.shape)
        if weight != int(weight) and bool((column <= 0).any()):
            raise InputError(
                f"tensor {ref.name!r} has entries that are not positive, which have no power of "
                f"{weight:g}: use --method linear"
            )
        return column**weight

    def thin(self) -> list[Term]:
        return whole_term(self.dense())


def powers(meeting: Meeting) -> Edit:
    """The product of the vectors, each to the power of its weight."""
    edits = [member.edit for member in meeting.members]
    vectors = tuple(edit.vector for edit in edits if isinstance(edit, Scale))
    factor = Powers(vectors, tuple(member.weight for member in meeting.members))
    first = edits[0]
    assert isinstance(first, Scale)
    return replace(first, vector=values(factor, first.vector, neutral=1.0))


METHOD = Method(
    name="product",
    summary="IA3 one after the other: l = product of l_i to the power w",
    url="https://arxiv.org/abs/2205.05638",
    rules={"scale": powers},
    promise=powers,
    linear=False,
)
