"""How an error in a weight counts, by what flows into it."""

from __future__ import annotations

from dataclasses import dataclass

from adaptmerge.lazy import torch


@dataclass(frozen=True, slots=True)
class Metric:
    """How an error e of a row counts: e (D + U U^T) e^T, from D (in,), at least 1, and U (in, k); both
    float64."""

    diagonal: torch.Tensor
    sketch: torch.Tensor

    def in_order(self, columns: torch.Tensor) -> Metric:
        """That of a matrix whose columns are these (in,) of this one."""
        return Metric(self.diagonal[columns], self.sketch[columns])


def slack(sketched: int, directions: int, strength: float) -> torch.Tensor:
    """How much less an error counts in each of k + R directions than if it had to be zero there, float64: 1
    in those of a sketch, whose size says how much it counts."""
    found = torch.ones(sketched + directions, dtype=torch.float64)
    found[sketched:] = 1 / strength
    return found
