"""OFT: oft_R.weight, for embeddings oft_embedding_R.weight: triangles (blocks, b (b - 1) / 2).

| quirk | here |
|---|---|
| block sizes that do not divide the input are moved to the nearest that do | the file's shapes count |
| the series of peft 0.16 and 0.17 ends in a full term, since 0.18 in half of one | told by peft_version |
| the unmerged forward of a k x k convolution sums overlapping patches | refused, k = 1 is read |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adaptmerge.adapters.families.oft import Oft
from adaptmerge.adapters.graph import Edit, Kind, Layer, Note, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner

LINEAR, EMBEDDING = "oft_R", "oft_embedding_R"
HALVED = "0.18.0"  # the first version whose series ends in half a term


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    leaf = EMBEDDING if EMBEDDING in parts else LINEAR
    layer = Layer("embedding") if leaf == EMBEDDING else reading.layer(module)
    site = Site(module, "weight", layer)
    _reject_patches(site)
    repeated = bool(reading.setting("block_share"))
    edit = Oft(
        site,
        parts[leaf],
        terms=_terms(reading),
        last=_last(reading),
        radius=float(reading.setting("eps")) if reading.setting("coft") else None,
        repeated=repeated,
        blocks=reading.setting("r") if repeated else parts[leaf].shape[0],
    )
    if repeated and parts[leaf].shape[0] != 1:
        raise Malformed(
            f"has {parts[leaf].shape[0]} blocks, but block_share says that there is one"
        )
    return [_fitted(reading, edit)]


def _fitted(reading: Reading, edit: Oft) -> Oft:
    """The edit, its blocks counted and compared with the base where that is known."""
    weight = reading.matrix(edit.site.module)
    if weight is None:
        return edit
    from dataclasses import replace

    blocks, left = divmod(weight.shape[1], edit.size)
    if left or (not edit.repeated and blocks != edit.blocks):
        raise Malformed(
            f"{edit.vectors.shape[0]} blocks of {edit.size} do not fill the base's {weight.shape[1]} inputs"
        )
    return replace(edit, blocks=blocks)


def _terms(reading: Reading) -> int:
    if not reading.setting("use_cayley_neumann"):
        return 0
    terms = reading.setting("num_cayley_neumann_terms")
    if not isinstance(terms, int) or terms < 1:
        raise Malformed(f"num_cayley_neumann_terms is {terms!r}: expected a number of at least 1")
    return terms


def _last(reading: Reading) -> float:
    if not reading.setting("use_cayley_neumann"):
        return 1.0
    version = str(reading.config.raw.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        what = (
            "the config has no peft_version: taken as written by peft 0.16 or 0.17, whose Cayley-Neumann "
            "series ends in a full term; newer versions of peft compute half of it"
        )
        reading.notes += [Note(Kind.ASSUMED, what)] if not _said(reading, what) else []
        return 2.0
    return 2.0 if (int(found[1]), int(found[2])) < (0, 18) else 1.0


def _said(reading: Reading, what: str) -> bool:
    return any(note.what == what for note in reading.notes)


def _reject_patches(site: Site) -> None:
    if any(side > 1 for side in site.layer.kernel):
        kernel = "x".join(str(side) for side in site.layer.kernel)
        raise Malformed(
            f"turns the inputs of a {kernel} convolution: peft sums their overlapping patches there, which "
            "no weight can do and which merging in peft loses; only 1x1 convolutions can be read"
        )


def tensors(edit: Oft) -> Parts:
    leaf = EMBEDDING if edit.site.layer.kind == "embedding" else LINEAR
    return {f"{leaf}.weight": edit.vectors}


def settings(edit: Oft) -> Mapping[str, Any]:
    fields: dict[str, Any] = {
        "block_share": edit.repeated,
        "coft": edit.radius is not None,
        "use_cayley_neumann": bool(edit.terms),
    }
    if edit.radius is not None:
        fields["eps"] = edit.radius
    if edit.terms:
        fields["num_cayley_neumann_terms"] = edit.terms
    if edit.terms and edit.last == 1.0:
        fields["peft_version"] = HALVED
    return fields


def shared(edits: Sequence[Oft]) -> Spelling:
    """One block size, or one number of blocks, from which PEFT's rounding gives the shapes of all."""
    for size in sorted({edit.size for edit in edits}):
        if all(edit.size == (_near(edit, size) if edit.blocks else size) for edit in edits):
            return Spelling({}, {"oft_block_size": size, "r": 0})
    for count in sorted({edit.blocks for edit in edits} - {0}):
        if all(edit.blocks == _near(edit, count) for edit in edits):
            return Spelling({}, {"oft_block_size": 0, "r": count})
    sizes = sorted({(edit.blocks, edit.size) for edit in edits})
    raise CannotStore(f"OFT has one block size or one number of blocks for all, here are {sizes}")


def _near(edit: Oft, wanted: int) -> int:
    """The divisor of the input width closest to `wanted`, the smaller of two; the width if that is less."""
    width = edit.blocks * edit.size
    if wanted >= width:
        return width
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


TUNER = Tuner(
    "OFT",
    summary="W times a block-diagonal rotation, by a Cayley transform or its series",
    shapes={
        "oft_R": "blocks values?",
        "oft_embedding_R": "blocks values?",
    },
    leaves=(LINEAR, EMBEDDING),
    module=module,
    tensors=tensors,
    settings=settings,
    shared=shared,
    maths={
        "r": 0,
        "oft_block_size": 32,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    training=frozenset({"module_dropout"}),
    bias_mode="oft_only",
    as_lora="base",
    merges="the mean rotation; with --as lora and --base as deltas",
)
