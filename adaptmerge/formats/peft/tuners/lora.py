"""LoRA and DoRA (Hu et al. 2021, Liu et al. 2024): the family that the canonical graph is made of."""

from __future__ import annotations

from adaptmerge.formats.peft import lora, lora_write
from adaptmerge.formats.peft.config_problems import VARIANTS
from adaptmerge.formats.peft.tuner import Tuner

TUNER = Tuner(
    "LORA",
    takes=("init",),
    summary="scale * B @ A, and what DoRA, PiSSA, OLoRA, KaSA, BD-LoRA, QA-LoRA and aLoRA make of it",
    shapes={
        "lora_A": "_r? _in *",
        "lora_B": "_out _r? *",
        r"lora_B\.bias": "_out",
        "lora_embedding_A": "_r? _number",
        "lora_embedding_B": "_dimension _r?",
        "lora_magnitude_vector": "_out | 1 _out *",
        "lora_diag": "_r",
    },
    leaves=(
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        *("lora_diag", "lora_velora_embed", r"lora_monteclora_sampler\.[^.]+"),
    ),
    read=lora.read,
    write=lora_write.write,
    finish=lora_write.finish,
    maths={
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "trainable_token_indices": None,
        "qalora_group_size": 16,
        "layer_replication": None,
        "target_parameters": None,
        **dict.fromkeys(VARIANTS),
    },
    training=frozenset(
        {"lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config"}
        | {"merge_weights"}  # of PEFT before 0.3: whether weights were merged for evaluation
        | {"corda_config", "lora_ga_config"}
        | {"runtime_config", "ensure_weight_tying"}
    ),
    bias_mode="lora_only",
    as_lora="itself",
    merges="exact sum; DoRA with LoRA and IA3 is one DoRA, with the base",
)
