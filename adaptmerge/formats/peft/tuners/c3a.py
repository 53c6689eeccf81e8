"""C3A: c3a_kernel (out / b, in / b, b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.c3a import C3a
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import added, expect
from adaptmerge.formats.peft.config import exactly
from adaptmerge.formats.peft.tuner import Parts, Reading, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    kernel = parts["c3a_kernel"]
    expect(reading, "block_size", module, kernel.shape[2])
    return added(reading, module, C3a(kernel))


def tensors(edit: Add) -> Parts:
    return {"c3a_kernel": _c3a(edit).rows}


def settings(edit: Add) -> Mapping[str, Any]:
    return {"block_size": _c3a(edit).rows.shape[2]}


def finish(edits: Sequence[Add], config: dict[str, Any]) -> dict[str, Any]:
    """With whole paths in the table as they are: C3A looks them up, and matches ends of paths only."""
    plain = {exactly(edit.site.module): edit.site.module for edit in edits}
    table = config["block_size_pattern"]
    return {**config, "block_size_pattern": {plain.get(k, k): size for k, size in table.items()}}


def _c3a(edit: Add) -> C3a:
    assert isinstance(edit.factor, C3a)
    return edit.factor


TUNER = Tuner(
    "C3A",
    summary="circulant blocks",
    shapes={
        "c3a_kernel": "_rows _columns b",
    },
    leaves=("c3a_kernel",),
    module=module,
    tensors=tensors,
    settings=settings,
    finish=finish,
    maths={"block_size": 256},
    patterns={"block_size": "block_size_pattern"},
    bias_mode="c3a_only",
    as_lora="svd",
    merges="as deltas",
)
