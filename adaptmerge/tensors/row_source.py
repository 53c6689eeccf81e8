"""Sources that compute some of their rows without reading what the others are made of."""

from __future__ import annotations

from dataclasses import dataclass

from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import Shape


class RowSource:
    """For sources in float32 that know their `shape` and `compute` any run of rows."""

    __slots__ = ()

    @property
    def shape(self) -> Shape:
        """Of all rows."""
        raise NotImplementedError

    def compute(self, start: int, stop: int) -> torch.Tensor:
        """The values of rows start..stop."""
        raise NotImplementedError

    @property
    def at_once(self) -> bool:
        """Whether some rows of it cost as much as all."""
        return False

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        return self.compute(0, self.shape[0])

    def rows(self, start: int, stop: int) -> SomeRows:
        """Some rows of it, as a source that reads no others."""
        return SomeRows(self, start, stop)


@dataclass(frozen=True, slots=True)
class SomeRows(RowSource):
    """Rows start..stop of a source."""

    whole: RowSource
    start: int
    stop: int

    @property
    def shape(self) -> Shape:
        return self.stop - self.start, *self.whole.shape[1:]

    def compute(self, start: int, stop: int) -> torch.Tensor:
        return self.whole.compute(self.start + start, self.start + stop)
