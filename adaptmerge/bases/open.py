"""Opening the base model at a path or hub id, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

from adaptmerge.bases.base import GGUF, Base
from adaptmerge.bases.config import checked_config
from adaptmerge.bases.gguf_model import model_in, open_model
from adaptmerge.errors import InputError
from adaptmerge.files import hub
from adaptmerge.files.listing import Listing
from adaptmerge.tensors.caches import forget

MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_base(place: str | Path) -> Base:
    """The base model at a folder or hub id, in one file of weights beside its config, or in GGUF files.

    Raises InputError when it is not a model checkpoint.
    """
    forget()
    source = str(place)
    path, _ = hub.resolve(source)
    listing = Listing.of(path, source)
    weights = listing.single
    gguf = path if weights and weights.endswith(GGUF) else None
    if not weights and not any(listing.has(name) for name in WEIGHT_FILES):
        gguf = model_in(path, listing.names)
    if gguf is not None:
        return open_model(gguf)
    if weights:
        path = path.parent
        listing = Listing.of(path, source)
    if not listing.has(MODEL_CONFIG) and listing.has(ADAPTER_CONFIG):
        raise InputError("is an adapter: a model belongs here", where=source)
    if not listing.has(MODEL_CONFIG):
        raise InputError(
            "is not a model: expected a folder with config.json and weights in it, or a GGUF file",
            where=source,
        )
    weights = weights or next((name for name in WEIGHT_FILES if listing.has(name)), None)
    tensors = listing.tensors(weights).refs if weights else {}
    config = checked_config(listing.json(MODEL_CONFIG), str(path / MODEL_CONFIG))
    return Base(path, config, tensors)
