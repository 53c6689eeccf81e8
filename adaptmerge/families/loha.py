"""LoHa: the element-wise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2022; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.factors import Expanded, Factor, Hadamard, Product, low_rank
from adaptmerge.files.refs import TensorRef


@dataclass(frozen=True, slots=True)
class LoHa(Expanded):
    """scale * (up_1 @ down_1) * (up_2 @ down_2), of rank up to r^2; ups (out, r), downs (r, in)."""

    family: ClassVar[str] = "loha"
    up_1: TensorRef
    down_1: TensorRef
    up_2: TensorRef
    down_2: TensorRef
    scale: float

    def expand(self) -> Factor:
        left, right = low_rank(self.up_1, self.down_1), low_rank(self.up_2, self.down_2)
        return Product((Hadamard(left, right),), self.scale)
