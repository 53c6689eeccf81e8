"""TinyLoRA: a few numbers mix fixed random matrices inside fixed singular sides (arXiv 2602.04118)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor, Leaf, Product
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, F64, DType
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class TinyLora(Expanded):
    """up (sum of vector[i] * mixed[i]) down; up (out, r), down (r, in), mixed (u, r, r), vector (u,).

    Sites may share a vector. place: the number of the site in the model's order, seed: where the random
    matrices of the site at place 0 come from; together they say how PEFT draws `mixed` and ties vectors.
    """

    family: ClassVar[str] = "tinylora"
    up: TensorRef
    down: TensorRef
    mixed: TensorRef
    vector: TensorRef
    place: int
    seed: int

    def expand(self) -> Factor:
        core = computed(TinyCore(self.mixed, self.vector))
        return Product((Leaf(self.up), Leaf(core), Leaf(self.down)))


@dataclass(frozen=True, slots=True)
class TinyCore:
    """The sum of vector[i] * mixed[i], (r, r)."""

    mixed: TensorRef
    vector: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mixed.shape[1:]

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        mixed, vector = self.mixed.read().double(), self.vector.read().double()
        core: torch.Tensor = torch.tensordot(vector, mixed, dims=1)
        return core


@dataclass(frozen=True, slots=True)
class TinyMatrices:
    """`count` matrices (r, r) of normal values with variance 1 / r, float32."""

    seed: int
    count: int
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, self.rank, self.rank

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        deviation = 1.0 / self.rank**0.5
        return torch.normal(0.0, deviation, self.shape, generator=generator, dtype=torch.float32)
