"""SHiRA: a sparse delta at chosen places of the weight (Bhardwaj et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Shira:
    """W + values (n,) at places (2, n), rows then columns; values that share a place add up.

    rank is that of the LoRA with as many values, n / (out + in), which the places need not tell.
    """

    kind: ClassVar[str] = "shira"
    family: ClassVar[str] = "shira"
    site: Site
    values: TensorRef
    places: TensorRef
    rank: int

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = self.places.read().long().to(weight.device)
        if not (_within(rows, weight.shape[0]) and _within(columns, weight.shape[1])):
            raise InputError(
                f"tensor {self.places.name!r} has places outside of a weight of {list(weight.shape)}: is "
                "it for another model?"
            )
        return weight.index_put((rows, columns), self.values.read().to(weight), accumulate=True)


def _within(places: torch.Tensor, count: int) -> bool:
    return not places.numel() or (int(places.min()) >= 0 and int(places.max()) < count)
