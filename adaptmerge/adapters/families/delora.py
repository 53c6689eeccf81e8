"""DeLoRA: a low-rank delta of normalised components, its strength learned apart (Bini et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Diag, Expanded, Factor, Leaf, Product, Rows
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, F64, DType
from adaptmerge.tensors.refs import TensorRef, computed

SMALLEST = 1e-4  # norms below are taken as this


@dataclass(frozen=True, slots=True)
class Strengths:
    """strength / (r |up_i| |down_i|) of each of the r components, norms kept away from zero."""

    up: TensorRef
    down: TensorRef
    strength: TensorRef
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.down.shape[0],)

    def read(self) -> torch.Tensor:
        norms = [self.up.read().double().norm(dim=0), self.down.read().double().norm(dim=1)]
        lengths = norms[0].clamp(min=SMALLEST) * norms[1].clamp(min=SMALLEST)
        value: torch.Tensor = self.strength.read().double() / self.down.shape[0] / lengths
        return value.to(self.dtype.torch)


@dataclass(frozen=True, slots=True)
class DeLora(Expanded):
    """up diag(strength / (r |up_i| |down_i|)) down diag(widths): up (out, r), down (r, in).

    strength is one number, widths (in,) the norms of the base weight's columns when training began.
    """

    family: ClassVar[str] = "delora"
    up: TensorRef
    down: TensorRef
    strength: TensorRef
    widths: TensorRef

    def expand(self) -> Factor:
        return self._chain(F64 if self.down.dtype == F64 else F32)

    def dense(self, rows: Rows = None) -> torch.Tensor:
        return self._chain(F64).dense(rows)

    def _chain(self, dtype: DType) -> Factor:
        strengths = computed(Strengths(self.up, self.down, self.strength, dtype))
        parts = (Leaf(self.up), Diag(strengths), Leaf(self.down), Diag(self.widths))
        return Product(parts)
