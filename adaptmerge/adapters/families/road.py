"""RoAd: outputs turned and scaled pair by pair (Liao and Monz 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Road:
    """R W, and R b for a bias: in each group of outputs, entry i is paired with entry i + group / 2.

    A pair (x, y) becomes (c x - s' y, c' y + s x), with c = scale * cos(angle) and s = scale * sin(angle);
    each = 1: the four share one angle and scale, 2: each output has its own, 4: so have its cosine and
    sine. angles and scales have out / 2 * each values.
    """

    kind: ClassVar[str] = "road"
    family: ClassVar[str] = "road"
    site: Site
    angles: TensorRef
    scales: TensorRef
    each: int
    group: int

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        own, other = self._factors(weight)
        rows = weight.reshape(-1, 2, self.group // 2, weight[0].numel())
        crossed = torch.stack([-rows[:, 1], rows[:, 0]], dim=1)
        return (rows * own[..., None] + crossed * other[..., None]).reshape(weight.shape)

    def _factors(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What every output is multiplied with, and its partner's: (groups, 2, group / 2)."""
        angles, scales = (ref.read().to(like) for ref in (self.angles, self.scales))
        half = self.group // 2
        if self.each == 4:
            pairs = (values.reshape(-1, 2, 2, half) for values in (angles, scales))
            angle, scale = (values.unbind(1) for values in pairs)
            return scale[0] * angle[0].cos(), scale[1] * angle[1].sin()
        angles, scales = (values.reshape(-1, self.each, half) for values in (angles, scales))
        own, other = scales * angles.cos(), scales * angles.sin()
        return own.expand(-1, 2, -1), other.expand(-1, 2, -1)
