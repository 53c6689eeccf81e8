"""Uni-LoRA: unilora_theta_d (d,) and, with save_indices, places and scales of every entry of A and B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from adaptmerge.adapters.families.unilora import UniLora, UniPlaces, UniScales
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.formats.peft.additive import integer
from adaptmerge.formats.peft.order import ORDERS, adapted, in_model_order
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.shared import seed, uncut
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.dtypes import DType
from adaptmerge.tensors.refs import TensorRef, bounded, computed

VECTOR = "unilora_theta_d"
LEAVES = ("unilora_indices_B", "unilora_scales_B", "unilora_indices_A", "unilora_scales_A")


def read(reading: Reading) -> list[Edit]:
    """Places and scales stored, or given out again to the modules in the order of the model."""
    vector = reading.shared(VECTOR)
    if vector is None:
        raise Malformed(f"base_model.{VECTOR} is missing, the one vector that this family trains")
    if vector.shape != (reading.setting("theta_d_length"),):
        raise Malformed(
            f"{VECTOR} has shape {list(vector.shape)}, but theta_d_length is "
            f"{reading.setting('theta_d_length')}"
        )
    stored = bool(reading.setting("save_indices"))
    if stored != bool(reading.keys.modules):
        found = "no indices are stored" if stored else "indices are stored"
        raise Malformed(
            f"save_indices is {str(stored).lower()}, but {found}: correct it in the config"
        )
    if stored:
        return each_module(reading, partial(_edit, vector=vector))
    return _given_out(reading, vector)


def _edit(reading: Reading, module: str, parts: Parts, vector: TensorRef) -> list[Edit]:
    up, up_scales, down, down_scales = (parts[leaf] for leaf in LEAVES)
    rank = reading.setting("r")
    shapes = up.shape[1:], down.shape[:1], up_scales.shape, down_scales.shape
    if shapes != ((rank,), (rank,), up.shape, down.shape):
        found = ", ".join(f"{leaf} {list(parts[leaf].shape)}" for leaf in LEAVES)
        raise Malformed(f"shapes do not fit together for r = {rank}: {found}")
    return [Add(Site(module), UniLora(vector, up, up_scales, down, down_scales))]


def _given_out(reading: Reading, vector: TensorRef) -> list[Edit]:
    """One shuffled list of places, cut into A and B of one module after the other."""
    base, rank = reading.options.base, integer(reading, "r")
    if base is None:
        raise Malformed(
            "the file names no module and its indices are given out again from proj_seed, for which "
            "only the base tells modules and shapes: pass --base DIR"
        )
    ordered = in_model_order(base, adapted(base, reading.config.raw))
    if ordered is None:
        raise Malformed(
            f"its indices are given out again in the order of the modules of a {base.architecture} "
            f"model, which is not known (known: {', '.join(ORDERS)}): save the adapter with "
            "save_indices=True"
        )
    shapes = {module: reading.shape(module) for module in ordered}
    total = rank * sum(out + width for out, width in shapes.values())
    places = UniPlaces(seed(reading, "proj_seed"), total, vector.count)
    dtypes = _dtypes(reading, ordered)
    edits: list[Edit] = []
    start = 0
    for module, (out, width) in shapes.items():
        scales = UniScales(places, dtypes[module])
        both = [bounded(computed(node, shared=True)) for node in (places, scales)]
        middle, stop = start + rank * width, start + rank * (width + out)
        down = [ref.slice(0, start, middle).reshape(rank, width) for ref in both]
        up = [ref.slice(0, middle, stop).reshape(out, rank) for ref in both]
        edits.append(Add(Site(module), UniLora(vector, *up, *down)))
        start = stop
    return edits


def _dtypes(reading: Reading, modules: Sequence[str]) -> Mapping[str, DType]:
    """The dtype of each module's weight, to which PEFT rounds the scales; below float32 that is a Note."""
    found = {m: weight.dtype for m in modules if (weight := reading.weight(m)) is not None}
    narrow = {str(dtype) for dtype in found.values() if dtype.bits < 32}
    if narrow:
        what = f"scales are rounded to {' and '.join(sorted(narrow))}, as with a base loaded in it"
        reading.notes.append(Note(Kind.ASSUMED, what))
    return found


def tensors(edit: Add) -> Parts:
    """None: whether a module's indices are stored is a matter of all modules."""
    return {}


def shared(edits: Sequence[Add]) -> Spelling:
    """The vector, and all indices unless PEFT gives out the same again to just these modules."""
    factors = {edit.site.module: _factor(edit) for edit in edits}
    vector = uncut((factor.vector for factor in factors.values()), "the vector")
    down = [factor.down_places for factor in factors.values()]
    fields = {"r": down[0].shape[0], "theta_d_length": vector.count}
    stored = {f"base_model.{VECTOR}": vector}
    sources = {ref.source for f in factors.values() for ref in (f.down_places, f.up_places)}
    source = sources.pop() if len(sources) == 1 else None
    total = sum(f.down_places.count + f.up_places.count for f in factors.values())
    if isinstance(source, UniPlaces) and source.total == total:
        return Spelling(stored, {**fields, "save_indices": False, "proj_seed": source.seed})
    for module, factor in factors.items():
        refs = factor.up_places, factor.up_scales, factor.down_places, factor.down_scales
        stored |= {f"{module}.{leaf}": ref for leaf, ref in zip(LEAVES, refs, strict=True)}
    return Spelling(stored, {**fields, "save_indices": True})


def _factor(edit: Add) -> UniLora:
    assert isinstance(edit.factor, UniLora)
    return edit.factor


TUNER = Tuner(
    "UNILORA",
    summary="B A, every entry of which is one of a single vector",
    shapes={
        "unilora_theta_d": "d",
        "unilora_indices_B": "whole: out r",
        "unilora_scales_B": "out r",
        "unilora_indices_A": "whole: r in",
        "unilora_scales_A": "r in",
    },
    leaves=LEAVES,
    read=read,
    tensors=tensors,
    shared=shared,
    maths={"r": 4, "theta_d_length": 256, "proj_seed": 42, "save_indices": False},
    training=frozenset({"unilora_dropout", "init_theta_d_bound"}),
    bias_mode="unilora_only",
    as_lora="exact",
    merges="exact sum of the LoRAs that they are",
)
