"""QA-LoRA: a LoRA whose inputs are averaged in groups, as a quantised base groups them (Xu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Kronecker, Leaf, Product
from adaptmerge.tensors.refs import TensorRef, constant


@dataclass(frozen=True, slots=True)
class Pooled(Expanded):
    """scale * up @ down @ pool with up (out, r), down (r, in / group).

    pool gives the mean of each `group` neighbours times the number of groups, as PEFT computes it, so
    every column of down stands `group` times in the delta, times in / group / group.
    """

    family: ClassVar[str] = "lora"
    up: TensorRef
    down: TensorRef
    scale: float
    group: int

    def expand(self) -> Factor:
        ones = constant(1.0, (1, self.group), self.down.dtype)
        scale = self.scale * self.down.shape[1] / self.group
        return Product((Leaf(self.up), Kronecker(Leaf(self.down), Leaf(ones))), scale)
