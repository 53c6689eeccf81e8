"""The low-rank delta of an edit that depends on the base, where its family knows one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from adaptmerge.adapters.weight_edits import made_for
from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class Side:
    """One side of what `edit` adds to `weight`: its `sides(W)` are up (out, rank) and down (rank, in)."""

    edit: Any
    weight: TensorRef
    rank: int
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        out, width = self.weight.shape
        return (out, self.rank) if self.index == 0 else (self.rank, width)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        with made_for(self.edit, self.weight):
            value: torch.Tensor = self.edit.sides(self.weight.read().double())[self.index]
            return value


@dataclass(frozen=True, slots=True)
class OnBase(Expanded):
    """edit.apply(W) - W, of rank at most `rank`."""

    family: ClassVar[str] = ""
    edit: Any
    weight: TensorRef
    rank: int

    def expand(self) -> Factor:
        up, down = (computed(Side(self.edit, self.weight, self.rank, index)) for index in (0, 1))
        return low_rank(up, down)
