"""FRoD: frod_lambda_l (in) and frod_lambda_s_values (n) per module; frod_V (in, in), frod_s_indices (2, n)
and frod_s_size (2) once per category of modules, under base_model.

| quirk | here |
|---|---|
| save_projection = False leaves V to be found again from all base weights by eigenvectors | refused |
| PEFT finds U with the V it computed itself, not with the V in the file | U comes from the file's V |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adaptmerge.adapters.families.frod import Frod
from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.dtypes import I64
from adaptmerge.tensors.refs import TensorRef, listed

LEAVES = ("frod_lambda_l", "frod_lambda_s_values")
SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


def read(reading: Reading) -> list[Edit]:
    """All edits; what modules of one category share is taken once."""
    categories = dict.fromkeys(category(module) for module in reading.keys.modules)
    shared = {name: [reading.shared(f"{leaf}.{name}") for leaf in SHARED] for name in categories}
    projections = {name: _projection(name, *refs) for name, refs in shared.items()}

    def module(reading: Reading, module: str, parts: Parts) -> list[Edit]:
        return [_edit(reading, module, parts, *projections[category(module)])]

    return each_module(reading, module)


def category(module: str) -> str:
    """What the modules of one role in all layers are called: the last two parts of their paths."""
    *before, last = module.split(".")
    if not before or before[-1].isdigit():
        return last
    if before[-2:] == ["attention", "output"] and last == "dense":
        return "attention_output"
    return f"{before[-1]}_{last}"


def _projection(
    name: str, basis: TensorRef | None, places: TensorRef | None, size: TensorRef | None
) -> tuple[TensorRef, TensorRef]:
    if basis is None or places is None or size is None:
        raise Malformed(
            f"frod_V, frod_s_indices and frod_s_size of {name} are not stored: with save_projection off "
            "they are eigenvectors that must be found again from all weights of the base, which need not "
            "give the same ones; save the adapter with save_projection=True where it was trained"
        )
    sizes = size.read().tolist()
    if len(set(sizes)) != 1 or basis.shape != tuple(sizes):
        raise Malformed(f"frod_V.{name} has shape {list(basis.shape)}, but frod_s_size is {sizes}")
    if places.shape[:1] != (2,) or (places.count and int(places.read().max()) >= sizes[0]):
        raise Malformed(f"frod_s_indices.{name} are no places in a matrix of {sizes}")
    return basis, places


def _edit(reading: Reading, module: str, parts: Parts, basis: TensorRef, places: TensorRef) -> Edit:
    scales, couplings = (parts[leaf] for leaf in LEAVES)
    if scales.shape != basis.shape[:1] or couplings.shape != places.shape[1:]:
        raise Malformed(
            f"has {scales.count} scales and {couplings.count} couplings, but its category "
            f"{basis.shape[0]} and {places.shape[1]}"
        )
    weight = reading.matrix(module)
    if weight is not None and weight.shape[1] != scales.count:
        raise Malformed(f"is for {scales.count} inputs, but the base has {weight.shape[1]}")
    ridge = float(reading.setting("regularization_alpha"))
    return Frod(Site(module), scales, couplings, places, basis, ridge)


def tensors(edit: Frod) -> Parts:
    return {"frod_lambda_l": edit.scales, "frod_lambda_s_values": edit.couplings}


def shared(edits: Sequence[Frod]) -> Spelling:
    """The projections by category, and the fields that PEFT makes tensors of these shapes from."""
    found: dict[str, Frod] = {}
    for edit in edits:
        first = found.setdefault(category(edit.site.module), edit)
        if (first.basis, first.places, first.ridge) != (edit.basis, edit.places, edit.ridge):
            raise CannotStore(
                f"FROD shares one basis among all {category(edit.site.module)}, here are several"
            )
    refs: dict[str, TensorRef] = {}
    for name, edit in found.items():
        width = edit.basis.shape[0]
        size = listed((width, width), (2,), I64)
        stored = (replace(edit.basis, shared=False), replace(edit.places, shared=False), size)
        refs |= {f"base_model.{leaf}.{name}": ref for leaf, ref in zip(SHARED, stored, strict=True)}
    fields: dict[str, Any] = {"save_projection": True, "sparse_rate": _rate(list(found.values()))}
    return Spelling(refs, {**fields, "regularization_alpha": edits[0].ridge})


def _rate(edits: Sequence[Frod]) -> float:
    """A share of couplings from which int(width^2 * share) gives the number that each category has."""
    low, high = 0.0, math.inf
    for edit in edits:
        entries, count = edit.basis.shape[0] ** 2, edit.places.shape[1]
        low = max(low, 0.0 if count == 1 else count / entries)
        high = min(
            high, math.inf if count == entries - edit.basis.shape[0] else (count + 1) / entries
        )
    if low >= high:
        raise CannotStore("FROD has one sparse_rate for all modules, here are several")
    return (low + high) / 2 if high < math.inf else max(low, 1.0)


TUNER = Tuner(
    "FROD",
    summary="U (S + diag(l)) V^T with a V that layers share and U from W",
    shapes={
        "frod_lambda_l": "in",
        "frod_lambda_s_values": "n?",
        r"frod_V\..+": "in in",
        r"frod_s_indices\..+": "whole: 2 n?",
        r"frod_s_size\..+": "whole: 2",
    },
    leaves=LEAVES,
    read=read,
    tensors=tensors,
    shared=shared,
    maths={
        "projection_prng_key": 0,
        "save_projection": True,
        "sparse_rate": 0.01,
        "regularization_alpha": 1e-3,
    },
    training=frozenset({"frod_dropout", "progressbar", "runtime_offload_base_weight"}),
    bias_mode="frod_only",
    as_lora="base",
    merges="as deltas, with the base",
)
