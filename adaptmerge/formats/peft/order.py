"""Which modules of a base PEFT adapts, and in which order: what a file without tensors per module needs.

PEFT goes through a model in the order in which its modules were made. A checkpoint does not keep that
order (its tensors are sorted by name), so it is written down here for the architectures that are common.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adaptmerge.adapters.graph import Site
from adaptmerge.adapters.module_paths import is_suffix
from adaptmerge.bases.base import Base

_LLAMA = (
    "model embed_tokens layers self_attn q_proj k_proj v_proj o_proj mlp gate_proj up_proj down_proj "
    "lm_head"
)
_BERT = (
    "bert roberta electra embeddings word_embeddings encoder layer attention self query key value "
    "intermediate output dense"
)
_OPT = "model decoder embed_tokens layers self_attn k_proj v_proj q_proj out_proj fc1 fc2 lm_head"
_BLOOM = (
    "transformer word_embeddings h self_attention query_key_value dense mlp dense_h_to_4h "
    "dense_4h_to_h lm_head"
)
_NEOX = "gpt_neox embed_in layers attention query_key_value dense mlp dense_h_to_4h dense_4h_to_h embed_out"
_T5 = (
    "shared encoder decoder embed_tokens block layer SelfAttention EncDecAttention q k v o "
    "DenseReluDense wi wi_0 wi_1 wo lm_head"
)
_TYPES = {
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 stablelm cohere cohere2 granite "
    "smollm3 helium arcee": _LLAMA,
    "bert roberta xlm-roberta camembert electra": _BERT,
    "phi3": "model embed_tokens layers self_attn o_proj qkv_proj mlp gate_up_proj down_proj lm_head",
    "phi": "model embed_tokens layers self_attn q_proj k_proj v_proj dense mlp fc1 fc2 lm_head",
    "starcoder2": "model embed_tokens layers self_attn q_proj k_proj v_proj o_proj mlp c_fc c_proj",
    "gpt2 gpt_bigcode": "transformer wte wpe h attn c_attn mlp c_fc c_proj lm_head",
    "gptj": "transformer wte h attn k_proj v_proj q_proj out_proj mlp fc_in fc_out lm_head",
    "gpt_neox": _NEOX,
    "bloom falcon": _BLOOM,
    "opt": _OPT,
    "t5 mt5": _T5,
    "distilbert": (
        "distilbert embeddings word_embeddings transformer layer attention q_lin k_lin v_lin out_lin "
        "ffn lin1 lin2"
    ),
}
ORDERS: Mapping[str, tuple[str, ...]] = {
    name: tuple(order.split()) for names, order in _TYPES.items() for name in names.split()
}


def in_model_order(base: Base | None, modules: Iterable[str]) -> list[str] | None:
    """The modules as PEFT meets them; None where the base's architecture is not one of ORDERS."""
    listed = list(modules)
    ranks = {
        name: i for i, name in enumerate(ORDERS.get(base.architecture or "", ()) if base else ())
    }
    parts = {part for module in listed for part in module.split(".") if not part.isdecimal()}
    if not parts <= ranks.keys():
        return None
    return sorted(
        listed, key=lambda m: [int(p) if p.isdecimal() else ranks[p] for p in m.split(".")]
    )


def adapted(base: Base, config: Mapping[str, Any]) -> list[str]:
    """The modules of the base that a config selects. Raises ValueError where it does not spell it out."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        raise ValueError(
            f"target_modules is {targets!r}: expected the names of modules or a regular expression, "
            "since the file itself names none"
        )
    found = [
        module for module in sorted(base.modules | base.tied_modules) if _selects(config, module)
    ]
    flat = [m for m in found if (w := base.parameter(Site(m))) is None or len(w.shape) != 2]
    if flat:
        raise ValueError(f"target_modules selects {flat[0]}, which has no matrix in the base")
    if not found:
        raise ValueError(f"target_modules selects no module of the base {base.path.name}")
    return found


def _selects(config: Mapping[str, Any], module: str) -> bool:
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if excluded and _named(excluded, module):
        return False
    if any(
        re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()
    ):
        return False
    if isinstance(targets, str):
        return _named(targets, module)
    return _named(targets, module) and _in_layers(config, module)


def _named(names: str | Collection[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(is_suffix(name, module) for name in names)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether the number of the module's layer is asked for."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    number = next((int(match[1]) for match in found if match), None)
    return number in wanted
