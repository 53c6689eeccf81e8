"""LoRAs beside values that only their training reads: VeLoRA's projection, MonteCLoRA's sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.algebra.factors import Expanded, Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class WithState(Expanded):
    """scale * up @ down with up (out, r), down (r, in); `state` are named tensors that compute nothing."""

    family: ClassVar[str] = "lora"
    up: TensorRef
    down: TensorRef
    scale: float
    state: tuple[tuple[str, TensorRef], ...]

    def expand(self) -> Factor:
        return low_rank(self.up, self.down, self.scale)
