"""Prefix tuning: prompt_embeddings (tokens, layers * 2 * key-value size), keys and values per layer.

With prefix_projection, PEFT stores what the projection gave, not the projection.
"""

from __future__ import annotations

from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Tuner

TUNER = Tuner(
    "PREFIX_TUNING",
    summary="keys and values that every layer attends to",
    shapes={
        "prompt_embeddings": "tokens width",
    },
    read=virtual.read_prefix("prefix_tuning"),
    tensors=virtual.nothing,
    shared=virtual.prefix_spelling,
    finish=virtual.finish,
    maths=virtual.SIZES,
    training=frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"}),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="averaged, for weights that sum to 1; one after the other with cat",
)
