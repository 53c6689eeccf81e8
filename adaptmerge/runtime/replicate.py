"""Models whose layers are copies of a base's layers, in ranges one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adaptmerge.errors import InputError
from adaptmerge.lazy import torch

Ranges = Sequence[tuple[int, int]]
LISTS = ("layers", "encoder.layer", "h")  # of llama and its kin, of bert, of falcon


@contextmanager
def replicated(model: torch.nn.Module, ranges: Ranges) -> Iterator[None]:
    """While active, the model's layers are those of `ranges`; () changes nothing.

    Copies share their weights, and each is a module of its own. Raises InputError when there is no
    list of layers, or it is shorter than the ranges say.
    """
    if not ranges:
        yield
        return
    owner, name, layers = _layers(model)
    stops = max(stop for _, stop in ranges)
    if stops > len(layers):
        raise InputError(
            f"the adapter is for copies of {stops} layers, the model has {len(layers)}"
        )
    config: Any = getattr(owner, "config", None)
    setattr(owner, name, torch.nn.ModuleList(replicate_layers(list(layers), ranges)))
    count = getattr(config, "num_hidden_layers", None)
    if count is not None:
        config.num_hidden_layers = sum(stop - start for start, stop in ranges)
    try:
        yield
    finally:
        setattr(owner, name, layers)
        if count is not None:
            config.num_hidden_layers = count


def replicate_layers(layers: Sequence[torch.nn.Module], ranges: Ranges) -> list[torch.nn.Module]:
    """Copies of the layers of each range, with the same parameters and their new places in the model."""
    copies = [_copy(layers[i]) for start, stop in ranges for i in range(start, stop)]
    for place, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = place
    return copies


def _copy(layer: torch.nn.Module) -> torch.nn.Module:
    shared = {id(value): value for value in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, shared)


def _layers(model: torch.nn.Module) -> tuple[Any, str, torch.nn.ModuleList]:
    """The module that holds the list of layers, its name there, and the list."""
    if hasattr(model, "streaming"):
        raise InputError("layers of a streamed model cannot be copied: load the whole model")
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    for path in LISTS:
        parent, _, name = path.rpartition(".")
        owner = getattr(inner, parent, None) if parent else inner
        found = getattr(owner, name, None)
        if isinstance(found, torch.nn.ModuleList):
            return owner, name, found
    raise InputError(f"{type(model).__name__} has no list of layers that could be copied")
