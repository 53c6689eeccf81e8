"""Synthetic adapters in the shapes of real models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of each adapted linear of a layer

HIDDEN, KV, FFN = 4096, 1024, 14336  # Llama-3-8B
SHAPES: Shapes = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BYTES = 2  # of a bfloat16


def squares(size: int) -> Shapes:
    """Only the two linears of a layer that are size x size."""
    return dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (size, size))


def sites(layers: int, shapes: Shapes = SHAPES) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module path, (out, in)) of all adapted linears."""
    for layer in range(layers):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}", shape


def make_adapter(
    folder: Path,
    *,
    layers: int,
    rank: int = 16,
    seed: int = 0,
    shapes: Shapes = SHAPES,
    scale: float = 0.02,
) -> Path:
    """A bf16 LoRA adapter of that rank on all linears, written as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, width) in sites(layers, shapes):
        key = f"base_model.model.{module}"
        down = torch.randn(rank, width, generator=generator) * scale
        up = torch.randn(out, rank, generator=generator) * scale
        tensors[f"{key}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"{key}.lora_B.weight"] = up.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    write_config(folder, rank, shapes)
    return folder


def make_large(folder: Path, *, layers: int, rank: int = 16) -> Path:
    """The same adapter with any number of layers, which all hold one layer's values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for module, (out, width) in sites(layers):
        for side, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
            begin, end = end, end + shape[0] * shape[1] * BYTES
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            header[f"base_model.model.{module}.{side}.weight"] = entry
    text = json.dumps(header).encode()
    values = torch.randn(end // layers // BYTES, generator=torch.Generator().manual_seed(0))
    layer = (values * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    folder.mkdir(parents=True)
    with (folder / TENSORS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(layers):
            file.write(layer)
    write_config(folder, rank, SHAPES)
    return folder


def write_config(folder: Path, rank: int, shapes: Shapes, alpha: int | None = None) -> None:
    """The config of a LoRA of that rank; alpha is twice the rank where it is not given."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "target_modules": sorted(name.split(".")[1] for name in shapes),
        "base_model_name_or_path": "bench/llama-3-8b-shapes",
    }
    (folder / CONFIG).write_text(json.dumps(config))
