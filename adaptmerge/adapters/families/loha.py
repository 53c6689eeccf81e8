"""LoHa: the element-wise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2022; LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Hadamard, Kronecker, Leaf, Product, Sum
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.tensors.dtypes import F32
from adaptmerge.tensors.refs import TensorRef, listed


@dataclass(frozen=True, slots=True)
class LoHa(Expanded):
    """scale * (up_1 @ down_1) * (up_2 @ down_2), of rank up to r^2; ups (out, r), downs (r, in).

    With cores (r, r, *kernel) each of the two is the kernel that `tucker` makes of its three parts.
    """

    family: ClassVar[str] = "loha"
    up_1: TensorRef
    down_1: TensorRef
    up_2: TensorRef
    down_2: TensorRef
    scale: float
    core_1: TensorRef | None = None
    core_2: TensorRef | None = None

    def expand(self) -> Factor:
        left = tucker(self.up_1, self.core_1, self.down_1)
        right = tucker(self.up_2, self.core_2, self.down_2)
        return Product((Hadamard(left, right),), self.scale)


def tucker(up: TensorRef, core: TensorRef | None, down: TensorRef) -> Factor:
    """up @ down; with a core (r, q, *kernel) between up (out, r) and down (q, in) the kernel of their
    Tucker decomposition, sum over r and q of up * core * down, as a matrix (out, in * kernel).

    Each position k of the kernel gives core_k @ down in every len(kernel)-th column.
    """
    if core is None:
        return low_rank(up, down)
    places = math.prod(core.shape[2:])
    flat = core.reshape(core.shape[0], core.shape[1], places)
    slices = [flat.slice(2, k, k + 1).reshape(*core.shape[:2]) for k in range(places)]
    inner = [strided(low_rank(part, down), k, places) for k, part in enumerate(slices)]
    return Product((Leaf(up), Sum(tuple(inner))))


def strided(factor: Factor, place: int, places: int) -> Factor:
    """The columns of a factor spread out: its column j becomes column j * places + place."""
    row = tuple(float(k == place) for k in range(places))
    return Kronecker(factor, Leaf(listed(row, (1, places), F32)))
