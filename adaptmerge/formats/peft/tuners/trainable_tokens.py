"""Trainable tokens: trainable_tokens_delta (tokens, dimension), rows that replace those of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.graph import Edit, Layer, Site
from adaptmerge.adapters.stored_edits import ReplaceRows
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner

MISSING = ("fan_in_fan_out", "modules_to_save", "bias")  # fields that PEFT's config does not have


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    values = parts["trainable_tokens_delta"]
    rows = reading.setting("token_indices")
    if not isinstance(rows, list) or len(rows) != values.shape[0]:
        raise Malformed(
            f"{values.shape[0]} trainable tokens are stored, but token_indices is {rows!r}"
        )
    site = Site(module, "weight", Layer("embedding"))
    tied = bool(reading.config.unselected([module]))
    return [ReplaceRows(site, tuple(rows), values, "trainable_tokens", tied)]


def tensors(edit: ReplaceRows) -> Parts:
    return {"trainable_tokens_delta": edit.values}


def settings(edit: ReplaceRows) -> Mapping[str, Any]:
    return {"token_indices": list(edit.rows)}


def shared(edits: Sequence[ReplaceRows]) -> Spelling:
    """PEFT finds the modules that are tied to a target itself, and fails where they are listed, too."""
    targets = [edit.site.module for edit in edits if not edit.tied]
    return Spelling({}, {"target_modules": targets} if 0 < len(targets) < len(edits) else {})


def finish(edits: Sequence[ReplaceRows], config: dict[str, Any]) -> dict[str, Any]:
    if config.get("modules_to_save"):
        raise CannotStore("peft's TRAINABLE_TOKENS has no place for heads and other whole modules")
    return {name: value for name, value in config.items() if name not in MISSING}


TUNER = Tuner(
    "TRAINABLE_TOKENS",
    summary="rows of an embedding replaced",
    shapes={
        "trainable_tokens_delta": "tokens _dimension",
    },
    leaves=("trainable_tokens_delta",),
    module=module,
    tensors=tensors,
    settings=settings,
    shared=shared,
    finish=finish,
    maths={"token_indices": None},
    as_lora="never",
    merges="rows of all inputs; the same token's rows are summed",
)
