"""HRA: hra_u (in, r), one reflection per column; `in` counts the kernel of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.hra import Hra
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    directions = parts["hra_u"]
    if len(directions.shape) != 2:
        raise Malformed(f"hra_u has shape {list(directions.shape)}: expected (in, r)")
    if reading.setting("r") != directions.shape[1]:
        raise Malformed(
            f"has rank {directions.shape[1]}, but the config says {reading.setting('r')}"
        )
    weight = reading.matrix(module)
    if weight is not None and weight.shape[1] != directions.shape[0]:
        raise Malformed(f"is for {directions.shape[0]} inputs, but the base has {weight.shape[1]}")
    site = Site(module, "weight", reading.layer(module))
    return [Hra(site, directions, bool(reading.setting("apply_GS")))]


def tensors(edit: Hra) -> Parts:
    return {"hra_u": edit.directions}


def settings(edit: Hra) -> Mapping[str, Any]:
    return {"r": edit.directions.shape[1], "apply_GS": edit.orthogonalise}


TUNER = Tuner(
    "HRA",
    summary="W times a chain of Householder reflections",
    shapes={
        "hra_u": "in r",
    },
    leaves=("hra_u",),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8, "apply_GS": False},
    bias_mode="hra_only",
    as_lora="base",
    merges="the mean rotation; with --as lora and --base as deltas",
)
