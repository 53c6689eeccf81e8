"""GLoRA: weight and bias scaled and shifted, and the bias by the weight (Chavan et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Support:
    """One of GLoRA's support tensors: the product of `parts` when there are two, else the one, broadcast.

    form: "lora" (two sides), "vector" (one value per output), "constant" (one) or "none" (zeros, stored).
    """

    form: str
    parts: tuple[TensorRef, ...]

    def value(self, like: torch.Tensor) -> torch.Tensor:
        """What broadcasts to `like`, a vector or matrix."""
        first, *rest = (part.read().to(like) for part in self.parts)
        value = first @ rest[0] if rest else first
        return value.flatten() if like.ndim == 1 else value


@dataclass(frozen=True, slots=True)
class GloraWeight:
    """W + W * scale + shift, element by element."""

    kind: ClassVar[str] = "glora"
    family: ClassVar[str] = "glora"
    site: Site
    scale: Support
    shift: Support

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight * self.scale.value(weight) + self.shift.value(weight)


@dataclass(frozen=True, slots=True)
class GloraBias:
    """b + b * scale + shift + W column, with W the base's own `weight` (None where `column` is zero)."""

    kind: ClassVar[str] = "glora"
    family: ClassVar[str] = "glora"
    site: Site
    scale: Support
    shift: Support
    column: Support
    weight: TensorRef | None

    def delta(self) -> Factor | None:
        return None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        changed = weight + weight * self.scale.value(weight) + self.shift.value(weight)
        if self.weight is None:
            return changed
        return changed + self.weight.read().to(weight) @ self.column.value(weight)
