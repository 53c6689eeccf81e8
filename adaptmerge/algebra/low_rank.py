"""Factors that are nothing but two stored sides: scale * up @ down."""

from __future__ import annotations

from typing import NamedTuple

from adaptmerge.algebra.factors import Factor, Leaf, Product
from adaptmerge.tensors.refs import TensorRef


def low_rank(up: TensorRef, down: TensorRef, scale: float = 1.0) -> Product:
    """scale * up @ down from two stored matrices, up (out, r) and down (r, in)."""
    return Product((Leaf(up), Leaf(down)), scale)


class LowRank(NamedTuple):
    """The stored sides of a factor that is nothing but scale * up @ down."""

    up: TensorRef
    down: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        return self.up.shape[1]


def as_low_rank(factor: Factor) -> LowRank | None:
    """The sides of a plain scale * up @ down of two stored matrices, else None."""
    if isinstance(factor, Product) and len(factor.parts) == 2:
        up, down = factor.parts
        if isinstance(up, Leaf) and isinstance(down, Leaf):
            return LowRank(up.ref, down.ref, factor.scale)
    return None
