"""SHiRA: shira_weight (n,) at shira_indices (2, n), whole numbers that Windows stores as floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.shira import Shira
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.additive import integer
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    values, places = parts["shira_weight"], parts["shira_indices"]
    if places.shape != (2, values.count):
        raise Malformed(
            f"shira_indices has shape {list(places.shape)}: expected (2, {values.count}), a place "
            "for every value of shira_weight"
        )
    rank = integer(reading, "r")
    weight = reading.matrix(module)
    if weight is not None and values.count != rank * sum(weight.shape):
        raise Malformed(
            f"{values.count} values are stored, but r = {rank} on a weight of {list(weight.shape)} "
            f"has {rank * sum(weight.shape)}: is this adapter for another model?"
        )
    return [Shira(Site(module), values, places, rank)]


def tensors(edit: Shira) -> Parts:
    return {"shira_weight": edit.values, "shira_indices": edit.places}


def settings(edit: Shira) -> Mapping[str, Any]:
    return {"r": edit.rank}


TUNER = Tuner(
    "SHIRA",
    summary="values at chosen places of the weight",
    shapes={
        "shira_weight": "n?",
        "shira_indices": "number: 2 n?",
    },
    leaves=("shira_weight", "shira_indices"),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 32},
    # the places are stored: how they were drawn does not matter
    training=frozenset({"mask_type", "random_seed"}),
    as_lora="base",
    merges="as deltas, with the base for its shape",
)
