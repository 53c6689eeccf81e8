"""Every variant of peft_type LORA that PEFT loads as it is; the others are in test_lora_variants.py."""

from __future__ import annotations

from typing import Any

import torch
from families.cases import LINEARS, QV, FamilyCase, noise
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft_cases import MODELS, seeded
from torch import Tensor, nn

BASE: dict[str, Any] = {"target_modules": LINEARS, "r": 4, "lora_alpha": 7}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"v_proj": 3, "o_proj": 11},
}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}


class Attention(nn.Module):
    """nn.MultiheadAttention twice, as vision models of CLIP's kind have it, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for attention in (self.first, self.second):
            hidden = hidden + attention(hidden, hidden, hidden, need_weights=False)[0]
        out: Tensor = self.head(hidden)
        return out


class Grouped(nn.Module):
    """Convolutions with groups, strides and padding, beside one without groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 8)
        self.depth = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.plane = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=1, groups=2)
        self.whole = nn.Conv2d(6, 4, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.depth(self.embed(input_ids).transpose(1, 2)))
        planes = hidden.reshape(hidden.shape[0], 2, 4, hidden.shape[2])
        out: Tensor = self.whole(torch.tanh(self.plane(planes))).flatten(1)
        return out


class Volume(nn.Module):
    """Conv3d with a kernel of three sizes and with 1x1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 18)
        self.conv = nn.Conv3d(2, 6, (3, 2, 1), padding=(1, 0, 0))
        self.point = nn.Conv3d(6, 4, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rows = input_ids.shape[0]
        cubes = self.embed(input_ids[:, :4]).reshape(rows, 2, 3, 3, 4)
        out: Tensor = self.point(torch.tanh(self.conv(cubes))).flatten(1)
        return out


MODELS |= {
    "attention": lambda: seeded(Attention),
    "grouped": lambda: seeded(Grouped),
    "volume": lambda: seeded(Volume),
}


@torch.no_grad()
def far(model: nn.Module) -> None:
    """Far from the initial values, where these are a part of the base itself."""
    noise(model, 0.3)


def lora(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    found = {**BASE, **options}
    keys = ("tolerance", "merges", "randomise", "task")
    own = {key: found.pop(key) for key in keys if key in found}
    return FamilyCase(f"lora_{name}", "LoraConfig", found, model, **own)


def moved(name: str, init: str, model: str = "llama", **options: Any) -> FamilyCase:
    """PEFT decomposes in float32, and so do we: what is left is the rounding of W - B0 A0."""
    return lora(name, model, init_lora_weights=init, randomise=far, tolerance=1e-5, **options)


def blocks(**options: Any) -> BdLoraConfig:
    return BdLoraConfig(
        target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["o_proj"], **options
    )


def activated(name: str, model: str = "llama", **options: Any) -> FamilyCase:
    """PEFT looks for the tokens in models with a task only."""
    tokens = [11, 5]
    return lora(
        name, model, alora_invocation_tokens=tokens, task="CAUSAL_LM", merges=False, **options
    )


CASES = (
    lora("plain"),
    lora("rslora", use_rslora=True),
    lora("gpt2", "gpt2", **GPT2),
    lora("bias", "qwen2", target_modules=QV, lora_bias=True),
    lora("embedding", target_modules=["embed_tokens", "q_proj"]),
    lora("dora", use_dora=True),
    lora("orthogonal", init_lora_weights="orthogonal"),
    lora("gaussian", init_lora_weights="gaussian"),
    lora("mica", init_lora_weights="mica"),
    lora("mica_embedding", init_lora_weights="mica", target_modules=["embed_tokens", "q_proj"]),
    moved("pissa", "pissa"),
    moved("pissa_bias", "pissa", "qwen2"),
    moved("pissa_gpt2", "pissa", "gpt2", **GPT2),
    moved("pissa_patterns", "pissa", **PATTERNS),
    moved("pissa_rslora", "pissa", use_rslora=True),
    moved("olora", "olora"),
    moved("olora_patterns", "olora", **PATTERNS),
    moved("olora_rslora", "olora", use_rslora=True),
    lora(
        "lora_ga_conv",
        "conv",
        target_modules=["conv", "line"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    ),
    # far, since what is dropped is small beside PEFT's float32 rounding of what stays
    lora("kasa", kasa_config=KasaConfig(), tolerance=1e-5, randomise=far),
    lora(
        "kasa_bias",
        "qwen2",
        kasa_config=KasaConfig(beta=0.1),
        tolerance=1e-5,
        randomise=far,
        lora_bias=True,
        **{**PATTERNS, "target_modules": QV},
    ),
    lora("bd", target_modules=[*QV, "o_proj"], use_bdlora=blocks(nblocks=2)),
    lora("bd_rest", use_bdlora=blocks(nblocks=4, match_strict=False)),
    lora("bd_one", target_modules=QV, use_bdlora=blocks()),
    lora("velora", velora_config=VeloraConfig(num_groups=4)),
    lora("monteclora", monteclora_config=MontecloraConfig()),
    # aLoRA cannot be merged: which positions it acts on is said by the input
    activated("alora"),
    activated("alora_bias", "qwen2", lora_bias=True),
    # PEFT's merge writes every copy's delta into the one weight that all copies share
    lora("replicated", layer_replication=[[0, 2], [0, 1], [1, 2]], merges=False),
    lora(
        "replicated_bert",
        "bert",
        target_modules=["query", "value"],
        layer_replication=[[0, 2], [1, 2]],
        merges=False,
    ),
    lora("attention", "attention", target_modules=["first", "second", "head"]),
    lora(
        "attention_patterns",
        "attention",
        target_modules=["first", "second", "head"],
        rank_pattern={"second": 2},
        alpha_pattern={"first": 3},
    ),
    # PEFT raises for groups, since the delta links inputs and outputs of different groups
    lora("grouped", "grouped", target_modules=["depth", "plane", "whole"], merges=False),
    lora("grouped_only", "grouped", target_modules=["depth"], lora_bias=True, merges=False),
    lora("conv_bias", "conv", target_modules=["conv", "point", "line"], lora_bias=True),
    # PEFT's merge of kernels 1x1x1 fails to squeeze the third axis
    lora("volume", "volume", target_modules=["conv"]),
    lora("volume_point", "volume", target_modules=["point"], merges=False),
)
