"""What a fused model is run against: the base, as it was trained on, with the adapters attached to it.

Weights that are quantised anew differ from the base's by far more than an adapter adds. That they are the
right ones is told by their values. What they compute is compared with them as they would be without the
adapters, and these attached: so outputs, too, tell whether the adapters are in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adaptmerge.edits import Replace
from adaptmerge.files.dtypes import F32, DType
from adaptmerge.files.refs import computed
from adaptmerge.fuse.layout import Fused
from adaptmerge.fuse.matrix import Matrix, delta_of
from adaptmerge.fuse.plan import FusePlan
from adaptmerge.fuse.provenance import RoundTrip
from adaptmerge.fuse.quantised import View
from adaptmerge.fuse.repack import Packing
from adaptmerge.graph import Adapter, BaseReference, Edit
from adaptmerge.lazy import torch
from adaptmerge.packed import Dequantised


@dataclass(frozen=True, slots=True)
class Without:
    """A stored matrix (out, in) less all that adapters add to it."""

    stored: Dequantised
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        value = self.stored.read().double()
        for part in self.matrix.parts:
            value -= part.factor.dense().reshape(value.shape).double() * part.weight
        return value.float()


@dataclass(frozen=True, slots=True)
class Reference:
    """The base that adapters are attached to, as what replaces its weights, and both together. apart: if
    those are the fused model's own weights less the adapters, with no rounding between the two."""

    base: Adapter
    whole: Adapter
    apart: bool


def reference(plan: FusePlan, fused: View) -> Reference:
    """What a fused model is run against."""
    matrices = [one.matrix for shard in plan.shards for one in shard.made]
    # what is computed from the weight itself is another delta on another weight
    apart = plan.quantised and all(delta_of(one).is_thin for one in matrices if one.parts)
    copies: list[Edit] = list(_own(plan, fused) if apart else _trained(plan))
    steps = [step.edit for step in plan.plan.steps]
    names = BaseReference(replication=plan.inputs[0].adapter.base.replication)
    base = Adapter("base", tuple(copies) if apart else (), names)
    return Reference(base, Adapter("reference", (*copies, *steps), names), apart)


def _trained(plan: FusePlan) -> Iterator[Edit]:
    """Weights of the base as adapters were trained on them, where these are others."""
    for one in (one for shard in plan.shards for one in shard.made):
        weight = one.matrix.weight
        if isinstance(weight.source, RoundTrip):
            turned = one.transposed if isinstance(one, Fused) else _is_turned(plan, one)
            yield Replace(one.matrix.site, weight.T if turned else weight, role="base copy")


def _own(plan: FusePlan, fused: View) -> Iterator[Edit]:
    """The quantised weights of a fused model less the adapters."""
    made = (one for shard in plan.shards for one in shard.made)
    for one in (one for one in made if isinstance(one, Packing)):
        packed = fused.packed.get(f"{one.packed.module}.weight")
        if packed is not None:
            value = computed(Without(Dequantised(packed), one.matrix))
            value = value.T if _is_turned(plan, one) else value
            yield Replace(one.matrix.site, value, role="base copy")


def _is_turned(plan: FusePlan, packing: Packing) -> bool:
    return plan.base.is_transposed(packing.matrix.site)
