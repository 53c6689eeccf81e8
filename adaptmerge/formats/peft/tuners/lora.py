"""LoRA and DoRA (Hu et al. 2021, Liu et al. 2024): the family that the canonical graph is made of."""

from __future__ import annotations

from adaptmerge.formats.peft import lora, lora_write
from adaptmerge.formats.peft.config import NOT_PLAIN
from adaptmerge.formats.peft.tuner import Tuner

TUNER = Tuner(
    "LORA",
    summary="scale * B @ A; DoRA with a magnitude per output",
    leaves=("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    read=lora.read,
    write=lora_write.write,
    maths={
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "trainable_token_indices": None,
        "qalora_group_size": 16,
        **dict.fromkeys(NOT_PLAIN),
    },
    training=frozenset(
        {"lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config"}
        | {"corda_config", "lora_ga_config", "velora_config", "monteclora_config"}
        | {"runtime_config", "ensure_weight_tying"}
    ),
    bias_mode="lora_only",
    as_lora="itself",
    merges="exact sum",
)
