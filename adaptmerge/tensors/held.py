"""A tensor in memory as the source of a ref: what was computed and lies in no file yet."""

from __future__ import annotations

from dataclasses import dataclass

from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import DType, of_torch


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """A tensor in memory, as the source of a ref."""

    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> DType:
        return of_torch(self.value.dtype)

    def read(self) -> torch.Tensor:
        return self.value
