"""Virtual tokens in a real model: prompts before the input embeddings, prefixes in the attention cache.

Outputs are PEFT's: with a prompt they begin with those of its own positions; with a prefix they do not.
A call that brings a filled cache, as in generation, already has them: only its mask is extended.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from adaptmerge.adapters.families.prefix import Prefix
from adaptmerge.adapters.families.prompt import Prompt
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.embeddings import embeddings_of

Given = dict[str, Any]  # the arguments of a forward by name
IGNORED = -100  # the label that losses leave out
MASKS = ("attention_mask", "decoder_attention_mask")


def hook_prompt(model: torch.nn.Module, path: str, edit: Prompt) -> list[Any]:
    """A hook that puts the prompt before the embeddings of every input of the model."""
    embed = _embeddings(model)
    width = embed.weight.shape[-1]
    if edit.values.shape[1] != width:
        raise InputError(
            f"the prompt has embeddings of {edit.values.shape[1]}, {type(model).__name__} of {width}: "
            "is this adapter for another model?"
        )

    def before(given: Given) -> None:
        given.pop("position_ids", None)
        given.pop("cache_position", None)
        _extend(given, "attention_mask", edit.length, 1)
        if not _filled(given.get("past_key_values")):
            _put_before(given, embed, edit)

    return [_on_arguments(model, before)]


def _put_before(given: Given, embed: Callable[[Any], torch.Tensor], edit: Prompt) -> None:
    """The prompt and what goes along with the tokens: their types and, where there are any, labels."""
    inputs, tokens = given.pop("inputs_embeds", None), given.pop("input_ids", None)
    if inputs is None and tokens is None:
        raise InputError(
            "a prompt needs the model's own inputs: an encoder that was run by itself (as in "
            "generation with encoder-decoder models) has none"
        )
    inputs = embed(tokens) if inputs is None else inputs
    length = inputs.shape[1]
    prompt = edit.embeddings().to(inputs).expand(inputs.shape[0], -1, -1)
    given["inputs_embeds"] = torch.cat((prompt, inputs), dim=1)
    _extend(given, "token_type_ids", edit.length, 0)
    labels = given.get("labels")
    if labels is not None and labels.shape[1:] == (length,):
        _extend(given, "labels", edit.length, IGNORED)


def hook_prefix(model: torch.nn.Module, path: str, edit: Prefix) -> list[Any]:
    """A hook that begins the attention cache of every layer with the prefix."""
    place = _cached(model)
    _check_prefix(model, edit)
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    mask = MASKS[paired]

    def before(given: Given) -> None:
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + edit.length
        given.pop("cache_position", None)
        _extend(given, mask, edit.length, 1)
        cache = given.get("past_key_values")
        if not _filled(cache):
            given["past_key_values"] = _begun(cache, edit, _sample(model, given), paired=paired)

    return [_on_arguments(place, before)]


def _begun(cache: Any, edit: Prefix, like: torch.Tensor, *, paired: bool) -> Any:
    """The cache, a new one where none is given, with the prefix in it, in the dtype of `like`."""
    from transformers import DynamicCache, EncoderDecoderCache

    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if paired else DynamicCache()
    own = cache.self_attention_cache if paired else cache
    batch = like.shape[0]
    for layer, (keys, values) in enumerate(edit.keys_and_values()):
        both = (value.to(like).expand(batch, -1, -1, -1) for value in (keys, values))
        own.update(*both, layer)
    return cache


def _sample(model: torch.nn.Module, given: Given) -> torch.Tensor:
    """A tensor (batch, ...) of the dtype and on the device that the model computes with."""
    found = (given.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tokens = next(value for value in found if value is not None)
    sample: torch.Tensor = tokens.new_empty(tokens.shape[0], dtype=_embeddings(model).weight.dtype)
    return sample


def _check_prefix(model: torch.nn.Module, edit: Prefix) -> None:
    """Raises InputError when the model's layers do not take keys of this shape."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    size = size or text.hidden_size // text.num_attention_heads
    layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
    if getattr(text, "num_kv_shared_layers", 0):
        raise InputError(
            f"{type(model).__name__} shares keys between layers: no prefix is known there"
        )
    found, expected = (edit.layers, edit.heads, edit.head_size), (layers, heads, size)
    if found != expected:
        raise InputError(
            "the prefix is for {} layers of {} key-value heads of size {}, ".format(*found)
            + "{} has {} of {} of {}: ".format(type(model).__name__, *expected)
            + "is this adapter for another model?"
        )


def _cached(model: torch.nn.Module) -> torch.nn.Module:
    """The model or, where only that takes a cache, its backbone. Raises InputError for neither."""
    backbone: torch.nn.Module = getattr(model, "base_model", model)
    for module in (model, backbone):
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return module
    raise InputError(f"{type(model).__name__} has no attention cache, which a prefix needs")


def _embeddings(model: torch.nn.Module) -> Any:
    """The input embeddings. Raises InputError for models that are not of text."""
    found, _ = embeddings_of(model)
    if found is None:
        raise InputError(
            f"{type(model).__name__} has no input embeddings: virtual tokens are for the text models "
            "of transformers"
        )
    return found


def _filled(cache: Any) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def _extend(given: Given, name: str, count: int, fill: int) -> None:
    """`count` more entries in front of a (batch, tokens) argument, where it is given."""
    value = given.get(name)
    if value is not None:
        front = value.new_full((value.shape[0], count), fill)
        given[name] = torch.cat((front, value), dim=1)


def _on_arguments(module: torch.nn.Module, change: Callable[[Given], None]) -> Any:
    """A hook that changes the arguments of a module's forward, all of them by name."""
    names = tuple(inspect.signature(module.forward).parameters)

    def before(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        change(given)
        return (), given

    return module.register_forward_pre_hook(before, with_kwargs=True)
