"""A tiny model of every class of `transformers` that writes text, by its default config made small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

TABLES = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
)
MOST = 30_000_000  # parameters of a model that is still made
VOCABULARY = 96
# What is set in a config and its parts, where they have it.
SHALLOW = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
}
FEWER = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
NARROW = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
}


def classes() -> list[tuple[str, str]]:
    """(model type, class) of all of these tables."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for table in TABLES:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return [(kind, name) for name, kind in found.items()]


def tiny(kind: str, name: str, **said: Any) -> nn.Module | None:
    """A small random model of a class; None where no small one comes of its default config."""
    import transformers

    for config in _configs(kind, said):
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)(config)
            if sum(parameter.numel() for parameter in model.parameters()) > MOST:
                continue
            torch.manual_seed(0)
            made: nn.Module = getattr(transformers, name)(config)
        except Exception:  # noqa: S112, BLE001 - the sizes do not fit together: others may
            continue
        return made
    return None


def _configs(kind: str, said: dict[str, Any]) -> Iterator[Any]:
    from transformers import CONFIG_MAPPING

    for sizes in (SHALLOW | FEWER | NARROW, FEWER | NARROW, SHALLOW | FEWER, {}):
        try:
            default = CONFIG_MAPPING[kind]()
            yield type(default).from_dict({**_shrunk(default.to_dict(), sizes), **said})
        except Exception:  # noqa: S112, BLE001 - as above
            continue


def _shrunk(config: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            found[key] = _shrunk(value, sizes)
        elif type(value) is int or (value is None and key.endswith("token_id")):
            found[key] = sizes.get(key, value)
        elif key != "layer_types":
            found[key] = value
    return found
