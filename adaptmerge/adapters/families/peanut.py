"""PEANuT: a delta computed from the base's weight by a small network (Zhong et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.on_base import OnBase
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Peanut:
    """W + scale * last f(W), of rank r; last (out, r).

    f runs the columns of W through first (r, out), then encoders and decoders (r, r), an activation after
    each, and adds to what a decoder gives what its encoder was given.
    """

    kind: ClassVar[str] = "peanut"
    family: ClassVar[str] = "peanut"
    site: Site
    first: TensorRef
    encoders: tuple[TensorRef, ...]
    decoders: tuple[TensorRef, ...]
    last: TensorRef
    activation: str
    scale: float

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta, of rank r."""
        return OnBase(self, weight, self.first.shape[0])

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        up, down = self.sides(weight)
        return weight + up @ down

    def sides(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """scale * last (out, r) and f(W) (r, in)."""
        from transformers.activations import get_activation

        activate = get_activation(self.activation)
        hidden, inputs = activate(self.first.read().to(weight) @ weight), []
        for encoder in self.encoders:
            inputs.append(hidden)
            hidden = activate(encoder.read().to(weight) @ hidden)
        for decoder in self.decoders:
            hidden = activate(decoder.read().to(weight) @ hidden) + inputs.pop()
        return self.scale * self.last.read().to(weight), hidden
