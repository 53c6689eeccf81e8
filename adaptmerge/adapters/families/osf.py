"""OSF: the weak singular directions of the base replaced by trained ones (Nayak et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Osf:
    """The part of W along its strongest singular directions, plus up diag(values) down.

    up (out, k), values (k), down (k, in), where min(out, in) - k directions of W are kept.
    """

    kind: ClassVar[str] = "osf"
    family: ClassVar[str] = "osf"
    site: Site
    up: TensorRef
    values: TensorRef
    down: TensorRef

    @property
    def kept(self) -> int:
        """How many singular directions of the base stay as they are."""
        return min(self.up.shape[0], self.down.shape[1]) - self.values.count

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        left, sizes, right = decompose.svd(weight, full_matrices=False)
        strong = (left[:, : self.kept] * sizes[: self.kept]) @ right[: self.kept]
        up, values, down = (ref.read().to(weight) for ref in (self.up, self.values, self.down))
        changed: torch.Tensor = strong + (up * values) @ down
        return changed
