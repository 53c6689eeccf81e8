"""OSF: osf_svd_params.U_low (out, k), S_low (k) and V_low (k, in); the kept directions are not stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.osf import Osf
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner

LEAVES = tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    up, values, down = (parts[leaf] for leaf in LEAVES)
    edit = Osf(Site(module), up, values, down)
    if up.shape[1:] != values.shape or down.shape[:1] != values.shape or edit.kept < 0:
        shapes = ", ".join(str(list(ref.shape)) for ref in (up, values, down))
        raise Malformed(f"U_low, S_low and V_low have shapes {shapes}, which do not multiply")
    weight = reading.matrix(module)
    if weight is not None and weight.shape != (up.shape[0], down.shape[1]):
        raise Malformed(
            f"is for a weight of {[up.shape[0], down.shape[1]]}, the base has {list(weight.shape)}"
        )
    return [edit]


def tensors(edit: Osf) -> Parts:
    return dict(zip(LEAVES, (edit.up, edit.values, edit.down), strict=True))


def settings(edit: Osf) -> Mapping[str, Any]:
    return {"effective_rank": edit.kept}


TUNER = Tuner(
    "OSF",
    summary="the weak singular directions of W replaced by trained ones",
    shapes={
        r"osf_svd_params\.U_low": "out k?",
        r"osf_svd_params\.S_low": "k?",
        r"osf_svd_params\.V_low": "k? in",
    },
    leaves=tuple(leaf.replace(".", r"\.") for leaf in LEAVES),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={"effective_rank": None},
    patterns={"effective_rank": "rank_pattern"},
    training=frozenset({"target_svd_config"}),
    as_lora="base",
    merges="as deltas, with the base",
)
