"""Synthetic base models in the shapes of real ones, as `transformers` checkpoints with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.shapes import Shapes, make_adapter

SHARD = 600 << 20
# name: hidden, keys and values, feed-forward, layers, heads
SIZES = {
    "tiny": (64, 32, 128, 2, 4),
    "0.3B": (1024, 256, 2816, 22, 16),
    "1.1B": (2048, 256, 5632, 22, 32),
    "3B": (3072, 1024, 8192, 26, 24),
    "8B-2": (4096, 1024, 14336, 2, 32),  # two of its layers
}
VOCABULARY = 32000


def shapes(size: str) -> Shapes:
    """The seven linears of a layer."""
    hidden, kv, ffn, *_ = SIZES[size]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def make_model(folder: Path, *, size: str) -> Path:
    """A bf16 Llama of that size, in shards of 600 MB."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, value in drawn(size, generator):
        held = sum(t.nbytes for t in shards[-1].values())
        if held and held + value.numel() * 2 > SHARD:
            _save(folder, shards, len(shards) - 1)
            shards.append({})
        shards[-1][name] = value.to(torch.bfloat16)
    _save(folder, shards, len(shards) - 1)
    _index(folder, size, len(shards))
    return folder


def drawn(size: str, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 values) of all tensors: matrices with a standard deviation of 0.02, norms of ones."""
    for name, shape in _tensors(size):
        matrix = len(shape) > 1
        yield name, torch.randn(shape, generator=generator) * 0.02 if matrix else torch.ones(shape)


def _tensors(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, *_, layers, _ = SIZES[size]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        for name, shape in shapes(size).items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def _name(number: int) -> str:
    return f"part-{number}.safetensors"


def _save(folder: Path, shards: list[dict[str, torch.Tensor]], number: int) -> None:
    save_file(shards[number], folder / _name(number), metadata={"format": "pt"})
    shards[number] = dict.fromkeys(shards[number], torch.empty(0))


def _index(folder: Path, size: str, count: int) -> None:
    from safetensors import safe_open

    table, total = {}, 0
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        (folder / _name(number)).rename(folder / name)
        with safe_open(folder / name, "pt") as file:
            table.update(dict.fromkeys(file.keys(), name))
        total += (folder / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(SIZES[size])))


def config(size: tuple[int, int, int, int, int]) -> dict[str, object]:
    """The config.json of a Llama of that size."""
    hidden, kv, ffn, layers, heads = size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv * heads // hidden,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make_model_adapter(folder: Path, *, size: str, scale: float = 0.0016, seed: int = 0) -> Path:
    """A rank-16 LoRA on all linears of a model of that size, its deltas a thousandth of the weights or, of
    another scale of its factors, 400 times its square."""
    *_, layers, _ = SIZES[size]
    return make_adapter(folder, layers=layers, shapes=shapes(size), scale=scale, seed=seed)
