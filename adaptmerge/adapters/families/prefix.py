"""Prefixes: learned keys and values that every layer attends to (Li and Liang 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of n virtual tokens: `values` (n, layers * 2 * heads * head size).

    A row holds, layer by layer, the keys of all key-value heads and then their values. family:
    "prefix_tuning", or "cartridge", trained from the cache of a text (Eyuboglu et al. 2025). parts: 2
    for encoder-decoder models, whose decoder takes the row twice over, two layers at a step. task: as
    that of a prompt.
    """

    kind: ClassVar[str] = "prefix"
    site: Site
    values: TensorRef
    layers: int
    heads: int
    family: str = "prefix_tuning"
    parts: int = 1
    task: str | None = None

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        return self.values.shape[0]

    @property
    def head_size(self) -> int:
        """The size of one key."""
        return self.values.shape[1] // (2 * self.layers * self.heads)

    def keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer (heads, n, head size) of both, as stored."""
        stored = self.values.read()
        shape = (self.length, 2 * self.layers, self.heads, self.head_size)
        entries = list(stored.reshape(shape).permute(1, 2, 0, 3)) * self.parts
        step = 2 * self.parts
        return [(entries[i], entries[i + 1]) for i in range(0, len(entries), step)]
