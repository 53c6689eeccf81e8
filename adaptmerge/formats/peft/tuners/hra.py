"""HRA: hra_u (in, r), one reflection per column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.families.hra import Hra
from adaptmerge.formats.peft.tuner import Parts, Reading, Tuner
from adaptmerge.graph import Edit, Site


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    return [Hra(Site(module), parts["hra_u"], bool(reading.setting("apply_GS")))]


def tensors(edit: Hra) -> Parts:
    return {"hra_u": edit.directions}


def settings(edit: Hra) -> Mapping[str, Any]:
    return {"r": edit.directions.shape[1], "apply_GS": edit.orthogonalise}


TUNER = Tuner(
    "HRA",
    summary="W times a chain of Householder reflections",
    leaves=("hra_u",),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8, "apply_GS": False},
    bias_mode="hra_only",
    as_lora="base",
    merges="as deltas, with the base",
)
