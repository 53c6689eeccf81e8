"""C3A: a delta of circulant blocks, learned by their first rows (Chen et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Whole
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class C3a(Whole):
    """Blocks (m, n) with entry (t, s) = rows[m, n, (s - t) mod b] / in; rows (out / b, in / b, b)."""

    family: ClassVar[str] = "c3a"
    rows: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        high, wide, size = self.rows.shape
        return high * size, wide * size

    def matrix(self) -> torch.Tensor:
        steps = torch.arange(self.rows.shape[2])
        turned = (steps[None, :] - steps[:, None]) % len(steps)
        blocks = self.rows.read().double()[:, :, turned]
        return blocks.transpose(1, 2).reshape(self.shape) / self.shape[1]
