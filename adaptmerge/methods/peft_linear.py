"""peft-linear: what PEFT's add_weighted_adapter(combination_type="linear") computes, bit for bit.

It averages A and B apart: A' = sum sign(ws) sqrt|ws| A, B' = sum sqrt|ws| B, so B'A' has cross terms and
is NOT the sum of the deltas (errors of 60-125 % are usual). For compatibility only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.weight_edits import delta_of, refitted
from adaptmerge.algebra.factors import Rows, Term
from adaptmerge.algebra.low_rank import LowRank, as_low_rank
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.methods.method import Meeting, Member, Method
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class SideAverage:
    """(sum of up_weights * ups) @ (sum of down_weights * downs)."""

    ups: tuple[TensorRef, ...]
    up_weights: tuple[float, ...]
    downs: tuple[TensorRef, ...]
    down_weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.ups[0].shape[0], self.downs[0].shape[1]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        up = sum(w * ref.read().double() for w, ref in zip(self.up_weights, self.ups, strict=True))
        pairs = zip(self.down_weights, self.downs, strict=True)
        down = sum(w * ref.read().double() for w, ref in pairs)
        assert isinstance(up, torch.Tensor)
        assert isinstance(down, torch.Tensor)
        return (up[slice(*rows)] if rows else up) @ down

    def thin(self) -> list[Term]:
        up = _like_peft(self.ups, self.up_weights)
        return [Term(up, _like_peft(self.downs, self.down_weights), 1.0)]


def _like_peft(refs: Sequence[TensorRef], weights: Sequence[float]) -> torch.Tensor:
    """The sum in PEFT's own order of operations, in float32; storing rounds it as PEFT does."""
    values = torch.stack([ref.read() for ref in refs])
    shaped = torch.tensor(weights).view(-1, *(1 for _ in values.shape[1:]))
    return (values * shaped).sum(dim=0)


def side_average(meeting: Meeting) -> Edit:
    """PEFT's rule. Raises CannotMerge where PEFT has none: other factors than LoRA, unequal ranks."""
    return refitted(meeting.members[0].edit, _averaged(meeting.site, meeting.members))


def _averaged(site: Site, members: Sequence[Member]) -> SideAverage:
    pairs = [_pair(site, member) for member in members]
    ranks = [pair.rank for pair in pairs]
    if len(set(ranks)) > 1:
        raise CannotMerge(
            f"peft-linear needs equal ranks, found {ranks}: use linear", where=str(site)
        )
    scaled = [m.weight * pair.scale for m, pair in zip(members, pairs, strict=True)]
    roots = tuple(math.sqrt(abs(value)) for value in scaled)
    signed = tuple(math.copysign(root, value) for root, value in zip(roots, scaled, strict=True))
    return SideAverage(
        tuple(pair.up for pair in pairs), roots, tuple(pair.down for pair in pairs), signed
    )


def _pair(site: Site, member: Member) -> LowRank:
    factor = delta_of(member.edit)
    pair = None if factor is None else as_low_rank(factor)
    if pair is None:
        raise CannotMerge("peft-linear is defined for plain LoRA only: use linear", where=str(site))
    return pair


METHOD = Method(
    name="peft-linear",
    summary="compatibility: PEFT's averaging of A and B apart; not the sum of the deltas",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    rules={"add": side_average},
    reduce=False,
    promise=side_average,
    caution="peft-linear averages A and B apart for compatibility: this is not the sum of the deltas",
    linear=False,
    gauge_invariant=False,
)
