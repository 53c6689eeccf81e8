"""RandLoRA: weighted random low-rank matrices, whose sum is of full rank (Albert et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Factor, Misshapen, Whole
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, DType
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class RandLora:
    """W + alpha / r * (long bases) (weighted short bases), transposed where W is wide.

    short (r, 1, small) and long (large, n, r) are shared by all `sites` and reach as far as the largest;
    weights (r, n) and columns (n, min(out, in)) are the site's own. shape (out, in), which the file does
    not tell, is () where no base told it.
    """

    kind: ClassVar[str] = "randlora"
    family: ClassVar[str] = "randlora"
    site: Site
    short: TensorRef
    long: TensorRef
    weights: TensorRef
    columns: TensorRef
    alpha: float
    shape: tuple[int, ...]
    sites: int

    def delta(self) -> Factor | None:
        return None

    def on(self, weight: TensorRef) -> Factor:
        """The delta of a weight of that shape."""
        return self._delta(*weight.shape)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self._delta(*weight.shape).matrix().to(weight)

    def _delta(self, out: int, width: int) -> RandDelta:
        tensors = self.short, self.long, self.weights, self.columns
        small, large = sorted((out, width))
        reach = self.columns.shape[1], self.long.shape[0]
        if small != reach[0] or large > reach[1] or self.shape not in ((), (out, width)):
            said = list(self.shape) or f"{reach[0]} by at most {reach[1]}"
            raise Misshapen(f"{self.site} is for a weight of {said}, the base has {[out, width]}")
        return RandDelta(*tensors, self.alpha, out, width)


@dataclass(frozen=True, slots=True)
class RandDelta(Whole):
    """The delta of a RandLora for a weight (out, width)."""

    short: TensorRef
    long: TensorRef
    weights: TensorRef
    columns: TensorRef
    alpha: float
    out: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.width

    def matrix(self) -> torch.Tensor:
        rank, count = self.weights.shape
        small, large = sorted(self.shape)
        short = self.short.read().double()[:, :, :small] * self.columns.read().double()
        short = self.weights.read().double()[:, :, None] * short
        long = self.long.read()[:large, :count].double()
        product: torch.Tensor = long.flatten(1) @ short.flatten(0, 1) * (self.alpha / rank)
        return product if small == self.width else product.T


@dataclass(frozen=True, slots=True)
class RandBases:
    """One of the two stacks of bases, drawn as PEFT draws them: short ones first, then long ones.

    style "dense": Kaiming uniform in bfloat16; "sparse" and "very_sparse": -1, 0 and 1, zero but for one
    in 3 or in sqrt(small). Either is divided by its standard deviation.
    """

    seed: int
    rank: int
    small: int
    large: int
    style: str
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        if self.side == "short":
            return self.rank, 1, self.small
        return self.large, -(-self.small // self.rank), self.rank

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        short, long = (_dense if self.style == "dense" else _sparse)(self, generator)
        value = short if self.side == "short" else long
        return (value / value.std()).float()


def _dense(bases: RandBases, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    count = -(-bases.small // bases.rank)
    short = _kaiming((bases.rank, 1, bases.small), generator)
    long = [_kaiming((bases.large, 1, bases.rank), generator) for _ in range(count)]
    return short, torch.cat(long, dim=1)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(shape[2]))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _sparse(bases: RandBases, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    sparsity = 3 if bases.style == "sparse" else math.sqrt(bases.small)
    edge, count = 1 / (2 * sparsity), -(-bases.small // bases.rank)
    shapes = (bases.rank, 1, bases.small), (bases.large, count, bases.rank)
    short, long = (torch.rand(shape, dtype=torch.float32, generator=generator) for shape in shapes)
    return _signs(short, edge), _signs(long, edge)


def _signs(value: torch.Tensor, edge: float) -> torch.Tensor:
    return (value > 1 - edge).float() - (value < edge).float()
