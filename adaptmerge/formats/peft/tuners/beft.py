"""BEFT: beft_bias (1, out), added to the bias; where the base has none, to zeros."""

from __future__ import annotations

from adaptmerge.adapters.families.beft import Beft
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.weight_edits import Add, factor_of
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    vector = parts["beft_bias"]
    if vector.shape != (1, vector.count):
        raise Malformed(f"beft_bias has shape {list(vector.shape)}: expected (1, out)")
    weight = reading.matrix(module)
    if weight is not None and weight.shape[0] != vector.count:
        raise Malformed(f"is for {vector.count} outputs, but the base has {weight.shape[0]}")
    return [Add(Site(module, "bias"), Beft(vector))]


def tensors(edit: Edit) -> Parts:
    factor = factor_of(edit)
    assert isinstance(factor, Beft)
    return {"beft_bias": factor.vector}


TUNER = Tuner(
    "BEFT",
    summary="a vector added to the bias",
    shapes={
        "beft_bias": "1 out",
    },
    leaves=("beft_bias",),
    module=module,
    tensors=tensors,
    as_lora="never",
    merges="exact sum",
)
