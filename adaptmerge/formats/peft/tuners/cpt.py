"""CPT: a prompt that began as the embeddings of given tokens, with what was learned added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptmerge.adapters.families.prompt import Prompt
from adaptmerge.formats.peft import virtual
from adaptmerge.formats.peft.tuner import Tuner

FILL = {"cpt_token_ids": 0, "cpt_mask": 1, "cpt_tokens_type_mask": 1}


def finish(edits: Sequence[Prompt], config: dict[str, Any]) -> dict[str, Any]:
    """PEFT counts the virtual tokens by these lists, whose values only its loss reads."""
    (edit,) = edits
    result = virtual.finish(edits, config)
    for name, value in FILL.items():
        if len(result.get(name) or ()) != edit.length:
            result[name] = [value] * edit.length
    return result


TUNER = Tuner(
    "CPT",
    summary="virtual tokens before the input, trained from given tokens",
    shapes={
        "prompt_embeddings": "tokens dimension",
    },
    read=virtual.read_prompt("cpt"),
    tensors=virtual.nothing,
    shared=virtual.prompt_spelling,
    finish=finish,
    maths=virtual.SIZES,
    training=frozenset(
        {"opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon"}
        | {"opt_projection_format_epsilon", "tokenizer_name_or_path", *FILL}
    ),
    prefix=virtual.PREFIX,
    as_lora="never",
    merges="averaged, for weights that sum to 1; one after the other with cat",
)
