"""What the class of a model says of its linear layers: which of them a loader would quantise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from adaptmerge.bases.classes import in_one_sentence, on_meta, quietly
from adaptmerge.lazy import torch
from adaptmerge.runtime.models import model_config


class Linears(NamedTuple):
    """The paths of linear layers: those that are quantised, and those that are kept as they are."""

    quantised: list[str]
    kept: list[str]


def linear_layers(base_dir: Path) -> Linears:
    """The linear layers of a model as `transformers` quantises them with bitsandbytes: all but the head and
    what is tied to an embedding."""
    from transformers.pytorch_utils import Conv1D

    model = _without_weights(base_dir)
    kept = _kept(model)
    found = Linears([], [])
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear | Conv1D):
            stays = any(name == part or name.startswith(f"{part}.") for part in kept)
            (found.kept if stays else found.quantised).append(name)
    return found


def quantised_modules(base_dir: Path) -> list[str]:
    """The paths of the linear layers that `transformers` quantises."""
    return linear_layers(base_dir).quantised


def parameters_of(base_dir: Path) -> tuple[str, ...]:
    """The names of all parameters of a model, tied ones under each."""
    model = _without_weights(base_dir)
    return tuple(name for name, _ in model.named_parameters(remove_duplicate=False))


def _without_weights(base_dir: Path) -> torch.nn.Module:
    """The model of a checkpoint on the meta device. Raises InputError where there is no class for it."""
    config = model_config(base_dir)
    with quietly(), in_one_sentence(str(base_dir)):
        return on_meta(config)


def _kept(model: torch.nn.Module) -> list[str]:
    """The modules that stay in full precision, by the library's own rule."""
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # transformers 4
        from transformers.integrations import get_keys_to_not_convert
    found: list[str] = get_keys_to_not_convert(model)
    return found
