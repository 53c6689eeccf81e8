"""Families with values that are drawn from a seed, shared by all modules, or chosen per task."""

from __future__ import annotations

from typing import Any

from families.cases import LINEARS, QV, FamilyCase

GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
BERT = ["query", "value", "output.dense"]
TARGETS: dict[str, dict[str, Any]] = {"gpt2": GPT2, "bert": {"target_modules": BERT}}
DRAWN: dict[str, Any] = {"save_projection": False, "projection_prng_key": 11}

VERA = (
    FamilyCase("vera", "VeraConfig", {"target_modules": QV, "r": 6}),
    FamilyCase("vera_shapes", "VeraConfig", {"target_modules": LINEARS, "r": 5, "d_initial": 0.3}),
    FamilyCase("vera_drawn", "VeraConfig", {"target_modules": LINEARS, "r": 5, **DRAWN}),
    FamilyCase("vera_gpt2", "VeraConfig", {**GPT2, "r": 5}, "gpt2"),
    FamilyCase("vera_gpt2_drawn", "VeraConfig", {**GPT2, "r": 5, **DRAWN}, "gpt2"),
    FamilyCase(
        "vera_bias", "VeraConfig", {"target_modules": QV, "r": 4, "bias": "vera_only"}, "qwen2"
    ),
)
PVERA = (
    FamilyCase("pvera", "PveraConfig", {"target_modules": LINEARS, "r": 5}),
    FamilyCase("pvera_drawn", "PveraConfig", {"target_modules": LINEARS, "r": 5, **DRAWN}),
    FamilyCase("pvera_gpt2", "PveraConfig", {**GPT2, "r": 5}, "gpt2"),
    FamilyCase("pvera_bert", "PveraConfig", {"target_modules": BERT, "r": 3}, "bert"),
)

# PEFT transforms in float32 whatever the model is.
FOURIER = (
    FamilyCase("fourier", "FourierFTConfig", {"target_modules": LINEARS, "n_frequency": 50}),
    FamilyCase(
        "fourier_patterns",
        "FourierFTConfig",
        {
            "target_modules": LINEARS,
            "n_frequency": 40,
            "n_frequency_pattern": {
                "v_proj": 25,
                "model.layers.1.mlp.down_proj": 70,
                r"layers\.0\.self_attn\.q_proj": 9,
            },
            "scaling": 60.0,
            "random_loc_seed": 5,
        },
    ),
    FamilyCase("fourier_gpt2", "FourierFTConfig", {**GPT2, "n_frequency": 60}, "gpt2"),
    FamilyCase(
        "fourier_bert", "FourierFTConfig", {"target_modules": BERT, "n_frequency": 60}, "bert"
    ),
)


def wave(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    targets = TARGETS.get(model, {"target_modules": LINEARS})
    return FamilyCase(name, "WaveFTConfig", {**targets, "n_frequency": 80, **options}, model)


WAVE = (
    wave("wave", random_loc_seed=3, scaling=11.0),
    wave("wave_plain", use_idwt=False, wavelet_family="db11"),
    wave("wave_db7", wavelet_family="db7"),
    wave("wave_sym6", wavelet_family="sym6"),
    wave("wave_coif3", wavelet_family="coif3"),
    wave("wave_coif4", wavelet_family="coif4"),
    wave("wave_share", proportional_parameters=True, n_frequency_pattern={"q_proj": 10}),
    wave("wave_patterns", n_frequency_pattern={"v_proj": 20, r"layers\.1\..*q_proj": 30}),
    wave("wave_gpt2", "gpt2", wavelet_family="db3"),
)


def bank(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    targets = TARGETS.get(model, {"target_modules": LINEARS})
    sizes = {"r": 3, "num_vectors": 9, "vector_length": 16, "init_vector_bank_bound": 0.5}
    return FamilyCase(name, "VBLoRAConfig", {**targets, **sizes, **options}, model)


VBLORA = (
    bank("vblora"),
    bank("vblora_topk", topk=4, save_only_topk_weights=True),
    bank("vblora_many", topk=3, num_vectors=300, save_only_topk_weights=True),
    bank("vblora_gpt2", "gpt2", topk=3),
    bank("vblora_bert", "bert", topk=1, save_only_topk_weights=True),
)


def rand(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    targets = TARGETS.get(model, {"target_modules": LINEARS})
    sizes = {"r": 7, "randlora_alpha": 20}
    return FamilyCase(name, "RandLoraConfig", {**targets, **sizes, **options}, model)


RANDLORA = (
    rand("randlora"),
    rand("randlora_sparse", sparse=True),
    rand("randlora_drawn", **DRAWN),
    rand("randlora_sparse_drawn", sparse=True, **DRAWN),
    rand("randlora_very_sparse_drawn", very_sparse=True, **DRAWN),
    rand("randlora_gpt2", "gpt2", **DRAWN),
    rand("randlora_bert", "bert", r=8),
)


def uni(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    sizes = {"r": 3, "theta_d_length": 70, "init_theta_d_bound": 0.5, "proj_seed": 9}
    targets = TARGETS.get(model, {"target_modules": LINEARS})
    return FamilyCase(name, "UniLoraConfig", {**targets, **sizes, **options}, model)


UNILORA = (
    uni("unilora"),
    uni("unilora_saved", save_indices=True),
    uni("unilora_regex", target_modules=r".*layers\.[01]\.(self_attn\.[vq]_proj|mlp\.up_proj)"),
    uni("unilora_layers", target_modules=[*QV, "gate_proj"], layers_to_transform=[1]),
    uni("unilora_qwen2", "qwen2", target_modules=[*QV, "k_proj"], bias="unilora_only"),
    uni("unilora_gpt2", "gpt2"),
    uni("unilora_bert", "bert"),
)


def tiny(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    sizes = {"r": 3, "u": 5, "projection_seed": 9}
    targets = TARGETS.get(model, {"target_modules": [*LINEARS, "gate_proj"]})
    return FamilyCase(name, "TinyLoraConfig", {**targets, **sizes, **options}, model)


TINYLORA = (
    tiny("tinylora"),
    tiny("tinylora_tied", weight_tying=0.75),
    tiny("tinylora_one", weight_tying=1.0),
    tiny("tinylora_drawn", weight_tying=0.4, save_projection=False),
    tiny("tinylora_gpt2", "gpt2", save_projection=False),
    tiny("tinylora_bert", "bert"),
    tiny("tinylora_embedding", target_modules=["embed_tokens", "q_proj"], weight_tying=0.3),
)

CASES = (*VERA, *PVERA, *FOURIER, *WAVE, *VBLORA, *RANDLORA, *UNILORA, *TINYLORA)
