"""The two pairs of a LoRA on nn.MultiheadAttention: one for in_proj_weight, one for its out_proj."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class InAttention(Expanded):
    """times * scale * up @ down with up (out, r), down (r, in).

    times is 1 for in_proj_weight; 2 for out_proj, into whose weight PEFT puts the delta twice, in every
    forward of training, too (its pull request 3774 is open).
    """

    family: ClassVar[str] = "lora"
    up: TensorRef
    down: TensorRef
    scale: float
    times: int

    def expand(self) -> Factor:
        return low_rank(self.up, self.down, self.times * self.scale)
