"""SHADOW: a small network that runs beside the model (read to be shown only)."""

from __future__ import annotations

from adaptmerge.formats.peft import opaque
from adaptmerge.formats.peft.tuner import Tuner

WHY = (
    "SHADOW runs a network of its own beside the model, which no change of weights does: keep the adapter "
    "as it is"
)

TUNER = Tuner(
    "SHADOW",
    summary="a network beside the model",
    read=opaque.read_all("shadow", WHY, "shadow_"),
    maths={
        "r": 8,
        "shadow_alpha": 0.1,
        "shadow_model": "mirror",
        "shadow_num_hidden_layers": None,
        "shadow_hidden_size": None,
        "shadow_num_attention_heads": None,
        "shadow_intermediate_size": None,
        "share_embeddings": True,
        "update_hidden_size": None,
    },
    training=frozenset({"shadow_dropout", "auxiliary_loss_weight"}),
    as_lora="never",
    merges="none",
    refused=WHY,
)
