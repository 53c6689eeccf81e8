"""A base model of one layer with two wide square matrices, and an adapter for them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.fused import TORCH
from bench.shapes import TENSORS, write_config

WIDTH, RANK = 4096, 16
HEAD, FFN, VOCABULARY = 32, 32, 32
PREFIX = "model.layers.0"
# what the values of weight and factors are drawn from: the module that has them
SITES = {
    "Gaussian": f"{PREFIX}.self_attn.q_proj",
    "Student t4": f"{PREFIX}.self_attn.o_proj",
}
LARGEST = 1e-2  # |dW|/|W| at weight 1
SPREAD = 0.02


def make_layers(folder: Path, *, width: int, dtype: str) -> Path:
    """A Llama of one layer, its two wide matrices drawn with a standard deviation of 0.02."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens": (VOCABULARY, width),
        "lm_head": (VOCABULARY, width),
        f"{PREFIX}.self_attn.k_proj": (HEAD, width),
        f"{PREFIX}.self_attn.v_proj": (HEAD, width),
        f"{PREFIX}.mlp.gate_proj": (FFN, width),
        f"{PREFIX}.mlp.up_proj": (FFN, width),
        f"{PREFIX}.mlp.down_proj": (width, FFN),
    }
    found = {name: drawn("Gaussian", shape, random) for name, shape in shapes.items()}
    found |= {site: drawn(values, (width, width), random) for values, site in SITES.items()}
    for name in (f"{PREFIX}.input_layernorm", f"{PREFIX}.post_attention_layernorm", "model.norm"):
        found[name] = torch.ones(width)
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": value.to(TORCH[dtype]) for name, value in found.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(width, dtype)))
    return folder


def make_layers_adapter(folder: Path, *, width: int) -> Path:
    """A float32 LoRA of both matrices, a hundredth of each."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for values, site in SITES.items():
        down = drawn(values, (RANK, width), random)
        up = drawn(values, (width, RANK), random)
        size = float((up.T @ up).double().mul((down @ down.T).double()).sum().sqrt())
        key = f"base_model.model.{site}"
        tensors[f"{key}.lora_A.weight"] = down
        tensors[f"{key}.lora_B.weight"] = up * (LARGEST * SPREAD * width / size)
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    names = {site.removeprefix(f"{PREFIX}."): (width, width) for site in SITES.values()}
    write_config(folder, RANK, names, alpha=RANK)
    return folder


def drawn(values: str, shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=random)
    if values == "Gaussian":
        return normal * SPREAD
    squares = torch.zeros(shape)
    for _ in range(4):
        squares += torch.randn(shape, generator=random).square_()
    # t with 4 degrees of freedom has variance 2
    return normal / (squares / 4).sqrt() * (SPREAD / math.sqrt(2))


def _config(width: int, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": str(TORCH[dtype]).removeprefix("torch."),
    }
