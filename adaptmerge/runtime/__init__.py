"""Real models: loading them, streaming them, running them, and attaching adapters to them."""

from __future__ import annotations

from adaptmerge.runtime.attach import as_built, attach, called
from adaptmerge.runtime.inputs import CannotRun, inputs_for, ran
from adaptmerge.runtime.models import example_inputs, load_model, outputs_of, twin, watched
from adaptmerge.runtime.replicate import replicate_layers, replicated
from adaptmerge.runtime.stream import stream_model
from adaptmerge.runtime.together import outputs_of_each

__all__ = [
    "CannotRun",
    "as_built",
    "attach",
    "called",
    "example_inputs",
    "inputs_for",
    "load_model",
    "outputs_of",
    "outputs_of_each",
    "ran",
    "replicate_layers",
    "replicated",
    "stream_model",
    "twin",
    "watched",
]
