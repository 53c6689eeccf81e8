"""VB-LoRA: a LoRA put together from a bank of vectors that all sites share (Li et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.places import places_in
from adaptmerge.tensors.refs import TensorRef, computed


@dataclass(frozen=True, slots=True)
class BankLogits:
    """For every place of a grid (a, b) the `topk` vectors of largest logits (a, b, vectors), by softmax."""

    values: TensorRef
    topk: int

    @property
    def grid(self) -> tuple[int, ...]:
        return self.values.shape[:-1]

    def chosen(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices, both (a, b, topk), of so many vectors."""
        logits, indices = self.values.read().double().topk(self.topk, dim=-1)
        return torch.softmax(logits, dim=-1), indices


@dataclass(frozen=True, slots=True)
class BankChoice:
    """The same choice stored as itself: indices (a, b, k) and all weights but the last, which sum to 1."""

    indices: TensorRef
    weights: TensorRef

    @property
    def grid(self) -> tuple[int, ...]:
        return self.indices.shape[:-1]

    def chosen(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices, both (a, b, k), of so many vectors."""
        weights = self.weights.read().double()
        last = 1 - weights.sum(-1, keepdim=True)
        return torch.cat([weights, last], dim=-1), places_in(self.indices, count)


@dataclass(frozen=True, slots=True)
class BankSide:
    """One side of the LoRA: mixed vectors of the bank (vectors, length) put one after the other.

    side "down": grid (r, in / length), read as (r, in). "up": grid (out / length, r), read as (out, r).
    """

    choice: BankLogits | BankChoice
    bank: TensorRef
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = self.choice.grid
        length = self.bank.shape[1]
        return (first, second * length) if self.side == "down" else (first * length, second)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        weights, indices = self.choice.chosen(self.bank.shape[0])
        mixed = (weights.unsqueeze(-1) * self.bank.read().double()[indices]).sum(-2)
        return (mixed if self.side == "down" else mixed.transpose(1, 2)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class VbLora(Expanded):
    """up @ down, both mixed from the bank."""

    family: ClassVar[str] = "vblora"
    up: BankLogits | BankChoice
    down: BankLogits | BankChoice
    bank: TensorRef

    def expand(self) -> Factor:
        up = BankSide(self.up, self.bank, "up")
        down = BankSide(self.down, self.bank, "down")
        return low_rank(computed(up), computed(down))
