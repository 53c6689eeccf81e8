"""Uni-LoRA: every entry of every LoRA side is one of the entries of a single vector (Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Misshapen
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F64, I64, DType
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class UniLora(Expanded):
    """up @ down with entries vector[places] * scales; up (out, r), down (r, in), vector (d,)."""

    family: ClassVar[str] = "unilora"
    vector: TensorRef
    up_places: TensorRef
    up_scales: TensorRef
    down_places: TensorRef
    down_scales: TensorRef

    def expand(self) -> Factor:
        up = UniSide(self.vector, self.up_places, self.up_scales)
        down = UniSide(self.vector, self.down_places, self.down_scales)
        return low_rank(computed(up), computed(down))


@dataclass(frozen=True, slots=True)
class UniSide:
    """vector[places] * scales, of the shape of `places`."""

    vector: TensorRef
    places: TensorRef
    scales: TensorRef

    def __post_init__(self) -> None:
        if self.places.shape != self.scales.shape:
            shapes = f"{list(self.places.shape)} and {list(self.scales.shape)}"
            raise Misshapen(f"places and scales of shapes {shapes} do not go together")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        return (
            self.vector.read().double()[places_in(self.places, self.vector.count)]
            * self.scales.read().double()
        )


@dataclass(frozen=True, slots=True)
class UniPlaces:
    """For `total` entries of all sites, one after the other, places in a vector of `length`.

    Every place is taken equally often, the rest once more at random places; then all are shuffled.
    """

    seed: int
    total: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.total,)

    @property
    def dtype(self) -> DType:
        return I64

    def read(self) -> torch.Tensor:
        return _places(self.seed, self.total, self.length)


@lru_cache(maxsize=1)
def _places(seed: int, total: int, length: int) -> torch.Tensor:
    import numpy

    generator = numpy.random.default_rng(seed)
    often, rest = divmod(total, length)
    places = numpy.repeat(numpy.arange(length), often)
    if rest:
        more = generator.choice(length, size=rest, replace=False)
        places = numpy.concatenate([places, more])
    generator.shuffle(places)
    return torch.as_tensor(places, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class UniScales:
    """1 / sqrt(how often the place of an entry is taken), in the dtype of the base's weights."""

    places: UniPlaces
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    def read(self) -> torch.Tensor:
        places = self.places.read()
        counts = torch.bincount(places, minlength=self.places.length).float()
        scales: torch.Tensor = counts.rsqrt()[places].to(self.dtype.torch)
        return scales
