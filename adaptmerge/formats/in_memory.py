"""Adapters in memory as inputs: tensors and a config under the names that a saved adapter has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptmerge.files.in_memory import InMemory, snapshots
from adaptmerge.formats.inputs import InputSpec

if TYPE_CHECKING:
    import torch

ORIGIN = "memory://"  # before the name of an input that lies in no file
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def from_state_dict(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    name: str = "adapter",
    weight: float | None = None,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> InputSpec:
    """An input that holds copies of these tensors: what a file of an adapter has, by its keys.

    config: what its `adapter_config.json` says; None where the tensors are all there is, as in a lone
    file. metadata: what the header of the file would say. weight and alpha: as in the text of an input.
    Raises InputError for values that are no tensors a file could hold.
    """
    origin = f"{ORIGIN}{name}"
    documents = {} if config is None else {CONFIG: copy.deepcopy(dict(config))}
    file = snapshots(tensors, metadata or {}, origin)
    held = InMemory.holding(origin, documents, {WEIGHTS: file})
    return InputSpec(origin, weight=weight, alpha=alpha, held=held)
