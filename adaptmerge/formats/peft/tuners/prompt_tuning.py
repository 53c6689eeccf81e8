"""Prompt tuning: prompt_embeddings (tokens, dimension), before the embeddings of the input."""

from __future__ import annotations

from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Tuner

TUNER = Tuner(
    "PROMPT_TUNING",
    summary="virtual tokens before the input",
    shapes={
        "prompt_embeddings": "tokens dimension",
    },
    read=virtual.read_prompt("prompt_tuning"),
    tensors=virtual.nothing,
    shared=virtual.prompt_spelling,
    finish=virtual.finish,
    maths=virtual.SIZES,
    training=frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
        | {"tokenizer_kwargs"}
    ),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="averaged, for weights that sum to 1; one after the other with cat",
)
