"""Super-Tuning: a sparse delta at the largest weights, with an optional LoRA beside it (Supra)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.algebra.low_rank import LowRank
from adaptmerge.lazy import torch
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Supertuning:
    """W + values (n,) at flat places (n,) of the (out, in) weight, + alpha / r * up @ down.

    places None: they are those of the n largest magnitudes of W in descending order, or the smallest
    in ascending order without `largest`. sparsity is the share of W left alone, which n only rounds.
    """

    kind: ClassVar[str] = "supertuning"
    family: ClassVar[str] = "supertuning"
    site: Site
    values: TensorRef
    places: TensorRef | None
    sparsity: float
    largest: bool
    up: TensorRef | None = None
    down: TensorRef | None = None
    alpha: float | None = None

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        flat = weight.flatten()
        moved = flat.scatter_add(0, self._places(flat), self.values.read().to(weight))
        result = moved.reshape(weight.shape)
        pair = self.pair
        if pair is None:
            return result
        return result + pair.scale * (pair.up.read().to(weight) @ pair.down.read().to(weight))

    @property
    def pair(self) -> LowRank | None:
        """The LoRA beside the sparse part."""
        if self.up is None or self.down is None or self.alpha is None:
            return None
        return LowRank(self.up, self.down, self.alpha / self.up.shape[1])

    def _places(self, flat: torch.Tensor) -> torch.Tensor:
        if self.places is not None:
            return places_in(self.places, len(flat)).to(flat.device)
        return torch.topk(flat.abs(), self.values.count, largest=self.largest).indices
