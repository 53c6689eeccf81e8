"""LoKr: the Kronecker product of a small and a larger matrix or kernel (LyCORIS, Yeh et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.loha import strided, tucker
from adaptmerge.algebra.factors import Expanded, Factor, Kronecker, Leaf, Product, Sum
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class LoKr(Expanded):
    """scale * kron(left, right), each stored as (whole,), as (up, down) or as (up, core, down).

    left (a, c); right (b, d), or a kernel (b, d, *kernel): the delta is (a b, c d * kernel). `rank` is
    the one that the scale was made with; it need not show in any shape.
    rows_last: the rows of left vary fastest, as PEFT's product with a whole one-dimensional kernel.
    """

    family: ClassVar[str] = "lokr"
    left: tuple[TensorRef, ...]
    right: tuple[TensorRef, ...]
    rank: int
    scale: float
    rows_last: bool = False

    def expand(self) -> Factor:
        left = side(self.left)
        if not self.rows_last:
            return Product((Kronecker(left, side(self.right)),), self.scale)
        (kernel,) = self.right
        places = kernel.shape[2]
        slices = [kernel.slice(2, k, k + 1).reshape(*kernel.shape[:2]) for k in range(places)]
        turned = [Kronecker(Leaf(part), left) for part in slices]
        spread = tuple(strided(part, k, places) for k, part in enumerate(turned))
        return Product((Sum(spread),), self.scale)


def side(parts: tuple[TensorRef, ...]) -> Factor:
    """One side of the product as a matrix; kernels are flattened to (b, d * kernel)."""
    if len(parts) == 1:
        (whole,) = parts
        return Leaf(whole.reshape(whole.shape[0], math.prod(whole.shape[1:])))
    up, *core, down = parts
    return tucker(up, core[0] if core else None, down)
