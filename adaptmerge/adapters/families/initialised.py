"""LoRA whose initialisation took a part of the base's weight into the adapter, as the base says it again.

PiSSA (Meng et al. 2024) takes the leading singular components, OLoRA (Büyükakyüz 2024) the leading
columns of a QR decomposition; what is trained beside the adapter is the weight without that part.
PEFT moreover rounds that to the base's dtype, which is left out here: it is no part of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Factor, Leaf, Product, Sum
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class Initialised:
    """W - scale * B0 A0 + scale * B A with up B (out, r), down A (r, in) and B0, A0 from W by `init`."""

    kind: ClassVar[str] = "initialised"
    family: ClassVar[str] = "lora"
    site: Site
    up: TensorRef
    down: TensorRef
    scale: float
    init: str

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        first = PARTS[self.init](weight.float(), self.rank, self.scale)
        taken = first[0].to(weight) @ first[1].to(weight)
        return weight - taken + low_rank(self.up, self.down, self.scale).dense().to(weight)

    def on(self, weight: TensorRef) -> Factor:
        """The same change of a known weight, of rank 2r."""
        part = Part(weight, self.init, self.rank, self.scale)
        taken = low_rank(computed(PartSide(part, 0)), computed(PartSide(part, 1)), -1.0)
        return Sum((low_rank(self.up, self.down, self.scale), taken))


def singular(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rank` leading singular components; the scale cancels in PiSSA's halves of them."""
    left, values, right = decompose.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def orthogonal(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """scale times the first columns of Q and rows of R."""
    unit, triangle = torch.linalg.qr(weight)
    return scale * unit[:, :rank], triangle[:rank]


def trailing(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rank` smallest singular components."""
    left, values, right = decompose.svd(weight, full_matrices=False)
    return left[:, -rank:] * values[-rank:], right[-rank:]


# In float32, as PEFT decomposes: another precision would take another part where values lie close.
PARTS: Mapping[str, Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]] = {
    "pissa": singular,
    "olora": orthogonal,
    "kasa": trailing,
}


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a weight (out, in) that an initialisation takes: its two sides flat, one by one."""

    weight: TensorRef
    init: str
    rank: int
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rank * sum(self.weight.shape),)

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        sides = PARTS[self.init](self.weight.read().float(), self.rank, self.scale)
        return torch.cat([side.flatten() for side in sides])


@dataclass(frozen=True, slots=True)
class PartSide:
    """One side of a part: up (out, rank) for index 0, down (rank, in) for 1."""

    part: Part
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        out, inner = self.part.weight.shape
        return (out, self.part.rank) if self.index == 0 else (self.part.rank, inner)

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        both = computed(self.part).read()  # by a ref, so that a job decomposes the weight once
        cut = self.part.rank * self.part.weight.shape[0]
        return (both[:cut] if self.index == 0 else both[cut:]).reshape(self.shape)


def since(up: TensorRef, down: TensorRef, first: tuple[TensorRef, TensorRef], scale: float) -> Sum:
    """scale * (B A - B0 A0): what an adapter moved since it was initialised, whatever the base is."""
    return Sum((low_rank(up, down, scale), Product((Leaf(first[0]), Leaf(first[1])), -scale)))
