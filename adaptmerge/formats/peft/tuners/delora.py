"""DeLoRA: delora_A (r, in), delora_B (out, r), delora_lambda (1,), delora_w_norm (in,)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.delora import DeLora
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import added, expect
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

LEAVES = ("delora_B", "delora_A", "delora_lambda", "delora_w_norm")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    up, down, strength, widths = (parts[leaf] for leaf in LEAVES)
    rank, _ = down.shape
    expect(reading, "r", module, rank)
    if strength.count != 1:
        raise Malformed(f"delora_lambda has {strength.count} values: expected one")
    return added(reading, module, DeLora(up, down, strength, widths))


def tensors(edit: Add) -> Parts:
    factor = _delora(edit)
    return dict(zip(LEAVES, (factor.up, factor.down, factor.strength, factor.widths), strict=True))


def settings(edit: Add) -> Mapping[str, Any]:
    return {"r": _delora(edit).down.shape[0]}


def _delora(edit: Add) -> DeLora:
    assert isinstance(edit.factor, DeLora)
    return edit.factor


TUNER = Tuner(
    "DELORA",
    summary="B diag(lambda / (r |B| |A|)) A diag(|W|), norms by component and column",
    shapes={
        "delora_A": "r in",
        "delora_B": "out r",
        "delora_lambda": "1",
        "delora_w_norm": "in",
    },
    leaves=LEAVES,
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 8},
    patterns={"r": "rank_pattern"},
    # lambda is stored: the config has what training began with
    training=frozenset({"module_dropout", "delora_lambda", "lambda_pattern"}),
    bias_mode="delora_only",
    merges="exact sum",
)
