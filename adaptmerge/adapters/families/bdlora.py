"""BD-LoRA: a LoRA with one side block-diagonal, stored without its zeros (Gray et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Leaf, Misshapen, Place, Product, Sum
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class BlockDiagonal(Expanded):
    """scale * up @ down, where the side of that name is block-diagonal and stored as its blocks stacked.

    side "down": up (out, r), down (r, in / blocks); side "up": up (out, r / blocks), down (r, in).
    """

    family: ClassVar[str] = "lora"
    up: TensorRef
    down: TensorRef
    scale: float
    side: str
    blocks: int

    def __post_init__(self) -> None:
        if len(self.down.shape) != 2 or len(self.up.shape) != 2 or self.blocks < 1:
            raise Misshapen(
                f"{list(self.up.shape)} and {list(self.down.shape)} are no two matrices in "
                f"{self.blocks} blocks"
            )
        rank, inner = self.down.shape[0], self.up.shape[1]
        out = self.up.shape[0]
        whole = rank if self.side == "down" else rank / self.blocks
        cut = rank if self.side == "down" else out
        if inner != whole or cut % self.blocks:
            raise ValueError(
                f"{list(self.up.shape)} and {list(self.down.shape)} are no pair with {self.side} in "
                f"{self.blocks} diagonal blocks"
            )

    def expand(self) -> Factor:
        down = self.down.shape[1] * (self.blocks if self.side == "down" else 1)
        shape = (self.up.shape[0], down)
        return Sum(tuple(self._block(i, shape) for i in range(self.blocks)))

    def _block(self, index: int, shape: tuple[int, int]) -> Factor:
        step = self.down.shape[0] // self.blocks
        down = self.down.slice(0, index * step, (index + 1) * step)
        if self.side == "down":
            up = self.up.slice(1, index * step, (index + 1) * step)
            block = Product((Leaf(up), Leaf(down)), self.scale)
            return Place(block, shape, column=index * down.shape[1])
        rows = shape[0] // self.blocks
        up = self.up.slice(0, index * rows, (index + 1) * rows)
        return Place(Product((Leaf(up), Leaf(down)), self.scale), shape, row=index * rows)
