"""Bone: what MiSS was called before PEFT 0.19, which loads no Bone; it is written as MiSS."""

from __future__ import annotations

from adaptmerge.adapters.graph import Edit, Kind, Note
from adaptmerge.formats.peft.tuner import Parts, Reading, Tuner
from adaptmerge.formats.peft.tuners.miss import edit_of

NOTE = Note(Kind.INFO, "Bone is what PEFT calls MiSS from 0.19 on: it is written as MISS")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """The formulas of MiSS: bone_block is its block; there is no mini."""
    if NOTE not in reading.notes:
        reading.notes.append(NOTE)
    return [edit_of(reading, module, parts["bone_block"])]


TUNER = Tuner(
    "BONE",
    summary="the former name of MiSS",
    shapes={
        "bone_block": "r _width | _blocks r r",
    },
    leaves=("bone_block",),
    module=module,
    maths={"r": 64, "init_weights": True},
    bias_mode="Bone_only",
    as_lora="base",
    merges="as MiSS",
)
