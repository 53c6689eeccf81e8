"""BOFT: boft_R (factors, blocks, b, b) and boft_s (out, 1), for convolutions (1, out).

Without a CUDA compiler PEFT itself forgets all butterfly factors but the first; here all are used.
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptmerge.adapters.families.boft import Boft
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    blocks, scales = parts["boft_R"], parts["boft_s"]
    if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3]:
        raise Malformed(f"boft_R has shape {list(blocks.shape)}: expected (factors, blocks, b, b)")
    factors, count, size, _ = blocks.shape
    runs = 2 ** (factors - 1)
    if factors > 1 and (count % runs or size % 2):
        raise Malformed(f"{factors} butterfly factors do not divide {count} blocks of {size}")
    weight = reading.matrix(module)
    if weight is not None and weight.shape != (scales.count, count * size):
        raise Malformed(
            f"is for {scales.count} outputs and {count * size} inputs, the base has {list(weight.shape)}"
        )
    return [Boft(Site(module, "weight", reading.layer(module)), blocks, scales)]


def tensors(edit: Boft) -> Parts:
    return {"boft_R": edit.blocks, "boft_s": edit.scales}


def shared(edits: Sequence[Boft]) -> Spelling:
    """One block size, or one number of blocks, and one number of factors."""
    shapes = {edit.blocks.shape[:3] for edit in edits}
    factors, counts, sizes = (set(found) for found in zip(*shapes, strict=True))
    if len(factors) > 1 or (len(counts) > 1 and len(sizes) > 1):
        found = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise CannotStore(f"BOFT has one kind of blocks for all modules, here are {found}")
    by_size = len(sizes) == 1
    return Spelling(
        {},
        {
            "boft_n_butterfly_factor": factors.pop(),
            "boft_block_size": sizes.pop() if by_size else 0,
            "boft_block_num": 0 if by_size else counts.pop(),
        },
    )


TUNER = Tuner(
    "BOFT",
    summary="W times a product of butterfly rotations, outputs scaled",
    shapes={
        "boft_R": "factors blocks b b",
        "boft_s": "_out 1 | 1 _out",
    },
    leaves=("boft_R", "boft_s"),
    module=module,
    tensors=tensors,
    shared=shared,
    maths={"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
    training=frozenset({"boft_dropout"}),
    bias_mode="boft_only",
    as_lora="base",
    merges="the mean rotation; with --as lora and --base as deltas",
)
