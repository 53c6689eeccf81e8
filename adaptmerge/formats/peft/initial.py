"""?init=DIR: the sides of a LoRA as they were when it was initialised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptmerge.errors import InputError
from adaptmerge.files import hub
from adaptmerge.files.listing import Listing
from adaptmerge.formats.peft.config import CONFIG, READABLE, PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading
from adaptmerge.tensors.refs import TensorRef

Sides = tuple[TensorRef, TensorRef]


@dataclass(frozen=True)
class Initial:
    """The tensors of the adapter as initialised, by module, and its config where it has one."""

    origin: str
    modules: Mapping[str, Parts]
    config: PeftConfig | None

    def pair(self, module: str, up: TensorRef, down: TensorRef, scale: float) -> Sides:
        """(up, down) as they were. Raises Malformed where they are of another adapter."""
        first = _sides(self.modules.get(module, {}))
        if first is None:
            raise Malformed(f"?init={self.origin} has no lora_A and lora_B of it")
        shapes = [list(ref.shape) for ref in (*first, up, down)]
        if shapes[:2] != shapes[2:]:
            raise Malformed(
                f"?init={self.origin} has lora_B {shapes[0]} and lora_A {shapes[1]}, but the adapter "
                f"{shapes[2]} and {shapes[3]}"
            )
        said = scale if self.config is None else self.config.scale(module, down.shape[0], None)
        if said != scale:
            raise Malformed(
                f"?init={self.origin} has the scale {said:g}, but the adapter {scale:g}: the same "
                "lora_alpha is needed"
            )
        return first


def _sides(parts: Parts) -> Sides | None:
    """(up, down), the down of a convolution with its kernel; None where one is missing."""
    if {"lora_embedding_A", "lora_embedding_B"} <= parts.keys():
        return parts["lora_embedding_A"].T, parts["lora_embedding_B"].T
    if not {"lora_A", "lora_B"} <= parts.keys():
        return None
    up = parts["lora_B"]
    return up.reshape(*up.shape[:2]), parts["lora_A"]


def initial_pairs(reading: Reading) -> Initial | None:
    """What ?init= names; None without it. Raises InputError when it is no adapter."""
    origin = reading.options.init
    if origin is None:
        return None
    path, _ = hub.resolve(origin)
    listing = Listing.of(path, origin)
    name = listing.single or next((name for name in READABLE if listing.has(name)), None)
    if name is None:
        raise InputError("has no adapter weights: expected the initial adapter", where=origin)
    config = PeftConfig.of(listing.json(CONFIG), origin) if listing.has(CONFIG) else None
    keys = Keys.of(listing.tensors(name), reading.tuner.key())
    return Initial(origin, keys.modules, config)
