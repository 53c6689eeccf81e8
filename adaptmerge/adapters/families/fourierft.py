"""FourierFT: a few coefficients of the delta's spectrum, scattered by a seed (Gao et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.families.seeded import scattered
from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor, Whole
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class FourierFt:
    """W + scale * Re(F^-1(S)), F the 2-d Fourier transform of W's size: the file does not tell it."""

    kind: ClassVar[str] = "fourierft"
    family: ClassVar[str] = "fourierft"
    site: Site
    spectrum: TensorRef
    seed: int
    scale: float

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta of a weight of that shape."""
        return FourierDelta(self.spectrum, self.seed, self.scale, *weight.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        delta = FourierDelta(self.spectrum, self.seed, self.scale, *weight.shape)
        return weight + delta.matrix().to(weight)


@dataclass(frozen=True, slots=True)
class FourierDelta(Whole):
    """scale * Re(F^-1(S)) for the spectrum S (out, width) of zeros and the given coefficients (n,)."""

    spectrum: TensorRef
    seed: int
    scale: float
    out: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.width

    def matrix(self) -> torch.Tensor:
        places = scattered(self.spectrum.count, self.out * self.width, self.seed)
        spectrum = torch.zeros(self.out * self.width, dtype=torch.float64)
        spectrum[places] = self.spectrum.read().double()
        inverse: torch.Tensor = torch.fft.ifft2(spectrum.reshape(self.shape)).real * self.scale
        return inverse
