"""KaSA: a LoRA with singular values of its own, on a base without its smallest ones (Wang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.initialised import Part, PartSide, trailing
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Diag, Factor, Leaf, Product, Sum
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class Kasa:
    """W less its r smallest singular components, plus scale * up diag(values) down.

    up (out, r), values (r), down (r, in).
    """

    kind: ClassVar[str] = "kasa"
    family: ClassVar[str] = "lora"
    site: Site
    up: TensorRef
    values: TensorRef
    down: TensorRef
    scale: float

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        left, right = trailing(weight.float(), self.down.shape[0], 1.0)
        return weight - left.to(weight) @ right.to(weight) + self._added().dense().to(weight)

    def on(self, weight: TensorRef) -> Factor:
        """The same change of a known weight, of rank 2r."""
        part = Part(weight, "kasa", self.down.shape[0], 1.0)
        dropped = low_rank(computed(PartSide(part, 0)), computed(PartSide(part, 1)), -1.0)
        return Sum((self._added(), dropped))

    def _added(self) -> Factor:
        return Product((Leaf(self.up), Diag(self.values), Leaf(self.down)), self.scale)
