"""HiRA: hira_A (r, in) and hira_B (out, r), kernels in hira_A as in a LoRA; for embeddings
hira_embedding_A (r, number) and hira_embedding_B (dimension, r)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.hira import Hira
from adaptmerge.adapters.graph import Edit, Layer, Site
from adaptmerge.formats.peft.additive import expect, fits
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    edit = _embedding(module, parts) if set(EMBEDDING) & parts.keys() else _layer(module, parts)
    rank = edit.down.shape[0]
    if edit.up.shape[1] != rank:
        raise Malformed(f"its sides have ranks {rank} and {edit.up.shape[1]}: they must be equal")
    # PEFT 0.21 makes modules of rank r whatever rank_pattern says
    if rank != reading.setting("r"):
        expect(reading, "r", module, rank)
    fits(reading, module, (edit.up.shape[0], edit.down.shape[1]))
    return [edit]


def _embedding(module: str, parts: Parts) -> Hira:
    up, down = (parts[leaf].T for leaf in EMBEDDING)
    return Hira(Site(module, "weight", Layer("embedding")), up, down)


def _layer(module: str, parts: Parts) -> Hira:
    up, down = parts["hira_B"], parts["hira_A"]
    kernel = down.shape[2:]
    if any(side != 1 for side in up.shape[2:]):
        raise Malformed(f"hira_B has shape {list(up.shape)}: expected a kernel of 1x1")
    layer = Layer("conv", kernel) if kernel else Layer()
    flat = down.reshape(down.shape[0], math.prod(down.shape[1:]))
    return Hira(Site(module, "weight", layer), up.reshape(*up.shape[:2]), flat)


def tensors(edit: Hira) -> Parts:
    up, down, layer = edit.up, edit.down, edit.site.layer
    if layer.kind == "embedding":
        return dict(zip(EMBEDDING, (up.T, down.T), strict=True))
    rank, width = down.shape
    kernel, ones = layer.kernel, [1 for _ in layer.kernel]
    return {
        "hira_A": down.reshape(rank, width // math.prod(kernel), *kernel),
        "hira_B": up.reshape(up.shape[0], rank, *ones),
    }


def settings(edit: Hira) -> Mapping[str, Any]:
    return {"r": edit.down.shape[0]}


TUNER = Tuner(
    "HIRA",
    summary="W + W * (B A), element by element",
    shapes={
        "hira_A": "r _in *",
        "hira_B": "out r *",
        "hira_embedding_A": "r _number",
        "hira_embedding_B": "_dimension r",
    },
    leaves=("hira_A", "hira_B", *EMBEDDING),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 32},
    patterns={"r": "rank_pattern"},
    training=frozenset({"hira_dropout"}),
    as_lora="base",
    merges="as deltas, with the base",
)
