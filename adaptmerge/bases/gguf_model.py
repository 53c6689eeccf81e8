"""A base model in GGUF files: its parts, and the config that its metadata says, in transformers' words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptmerge.bases.base import GGUF, Base
from adaptmerge.bases.llama_cpp import ARCHITECTURES, EMBEDDING, HEAD
from adaptmerge.errors import InputError
from adaptmerge.files.gguf import GgufFile, Info, read_header
from adaptmerge.files.paths import missing
from adaptmerge.tensors.refs import TensorRef

LIBRARY = "gguf"  # what a model card calls its library
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Keys of llama.cpp (gguf-py's constants.py), less the architecture's name, as configs spell them.
KEYS: Mapping[str, Sequence[str]] = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "context_length": ("max_position_embeddings",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.freq_base": ("rope_theta",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "attention.scale": ("attention_multiplier",),
}
BIASED = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}


@dataclass(frozen=True)
class GgufModel(Base):
    """A base whose files are GGUF; `path` is the first of them, tensors have llama.cpp's names and those of
    blocks are bytes (..., bytes of a row). parameters: the names that its class in `transformers` has."""

    headers: tuple[GgufFile, ...] = ()
    parameters: tuple[str, ...] = ()

    @cached_property
    def infos(self) -> Mapping[str, Info]:
        """What the headers say of each tensor."""
        return {info.name: info for header in self.headers for info in header.infos}

    def header(self, path: str) -> GgufFile:
        """The header of one of its files."""
        return next(header for header in self.headers if header.path == path)


def open_model(path: Path) -> GgufModel:
    """The model that a GGUF file is, or is part of. Raises InputError."""
    headers = _headers_of(path)
    return GgufModel(path, _config(headers, path), _tensors(headers), headers=headers)


def parts_of(path: Path) -> list[Path]:
    """The files of a model of which one is named, in order. Raises InputError when one is missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    found = [path.with_name(name) for name in names]
    lost = [one for one in found if not one.is_file()]
    if lost:
        raise missing(lost[0])
    return found


def model_in(folder: Path, names: Sequence[str]) -> Path | None:
    """The GGUF model in a folder, by its first file. Raises InputError when there are several."""
    found = [name for name in names if name.endswith(GGUF)]
    firsts = [n for n in found if (m := PART.fullmatch(n)) is None or int(m["number"]) == 1]
    if len(firsts) > 1:
        raise InputError(
            f"holds several GGUF files: name one of {', '.join(firsts)}", where=str(folder)
        )
    return folder / firsts[0] if firsts else None


def _headers_of(path: Path) -> tuple[GgufFile, ...]:
    """The headers of all files of a model. Raises InputError when they are no model."""
    found = tuple(read_header(part) for part in parts_of(path))
    kind = found[0].values.get("general.type", "model")
    if kind != "model":
        raise InputError(f"is GGUF but no model (general.type is {kind!r})", where=str(path))
    return found


def _tensors(headers: Sequence[GgufFile]) -> dict[str, TensorRef]:
    """All tensors by llama.cpp's names: floats as they are, blocks as bytes (..., bytes of a row)."""
    found: dict[str, TensorRef] = {}
    for header in headers:
        for info in header.infos:
            found[info.name] = header.refs.get(info.name) or header.raw(info)
    return found


def config_of(path: Path) -> dict[str, Any]:
    """The entries of a `transformers` config that a GGUF model states.

    Raises InputError for an architecture whose names are not known.
    """
    return _config(_headers_of(path), path)


def _config(headers: Sequence[GgufFile], path: Path) -> dict[str, Any]:
    values = headers[0].values
    shapes = {info.name: info.shape for header in headers for info in header.infos}
    name = str(values.get("general.architecture"))
    found: dict[str, Any] = {"model_type": _model_type(name, values, path)}
    for key, spellings in KEYS.items():
        value = values.get(f"{name}.{key}")
        if value is not None:
            found.update(dict.fromkeys(spellings, _one(value)))
    found["tie_word_embeddings"] = HEAD not in shapes
    if EMBEDDING in shapes:
        found["vocab_size"] = shapes[EMBEDDING][0]
    for suffix, entry in BIASED.items():
        found[entry] = any(tensor.endswith(suffix) for tensor in shapes)
    return found | {"dtype": "float32"}


def _one(value: Any) -> Any:
    """One number for all layers, where they are listed and equal."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _model_type(name: str, values: Mapping[str, Any], path: Path) -> str:
    kinds = [kind for kind, known in ARCHITECTURES.items() if known.name == name]
    if not kinds:
        known = ", ".join(sorted({found.name for found in ARCHITECTURES.values()}))
        raise InputError(
            f"is of llama.cpp's architecture {name!r}, whose names are not known (known: {known})",
            where=str(path),
        )
    mixed = [kind for kind in kinds if kind == "mixtral" and values.get(f"{name}.expert_count")]
    return (mixed or kinds)[0]
