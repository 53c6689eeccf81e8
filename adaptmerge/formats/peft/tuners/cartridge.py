"""Cartridge: a prefix whose keys and values began as the attention cache of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptmerge.adapters.families.prefix import Prefix
from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Tuner


def finish(edits: Sequence[Prefix], config: dict[str, Any]) -> dict[str, Any]:
    """No more tokens were frozen than there are."""
    (edit,) = edits
    frozen = min(config.get("num_frozen_tokens", 1), edit.length)
    return virtual.finish(edits, {**config, "num_frozen_tokens": frozen})


TUNER = Tuner(
    "CARTRIDGE",
    summary="keys and values that every layer attends to, begun as those of a text",
    shapes={
        "prompt_embeddings": "tokens width",
    },
    read=virtual.read_prefix("cartridge"),
    tensors=virtual.nothing,
    shared=virtual.prefix_spelling,
    finish=finish,
    maths=virtual.SIZES,
    training=frozenset({"num_frozen_tokens"}),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="averaged, for weights that sum to 1; one after the other with cat",
)
