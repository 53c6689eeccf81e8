"""LoHa: hada_w1_a (out, r), hada_w1_b (r, in) and the same for w2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.edits import Add
from adaptmerge.families.loha import LoHa
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.graph import Edit, Site

LEAVES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """alpha / r times the product."""
    up_1, down_1, up_2, down_2 = (parts[leaf] for leaf in LEAVES)
    rank = up_1.shape[1]
    if reading.setting("r", module) != rank:
        raise Malformed(f"has rank {rank}, but the config says {reading.setting('r', module)}")
    scale = reading.setting("alpha", module) / rank
    return [Add(Site(module), LoHa(up_1, down_1, up_2, down_2, scale))]


def tensors(edit: Add) -> Parts:
    loha = _loha(edit)
    sides = (loha.up_1, loha.down_1, loha.up_2, loha.down_2)
    return dict(zip(LEAVES, sides, strict=True))


def settings(edit: Add) -> Mapping[str, Any]:
    rank = _loha(edit).up_1.shape[1]
    return {"r": rank, "alpha": _loha(edit).scale * rank}


def _loha(edit: Add) -> LoHa:
    assert isinstance(edit.factor, LoHa)
    return edit.factor


TUNER = Tuner(
    "LOHA",
    summary="(B1 A1) * (B2 A2), element by element",
    leaves=LEAVES,
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8, "alpha": 8, "use_effective_conv2d": False},
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    training=frozenset({"rank_dropout", "module_dropout"}),
    merges="exact sum",
)
