"""MiSS: miss_block (r, out); (r, mini_r) for init_weights "mini"; (out / r, r, r) for "bat"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.miss import Miss, MissBat
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.additive import expect, refuse
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

VARIANTS = ("bat", "mini")


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """The variant is what init_weights says, which says more than how training began."""
    return [edit_of(reading, module, parts["miss_block"])]


def edit_of(reading: Reading, module: str, block: TensorRef) -> Edit:
    """The edit of one module. Raises Malformed where block, config and base contradict each other."""
    variant = reading.setting("init_weights")
    if isinstance(variant, str) and variant not in VARIANTS:
        refuse(reading, "init_weights", f"expected true, false, {' or '.join(VARIANTS)}")
    edit = _bat(reading, module, block) if variant == "bat" else _plain(reading, module, block)
    _fits(reading, edit)
    return edit


def _plain(reading: Reading, module: str, block: TensorRef) -> Miss:
    if len(block.shape) != 2:
        raise Malformed(f"the block has shape {list(block.shape)}: expected 2 axes")
    rank, width = block.shape
    expect(reading, "r", module, rank)
    tiled = reading.setting("init_weights") == "mini"
    if tiled:
        expect(reading, "mini_r", module, width)
    return Miss(Site(module), block, tiled)


def _bat(reading: Reading, module: str, block: TensorRef) -> MissBat:
    if len(block.shape) != 3 or block.shape[1] != block.shape[2]:
        raise Malformed(f"a bat block has shape {list(block.shape)}: expected (out / r, r, r)")
    expect(reading, "r", module, block.shape[1])
    return MissBat(Site(module), block)


def _fits(reading: Reading, edit: Miss | MissBat) -> None:
    weight = reading.matrix(edit.site.module)
    problem = None if weight is None else edit.misfit(weight.shape)
    if problem:
        raise Malformed(f"{problem}: is this adapter for another model?")


def tensors(edit: Miss | MissBat) -> Parts:
    return {"miss_block": edit.blocks if isinstance(edit, MissBat) else edit.block}


def settings(edit: Miss | MissBat) -> Mapping[str, Any]:
    if isinstance(edit, MissBat):
        return {"r": edit.blocks.shape[1], "init_weights": "bat"}
    rank, width = edit.block.shape
    return {"r": rank, **({"init_weights": "mini", "mini_r": width} if edit.tiled else _PLAIN)}


_PLAIN: Mapping[str, Any] = {"init_weights": True}

TUNER = Tuner(
    "MISS",
    summary="one block added to every shard of the inputs; bat: W M + M by blocks",
    shapes={
        "miss_block": "r _width | _blocks r r",
    },
    leaves=("miss_block",),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"r": 64, "init_weights": True, "mini_r": 1},
    training=frozenset({"miss_dropout"}),
    bias_mode="MiSS_only",
    as_lora="base",
    merges="as deltas, with the base; all but bat stay of rank r",
)
