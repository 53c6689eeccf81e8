"""HRA: the input side turned by a chain of Householder reflections (Yuan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.factors import Factor
from adaptmerge.files.refs import TensorRef
from adaptmerge.graph import Site
from adaptmerge.lazy import torch


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

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.reflections(weight)

    def reflections(self, like: torch.Tensor) -> torch.Tensor:
        """H (in, in), in the dtype of `like`."""
        columns = self.directions.read().to(like)
        eye = torch.eye(columns.shape[0]).to(like)
        if self.orthogonalise:
            unit = torch.linalg.qr(columns).Q
            return eye - 2 * unit @ unit.T
        unit = columns / columns.norm(dim=0)
        for column in unit.T:
            eye = eye - 2 * (eye @ column)[:, None] * column[None, :]
        return eye
