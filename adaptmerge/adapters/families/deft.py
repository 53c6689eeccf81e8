"""DEFT: a projection of the base removed and something injected in its place (Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.on_base import OnBase
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Deft:
    """W + Q (scale * injected - K^T W), with Q, K (out, r) from `directions` and injected (r, in).

    orthonormal: Q = K is the orthonormal factor of a QR of the directions; else Q is the directions and
    K their positive part. injected None: only removal (PaRa).
    """

    kind: ClassVar[str] = "deft"
    family: ClassVar[str] = "deft"
    site: Site
    directions: TensorRef
    injected: TensorRef | None
    scale: float
    orthonormal: bool

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta, of rank r."""
        return OnBase(self, weight, self.directions.shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        up, down = self.sides(weight)
        return weight + up @ down

    def sides(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q (out, r) and scale * injected - K^T W (r, in)."""
        placed = removed = self.directions.read().to(weight)
        if self.orthonormal:
            placed = removed = torch.linalg.qr(placed).Q
        else:
            removed = torch.relu(removed)
        down = -(removed.T @ weight)
        if self.injected is not None:
            down = down + self.scale * self.injected.read().to(weight)
        return placed, down
