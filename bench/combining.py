"""Adapters whose sums ask for more than their own factors: DoRAs with their base, and experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.models import config
from bench.shapes import CONFIG, FFN, HIDDEN, KV, TENSORS, make_adapter, sites

LAYER = "one layer of Llama-3-8B shapes"
SIZE = (HIDDEN, KV, FFN, 1, 32)
SPREAD = 0.02
EXPERTS, EXPERT_LAYERS = 128, 2
MODEL, INNER = 2048, 768  # of a Qwen3 with 128 experts


def make_layer(folder: Path) -> Path:
    """A bf16 base of one layer, without embeddings."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{module}.weight": (torch.randn(shape, generator=random) * SPREAD).to(torch.bfloat16)
        for module, shape in sites(1)
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(SIZE)))
    return folder


def make_dora(folder: Path, *, base: Path, seed: int) -> Path:
    """A rank-16 DoRA of that layer, whose magnitudes are off by some percent."""
    return as_dora(make_adapter(folder, layers=1, seed=seed), base=base, seed=seed)


def as_dora(folder: Path, *, base: Path, seed: int) -> Path:
    """The LoRA in the folder made a DoRA of that base, whose magnitudes are off by some percent."""
    tensors = load_file(folder / TENSORS)
    weights = {
        name: t for part in base.glob("*.safetensors") for name, t in load_file(part).items()
    }
    random = torch.Generator().manual_seed(seed)
    for down in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        key = down.removesuffix(".lora_A.weight")
        norms = weights[f"{key.removeprefix('base_model.model.')}.weight"].float().norm(dim=1)
        off = 1 + SPREAD * torch.randn(len(norms), generator=random)
        tensors[f"{key}.lora_magnitude_vector"] = norms * off
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    stated = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**stated, "use_dora": True}))
    return folder


def make_experts(folder: Path, *, seed: int, rank: int = 16) -> Path:
    """A bf16 LoRA of that rank on both stacked parameters of the experts of some layers."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"": (MODEL, INNER), ".base_layer": (2 * INNER, MODEL)}  # down is outermost
    tensors = {}
    for layer in range(EXPERT_LAYERS):
        for nested, (out, width) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.mlp.experts{nested}"
            for side, shape in (("A", (EXPERTS * rank, width)), ("B", (out, rank * EXPERTS))):
                value = torch.randn(shape, generator=random) * SPREAD
                tensors[f"{key}.lora_{side}.weight"] = value.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    stated = {
        "peft_type": "LORA",
        "peft_version": "0.19.0",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "base_model_name_or_path": "bench/experts",
    }
    (folder / CONFIG).write_text(json.dumps(stated))
    return folder


def norms_of(base: Path, adapters: list[Path]) -> None:
    """The arithmetic that a sum of DoRAs with this base is worth: |W|^2 and W A^T of all adapters."""
    weights = load_file(base / "model.safetensors")
    downs = [load_file(folder / TENSORS) for folder in adapters]
    for module, _ in sites(1):
        key = f"base_model.model.{module}.lora_A.weight"
        down = torch.cat([found[key] for found in downs]).float()
        for rows in weights[f"{module}.weight"].split(64):
            torch.linalg.vector_norm(rows.double(), dim=1)
            rows.float() @ down.T
