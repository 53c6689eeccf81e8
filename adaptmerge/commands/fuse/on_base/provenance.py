"""What the base was when an adapter was trained on it: its weights after quantisation, not as stored.

An adapter trained on a quantised base (QLoRA, Dettmers et al. 2023) was fitted to dq(q(W)), the weights
that the quantised layers compute with. Fused into W itself it meets weights it never saw.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Adapter, Kind, Note, Site
from adaptmerge.bases.base import Base
from adaptmerge.lazy import torch
from adaptmerge.schemes.coded import dequantised
from adaptmerge.schemes.scheme import quantisers
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef, computed
from adaptmerge.tensors.row_source import RowSource

ORIGINAL, QUANTISED = "original", "quantised"
TRAINED_ON = (ORIGINAL, "nf4", "nf4,double", "fp4", "fp4,double", "int8", QUANTISED)
BY_ROWS = "int8"  # each row is quantised by itself
MARKS = ("bnb", "4bit", "8bit", "nf4", "int8", "int4", "4-bit", "8-bit", "qlora")


@dataclass(frozen=True, slots=True)
class RoundTrip(RowSource):
    """A weight (out, in) as a quantised layer computes with it, in float32."""

    ref: TensorRef
    trained_on: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def compute(self, start: int, stop: int) -> torch.Tensor:
        from adaptmerge.schemes.bitsandbytes.codes import round_trip

        if self.trained_on == BY_ROWS or (start, stop) == (0, self.shape[0]):
            return round_trip(self.ref.slice(0, start, stop).read(), self.trained_on)
        # the scales of these rows may need others
        coded = quantisers()[self.trained_on].quantise(self.ref.name, self.ref, F32)
        return dequantised(coded, (start, stop))


def as_trained(base: Base, trained_on: str | None, linears: Collection[str]) -> Base:
    """The base with the weights of its linear layers as quantised ones compute with them."""
    if trained_on is None:
        return base
    tensors = dict(base.tensors)
    for module in linears:
        name = f"{module}.weight"
        if name in tensors and len(tensors[name].shape) == 2:
            turned = base.is_transposed(Site(module))
            ref = tensors[name].T if turned else tensors[name]
            quantised = computed(RoundTrip(ref, trained_on), name)
            tensors[name] = quantised.T if turned else quantised
    return replace(base, tensors=tensors)


def provenance(adapters: Mapping[str, Adapter], said: str | None) -> tuple[str | None, list[Note]]:
    """The quantisation that the adapters were trained on, as said, else as recorded; and Notes."""
    recorded = {a.base.trained_on for a in adapters.values() if a.base.trained_on}
    if said is None and len(recorded) == 1:
        found = recorded.pop()
        note = Note(Kind.INFO, f"trained on a base quantised as {found}, as recorded")
        return None if found == ORIGINAL else found, [note]
    if said is not None:
        return None if said in (ORIGINAL, QUANTISED) else said, []
    marked = {n: a.base.name for n, a in adapters.items() if looks_quantised(a.base.name)}
    return None, [
        Note(
            Kind.ASSUMED,
            f"its base is called {base}, so it looks trained on a quantised base, but is fused into the "
            "original weights, for which it was not trained: pass --trained-on nf4,double (or nf4, int8), "
            "or --trained-on original if it was",
            input=name,
        )
        for name, base in marked.items()
    ]


def looks_quantised(name: str | None) -> bool:
    """Whether the name of a base says that it is quantised."""
    return any(mark in (name or "").lower() for mark in MARKS)
