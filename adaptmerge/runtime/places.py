"""Where activation edits act: which hook of which architecture a place of a layer means.

| model types | place | output changed | residual |
|---|---|---|---|
| llama, mistral, qwen2, qwen3 | mlp | mlp | input of post_attention_layernorm |
| | attention | self_attn | input of input_layernorm |
| gpt2 | mlp | mlp | input of ln_2 |
| | attention | attn | input of ln_1 |
| bert, roberta, xlm-roberta, electra | mlp | output.dense | second input of output |
| | attention | attention.output.dense | second input of attention.output |

The last row's models normalise output plus residual; there the "sum" is the normalised one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptmerge.adapters.activation_edits import ActivationEdit, Bottleneck
from adaptmerge.adapters.graph import Edit
from adaptmerge.errors import InputError
from adaptmerge.lazy import torch
from adaptmerge.runtime.attention import hook_adaption
from adaptmerge.runtime.virtual import hook_prefix, hook_prompt


@dataclass(frozen=True, slots=True)
class SubBlock:
    """Paths inside a layer: the module whose output is changed, the one that is given the residual
    (as its input number `argument`), and the norm over their sum where the model has one."""

    output: str
    residual: str
    argument: int = 0
    norm: str | None = None


PRE_NORM = {
    "mlp": SubBlock("mlp", "post_attention_layernorm"),
    "attention": SubBlock("self_attn", "input_layernorm"),
}
GPT2 = {"mlp": SubBlock("mlp", "ln_2"), "attention": SubBlock("attn", "ln_1")}
POST_NORM = {
    "mlp": SubBlock("output.dense", "output", 1, "output.LayerNorm"),
    "attention": SubBlock(
        "attention.output.dense", "attention.output", 1, "attention.output.LayerNorm"
    ),
}
PLACES: Mapping[str, Mapping[str, SubBlock]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), PRE_NORM),
    "gpt2": GPT2,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), POST_NORM),
}


def is_activation(edit: Edit) -> bool:
    """Whether the edit changes what flows, in a way that is known here."""
    return edit.kind in HOOKS or isinstance(edit, ActivationEdit)


def hook_activation(model: torch.nn.Module, path: str, edit: Edit) -> list[Any]:
    """Hooks that make the module at `path` compute with the edit; the caller removes them."""
    hook: Hook = HOOKS.get(edit.kind, _hook_module)
    return hook(model, path, edit)


def _hook_module(model: torch.nn.Module, path: str, edit: ActivationEdit) -> list[Any]:
    def after(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        inputs = _argument(args, kwargs, 0)
        return _changed(out, lambda value: edit.forward(inputs, value, None))

    return [model.get_submodule(path).register_forward_hook(after, with_kwargs=True)]


def _hook_block(model: torch.nn.Module, path: str, edit: Bottleneck) -> list[Any]:
    layer, place = model.get_submodule(path), _place(model, path, edit)
    seen: list[torch.Tensor] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen[:] = [_argument(args, kwargs, place.argument)]

    def residual_for(value: torch.Tensor) -> torch.Tensor:
        """What the edit adds to `value` to see the block's sum, normalised where the model does."""
        if place.norm is None or edit.source != "sum":
            return seen[0]
        total: torch.Tensor = layer.get_submodule(place.norm)(value + seen[0])
        return total - value

    def after(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        inputs = _argument(args, kwargs, 0)
        return _changed(out, lambda value: edit.forward(inputs, value, residual_for(value)))

    return [
        layer.get_submodule(place.residual).register_forward_pre_hook(before, with_kwargs=True),
        layer.get_submodule(place.output).register_forward_hook(after, with_kwargs=True),
    ]


def _place(model: torch.nn.Module, path: str, edit: Bottleneck) -> SubBlock:
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    places = PLACES.get(kind)
    if places is None or edit.site.place not in places:
        known = ", ".join(PLACES)
        raise InputError(
            f"{path}: where the {edit.site.place} of a {kind} layer takes a bottleneck is not known "
            f"(known: {known})"
        )
    return places[edit.site.place]


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> Any:
    return [*args, *kwargs.values()][index]


def _changed(out: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The output with its (first) tensor changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def _hook_own(model: torch.nn.Module, path: str, edit: Any) -> list[Any]:
    """Hooks of an edit that needs more than what flows through its module."""
    found: list[Any] = edit.hooks(model, path)
    return found


Hook = Callable[[Any, str, Any], list[Any]]
HOOKS: Mapping[str, Hook] = {
    "adaption_prompt": hook_adaption,
    "alora": _hook_own,
    "bottleneck": _hook_block,
    "grouped": _hook_own,
    "prefix": hook_prefix,
    "prompt": hook_prompt,
}
