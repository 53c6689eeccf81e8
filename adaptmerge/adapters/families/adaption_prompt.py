"""LLaMA-Adapter: a gated attention over learned prompts beside a layer's own (Zhang et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adaptmerge.adapters.graph import Site
from adaptmerge.lazy import torch
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class AdaptionPrompt:
    """gate * softmax(q k^T / sqrt(d)) v, added to the attention module at `site`.

    q are the module's own queries, k and v its projections of `prompt` (n, dim); gate (1,).
    """

    kind: ClassVar[str] = "adaption_prompt"
    family: ClassVar[str] = "adaption_prompt"
    site: Site
    prompt: TensorRef
    gate: TensorRef

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """(batch, tokens, heads * d) from queries (batch, heads, tokens, d) and keys and values
        (heads, n, d); the softmax in float32, as in training."""
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries)
        mixed: torch.Tensor = self.gate.read().to(queries) * weights @ values
        return mixed.transpose(1, 2).flatten(2)
