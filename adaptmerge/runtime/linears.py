"""Which modules of a model a loader would quantise."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.lazy import torch
from adaptmerge.runtime.models import in_one_sentence, model_class, model_config, quietly


def quantised_modules(base_dir: Path) -> list[str]:
    """The paths of the linear layers that `transformers` quantises with bitsandbytes: all but the head
    and what is tied to an embedding."""
    from transformers.pytorch_utils import Conv1D

    config = model_config(base_dir)
    with quietly(), in_one_sentence(str(base_dir)), torch.device("meta"):
        model = model_class(config)(config)
    kept = _kept(model)
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not any(name == part or name.startswith(f"{part}.") for part in kept)
    ]


def _kept(model: torch.nn.Module) -> list[str]:
    """The modules that stay in full precision, by the library's own rule."""
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # transformers 4
        from transformers.integrations import get_keys_to_not_convert
    found: list[str] = get_keys_to_not_convert(model)
    return found
