"""HiRA: the weight times a low-rank matrix, element by element, added to it (Huang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor, Hadamard, Leaf
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Hira:
    """W + W * (up @ down), with up (out, r) and down (r, in), kernels flattened into in."""

    kind: ClassVar[str] = "hira"
    family: ClassVar[str] = "hira"
    site: Site
    up: TensorRef
    down: TensorRef

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta on a base weight (out, in)."""
        return Hadamard(Leaf(weight), low_rank(self.up, self.down))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (1 + low_rank(self.up, self.down).dense().to(weight))
