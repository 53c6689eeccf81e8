"""MiSS, formerly Bone: one small block added to every shard of the inputs (Kang and Yin 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef, computed, join


@dataclass(frozen=True, slots=True)
class Shards:
    """The (rank, width) matrix that is 1 where column modulo rank is the row: it sums shards."""

    rank: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rank, self.width

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        columns = torch.arange(self.width) % self.rank
        return (torch.arange(self.rank)[:, None] == columns[None, :]).float()


@dataclass(frozen=True, slots=True)
class Miss:
    """W[o, i] + block[i mod r, o] with block (r, out): exactly of rank r, for any input width.

    tiled: block is (r, n) and repeated along the outputs, block[i mod r, o mod n].
    """

    kind: ClassVar[str] = "miss"
    family: ClassVar[str] = "miss"
    site: Site
    block: TensorRef
    tiled: bool = False

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta for the input width of a base weight (out, in)."""
        return self._for(weight.shape[0], weight.shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        delta = self._for(*weight.shape).dense()
        return weight + delta.to(weight)

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why it is not for a weight of that shape; None if it is."""
        width = self.block.shape[1]
        if shape[0] == width or (self.tiled and shape[0] % width == 0):
            return None
        return f"a block for {width} outputs does not fit a weight of {list(shape)}"

    def _for(self, rows: int, columns: int) -> Factor:
        rank, width = self.block.shape
        repeated = join([self.block.T] * (rows // width), 0)
        return low_rank(repeated, computed(Shards(rank, columns)))


@dataclass(frozen=True, slots=True)
class MissBat:
    """W + W_jk M_j + M_j on every (r, r) block W_jk of W; blocks (out / r, r, r) holds the M_j."""

    kind: ClassVar[str] = "miss"
    family: ClassVar[str] = "miss"
    site: Site
    blocks: TensorRef

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        count, rank, _ = self.blocks.shape
        blocks = self.blocks.read().to(weight)[:, None]
        parts = weight.reshape(count, rank, weight.shape[1] // rank, rank).transpose(1, 2)
        moved = parts + parts @ blocks + blocks
        return moved.transpose(1, 2).reshape(weight.shape)

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why it is not for a weight of that shape; None if it is."""
        count, rank, _ = self.blocks.shape
        if shape[0] == count * rank and shape[1] % rank == 0:
            return None
        return f"{count} blocks of {rank} do not fit a weight of {list(shape)}"
