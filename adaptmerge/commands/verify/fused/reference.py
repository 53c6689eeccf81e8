"""What a fused model is run against: the base, as it was trained on, with the adapters attached to it.

Weights that are quantised anew differ from the base's by far more than an adapter adds. That they are the
right ones is told by their values. What they compute is compared with them as they would be without the
adapters, and these attached: so outputs, too, tell whether the adapters are in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adaptmerge.adapters.graph import Adapter, BaseReference, Site
from adaptmerge.adapters.stored_edits import Replace
from adaptmerge.commands.fuse.on_base.provenance import RoundTrip
from adaptmerge.commands.fuse.pieces.layout import Fused
from adaptmerge.commands.fuse.plan import FusePlan
from adaptmerge.lazy import torch
from adaptmerge.rounding.codes import CodedMatrix
from adaptmerge.rounding.matrix import Matrix, delta_of
from adaptmerge.schemes.view import View
from adaptmerge.tensors.refs import TensorRef, computed
from adaptmerge.tensors.row_source import RowSource


@dataclass(frozen=True, slots=True)
class Without(RowSource):
    """A stored matrix (out, in) less all that adapters add to it, in float32."""

    stored: TensorRef
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def compute(self, start: int, stop: int) -> torch.Tensor:
        rows = start, stop
        value = self.stored.slice(0, *rows).read().double()
        for part in self.matrix.parts:
            value -= part.factor.dense(rows).reshape(value.shape).double() * part.weight
        return value.float()


@dataclass(frozen=True, slots=True)
class Reference:
    """The base that adapters are attached to, as what replaces its weights, and both together.

    settled: the sites whose weights are the fused model's own, less the adapters: no rounding lies between.
    """

    base: Adapter
    whole: Adapter
    settled: frozenset[Site]


def reference(plan: FusePlan, fused: View) -> Reference:
    """What a fused model is run against."""
    matrices = [one.matrix for shard in plan.shards for one in shard.made]
    # what is computed from the weight itself is another delta on another weight
    apart = plan.quantised and all(delta_of(one).is_thin for one in matrices if one.parts)
    copies = list(_own(plan, fused) if apart else _trained(plan))
    settled = frozenset(copy.site for copy in copies) if apart else frozenset[Site]()
    steps = [step.edit for step in plan.plan.steps]
    names = BaseReference(replication=plan.inputs[0].adapter.base.replication)
    base = Adapter("base", tuple(copies) if apart else (), names)
    return Reference(base, Adapter("reference", (*copies, *steps), names), settled)


def _made(plan: FusePlan) -> Iterator[tuple[str, Fused | CodedMatrix, bool]]:
    """What is computed, with its tensor's name, and whether the base has it as (in, out)."""
    for shard in plan.shards:
        for name, one in zip(shard.names, shard.made, strict=True):
            turned = one.transposed if isinstance(one, Fused) else None
            yield (
                name,
                one,
                plan.bases.values.is_transposed(one.matrix.site) if turned is None else turned,
            )


def _trained(plan: FusePlan) -> Iterator[Replace]:
    """Weights of the base as adapters were trained on them, where these are others."""
    for _, one, turned in _made(plan):
        weight = one.matrix.weight
        if isinstance(weight.source, RoundTrip):
            yield Replace(one.matrix.site, weight.T if turned else weight, role="base copy")


def _own(plan: FusePlan, fused: View) -> Iterator[Replace]:
    """The weights of a fused model less the adapters, where all that is added is in their place."""
    for name, one, turned in _made(plan):
        name = f"{one.weight.module}.weight" if isinstance(one, CodedMatrix) else name
        stored = fused.values.tensors.get(name)
        if stored is None or one.matrix.tokens:
            continue
        stored = stored.T if turned else stored
        if stored.shape == one.matrix.shape:
            value = computed(Without(stored, one.matrix))
            yield Replace(one.matrix.site, value.T if turned else value, role="base copy")
