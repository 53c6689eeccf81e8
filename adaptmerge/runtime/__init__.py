"""Real models: loading them, streaming them, running them, and attaching adapters to them."""

from __future__ import annotations

from adaptmerge.runtime.attach import attach
from adaptmerge.runtime.models import example_inputs, load_model, outputs_of
from adaptmerge.runtime.stream import stream_model

__all__ = ["attach", "example_inputs", "load_model", "outputs_of", "stream_model"]
