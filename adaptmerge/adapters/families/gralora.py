"""GraLoRA: a low-rank delta per block of the weight, k by k blocks (Jung et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Place, Product, Sum
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class GraLora(Expanded):
    """scale * the k by k blocks, each of rank r / k; downs (k, in / k, r), ups (k, r, out / k).

    Block (j, n) multiplies part n of the r rows of ups[j] with part j of the r columns of downs[n].
    up (out, h) and down (h, in), where stored, are a LoRA beside the blocks.
    """

    family: ClassVar[str] = "gralora"
    ups: TensorRef
    downs: TensorRef
    scale: float
    up: TensorRef | None = None
    down: TensorRef | None = None

    def expand(self) -> Factor:
        count = self.ups.shape[0]
        parts: list[Factor] = [self._block(j, n) for j in range(count) for n in range(count)]
        if self.up is not None and self.down is not None:
            parts.append(low_rank(self.up, self.down))
        return Product((Sum(tuple(parts)),), self.scale)

    def _block(self, row: int, column: int) -> Factor:
        count, rank, height = self.ups.shape
        width, share = self.downs.shape[1], rank // count
        rows = self.ups.slice(0, row, row + 1).reshape(rank, height)
        columns = self.downs.slice(0, column, column + 1).reshape(width, rank)
        up = rows.slice(0, column * share, (column + 1) * share)
        down = columns.slice(1, row * share, (row + 1) * share)
        shape = (count * height, count * width)
        return Place(low_rank(up.T, down.T), shape, row * height, column * width)
