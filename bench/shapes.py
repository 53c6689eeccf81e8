"""Synthetic adapters in the shapes of real models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, KV, FFN = 4096, 1024, 14336  # Llama-3-8B
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def sites(layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module path, (out, in)) of all adapted linears."""
    for layer in range(layers):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}", shape


def make_adapter(folder: Path, *, layers: int, rank: int = 16, seed: int = 0) -> Path:
    """A bf16 LoRA adapter of that rank on all seven linears, written as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, width) in sites(layers):
        key = f"base_model.model.{module}"
        down = torch.randn(rank, width, generator=generator) * 0.02
        up = torch.randn(out, rank, generator=generator) * 0.02
        tensors[f"{key}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"{key}.lora_B.weight"] = up.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[1] for name in SHAPES),
        "base_model_name_or_path": "bench/llama-3-8b-shapes",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
