"""HRA: the input side turned by a chain of Householder reflections (Yuan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.families.on_base import OnBase
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Hra:
    """W H with H the product of I - 2 u u^T over the columns u of `directions` (in, r), normalised.

    orthogonalise: the columns are made orthonormal first (Gram-Schmidt), so H = I - 2 U U^T.
    """

    kind: ClassVar[str] = "hra"
    family: ClassVar[str] = "hra"
    site: Site
    directions: TensorRef
    orthogonalise: bool

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta W (H - I), of rank r."""
        return OnBase(self, weight, self.directions.shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        up, down = self.sides(weight)
        return weight + up @ down

    def sides(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-W U T (out, r) and U^T (r, in), where H = I - U T U^T (Schreiber and Van Loan 1989)."""
        unit, core = self._compact(weight)
        return -(weight @ unit) @ core, unit.T

    def _compact(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U (in, r) and the triangular T (r, r)."""
        columns = self.directions.read().to(like)
        eye = torch.eye(columns.shape[1]).to(like)
        if self.orthogonalise:
            return torch.linalg.qr(columns).Q, 2 * eye
        unit = columns / columns.norm(dim=0)
        # T^-1 = I / 2 + the strict upper triangle of U^T U
        return unit, decompose.inv(eye / 2 + torch.triu(unit.T @ unit, 1))

    def reflections(self, like: torch.Tensor) -> torch.Tensor:
        """H (in, in), in the dtype of `like`."""
        unit, core = self._compact(like)
        eye = torch.eye(unit.shape[0]).to(like)
        return eye - unit @ core @ unit.T

    def rotation(self, like: torch.Tensor) -> torch.Tensor:
        """H as one block (1, in, in); a mirror where r is odd."""
        return self.reflections(like)[None]

    def stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """The `directions` (in, r) of which the chain (orthogonalise off) gives this block."""
        return rotation.reflections(blocks[0], self.directions.shape[1])
