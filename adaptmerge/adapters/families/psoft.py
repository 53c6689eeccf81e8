"""PSOFT: a rotation inside the subspace of the base's strongest singular directions (Wu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.families.on_base import OnBase
from adaptmerge.adapters.families.seeded import global_seed
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra import decompose
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Psoft:
    """W + B (T - I) A, with B A the best rank-r part of W: B = U S and A = V^T, or both with sqrt(S).

    T (r, r) is `core` itself, or the rotation of the skew block whose upper triangle `core` is (terms as
    for OFT; a skew block longer than `longest` is shrunk to it), then diag(outer) T diag(inner).
    split: "psoft_init" or "pissa_init". search: "full" SVD, or "lowrank" with `rounds` and `seed`.
    alpha cancels, but PEFT rounds by it.
    Signs of singular vectors matter: they are taken from an SVD in float32 on the CPU, as PEFT does there.
    """

    kind: ClassVar[str] = "psoft"
    family: ClassVar[str] = "psoft"
    site: Site
    core: TensorRef
    outer: TensorRef | None
    inner: TensorRef | None
    terms: int = 0
    longest: float | None = None
    split: str = "psoft_init"
    search: str = "full"
    rounds: int = 10
    seed: int = 0
    alpha: float = 32

    @property
    def rank(self) -> int:
        """r."""
        shape = self.core.shape
        return shape[0] if len(shape) == 2 else rotation.block_size(self.core.count)

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta B (T - I) A, of rank r."""
        return OnBase(self, weight, self.rank)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        up, down = self.sides(weight)
        return weight + up @ down

    def sides(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B (T - I) (out, r) and A (r, in)."""
        left, sizes, right = (part.to(weight) for part in self._strongest(weight.float().cpu()))
        change = self.transform(weight) - torch.eye(self.rank).to(weight)
        if self.split == "pissa_init":
            return (left * sizes.sqrt()) @ change, sizes.sqrt()[:, None] * right
        return (left * sizes) @ change, right

    def transform(self, like: torch.Tensor) -> torch.Tensor:
        """T (r, r)."""
        value = self.core.read().to(like)
        if value.ndim == 1:
            value = self._turned(rotation.skew_of(value[None]))[0]
        if self.outer is not None:
            value = self.outer.read().to(like)[:, None] * value
        if self.inner is not None:
            value = value * self.inner.read().to(like)
        return value

    def _turned(self, skew: torch.Tensor) -> torch.Tensor:
        if not self.terms:
            return rotation.cayley(-skew)
        norm = float(skew.norm())
        if self.longest is not None and norm > self.longest:
            skew = skew * (self.longest / (norm + 1e-12))
        return rotation.cayley_series(skew, self.terms)

    def _strongest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out, r), S (r) and V^T (r, in)."""
        if self.search == "lowrank":
            with global_seed(self.seed):
                left, sizes, right = decompose.svd_lowrank(weight, self.rank, self.rounds)
            return left, sizes, right.T
        left, sizes, right = decompose.svd(weight, full_matrices=False)
        return left[:, : self.rank], sizes[: self.rank], right[: self.rank]
