"""What a stored model stands for, run by transformers in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptmerge.bases.open import open_base
from adaptmerge.schemes.view import view_of

TOKENS = torch.arange(60).view(2, 30) * 7 % 60 + 3


def values(folder: Path) -> dict[str, Tensor]:
    """All parameters of a checkpoint, dequantised."""
    return {n: r.read().double() for n, r in view_of(open_base(str(folder))).values.tensors.items()}


def model_of(config: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model of a folder's config with these parameters."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(config, dtype=torch.float64).eval()
    model.load_state_dict(tensors)
    return model


def outputs(model: nn.Module) -> Tensor:
    """Its logits of some tokens, float64."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found.double()
