"""FRoD: the base's weight in a basis that its layers share, with trained scales and sparse couplings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef

NOTHING = 1e-12  # columns of W V^-T shorter than this have no direction


@dataclass(frozen=True, slots=True)
class Frod:
    """U (S + diag(scales)) V^T, with V (in, in) = `basis` and U the columns of W V^-T, normalised.

    S (in, in) is zero but for `couplings` at `places` (2, n). ridge is what V was computed with.
    """

    kind: ClassVar[str] = "frod"
    family: ClassVar[str] = "frod"
    site: Site
    scales: TensorRef
    couplings: TensorRef
    places: TensorRef
    basis: TensorRef
    ridge: float

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        basis = self.basis.read().to(weight)
        core = torch.diag(self.scales.read().to(weight))
        rows, columns = places_in(self.places, *core.shape).to(weight.device)
        core = core.index_put((rows, columns), self.couplings.read().to(weight), accumulate=True)
        return _directions(weight, basis) @ core @ basis.T


def _directions(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """U (out, in)."""
    try:
        columns = decompose.solve(basis, weight.T).T
    except RuntimeError:
        columns = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
    length = columns.norm(dim=0)
    return torch.where(length > NOTHING, columns / length, 0.0)
