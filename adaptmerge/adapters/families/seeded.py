"""Values that are drawn from a seed instead of being stored: the same calls of the same generators."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from adaptmerge.lazy import torch
from adaptmerge.tensors.dtypes import F32, DType

_ALONE = threading.Lock()
GAIN = math.sqrt(2.0)  # of Kaiming's initialisation for rectifiers


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """One thread at a time draws from torch's own generator, seeded, and leaves it as it was."""
    with _ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, slots=True)
class KaimingPair:
    """One of two matrices that one generator draws: `down` (its shape) first, then `up`.

    Uniform in +-sqrt(3) * GAIN / sqrt(columns), float32; side says which of the two this is.
    """

    seed: int
    down: tuple[int, int]
    up: tuple[int, int]
    side: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.down if self.side == "down" else self.up

    @property
    def dtype(self) -> DType:
        return F32

    def read(self) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        down = _kaiming(self.down, generator)
        return down if self.side == "down" else _kaiming(self.up, generator)


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (GAIN / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


@lru_cache(maxsize=64)
def scattered(count: int, places: int, seed: int) -> torch.Tensor:
    """`count` different numbers below `places`, as one seed shuffles them: a tensor to be read only."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(places, generator=generator)[:count].clone()
