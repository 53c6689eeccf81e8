"""LoHa, LoKr, AdaLoRA, MiSS, DeLoRA, GraLoRA, C3A, SHiRA, Super-Tuning and HiRA."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from families.cases import LINEARS, QV, FamilyCase, noise
from torch import nn

LAYER = r"^model\.layers\.0\.self_attn\.q_proj"
PATTERNS = {"rank_pattern": {LAYER: 2, "v_proj": 5}, "alpha_pattern": {"down_proj": 2}}
BIASED = [*QV, "up_proj"]  # two of these have biases in Qwen2
CONVS = ["conv", "point", "line", "head"]
Q = ["q_proj", "o_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
MASKS = {
    "0.self_attn.q_proj": [True, False, True, True, False, False],
    "1.self_attn.q_proj": [False, False, False, False, True, False],
    "1.self_attn.v_proj": [False] * 6,
}
loud = partial(noise, size=1.0)


@torch.no_grad()
def pruned(model: nn.Module) -> None:
    """Random values, and masks as the rank allocator leaves them."""
    noise(model, 0.3)
    peft_model: Any = model
    peft_model.peft_config["default"].rank_pattern = {
        f"{name.removeprefix('base_model.model.').removesuffix('.default')}": mask
        for name, _ in model.named_parameters()
        for part, mask in MASKS.items()
        if f"{part}.lora_E" in name
    }


OWN = ("model", "tolerance", "randomise", "merges")


def case(name: str, config: str, targets: list[str], **options: Any) -> FamilyCase:
    """A case; what FamilyCase itself takes is taken out of the options."""
    own = {key: options.pop(key) for key in OWN if key in options}
    return FamilyCase(name, config, {"target_modules": targets, **options}, **own)


def on_convs(name: str, config: str, targets: list[str], **options: Any) -> FamilyCase:
    return case(name, config, targets, model="conv", randomise=partial(noise, size=0.3), **options)


# PEFT keeps the scale of LoHa in float32, and computes C3A in it, whatever the model is in
SINGLE = 1e-5
LOHA = (
    case("loha", "LoHaConfig", LINEARS, r=3, alpha=7, tolerance=SINGLE),
    case("loha_patterns", "LoHaConfig", LINEARS, r=3, alpha=7, tolerance=SINGLE, **PATTERNS),
    case("loha_bias", "LoHaConfig", BIASED, r=3, alpha=7, model="qwen2", tolerance=SINGLE),
    on_convs("loha_conv", "LoHaConfig", CONVS, r=3, alpha=7),
    on_convs("loha_conv_cores", "LoHaConfig", CONVS, r=3, alpha=7, use_effective_conv2d=True),
)
LOKR = (
    case("lokr", "LoKrConfig", LINEARS, r=3, alpha=7),
    case("lokr_whole", "LoKrConfig", LINEARS, r=8, alpha=3),
    case("lokr_both", "LoKrConfig", LINEARS, r=2, alpha=5, decompose_both=True),
    case("lokr_factor", "LoKrConfig", LINEARS, r=3, alpha=7, decompose_factor=4),
    case("lokr_large_factor", "LoKrConfig", LINEARS, r=2, alpha=7, decompose_factor=16),
    case("lokr_odd_factor", "LoKrConfig", LINEARS, r=3, alpha=7, decompose_factor=5),
    case("lokr_patterns", "LoKrConfig", LINEARS, r=3, alpha=7, **PATTERNS),
    case("lokr_bias", "LoKrConfig", BIASED, r=3, alpha=7, model="qwen2"),
    on_convs("lokr_conv", "LoKrConfig", CONVS, r=1, alpha=3),
    on_convs("lokr_conv_both", "LoKrConfig", CONVS, r=1, alpha=3, decompose_both=True),
    on_convs("lokr_conv_whole", "LoKrConfig", ["conv", "point", "head"], r=4, alpha=3),
    # whole one-dimensional kernels: PEFT multiplies them with the roles of the sides swapped
    on_convs("lokr_line_whole", "LoKrConfig", ["line"], r=4, alpha=3),
    # with r = 1 PEFT's own product fails on a one-dimensional kernel with a core
    on_convs("lokr_line_cores", "LoKrConfig", ["line"], r=2, alpha=3, use_effective_conv2d=True),
    on_convs(
        "lokr_conv_cores",
        "LoKrConfig",
        ["conv", "point", "head"],
        r=1,
        alpha=3,
        use_effective_conv2d=True,
    ),
)
ADALORA = (
    case("adalora", "AdaLoraConfig", LINEARS, init_r=6, lora_alpha=32, total_step=9),
    case("adalora_alpha", "AdaLoraConfig", LINEARS, init_r=6, lora_alpha=0, total_step=9),
    case("adalora_pruned", "AdaLoraConfig", Q, init_r=6, total_step=9, randomise=pruned),
    case(
        "adalora_pruned_alpha",
        "AdaLoraConfig",
        Q,
        init_r=6,
        lora_alpha=0,
        total_step=9,
        randomise=pruned,
    ),
    # nothing is left of one module: there is no move to compare a delta with
    case(
        "adalora_empty",
        "AdaLoraConfig",
        QV,
        init_r=6,
        total_step=9,
        randomise=pruned,
        merges=False,
    ),
    case(
        "adalora_bias",
        "AdaLoraConfig",
        BIASED,
        init_r=6,
        lora_alpha=32,
        total_step=9,
        bias="lora_only",
        model="qwen2",
    ),
    case(
        "adalora_gpt2",
        "AdaLoraConfig",
        GPT2,
        init_r=6,
        lora_alpha=32,
        total_step=9,
        model="gpt2",
        fan_in_fan_out=True,
    ),
    on_convs(
        "adalora_conv",
        "AdaLoraConfig",
        ["conv", "point", "head"],
        init_r=4,
        lora_alpha=9,
        total_step=9,
    ),
)
MISS = (
    case("miss", "MissConfig", LINEARS, r=8),
    case("miss_remainder", "MissConfig", LINEARS, r=7),
    case("miss_random", "MissConfig", LINEARS, r=8, init_weights=False),
    case("miss_mini", "MissConfig", LINEARS, r=8, init_weights="mini", mini_r=4),
    case("miss_mini_remainder", "MissConfig", LINEARS, r=7, init_weights="mini", mini_r=16),
    case("miss_bat", "MissConfig", LINEARS, r=8, init_weights="bat"),
    case("miss_bias", "MissConfig", BIASED, r=8, bias="MiSS_only", model="qwen2"),
    case("miss_bat_bias", "MissConfig", BIASED, r=8, bias="all", model="qwen2", init_weights="bat"),
)
DELORA = (
    case("delora", "DeloraConfig", LINEARS, r=3, delora_lambda=2),
    case(
        "delora_patterns",
        "DeloraConfig",
        LINEARS,
        r=3,
        rank_pattern=PATTERNS["rank_pattern"],
        lambda_pattern={"o_proj": 4},
    ),
    case("delora_bias", "DeloraConfig", BIASED, r=3, bias="delora_only", model="qwen2"),
)
GRALORA = (
    case("gralora", "GraloraConfig", LINEARS, r=6, alpha=9, gralora_k=2),
    case("gralora_4", "GraloraConfig", LINEARS, r=4, alpha=9, gralora_k=4),
    case("gralora_hybrid", "GraloraConfig", LINEARS, r=4, alpha=9, hybrid_r=3),
    case("gralora_bias", "GraloraConfig", BIASED, r=4, bias="gralora_only", model="qwen2"),
    case("gralora_gpt2", "GraloraConfig", GPT2, r=4, hybrid_r=2, model="gpt2", fan_in_fan_out=True),
)
C3A = (
    case("c3a", "C3AConfig", LINEARS, block_size=8, tolerance=SINGLE, randomise=loud),
    case(
        "c3a_patterns",
        "C3AConfig",
        LINEARS,
        block_size=16,
        block_size_pattern={
            "v_proj": 4,
            "model.layers.0.self_attn.q_proj": 8,
            r"layers\.1\.mlp\.down_proj": 2,
        },
        tolerance=SINGLE,
        randomise=loud,
    ),
    case(
        "c3a_bias",
        "C3AConfig",
        BIASED,
        block_size=8,
        bias="c3a_only",
        model="qwen2",
        tolerance=SINGLE,
        randomise=loud,
    ),
)
SPARSE = (
    case("shira", "ShiraConfig", LINEARS, r=2, random_seed=5),
    case("shira_bias", "ShiraConfig", BIASED, r=2, model="qwen2"),
    case("supertuning", "SupertuningConfig", LINEARS, sparsity=0.9),
    case("supertuning_small", "SupertuningConfig", LINEARS, sparsity=0.9, select_top=False),
    case("supertuning_supra", "SupertuningConfig", LINEARS, sparsity=0.95, r=3),
    case("supertuning_alpha", "SupertuningConfig", LINEARS, r=3, lora_alpha=5.0),
    case("supertuning_bias", "SupertuningConfig", BIASED, sparsity=0.9, model="qwen2"),
    case(
        "supertuning_found",
        "SupertuningConfig",
        LINEARS,
        sparsity=0.9,
        save_precomputed_indices=False,
    ),
    case(
        "supertuning_found_small",
        "SupertuningConfig",
        LINEARS,
        sparsity=0.9,
        select_top=False,
        save_precomputed_indices=False,
    ),
)
HIRA = (
    case("hira", "HiraConfig", LINEARS, r=3),
    # PEFT reads rank_pattern of HiRA and makes every module of rank r nevertheless
    case("hira_patterns", "HiraConfig", LINEARS, r=3, rank_pattern={"v_proj": 5}),
    case("hira_embedding", "HiraConfig", ["embed_tokens", "q_proj"], r=3),
    case("hira_bias", "HiraConfig", BIASED, r=3, model="qwen2"),
    case("hira_gpt2", "HiraConfig", [*GPT2, "wte"], r=3, model="gpt2", fan_in_fan_out=True),
    on_convs("hira_conv", "HiraConfig", CONVS, r=3),
)


CASES = (*LOHA, *LOKR, *ADALORA, *MISS, *DELORA, *GRALORA, *C3A, *SPARSE, *HIRA)
