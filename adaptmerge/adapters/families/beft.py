"""BEFT: a vector added to a bias (Huang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Leaf, Product
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Beft(Expanded):
    """The vector (1, out) as a column."""

    family: ClassVar[str] = "beft"
    vector: TensorRef

    def expand(self) -> Factor:
        return Product((Leaf(self.vector.reshape(self.vector.count, 1)),))
