"""Where adaption prompts find the queries, keys and values of an attention module.

| model types | queries | keys and values | afterwards |
|---|---|---|---|
| llama, mistral | q_proj, rotated by position | k_proj, v_proj, heads repeated in groups | o_proj |
| gpt2 | c_attn, first third | c_attn, the other thirds | |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adaptmerge.adapters.families.adaption_prompt import AdaptionPrompt
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch


class Attention(NamedTuple):
    """Of one architecture: queries from hidden states and keyword arguments; keys and values of a
    prompt; what is done with the mixture."""

    queries: Callable[[Any, torch.Tensor, Mapping[str, Any]], torch.Tensor]
    prompted: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    finish: Callable[[Any, torch.Tensor], torch.Tensor]


def hook_adaption(model: torch.nn.Module, path: str, edit: AdaptionPrompt) -> list[Any]:
    """A hook that adds the gated attention to the output of the attention module."""
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind not in ATTENTIONS:
        known = ", ".join(ATTENTIONS)
        raise InputError(f"{path}: where {kind} attends to prompts is not known (known: {known})")
    parts, module = ATTENTIONS[kind], model.get_submodule(path)

    def after(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys, values = parts.prompted(module, edit.prompt.read().to(hidden).flatten(0, -2))
        mixed = edit.attend(parts.queries(module, hidden, kwargs), keys, values)
        return (out[0] + parts.finish(module, mixed), *out[1:])

    return [module.register_forward_hook(after, with_kwargs=True)]


def _heads(value: torch.Tensor, size: int) -> torch.Tensor:
    """(..., heads, tokens, size) from (..., tokens, heads * size)."""
    return value.reshape(*value.shape[:-1], -1, size).transpose(-3, -2)


def _rotated(module: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    queries = _heads(module.q_proj(hidden), module.head_dim)
    cosines, sines = (value.unsqueeze(1) for value in kwargs["position_embeddings"])
    first, second = queries.chunk(2, dim=-1)
    turned: torch.Tensor = queries * cosines + torch.cat((-second, first), dim=-1) * sines
    return turned


def _grouped(module: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = module.num_key_value_groups
    keys, values = (
        _heads(project(prompt), module.head_dim).repeat_interleave(groups, dim=0)
        for project in (module.k_proj, module.v_proj)
    )
    return keys, values


def _fused_queries(module: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    return _heads(module.c_attn(hidden).chunk(3, dim=-1)[0], module.head_dim)


def _fused(module: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, keys, values = module.c_attn(prompt).chunk(3, dim=-1)
    return _heads(keys, module.head_dim), _heads(values, module.head_dim)


SEPARATE = Attention(_rotated, _grouped, lambda module, mixed: module.o_proj(mixed))
ATTENTIONS: Mapping[str, Attention] = {
    "llama": SEPARATE,
    "mistral": SEPARATE,
    "gpt2": Attention(_fused_queries, _fused, lambda module, mixed: mixed),
}
