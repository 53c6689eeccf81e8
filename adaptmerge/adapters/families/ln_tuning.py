"""LN tuning: the weights and biases of norms, trained and stored whole (Zhao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class LnTuning:
    """The vector itself is stored."""

    kind: ClassVar[str] = "ln_tuning"
    family: ClassVar[str] = "ln_tuning"
    site: Site
    value: TensorRef

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return self.value.read().to(weight)
