"""LoHa: hada_w1_a (out, r), hada_w1_b (r, in) and the same for w2; with hada_t1 and hada_t2
(r, r, *kernel), which use_effective_conv2d gives convolutions, hada_w1_a and hada_w2_a are (r, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.loha import LoHa
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import added, expect, integer, kernel_of, number
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

SIDES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """alpha / r times the product."""
    up_1, down_1, up_2, down_2 = (parts[leaf] for leaf in SIDES)
    rank, _ = down_1.shape
    expect(reading, "r", module, rank)
    scale = number(reading, "alpha", module) / integer(reading, "r", module)
    if not any(leaf in parts for leaf in CORES):
        return added(reading, module, LoHa(up_1, down_1, up_2, down_2, scale))
    if not reading.setting("use_effective_conv2d"):
        raise Malformed("hada_t1 or hada_t2 is stored, but use_effective_conv2d is not set")
    core_1, core_2 = (parts[leaf] for leaf in CORES)
    factor = LoHa(up_1.T, down_1, up_2.T, down_2, scale, core_1, core_2)
    return added(reading, module, factor, kernel_of(core_1.shape))


def tensors(edit: Add) -> Parts:
    loha = _loha(edit)
    ups, downs = (loha.up_1, loha.up_2), (loha.down_1, loha.down_2)
    if loha.core_1 is None or loha.core_2 is None:
        return dict(zip(SIDES, (ups[0], downs[0], ups[1], downs[1]), strict=True))
    sides = zip(SIDES, (ups[0].T, downs[0], ups[1].T, downs[1]), strict=True)
    return {**dict(sides), "hada_t1": loha.core_1, "hada_t2": loha.core_2}


def settings(edit: Add) -> Mapping[str, Any]:
    loha = _loha(edit)
    rank = loha.down_1.shape[0]
    found = {"r": rank, "alpha": loha.scale * rank}
    return found if loha.core_1 is None else {**found, "use_effective_conv2d": True}


def _loha(edit: Add) -> LoHa:
    assert isinstance(edit.factor, LoHa)
    return edit.factor


TUNER = Tuner(
    "LOHA",
    summary="(B1 A1) * (B2 A2), element by element",
    shapes={
        "hada_w[12]_[ab]": "_a _b",
        "hada_t[12]": "r r *",
    },
    leaves=(*SIDES, *CORES),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8, "alpha": 8, "use_effective_conv2d": False},
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    training=frozenset({"rank_dropout", "module_dropout"}),
    merges="exact sum",
)
