"""Rotations merged along the rotation group: R = exp(sum of w log R_t), block by block.

The weighted mean of rotations is a rotation, so OFT, BOFT and HRA stay what they are. It is not the sum
of what they add to a base (for that: --as lora with --base), and it does not compose: the merge of
merges depends on the order. Half turns have no unique logarithm and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.families.boft import Boft
from adaptmerge.adapters.families.hra import Hra
from adaptmerge.adapters.families.oft import Oft
from adaptmerge.adapters.graph import Edit, Kind
from adaptmerge.algebra.factors import Leaf, Product, Sum, values
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.methods.method import Meeting
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed, constant

Turning = Oft | Boft | Hra


@dataclass(frozen=True, slots=True)
class Mean:
    """What the mean rotation is stored as, still to be computed."""

    like: Turning
    edits: tuple[Turning, ...]
    weights: tuple[float, ...]
    shape: tuple[int, ...]
    store: DType

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        wide = torch.empty(0, dtype=torch.float64)
        try:
            blocks = [rotation.nearest(edit.rotation(wide)) for edit in self.edits]
            return self.like.stored(mean_rotation(blocks, self.weights)).reshape(self.shape)
        except ValueError as problem:
            raise CannotMerge(_advice(problem), where=str(self.like.site)) from None


@dataclass(frozen=True, slots=True)
class MeanReflections:
    """The reflections of the mean of chains of reflections: all lie in the span of the members' own."""

    edits: tuple[Hra, ...]
    weights: tuple[float, ...]
    store: DType

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.edits[0].directions.shape[0]
        return first, sum(edit.directions.shape[1] for edit in self.edits)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        stacked = torch.cat([edit.directions.read().double() for edit in self.edits], dim=1)
        span = torch.linalg.qr(stacked).Q
        blocks = [self._within(edit, span) for edit in self.edits]
        try:
            turned = mean_rotation(blocks, self.weights)[0]
            directions: torch.Tensor = span @ rotation.reflections(turned, self.shape[1])
        except ValueError as problem:
            raise CannotMerge(_advice(problem), where=str(self.edits[0].site)) from None
        return directions

    def _within(self, edit: Hra, span: torch.Tensor) -> torch.Tensor:
        """H in the coordinates of the span, one block (1, R, R): outside of it H does nothing."""
        up, down = edit.sides(span.T)
        return (torch.eye(span.shape[1]).to(span) + up @ (down @ span))[None]


def mean_rotation(blocks: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """exp(sum of w log R), (n, b, b). Raises ValueError for half turns and mirrors."""
    total = torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        total = total + weight * rotation.log(block)
    return rotation.exp(total)


def _advice(problem: ValueError) -> str:
    return f"{problem}; their deltas can be summed with --as lora and --base DIR"


def mean_oft(meeting: Meeting) -> Edit:
    """One OFT with the exact Cayley transform of the mean rotation."""
    edits = tuple(m.edit for m in meeting.members if isinstance(m.edit, Oft))
    _alike(meeting, [(e.vectors.shape, e.repeated, e.blocks) for e in edits], "blocks")
    if any(edit.terms for edit in edits):
        meeting.say(Kind.APPROXIMATED, "cut Cayley series were taken as the nearest rotations")
    like = replace(edits[0], terms=0, last=1.0, radius=None)
    return replace(like, vectors=computed(_mean(meeting, like, edits, edits[0].vectors)))


def mean_boft(meeting: Meeting) -> Edit:
    """One BOFT: each butterfly factor's mean rotation, and scales summed in their deviation from 1."""
    edits = tuple(m.edit for m in meeting.members if isinstance(m.edit, Boft))
    _alike(meeting, [e.blocks.shape for e in edits], "butterfly factors")
    if edits[0].blocks.shape[0] > 1 and len(edits) > 1:
        meeting.say(Kind.APPROXIMATED, "butterfly factors were averaged one by one")
    first = edits[0]
    ones = constant(1.0, first.scales.shape, first.scales.dtype)
    terms = [(m.weight, e.scales) for m, e in zip(meeting.members, edits, strict=True)]
    columns = [(w, r.reshape(r.count, 1)) for w, r in (*terms, (1.0 - meeting.total, ones))]
    scales = Sum(tuple(Product((Leaf(ref),), weight) for weight, ref in columns))
    return replace(
        first,
        blocks=computed(_mean(meeting, first, edits, first.blocks)),
        scales=values(scales, first.scales, neutral=1.0),
    )


def mean_hra(meeting: Meeting) -> Edit:
    """One HRA with as many reflections as all members have together."""
    edits = tuple(m.edit for m in meeting.members if isinstance(m.edit, Hra))
    _alike(meeting, [e.directions.shape[0] for e in edits], "widths")
    weights = tuple(member.weight for member in meeting.members)
    mean = MeanReflections(edits, weights, edits[0].directions.dtype)
    return replace(edits[0], directions=computed(mean), orthogonalise=False)


def _mean(meeting: Meeting, like: Turning, edits: tuple[Turning, ...], stored: TensorRef) -> Mean:
    weights = tuple(member.weight for member in meeting.members)
    return Mean(like, edits, weights, stored.shape, stored.dtype)


def _alike(meeting: Meeting, found: Sequence[object], what: str) -> None:
    if len(set(found)) > 1:
        raise CannotMerge(
            f"{what} differ: {', '.join(map(str, found))}; --as lora with --base DIR sums their deltas",
            where=str(meeting.site),
        )
