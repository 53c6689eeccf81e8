"""LoRA on parameters: stacked experts, one or both of them, routers, and matrices of linear layers."""

from __future__ import annotations

from families.cases import FamilyCase

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = {"target_parameters": [GATE_UP, DOWN], "r": 3, "lora_alpha": 8}


def moe(name: str, model: str = "mixtral", **options: object) -> FamilyCase:
    return FamilyCase(
        name, "LoraConfig", {"target_modules": [], **BOTH, **options}, model, task="CAUSAL_LM"
    )


CASES = (
    moe("moe_mixtral"),
    moe("moe_gate_up", target_parameters=[GATE_UP]),
    moe("moe_down", target_parameters=[DOWN], use_rslora=True),
    moe("moe_one_layer", target_parameters=["layers.1.mlp.experts.down_proj"]),
    moe("moe_short_names", target_parameters=["gate_up_proj", "down_proj"]),
    moe("moe_router", target_parameters=[GATE_UP, DOWN, "mlp.gate.weight"]),
    moe("moe_short_router", target_parameters=["gate_up_proj", "gate.weight", "down_proj"]),
    moe("moe_with_attention", target_modules=["q_proj", "v_proj"]),
    moe("moe_matrix", "llama", target_parameters=["q_proj.weight", "mlp.down_proj.weight"]),
    moe("moe_qwen2", "qwen2_moe", target_modules=["q_proj"]),
    moe("moe_qwen2_down", "qwen2_moe", target_parameters=[DOWN]),
    moe("moe_gpt_oss", "gpt_oss"),
    moe("moe_gpt_oss_bias", "gpt_oss", target_parameters=[GATE_UP, GATE_UP + "_bias", DOWN]),
)
