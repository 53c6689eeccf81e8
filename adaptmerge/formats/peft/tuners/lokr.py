"""LoKr: lokr_w1 (a, c) or lokr_w1_a and _b; lokr_w2 (b, d, *kernel) or lokr_w2_a and _b, with lokr_t2
for convolutions under use_effective_conv2d.

The scale is alpha / r even where no factor has rank r. How a size is split in two follows from
decompose_factor, and which side is whole from r and decompose_both: a written config must say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.lokr import LoKr, side
from adaptmerge.adapters.graph import Edit
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.additive import added, expect, integer, kernel_of, number
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

BALANCED = -1  # decompose_factor: two numbers as near to each other as the size has


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    """alpha / r times the Kronecker product."""
    left = _side(parts, "lokr_w1")
    right = _side(parts, "lokr_w2")
    for pair in (left, right):
        if len(pair) > 1:
            expect(reading, "r", module, pair[-1].shape[0])
    rank = integer(reading, "r", module)
    scale = number(reading, "alpha", module) / rank
    rows_last = len(right) == 1 and len(right[0].shape) == 3
    factor = LoKr(left, right, rank, scale, rows_last)
    return added(reading, module, factor, _kernel(right))


def _side(parts: Parts, name: str) -> tuple[TensorRef, ...]:
    """A side as it is stored; PEFT keeps the up of one with a core as (r, out)."""
    low = [f"{name}_a", f"{name}_b"]
    core = name.replace("_w", "_t")
    if name in parts:
        extra = [leaf for leaf in (*low, core) if leaf in parts]
        if extra:
            raise Malformed(
                f"{name} is stored whole and as {', '.join(extra)}: expected one of them"
            )
        return (parts[name],)
    up, down = (parts[leaf] for leaf in low)
    if core not in parts:
        return up, down
    if len(parts[core].shape) < 3:
        raise Malformed(f"{core} has shape {list(parts[core].shape)}: expected a kernel")
    return up.T, parts[core], down


def _kernel(right: Sequence[TensorRef]) -> tuple[int, ...]:
    if len(right) == 1:
        return right[0].shape[2:]
    return kernel_of(right[1].shape) if len(right) == 3 else ()


def tensors(edit: Add) -> Parts:
    lokr = _lokr(edit)
    return {**_stored("lokr_w1", lokr.left), **_stored("lokr_w2", lokr.right)}


def _stored(name: str, parts: Sequence[TensorRef]) -> Parts:
    if len(parts) == 1:
        return {name: parts[0]}
    up, *core, down = parts
    if not core:
        return {f"{name}_a": up, f"{name}_b": down}
    return {f"{name}_a": up.T, name.replace("_w", "_t"): core[0], f"{name}_b": down}


def settings(edit: Add) -> Mapping[str, Any]:
    lokr = _lokr(edit)
    rank = _rank(lokr)
    found: dict[str, Any] = {"r": rank, "alpha": lokr.scale * rank}
    if len(lokr.right) == 3:
        found["use_effective_conv2d"] = True
    if len(lokr.left) > 1 or 2 * rank < max(side(lokr.left).shape):
        found["decompose_both"] = len(lokr.left) > 1
    return found


def _rank(lokr: LoKr) -> int:
    """The rank as it was, or the least for which PEFT keeps the right side whole."""
    if len(lokr.left) > 1 or len(lokr.right) > 1:
        return lokr.rank
    return max(lokr.rank, math.ceil(max(lokr.right[0].shape[:2]) / 2))


def finish(edits: Sequence[Add], config: dict[str, Any]) -> dict[str, Any]:
    """With a decompose_factor that splits all sizes as they are split, the config's own if it does."""
    splits = {split for edit in edits for split in _splits(edit)}
    small = sorted({first for first, _ in splits})
    for factor in (config.get("decompose_factor", BALANCED), BALANCED, *small):
        if all(split_of(first * second, factor) == (first, second) for first, second in splits):
            return {**config, "decompose_factor": factor}
    if "decompose_factor" in config:  # kernels that only the base tells may hide in the sizes
        return config
    raise CannotStore(
        f"LOKR has one decompose_factor for all modules, and none splits sizes into {sorted(splits)}"
    )


def _splits(edit: Add) -> list[tuple[int, int]]:
    """How outputs and inputs (channels of convolutions) are split over the two sides."""
    lokr = _lokr(edit)
    left, up, down = side(lokr.left).shape, lokr.right[0], lokr.right[-1]
    places = math.prod(edit.site.layer.kernel) if len(lokr.right) == 2 else 1
    return [(left[0], up.shape[0]), (left[1], down.shape[1] // places)]


def split_of(size: int, factor: int) -> tuple[int, int]:
    """The two numbers that PEFT and LyCORIS split a size into: the factor first where it divides the
    size, else the largest divisor up to it (or any, if BALANCED) that is not above the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == BALANCED else min(factor, math.isqrt(size))
    small = max((n for n in range(1, limit + 1) if size % n == 0), default=1)
    return small, size // small


def _lokr(edit: Add) -> LoKr:
    assert isinstance(edit.factor, LoKr)
    return edit.factor


TUNER = Tuner(
    "LOKR",
    summary="kron(C, B A), either side whole or of low rank",
    shapes={
        "lokr_w[12]": "_a _b *",
        "lokr_w[12]_[ab]": "_a _b",
        "lokr_t2": "_r _q *",
    },
    leaves=(
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
        *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    module=module,
    tensors=tensors,
    settings=settings,
    finish=finish,
    maths={
        "r": 8,
        "alpha": 8,
        "use_effective_conv2d": False,
        "decompose_both": False,
        "decompose_factor": BALANCED,
    },
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    training=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"}),
    merges="exact sum",
)
