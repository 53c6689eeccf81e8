"""VeRA: two vectors per site around matrices that all sites share (Kopiczko et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Diag, Expanded, Factor, Leaf, Product
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Vera(Expanded):
    """diag(up_scale) up diag(down_scale) down, with up (out, r) and down (r, in) cut from shared ones."""

    family: ClassVar[str] = "vera"
    up: TensorRef
    up_scale: TensorRef
    down: TensorRef
    down_scale: TensorRef

    def expand(self) -> Factor:
        return Product((Diag(self.up_scale), Leaf(self.up), Diag(self.down_scale), Leaf(self.down)))
