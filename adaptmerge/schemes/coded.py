"""Quantised weights in checkpoints: which stored tensors make one up, and what they stand for.

A scheme is one module of `adaptmerge.schemes` with a constant SCHEME. It knows a layout and nothing of
rounding: it finds coded weights, reads rows of them as codes on a grid, and stores codes on a grid again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.row_source import RowSource

if TYPE_CHECKING:
    import torch

    from adaptmerge.schemes.grids import BlockGrid


class CodedWeight(Protocol):
    """One quantised weight (out, in) of a checkpoint. Data: refs and numbers, no tensors."""

    @property
    def module(self) -> str:
        """The module whose weight it is, as the checkpoint names it; one matrix of a parameter that stacks
        several is named PARAMETER[3]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """All stored tensors that make it up, by their names in the checkpoint, the codes first; NAME[3] is
        an entry of the first axis of NAME."""

    def grid(self, rows: tuple[int, int]) -> tuple[torch.Tensor, BlockGrid]:
        """The codes (rows, in), uint8, of some rows and the grid that they lie on, in float32."""

    def pack(self, codes: torch.Tensor, grid: BlockGrid) -> dict[str, torch.Tensor]:
        """What is stored for codes (out, in) on a grid of all rows: those of `tensors` that change with
        them, in their dtypes and shapes. Codes and grid as they were read give the stored bytes."""

    def nearest_scales(self, scale: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor | None:
        """The storable scales nearest to these (rows, blocks); None where scales cannot be chosen freely
        enough to be fitted (powers of two, blocks of several rows, blocks across rows)."""

    def __hash__(self) -> int:
        """Coded weights are data."""


@dataclass(frozen=True, slots=True)
class Dequantised(RowSource):
    """A coded weight as the values that it stands for, in float32: a source of refs."""

    weight: CodedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def compute(self, start: int, stop: int) -> torch.Tensor:
        return dequantised(self.weight, (start, stop))


def named(weight: CodedWeight) -> str:
    """The name of the values of a coded weight: of the module's weight, or NAME[3] in a stack of them."""
    return weight.module if weight.module.endswith("]") else f"{weight.module}.weight"


def stacked(name: str) -> tuple[str, int | None]:
    """The tensor that a name is of, and which of the entries of its first axis; None for all of it."""
    whole, bracket, number = name.removesuffix("]").rpartition("[")
    return (whole, int(number)) if bracket else (name, None)


def stands_alone(weight: CodedWeight) -> bool:
    """Whether the tensors of a coded weight hold no other, as those of a stack do."""
    return all(stacked(name)[1] is None for name in weight.tensors)


def dequantised(weight: CodedWeight, rows: tuple[int, int]) -> torch.Tensor:
    """Rows of a coded weight (rows, in) in float32."""
    from adaptmerge.lazy import torch

    codes, grid = weight.grid(rows)
    out = torch.empty(codes.shape, dtype=torch.float32)
    return grid.values(codes, slice(0, weight.shape[1]), out)
