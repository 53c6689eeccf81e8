"""Smoothed bases made by hand: a Llama whose scales are moved between layers in float64, then quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from schemes.bit_by_bit import interleaved
from torch import Tensor

SIZE = 32  # inputs in a group
LAYER = "model.layers.{}"
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
Tensors = dict[str, Tensor]


def scales(count: int, seed: int) -> Tensor:
    """Factors from about a third to three, as AWQ's are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(0.5 * torch.randn(count, generator=generator, dtype=torch.float64))


def factors(config: dict[str, int]) -> dict[str, tuple[Tensor | None, Tensor]]:
    """By linear what its rows and columns are multiplied by: what leaves the one is in the next."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    found: dict[str, tuple[Tensor | None, Tensor]] = {}
    for number in range(config["num_hidden_layers"]):
        layer, seed = LAYER.format(number), 10 * number
        first, second = scales(hidden, seed), scales(hidden, seed + 1)
        between = scales(inner, seed + 2)
        heads = scales(config["num_key_value_heads"] * config["head_dim"], seed + 3)
        repeated = heads.view(-1, config["head_dim"]).repeat_interleave(groups, 0).flatten()
        found[f"{layer}.self_attn.q_proj"] = None, first
        found[f"{layer}.self_attn.k_proj"] = None, first
        found[f"{layer}.self_attn.v_proj"] = 1 / heads, first
        found[f"{layer}.self_attn.o_proj"] = None, repeated
        found[f"{layer}.mlp.gate_proj"] = None, second
        found[f"{layer}.mlp.up_proj"] = 1 / between, second
        found[f"{layer}.mlp.down_proj"] = None, between
    return found


def times(weight: Tensor, by: tuple[Tensor | None, Tensor], power: float = 1.0) -> Tensor:
    """A weight (out, in) with its rows and columns multiplied by powers of their factors."""
    rows, columns = by
    value = weight.double() * columns**power
    return value if rows is None else value * (rows**power)[:, None]


def awq(weight: Tensor, name: str, clip: float = 1.0) -> Tensors:
    """A weight (out, in) in AWQ's layout, by its nearest codes; clip: the part of ranges that is kept."""
    runs = weight.unflatten(1, (-1, SIZE))
    low, high = clip * runs.amin(2).clamp(max=0), clip * runs.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.double()).round().clamp(0, 15)
    codes = (runs / scale.double()[..., None]).round() + zero[..., None]
    return {
        f"{name}.qweight": interleaved(codes.clamp(0, 15).flatten(1).long().T),
        f"{name}.qzeros": interleaved(zero.long().T),
        f"{name}.scales": scale.T.contiguous(),
    }


def int8(weight: Tensor, name: str) -> Tensors:
    """A weight (out, in) in bytes with a scale per row, as compressed-tensors stores it."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).float()
    codes = (weight / scale.double()).round().to(torch.int8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


ARGS: dict[str, object] = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
ROWS = {"format": "int-quantized", "targets": ["Linear"], "weights": ARGS}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "version": "gemm"}
KINDS: dict[str, tuple[Callable[[Tensor, str], Tensors], dict[str, Any]]] = {
    "awq": (awq, AWQ),
    "clipped awq": (partial(awq, clip=0.8), AWQ),
    "int8": (
        int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": ROWS},
        },
    ),
}


def smoothed_base(source: Path, folder: Path, kind: str, *, smooth: bool = True) -> Path:
    """The Llama in a folder smoothed and quantised; without `smooth` only quantised."""
    folder.mkdir(parents=True)
    store, said = KINDS[kind]
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = load_file(source / "model.safetensors")
    found: Tensors = {}
    for name, by in factors(config).items():
        weight = tensors.pop(f"{name}.weight").double()
        found |= store(times(weight, by) if smooth else weight, name)
        if smooth and by[0] is not None and f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].double() * by[0]
    for name in [name for name in tensors if smooth and "layernorm" in name]:
        tensors[name] = tensors[name].double() / factors(config)[fed_by(name)][1]
    found |= {name: value.half() for name, value in tensors.items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    config |= {"quantization_config": said, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def fed_by(norm: str) -> str:
    """A linear that reads what a norm gives."""
    layer = norm.rpartition(".")[0].rpartition(".")[0]
    return f"{layer}.self_attn.q_proj" if "input" in norm else f"{layer}.mlp.gate_proj"


def smoothed_experts(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """A mixture of experts with what they and their router read smoothed, experts in int8; and its values
    before smoothing."""
    stored, before = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "post_attention_layernorm" in name]:
        layer = name.rpartition(".")[0].rpartition(".")[0]
        reading = scales(len(tensors[name]), len(layer))
        stored[name] = (tensors[name].double() / reading).float()
        router = f"{layer}.mlp.gate.weight"
        stored[router] = (tensors[router].double() * reading).float()
        for number, down in enumerate(
            n for n in tensors if n.startswith(f"{layer}.mlp.experts") and "down" in n
        ):
            between = scales(tensors[down].shape[1], number)
            for part, by in (
                ("gate_proj", (None, reading)),
                ("up_proj", (1 / between, reading)),
                ("down_proj", (None, between)),
            ):
                module = down.replace("down_proj", part).removesuffix(".weight")
                codes = int8(times(stored.pop(f"{module}.weight"), by), module)
                value = (
                    codes[f"{module}.weight"].double() * codes[f"{module}.weight_scale"].double()
                )
                before[f"{module}.weight"] = times(value, by, -1).float()
                stored |= codes
    return stored, before
