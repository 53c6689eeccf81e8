"""Poly: LoRAs that every task mixes in its own way (Ponti et al. 2022; in splits, Caccia et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.errors import CannotMerge
from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F64, DType
from adaptmerge.tensors.refs import TensorRef, computed

EPSILON = 1e-12  # what PEFT adds to the sum of a task's weights


@dataclass(frozen=True, slots=True)
class Poly:
    """The LoRAs of all tasks at once: kept and written back, but computed only for one task.

    down (splits, skills, in / splits, r), up (splits, skills, r, out / splits) and logits
    (tasks, splits * skills).
    """

    kind: ClassVar[str] = "poly"
    family: ClassVar[str] = "poly"
    site: Site
    up: TensorRef
    down: TensorRef
    logits: TensorRef

    @property
    def why(self) -> str:
        """What is in the way of computing with it, and what to do."""
        last = self.logits.shape[0] - 1
        return (
            f"this adapter computes something else for each of its tasks 0 to {last}: name one, as in "
            "ADAPTER?task=0, and it is a LoRA"
        )

    def delta(self) -> Factor | None:
        """Raises CannotMerge: none before a task is chosen."""
        raise CannotMerge(self.why, where=str(self.site))

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Raises CannotMerge, as `delta`."""
        raise CannotMerge(self.why, where=str(self.site))


@dataclass(frozen=True, slots=True)
class PolyTask(Expanded):
    """up @ down / r, both sides mixed from the skills by the weights of one task."""

    up: TensorRef
    down: TensorRef
    logits: TensorRef
    task: int

    def expand(self) -> Factor:
        up = PolySide(self.up, self.logits, self.task, "up")
        down = PolySide(self.down, self.logits, self.task, "down")
        return low_rank(computed(up), computed(down), 1.0 / self.down.shape[3])


@dataclass(frozen=True, slots=True)
class PolySide:
    """One side for one task: every split a weighted mean of the skills, by the sigmoids of their logits.

    side "down": (r, in) from (splits, skills, in / splits, r). "up": (out, r) from
    (splits, skills, r, out / splits).
    """

    skills: TensorRef
    logits: TensorRef
    task: int
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        splits, _, first, last = self.skills.shape
        return (last, splits * first) if self.side == "down" else (splits * last, first)

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> torch.Tensor:
        splits, count = self.skills.shape[:2]
        logits = self.logits.slice(0, self.task, self.task + 1).read().double()
        shares = torch.sigmoid(logits.reshape(splits, count))
        shares = shares / (shares.sum(dim=1, keepdim=True) + EPSILON)
        mixed = torch.einsum("qs,qsab->qab", shares, self.skills.read().double())
        if self.side == "down":
            return mixed.flatten(0, 1).T.contiguous()
        return mixed.transpose(1, 2).flatten(0, 1).contiguous()
