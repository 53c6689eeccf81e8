"""P-tuning: the prompt that its encoder made in training; the encoder itself is not stored."""

from __future__ import annotations

from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Tuner

TUNER = Tuner(
    "P_TUNING",
    summary="virtual tokens before the input, trained through a small network",
    shapes={
        "prompt_embeddings": "tokens dimension",
    },
    read=virtual.read_prompt("p_tuning"),
    tensors=virtual.nothing,
    shared=virtual.prompt_spelling,
    finish=virtual.finish,
    maths=virtual.SIZES,
    training=frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"}
        | {"encoder_dropout"}
    ),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="averaged, for weights that sum to 1; one after the other with cat",
)
