"""BOFT: the input side turned by a product of butterfly factors (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families import rotation
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Boft:
    """diag(scales) W M^T with M = B_m ... B_1 and B_i = P_i blockdiag(R_i) P_i^T.

    blocks (m, n, b, b): the skew part of each is turned into R by the Cayley transform. scales has
    `out` values. P_i pairs up half blocks that lie 2^i half blocks apart; P_1 is the identity.
    """

    kind: ClassVar[str] = "boft"
    family: ClassVar[str] = "boft"
    site: Site
    blocks: TensorRef
    scales: TensorRef

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        factors, count, size, _ = self.blocks.shape
        turned = self.rotation(weight).reshape(factors, count, size, size)
        value = weight
        for level, blocks in enumerate(turned):
            order = butterfly(count, size, level, value.device)
            placed = value[:, torch.argsort(order)].reshape(-1, count, size)
            value = torch.einsum("onb,ncb->onc", placed, blocks).flatten(1)[:, order]
        return value * self.scales.read().to(weight).reshape(-1, 1)

    def rotation(self, like: torch.Tensor) -> torch.Tensor:
        """The blocks of all factors (m * n, b, b)."""
        values = self.blocks.read().to(like).flatten(0, 1)
        return rotation.cayley((values - values.mT) / 2)

    def stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """The `blocks` (m, n, b, b) that these rotations are stored as."""
        return rotation.inverse_cayley(blocks).reshape(self.blocks.shape)


def butterfly(
    count: int, size: int, level: int, device: torch.device | None = None
) -> torch.Tensor:
    """The permutation of one factor: in runs of 2^(level + 1) half blocks, even ones before odd ones."""
    if level == 0:
        return torch.arange(count * size, device=device)
    halves = torch.arange(count * size, device=device).reshape(-1, 2**level, 2, size // 2)
    return halves.transpose(1, 2).flatten()
