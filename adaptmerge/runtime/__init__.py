"""Real models: loading them, streaming them, running them, and attaching adapters to them."""

from __future__ import annotations

from adaptmerge.runtime.attach import as_built, attach
from adaptmerge.runtime.models import example_inputs, load_model, outputs_of
from adaptmerge.runtime.replicate import replicate_layers, replicated
from adaptmerge.runtime.stream import stream_model

__all__ = [
    "as_built",
    "attach",
    "example_inputs",
    "load_model",
    "outputs_of",
    "replicate_layers",
    "replicated",
    "stream_model",
]
