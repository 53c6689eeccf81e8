"""Random inputs for a model, of the kinds that its class takes: tokens, images, sounds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptmerge.bases.classes import model_class
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.models import example_inputs, model_config, outputs_of

Config = Mapping[str, Any]
BATCH = 2
FRAMES = 64  # of a sound, where the model does not ask for a number of them
STRIDE = (5, 2, 2, 2, 2, 2, 2)  # of the convolutions of wav2vec 2.0


class CannotRun(InputError):
    """The model computes nothing from inputs that are made up."""


def inputs_for(path: Path, first: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Seeded random inputs for the model in a folder; tokens begin with `first`. Raises CannotRun for a
    class that takes what none can be made of."""
    config = model_config(path)
    kind = model_class(config)
    said, main = config.to_dict(), kind.main_input_name
    takes = inspect.signature(kind.forward).parameters
    if main not in ("input_ids", *MADE):
        raise CannotRun(f"{kind.__name__} takes {main}, of which no examples are made")
    names = [name for name in MADE if name == main or (name == "pixel_values" and _is_dual(kind))]
    generator = torch.Generator().manual_seed(0)
    try:
        found = {name: torch.randn(MADE[name](said), generator=generator) for name in names}
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise CannotRun(f"the config does not say the size of {names[0]} ({problem})") from None
    if main == "input_ids":
        return {**example_inputs(said, first=first), **found}
    tokens = [name for name in ("decoder_input_ids", "input_ids") if name in takes][:1]
    if tokens and _has_words(said):
        found[tokens[0]] = example_inputs(said, first=first, length=FRAMES // 8)["input_ids"]
    return found


def ran(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """None if the model as it is computes something from inputs, else why it does not."""
    try:
        outputs_of(model, inputs)
    except Exception as problem:  # noqa: BLE001 - whatever a foreign model raises
        said = first_line(problem)
        return f"{type(model).__name__} computes nothing from {', '.join(inputs)}: {said}"
    return None


def first_line(problem: Exception) -> str:
    """What an exception says, without what follows its first line; its name where it says nothing."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def out_of_memory(problem: Exception) -> bool:
    """Whether the machine, not the model, is what a forward failed on."""
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(problem, RuntimeError) and "allocate memory" in str(problem)
    )


def _is_dual(kind: Any) -> bool:
    """Whether a class compares texts with images, and needs both."""
    return hasattr(kind, "get_text_features") and hasattr(kind, "get_image_features")


def _has_words(config: Config) -> bool:
    size = (config.get("text_config") or config).get("vocab_size")
    return isinstance(size, int) and size > 1


def _image(config: Config) -> tuple[int, ...]:
    vision = config.get("vision_config") or config
    size = vision["image_size"]
    sides = [size["height"], size["width"]] if isinstance(size, Mapping) else size
    height, width = sides if isinstance(sides, (list, tuple)) else (sides, sides)
    return BATCH, int(vision.get("num_channels", 3)), int(height), int(width)


def _spectrum(config: Config) -> tuple[int, ...]:
    audio = config.get("audio_config") or config
    if "input_feat_per_channel" in audio:  # time first, as speech encoders before Whisper have it
        return BATCH, FRAMES, int(audio["input_feat_per_channel"])
    return BATCH, int(audio["num_mel_bins"]), 2 * int(audio["max_source_positions"])


def _sound(config: Config) -> tuple[int, ...]:
    if (
        "num_mel_bins" in config and "max_length" in config
    ):  # a spectrogram under the name of a sound
        return BATCH, int(config["max_length"]), int(config["num_mel_bins"])
    return BATCH, FRAMES * math.prod(config.get("conv_stride") or STRIDE)


MADE: Mapping[str, Callable[[Config], tuple[int, ...]]] = {
    "pixel_values": _image,
    "input_features": _spectrum,
    "input_values": _sound,
}
