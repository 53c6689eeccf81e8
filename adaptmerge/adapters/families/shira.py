"""SHiRA: a sparse delta at chosen places of the weight (Bhardwaj et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Shira:
    """W + values (n,) at places (2, n), rows then columns; values that share a place add up.

    rank is that of the LoRA with as many values, n / (out + in), which the places need not tell.
    """

    kind: ClassVar[str] = "shira"
    family: ClassVar[str] = "shira"
    site: Site
    values: TensorRef
    places: TensorRef
    rank: int

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = places_in(self.places, *weight.shape).to(weight.device)
        return weight.index_put((rows, columns), self.values.read().to(weight), accumulate=True)
