"""PSOFT: psoft_R.weight (an upper triangle, or r x r), psoft_R.vector_a and vector_b (r).

A and B are not stored: they are the top singular vectors of the base's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptmerge.adapters.families.psoft import Psoft
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Tuner
from adaptmerge.tensors.refs import TensorRef

KNOWN = {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}
OUTER, INNER = "psoft_R.vector_b", "psoft_R.vector_a"
SIGNS = Note(
    Kind.ASSUMED,
    "singular vectors of the base are not stored: they are computed on the CPU, as peft does there; "
    "an adapter trained on another device may have had them with other signs",
)


def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
    for name, known in KNOWN.items():
        if reading.setting(name) not in known:
            raise Malformed(f"{name} is {reading.setting(name)!r}: expected {' or '.join(known)}")
    if SIGNS not in reading.notes:
        reading.notes.append(SIGNS)
    series = bool(reading.setting("use_cayley_neumann"))
    lowrank = reading.setting("psoft_svd") == "lowrank"
    edit = Psoft(
        Site(module),
        parts["psoft_R"],
        _magnitude(reading, parts, "psoft_mag_b", OUTER),
        _magnitude(reading, parts, "psoft_mag_a", INNER),
        terms=_terms(reading) if series else 0,
        longest=reading.setting("cayley_neumann_eps") if series else None,
        split=reading.setting("ab_svd_init"),
        search=reading.setting("psoft_svd"),
        rounds=reading.setting("psoft_svd_lowrank_niter") if lowrank else 10,
        seed=reading.setting("random_seed") if lowrank else 0,
        alpha=reading.setting("psoft_alpha"),
    )
    _check(reading, edit)
    return [edit]


def _terms(reading: Reading) -> int:
    terms = reading.setting("num_cayley_neumann_terms")
    if not isinstance(terms, int) or terms < 1:
        raise Malformed(f"num_cayley_neumann_terms is {terms!r}: expected a number of at least 1")
    return terms


def _magnitude(reading: Reading, parts: Parts, switch: str, leaf: str) -> TensorRef | None:
    return parts[leaf] if reading.setting(switch) else None


def _check(reading: Reading, edit: Psoft) -> None:
    orthogonal, rank = bool(reading.setting("psoft_orth")), reading.setting("r")
    if orthogonal != (len(edit.core.shape) == 1):
        raise Malformed(
            f"psoft_R.weight has shape {list(edit.core.shape)}, but psoft_orth is {orthogonal}"
        )
    sizes = [edit.rank, *(ref.count for ref in (edit.outer, edit.inner) if ref is not None)]
    if {rank} != set(sizes):
        raise Malformed(f"has rank {sizes[0]}, magnitudes {sizes[1:]}, but the config says {rank}")


def tensors(edit: Psoft) -> Parts:
    stored = {"psoft_R.weight": edit.core, OUTER: edit.outer, INNER: edit.inner}
    return {leaf: ref for leaf, ref in stored.items() if ref is not None}


def settings(edit: Psoft) -> Mapping[str, Any]:
    fields: dict[str, Any] = {
        "r": edit.rank,
        "psoft_orth": len(edit.core.shape) == 1,
        "psoft_mag_b": edit.outer is not None,
        "psoft_mag_a": edit.inner is not None,
        "use_cayley_neumann": bool(edit.terms),
        "ab_svd_init": edit.split,
        "psoft_svd": edit.search,
        "psoft_alpha": edit.alpha,
    }
    if edit.terms:
        fields["num_cayley_neumann_terms"] = edit.terms
        fields["cayley_neumann_eps"] = edit.longest
    if edit.search == "lowrank":
        fields["psoft_svd_lowrank_niter"] = edit.rounds
        fields["random_seed"] = edit.seed
    return fields


TUNER = Tuner(
    "PSOFT",
    summary="W + B (R - I) A inside its strongest singular directions",
    shapes={
        "psoft_R": "_n? | r r",
        r"psoft_R\.vector_[ab]": "r",
    },
    leaves=(r"psoft_R\.vector_a", r"psoft_R\.vector_b", "psoft_R"),
    module=module,
    tensors=tensors,
    settings=settings,
    maths={
        "r": 32,
        "psoft_alpha": 32,
        "ab_svd_init": "psoft_init",
        "psoft_svd": "full",
        "psoft_svd_lowrank_niter": 10,
        "random_seed": 0,
        "psoft_orth": True,
        "psoft_mag_b": True,
        "psoft_mag_a": True,
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
        "cayley_neumann_eps": None,
    },
    training=frozenset({"psoft_dropout"}),
    as_lora="base",
    merges="as deltas, with the base",
)
