"""What an input is that no format here reads, so that a refusal can say so.

Told by names of files and of tensors only. A kind that becomes a format leaves this list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from adaptmerge.errors import InputError
from adaptmerge.files.listing import Listing

TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
PIPELINE = re.compile(r"(unet|text_encoder(_\d)?|transformer(_\d)?)\.")
# a transformer of a pipeline, not one that language models call by that name
DIFFUSION = re.compile(r"\.(to_[qkv]|to_out|add_[qkv]_proj|(single_)?transformer_blocks)\b")
PIPELINE_METADATA = "lora_adapter_metadata"
KOHYA = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_\w+\.")
MLX = re.compile(r"\.lora_[ab]$")


def is_pipeline(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether tensors are of the components of a diffusers pipeline, which PEFT's own names may follow."""
    if PIPELINE_METADATA in metadata:
        return True
    found = [key for key in keys if PIPELINE.match(key)]
    return bool(found) and all(
        not key.startswith("transformer") or DIFFUSION.search(key) for key in found
    )


class Kind(NamedTuple):
    """A kind of input and how it is told, from its file names and from the keys of its tensors."""

    sentence: str
    names: Callable[[Collection[str]], bool] = lambda names: False
    keys: Callable[[Collection[str]], bool] = lambda keys: False


def ends(*suffixes: str) -> Callable[[Collection[str]], bool]:
    """Whether any name ends so."""
    return lambda names: any(name.endswith(suffixes) for name in names)


def some(pattern: re.Pattern[str]) -> Callable[[Collection[str]], bool]:
    """Whether a pattern is found in any key."""
    return lambda keys: any(pattern.search(key) for key in keys)


def _is_model(keys: Collection[str]) -> bool:
    """Whether tensors are those of a whole model: an embedding, and no side of an adapter."""
    embeds = re.compile(r"(embed_tokens|word_embeddings|wte|embeddings|embed_in)\.weight$")
    sides = re.compile(r"lora|adapter|ia3|vera|hada|prompt", re.IGNORECASE)
    return some(embeds)(keys) and not some(sides)(keys)


NOT_YET = "which adaptmerge cannot read yet"
KINDS: Sequence[Kind] = (
    Kind(f"is a LoRA of a diffusers pipeline, {NOT_YET}", keys=lambda keys: is_pipeline(keys, {})),
    Kind(f"is a LoRA of kohya's sd-scripts or LyCORIS, {NOT_YET}", keys=some(KOHYA)),
    Kind(f"is an adapter of MLX, {NOT_YET}", ends("adapters.npz"), some(MLX)),
    Kind(f"is of NVIDIA NeMo, {NOT_YET}", ends(".nemo")),
    Kind("is an ONNX model, no adapter: give the adapter that it was made with", ends(".onnx")),
    Kind(
        "is a whole model, no adapter: use it as a base (adaptmerge fuse), or take an adapter out of it "
        "(adaptmerge extract)",
        keys=_is_model,
    ),
)


def kind_of(listing: Listing) -> str | None:
    """A sentence on what an input is; None where that cannot be told."""
    if _config(listing).keys() & {"lora_parameters", "fine_tune_type"}:
        return f"is an adapter of MLX, {NOT_YET}"
    names = [listing.single] if listing.single else list(listing.names)
    keys, metadata = _tensors(listing, names)
    if PIPELINE_METADATA in metadata:
        return KINDS[0].sentence
    return next((k.sentence for k in KINDS if k.names(names) or k.keys(keys)), None)


def _config(listing: Listing) -> Mapping[str, Any]:
    try:
        return listing.json("adapter_config.json") if listing.has("adapter_config.json") else {}
    except InputError:
        return {}


def _tensors(listing: Listing, names: Sequence[str]) -> tuple[Collection[str], Mapping[str, str]]:
    """The keys and metadata of the first file of tensors that can be read."""
    for name in names:
        if name.endswith(TENSORS):
            try:
                file = listing.tensors(name)
            except InputError:
                continue
            return file.refs.keys(), file.metadata
    return (), {}
