"""AdaLoRA: a low-rank delta with singular values of its own, some pruned away (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Diag, Expanded, Factor, Leaf, Product
from adaptmerge.tensors.refs import TensorRef

STABILISER = 1e-5  # what the formula adds to the rank that it divides by


@dataclass(frozen=True, slots=True)
class AdaLora(Expanded):
    """alpha / (initial_rank + 1e-5) * up diag(singular) down: up (out, r), singular (r, 1), down (r, in).

    r is what pruning left of `initial_rank`. Without a positive alpha, r stands in its place.
    """

    family: ClassVar[str] = "adalora"
    up: TensorRef
    singular: TensorRef
    down: TensorRef
    alpha: float
    initial_rank: int

    @property
    def scale(self) -> float:
        """The number in front."""
        alpha = self.alpha if self.alpha > 0 else self.up.shape[1]
        return alpha / (self.initial_rank + STABILISER)

    def expand(self) -> Factor:
        return Product((Leaf(self.up), Diag(self.singular), Leaf(self.down)), self.scale)
