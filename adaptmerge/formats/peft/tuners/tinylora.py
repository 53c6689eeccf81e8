"""TinyLoRA: tinylora_A (r, in), _B (out, r), _P (u, r, r) at every module; vectors base_model.tinylora_v.N.

Which vector is a module's, and from which seed its P, follows from its place in the model's order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from adaptmerge.adapters.families.tinylora import TinyLora, TinyMatrices
from adaptmerge.adapters.graph import Edit, Layer, Site
from adaptmerge.adapters.module_paths import INPUTS
from adaptmerge.adapters.weight_edits import Add
from adaptmerge.errors import CannotStore
from adaptmerge.formats.peft.additive import integer, number
from adaptmerge.formats.peft.order import ORDERS, in_model_order
from adaptmerge.formats.peft.read import each_module
from adaptmerge.formats.peft.shared import seed
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading, Spelling, Tuner
from adaptmerge.tensors.refs import TensorRef, computed

UP, DOWN, MIXED = "tinylora_B", "tinylora_A", "tinylora_P"
VECTOR = re.compile(r"(?:base_model\.)?tinylora_v\.(?:[^.]+\.)?(\d+)$")
MOST = 2048  # places that a stored P is looked for at


class Group(NamedTuple):
    """What a module is given by its place: the place, and its group's vector."""

    place: int
    vector: TensorRef


def read(reading: Reading) -> list[Edit]:
    """Vectors, stored once per group of modules, handed to the modules of the group."""
    modules = reading.keys.modules
    vectors = _vectors(reading)
    tied = 1.0 - number(reading, "weight_tying")
    if not modules or sorted(vectors) != list(range(max(1, round(len(modules) * tied)))):
        raise Malformed(
            f"vectors {', '.join(map(str, sorted(vectors))) or 'none'} are stored for {len(modules)} "
            f"modules, which weight_tying = {reading.setting('weight_tying')} does not make of them"
        )
    places = _places(reading, len(vectors))
    order = sorted(modules, key=places.__getitem__)
    groups = {
        module: Group(places[module], vectors[group_of(i, len(order), len(vectors))])
        for i, module in enumerate(order)
    }
    return each_module(reading, partial(_edit, groups=groups))


def group_of(index: int, modules: int, groups: int) -> int:
    """Groups of equal size in the order of the model, the last one with what is left over."""
    return min(index // max(1, modules // groups), groups - 1)


def _vectors(reading: Reading) -> dict[int, TensorRef]:
    keys = {key: match for key in reading.keys.refs if (match := VECTOR.match(key))}
    taken = {int(match[1]): reading.keys.take(key) for key, match in keys.items()}
    return {n: replace(ref, shared=True) for n, ref in taken.items() if ref is not None}


def _places(reading: Reading, groups: int) -> Mapping[str, int]:
    """Every module's place in the model's order: by the seed of its stored P, else by the base."""
    modules = reading.keys.modules
    found = _by_seed(reading)
    if found is not None:
        return found
    stored = all(MIXED in parts for parts in modules.values())
    ordered = in_model_order(reading.options.base, modules)
    if ordered is None and (len(modules) == 1 or (stored and groups == 1)):
        ordered = sorted(modules)
    if ordered is None:
        raise Malformed(
            "which vector and seed are which module's follows from the order of the model's modules, "
            "which neither the file nor a base tells: pass --base DIR (known architectures: "
            f"{', '.join(ORDERS)}), or save the adapter with save_projection=True"
        )
    return {module: place for place, module in enumerate(ordered)}


def _by_seed(reading: Reading) -> Mapping[str, int] | None:
    """The place that was added to the seed of each P, found by drawing again; None unless all are found."""
    key = seed(reading, "projection_seed")
    drawn: dict[tuple[int, ...], dict[bytes, int]] = {}
    places: dict[str, int] = {}
    for module, parts in reading.keys.modules.items():
        ref = parts.get(MIXED)
        if ref is None or len(ref.shape) != 3:
            return None
        table = drawn.setdefault(ref.shape, {})
        place = _find(ref, key, table)
        if place is None:
            return None
        places[module] = place
    return places if len(set(places.values())) == len(places) else None


def _find(ref: TensorRef, key: int, table: dict[bytes, int]) -> int | None:
    """Draws as many more as it takes; `table` has those that were drawn already."""
    wanted = _first(ref)
    while wanted not in table and len(table) < MOST:
        node = TinyMatrices(key + len(table), ref.shape[0], ref.shape[1])
        table[_first(computed(node))] = len(table)
    return table.get(wanted)


def _first(ref: TensorRef) -> bytes:
    """All values: few, as r and u are."""
    return bytes(ref.read().float().numpy().tobytes())


def _edit(reading: Reading, module: str, parts: Parts, groups: Mapping[str, Group]) -> list[Edit]:
    up, down = parts[UP], parts[DOWN]
    place, vector = groups[module]
    key, rank, count = seed(reading, "projection_seed"), down.shape[0], integer(reading, "u")
    if not reading.setting("save_projection"):
        if MIXED in parts:
            raise Malformed(
                f"{MIXED} is stored, but save_projection is false, so that PEFT would draw another: set "
                "it to true in the config"
            )
        mixed = computed(TinyMatrices(key + place, count, rank))
    else:
        mixed = parts[MIXED]
    shapes = up.shape[1:], mixed.shape, vector.shape
    if shapes != ((rank,), (count, rank, rank), (count,)):
        raise Malformed(
            f"B {list(up.shape)}, A {list(down.shape)}, P {list(mixed.shape)} and the vector "
            f"{list(vector.shape)} do not fit together for u = {count}"
        )
    embedding = module.rpartition(".")[2] in INPUTS
    site = Site(module, layer=Layer("embedding") if embedding else Layer())
    return [Add(site, TinyLora(up, down, mixed, vector, place, key))]


def tensors(edit: Add) -> Parts:
    factor = _factor(edit)
    return {UP: factor.up, DOWN: factor.down}


def shared(edits: Sequence[Add]) -> Spelling:
    """Vectors by group, and every P unless PEFT draws it again at the places that the modules have now."""
    ordered = sorted(edits, key=lambda edit: _factor(edit).place)
    factors = [_factor(edit) for edit in ordered]
    seeds = {factor.seed for factor in factors}
    if len(seeds) > 1 or len({factor.place for factor in factors}) < len(factors):
        raise CannotStore(
            "TINYLORA hands out vectors by the order of the modules, which several files do not "
            "tell: --to native keeps each module's own"
        )
    vectors = _tied(factors)
    fields = {
        "r": max(factor.down.shape[0] for factor in factors),
        "u": factors[0].vector.count,
        "projection_seed": factors[0].seed,
        "weight_tying": 1.0 - len(vectors) / len(factors),
        "save_projection": not all(_is_drawn(factor, i) for i, factor in enumerate(factors)),
    }
    stored = {f"base_model.tinylora_v.{n}": v for n, v in enumerate(vectors)}
    if fields["save_projection"]:
        stored |= {f"{edit.site.module}.{MIXED}": _factor(edit).mixed for edit in ordered}
    return Spelling(stored, fields)


def _tied(factors: Sequence[TinyLora]) -> list[TensorRef]:
    """One vector per group where the groups are PEFT's, else one per module."""
    distinct = list(dict.fromkeys(factor.vector for factor in factors))
    count = len(factors)
    as_grouped = [distinct[group_of(i, count, len(distinct))] for i in range(count)]
    own = [factor.vector for factor in factors]
    chosen = distinct if as_grouped == own else own
    return [replace(vector, shared=False) for vector in chosen]


def _is_drawn(factor: TinyLora, index: int) -> bool:
    node = factor.mixed.source
    return isinstance(node, TinyMatrices) and node.seed == factor.seed + index


def _factor(edit: Add) -> TinyLora:
    assert isinstance(edit.factor, TinyLora)
    return edit.factor


TUNER = Tuner(
    "TINYLORA",
    summary="B (sum of v_i P_i) A, P random, B and A the base's singular sides",
    shapes={
        "tinylora_A": "_r _in",
        "tinylora_B": "_out _r",
        "tinylora_P": "u r r",
        r"tinylora_v\..+": "u",
    },
    leaves=(UP, DOWN, MIXED),
    read=read,
    tensors=tensors,
    shared=shared,
    maths={
        "r": 2,
        "u": 64,
        "weight_tying": 0.0,
        "projection_seed": 42,
        "save_projection": True,
    },
    training=frozenset({"tinylora_dropout", "init_v_bound"}),
    bias_mode="tinylora_only",
    as_lora="exact",
    merges="exact sum of the LoRAs that they are",
)
