"""Tensors of a weight that is quantised anew: sources that compute what a library would store of values.

A coded weight made of such refs is read like one in a file. Codes are computed for the rows that are asked
for; what is read as a whole, being small, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from adaptmerge.lazy import torch
from adaptmerge.tensors.caches import remembered
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.row_source import RowSource

PIECE = 1 << 20  # entries that are quantised at once
SMALL = 16  # entries of a weight for each byte of what is kept when it was read as a whole: scales
KEPT = 32  # of them, and of weights that are quantised as a whole


class Encoder(Protocol):
    """How values (rows, in) become stored tensors, by their names there. Data."""

    def quantise(self, values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What is stored for values; each row by itself where it is used by `OfRows`."""

    def __hash__(self) -> int:
        """Encoders are data."""


@dataclass(frozen=True, slots=True)
class OfRows:
    """One tensor of a quantised weight, whose first axis has `per_row` entries for each row."""

    values: TensorRef
    how: Encoder
    part: str
    shape: tuple[int, ...]
    dtype: DType
    per_row: int = 1

    def read(self) -> torch.Tensor:
        small = self.dtype.nbytes(math.prod(self.shape)) * SMALL <= self.values.count
        return _remembered(self) if small else _joined(self)

    def rows(self, start: int, stop: int) -> OfRows:
        """Entries start..stop of the first axis, which begin and end with rows."""
        first, last = start // self.per_row, stop // self.per_row
        if (first * self.per_row, last * self.per_row) != (start, stop):
            raise ValueError(f"entries {start}:{stop} are no whole rows of {self.per_row}")
        return replace(
            self, values=self.values.slice(0, first, last), shape=(stop - start, *self.shape[1:])
        )

    def pieces(self) -> Iterator[torch.Tensor]:
        """It in runs of rows."""
        count, width = self.values.shape
        source = self.values.source
        at_once = isinstance(source, RowSource) and source.at_once
        step = count if at_once else max(1, PIECE // max(1, width))
        for start in range(0, count, max(1, step)):
            stop = min(count, start + step)
            yield self.how.quantise(self.values.slice(0, start, stop).read())[self.part]


def _joined(source: OfRows) -> torch.Tensor:
    return torch.cat(list(source.pieces())).view(source.shape)


_remembered = remembered(_joined, KEPT)


@dataclass(frozen=True, slots=True)
class OfAll:
    """One tensor of what all values together are quantised to."""

    values: TensorRef
    how: Encoder
    part: str
    shape: tuple[int, ...]
    dtype: DType

    def read(self) -> torch.Tensor:
        return _quantised(self.values, self.how)[self.part].view(self.shape)


def _all_quantised(values: TensorRef, how: Encoder) -> Mapping[str, torch.Tensor]:
    return how.quantise(values.read())


_quantised = remembered(_all_quantised, KEPT)


def renamed(ref: TensorRef, name: str) -> TensorRef:
    """A ref under the name that it will be stored under."""
    return replace(ref, name=name)
