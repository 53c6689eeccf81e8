"""GraLoRA: gralora_A (k, in / k, r), gralora_B (k, r, out / k); with hybrid_r a LoRA beside them,
gralora_A_general.weight (h, in) and gralora_B_general.weight (out, h)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.gralora import GraLora
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import added, expect, number
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

GENERAL = ("gralora_B_general", "gralora_A_general")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """alpha / (r + hybrid_r) times all blocks."""
    ups, downs = parts["gralora_B"], parts["gralora_A"]
    up, down = (parts[n] for n in GENERAL) if set(GENERAL) & parts.keys() else (None, None)
    rank = _rank(reading, module, ups, downs)
    hybrid = 0 if down is None else down.shape[0]
    expect(reading, "hybrid_r", module, hybrid)
    scale = number(reading, "alpha") / (rank + hybrid)
    return added(reading, module, GraLora(ups, downs, scale, up, down))


def _rank(reading: Reading, module: str, ups: TensorRef, downs: TensorRef) -> int:
    """The rank of the blocks together. Raises Malformed where the two are not k parts of one rank."""
    blocks, rank, _ = ups.shape
    expect(reading, "r", module, rank)
    expect(reading, "gralora_k", module, blocks)
    if not rank or rank % blocks or (downs.shape[0], downs.shape[2]) != (blocks, rank):
        raise Malformed(
            f"gralora_A {list(downs.shape)} and gralora_B {list(ups.shape)} are no pair of k parts "
            "with a rank that k divides"
        )
    return rank


def tensors(edit: Add) -> Parts:
    factor = _gralora(edit)
    general = {"gralora_A_general.weight": factor.down, "gralora_B_general.weight": factor.up}
    stored = {leaf: ref for leaf, ref in general.items() if ref is not None}
    return {"gralora_A": factor.downs, "gralora_B": factor.ups, **stored}


def settings(edit: Add) -> Mapping[str, Any]:
    factor = _gralora(edit)
    blocks, rank, _ = factor.ups.shape
    hybrid = 0 if factor.down is None else factor.down.shape[0]
    alpha = factor.scale * (rank + hybrid)
    return {"r": rank, "gralora_k": blocks, "hybrid_r": hybrid, "alpha": alpha}


def _gralora(edit: Add) -> GraLora:
    assert isinstance(edit.factor, GraLora)
    return edit.factor


TUNER = Tuner(
    "GRALORA",
    summary="k by k blocks, each of rank r / k; with hybrid_r a LoRA beside them",
    shapes={
        "gralora_A": "k width r",
        "gralora_B": "k r height",
        "gralora_A_general": "h in",
        "gralora_B_general": "out h",
    },
    leaves=("gralora_A", "gralora_B", *GENERAL),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2},
    training=frozenset({"gralora_dropout"}),
    bias_mode="gralora_only",
    merges="exact sum",
)
