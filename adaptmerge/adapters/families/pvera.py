"""PVeRA: VeRA whose inner coordinates are random; their mean is what an adapter computes.

The first half of the inner vectors gives the mean of a normal distribution, the second half the
logarithm of its variance, which only training (or sampling at inference) looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Diag, Expanded, Factor, Leaf, Product
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Pvera(Expanded):
    """diag(up_scale) up diag(mean scale) mean down, with up (out, r).

    down_scale (2r,) and down (2r, in) hold the mean's r rows, then those of the variance.
    """

    family: ClassVar[str] = "pvera"
    up: TensorRef
    up_scale: TensorRef
    down: TensorRef
    down_scale: TensorRef

    def expand(self) -> Factor:
        rank = self.up.shape[1]
        inner = Diag(self.down_scale.slice(0, 0, rank)), Leaf(self.down.slice(0, 0, rank))
        return Product((Diag(self.up_scale), Leaf(self.up), *inner))
