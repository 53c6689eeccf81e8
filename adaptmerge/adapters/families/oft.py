"""OFT: the input side turned block by block (Qiu et al. 2023; Cayley-Neumann: Qiu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Oft:
    """W R^T with R block-diagonal from `vectors` (blocks, b * (b - 1) / 2); W R where W is an embedding.

    terms: 0 for the exact Cayley transform, else the terms of its series, whose last power counts `last`
    times. radius: skew blocks are shrunk to a Frobenius norm of radius / sqrt(blocks) (COFT).
    repeated: one block is stored and used `blocks` times (0: as often as the input has room).
    """

    kind: ClassVar[str] = "oft"
    family: ClassVar[str] = "oft"
    site: Site
    vectors: TensorRef
    terms: int = 0
    last: float = 1.0
    radius: float | None = None
    repeated: bool = False
    blocks: int = 0

    def delta(self) -> Factor | None:
        return None

    @property
    def size(self) -> int:
        """b, the width of a block."""
        return rotation.block_size(self.vectors.shape[1])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = self.rotation(weight)
        if self.site.layer.kind != "embedding":
            blocks = blocks.mT
        split = weight.reshape(weight.shape[0], -1, self.size)
        return torch.einsum("onb,nbc->onc", split, blocks.expand(split.shape[1], -1, -1)).reshape(
            weight.shape
        )

    def rotation(self, like: torch.Tensor) -> torch.Tensor:
        """The stored blocks of R (n, b, b); a series of few terms is only close to a rotation."""
        skew = rotation.skew_of(self.vectors.read().to(like))
        if self.radius is not None:
            norm = skew.flatten(1).norm(dim=1)[:, None, None]
            limit = self.radius / skew.shape[0] ** 0.5
            skew = torch.where(norm > limit, skew * (limit / norm), skew)
        if self.terms:
            return rotation.cayley_series(skew, self.terms, self.last)
        return rotation.cayley(skew)

    def stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """The `vectors` of which the exact transform (terms = 0, no radius) gives these blocks."""
        return rotation.vectors_of(rotation.inverse_cayley(blocks))
