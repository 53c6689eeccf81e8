"""Adaption prompts (LLaMA-Adapter): adaption_prompt (1, tokens, dimension) and adaption_gate (1,)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.adaption_prompt import AdaptionPrompt
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

MISSING = ("fan_in_fan_out", "modules_to_save", "bias")  # fields that PEFT's config does not have


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    prompt, gate = parts["adaption_prompt"], parts["adaption_gate"]
    if len(prompt.shape) != 3 or prompt.shape[0] != 1 or gate.shape != (1,):
        raise Malformed(
            f"adaption_prompt {list(prompt.shape)} and adaption_gate {list(gate.shape)}: expected "
            "(1, tokens, dimension) and (1,)"
        )
    said = reading.setting("adapter_len")
    if said is not None and said != prompt.shape[1]:
        raise Malformed(f"adaption_prompt has {prompt.shape[1]} tokens, adapter_len is {said}")
    return [AdaptionPrompt(Site(module, "prompt"), prompt, gate)]


def tensors(edit: AdaptionPrompt) -> Parts:
    return {"adaption_prompt": edit.prompt, "adaption_gate": edit.gate}


def settings(edit: AdaptionPrompt) -> Mapping[str, Any]:
    return {"adapter_len": edit.prompt.shape[1]}


def finish(edits: Sequence[AdaptionPrompt], config: dict[str, Any]) -> dict[str, Any]:
    """PEFT adapts the last `adapter_layers` modules of one name."""
    if config.get("modules_to_save"):
        raise CannotStore("peft's ADAPTION_PROMPT has no place for heads and other whole modules")
    names = {edit.site.module.rpartition(".")[2] for edit in edits}
    if len(names) > 1:
        raise CannotStore(f"peft's ADAPTION_PROMPT has one module name, here are {sorted(names)}")
    kept = {name: value for name, value in config.items() if name not in MISSING}
    return {**kept, "target_modules": names.pop(), "adapter_layers": len(edits)}


TUNER = Tuner(
    "ADAPTION_PROMPT",
    summary="gated attention over learned prompts",
    shapes={
        "adaption_prompt": "1 tokens dimension",
        "adaption_gate": "1",
    },
    leaves=("adaption_prompt", "adaption_gate"),
    module=module,
    tensors=tensors,
    settings=settings,
    finish=finish,
    maths={"adapter_len": None, "adapter_layers": None},
    as_lora="never",
    merges="one input only: attention is no change of weights",
)
