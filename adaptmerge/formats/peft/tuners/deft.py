"""DEFT: deft_P (out, r) and, unless `para`, deft_R (r, in); alpha / r scales deft_R where alpha is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.deft import Deft
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner

METHODS = ("relu", "qr")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    method, directions = reading.setting("decomposition_method"), parts["deft_P"]
    if method not in METHODS:
        raise Malformed(f"decomposition_method is {method!r}: expected {' or '.join(METHODS)}")
    out, rank = directions.shape
    if rank != min(reading.setting("r"), out):
        raise Malformed(f"has rank {rank}, but the config says {reading.setting('r')}")
    injected = None if reading.setting("para") else parts["deft_R"]
    if injected is not None and injected.shape[0] != rank:
        raise Malformed(f"deft_P has rank {rank}, but deft_R {injected.shape[0]}")
    alpha = reading.setting("alpha")
    scale = alpha / rank if alpha and injected is not None else 1.0
    return [Deft(Site(module), directions, injected, scale, method == "qr")]


def tensors(edit: Deft) -> Parts:
    stored = {"deft_P": edit.directions}
    return stored if edit.injected is None else {**stored, "deft_R": edit.injected}


def settings(edit: Deft) -> Mapping[str, Any]:
    return {
        "decomposition_method": METHODS[edit.orthonormal],
        "para": edit.injected is None,
    }


def shared(edits: Sequence[Deft]) -> Spelling:
    """One rank, which PEFT lowers to the outputs of modules that have fewer, and one alpha or none."""
    rank = max(edit.directions.shape[1] for edit in edits)
    shapes = {edit.directions.shape for edit in edits}
    if any(found != min(rank, out) for out, found in shapes):
        ranks = sorted({found for _, found in shapes})
        raise CannotStore(f"DEFT has one rank for all modules, here are {ranks}")
    alphas = {round(edit.scale * edit.directions.shape[1], 9) for edit in edits}
    if all(edit.scale == 1.0 for edit in edits):
        return Spelling({}, {"r": rank, "alpha": None})
    if len(alphas) > 1:
        raise CannotStore(f"DEFT has one alpha for all modules, here are {sorted(alphas)}")
    return Spelling({}, {"r": rank, "alpha": alphas.pop()})


TUNER = Tuner(
    "DEFT",
    summary="a projection of W removed, and another one injected",
    shapes={
        "deft_P": "out r",
        "deft_R": "r in",
    },
    leaves=("deft_P", "deft_R"),
    module=module,
    tensors=tensors,
    settings=settings,
    shared=shared,
    maths={"r": 8, "decomposition_method": "relu", "alpha": None, "para": False},
    training=frozenset({"deft_dropout", "init_scale"}),
    bias_mode="deft_only",
    as_lora="base",
    merges="as deltas, with the base",
)
