"""Super-Tuning: supertuning_values (n,) at the flat supertuning_indices (n,) of the weight; with r also
supertuning_lora_A.weight (r, in) and supertuning_lora_B.weight (out, r)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.supertuning import Supertuning
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.formats.peft.additive import expect, fits, number
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

SIDES = ("supertuning_lora_B", "supertuning_lora_A")
FOUND_AGAIN = Note(
    Kind.ASSUMED,
    "places are not stored (save_precomputed_indices is off): they are found again by the magnitudes of "
    "the base's weights, which must be the very ones of training",
)


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """The sparse part and, where it is stored, the LoRA beside it."""
    values = parts["supertuning_values"]
    places, sparsity = _places(reading, parts, values), number(reading, "sparsity")
    largest = bool(reading.setting("select_top"))
    up, down, alpha = _pair(reading, module, parts)
    return [Supertuning(Site(module), values, places, sparsity, largest, up, down, alpha)]


def _pair(
    reading: Reading, module: str, parts: Parts
) -> tuple[TensorRef | None, TensorRef | None, float | None]:
    """up, down and alpha, which is 2 r unless the config says another."""
    if not set(SIDES) & parts.keys() and not reading.setting("r"):
        return None, None, None
    up, down = (parts[leaf] for leaf in SIDES)
    height, rank = up.shape
    _, width = down.shape
    expect(reading, "r", module, down.shape[0])
    expect(reading, "r", module, rank)
    fits(reading, module, (height, width))
    unsaid = reading.setting("lora_alpha") is None
    return up, down, 2 * rank if unsaid else number(reading, "lora_alpha")


def _places(reading: Reading, parts: Parts, values: TensorRef) -> TensorRef | None:
    if "supertuning_indices" not in parts and not reading.setting("save_precomputed_indices"):
        if FOUND_AGAIN not in reading.notes:
            reading.notes.append(FOUND_AGAIN)
        return None
    places = parts["supertuning_indices"]
    if places.shape != (values.count,):
        raise Malformed(
            f"supertuning_indices has shape {list(places.shape)}: expected one place for each of "
            f"{values.count} values"
        )
    return places


def tensors(edit: Supertuning) -> Parts:
    found = {
        "supertuning_values": edit.values,
        "supertuning_indices": edit.places,
        "supertuning_lora_A.weight": edit.down,
        "supertuning_lora_B.weight": edit.up,
    }
    return {leaf: ref for leaf, ref in found.items() if ref is not None}


def settings(edit: Supertuning) -> Mapping[str, Any]:
    return {
        "sparsity": edit.sparsity,
        "select_top": edit.largest,
        "save_precomputed_indices": edit.places is not None,
        "r": None if edit.down is None else edit.down.shape[0],
        "lora_alpha": edit.alpha,
    }


TUNER = Tuner(
    "SUPERTUNING",
    summary="values at the largest weights; with r a LoRA beside them",
    shapes={
        "supertuning_values": "n?",
        "supertuning_indices": "whole: n?",
        "supertuning_lora_A": "r in",
        "supertuning_lora_B": "out r",
    },
    leaves=("supertuning_indices", "supertuning_values", *SIDES),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={
        "sparsity": 0.99,
        "select_top": True,
        "r": None,
        "lora_alpha": None,
        "save_precomputed_indices": True,
    },
    training=frozenset({"lora_dropout"}),
    as_lora="base",
    merges="as deltas, with the base for its shape",
)
