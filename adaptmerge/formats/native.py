"""adaptmerge's own format: every edit as it is, in safetensors, with the graph as JSON.

A folder holds graph.json and tensors.safetensors; a lone .safetensors file has the JSON in its metadata
under "adaptmerge_graph". The JSON mirrors the classes of the graph: {"is": "Add", "site": ..., "factor":
...}; a tensor is {"tensor": NAME} and, where several sites share one, the steps that cut it. Version 1;
the page docs/formats/native.md is its definition.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

from adaptmerge.adapters import activation_edits, families, stored_edits, weight_edits
from adaptmerge.adapters.graph import (
    Adapter,
    BaseReference,
    Bundle,
    Labels,
    Layer,
    Note,
    Site,
    key_of,
)
from adaptmerge.adapters.weight_edits import Deviation, Effect, Share, family_of
from adaptmerge.algebra import factors
from adaptmerge.algebra.factors import Values
from adaptmerge.errors import InputError
from adaptmerge.files.in_memory import AS_STORED
from adaptmerge.files.listing import Listing
from adaptmerge.files.strict_json import capped, object_in, quoted
from adaptmerge.files.typed import checked, reader
from adaptmerge.formats.format import Format, Output, ReadOptions, Stores, WriteOptions
from adaptmerge.formats.peft.tuner import misshapen
from adaptmerge.tensors import refs
from adaptmerge.tensors.dtypes import BY_NAME, DType
from adaptmerge.tensors.refs import (
    Constant,
    Joined,
    Listed,
    Source,
    Step,
    TensorRef,
    bounded,
    computed,
)
from adaptmerge.tensors.walk import refs_of

VERSION = 1
KEY = "adaptmerge_graph"
GRAPH = "graph.json"
TENSORS = "tensors.safetensors"
WITHIN = (TensorRef, *AS_STORED, Constant, Listed, Joined)  # written as {"tensor": NAME}

HOMES = (factors, weight_edits, stored_edits, activation_edits, refs)  # of what graphs are made of
UNSETTLED = (Values, Effect, Share, Deviation)  # what a run computes before anything is written


@cache
def nodes() -> dict[str, type]:
    """The classes a graph is made of, by name; each name is that of one class.

    A ref and its source are none of them: a file must not be able to name a path on this machine.
    """
    table: dict[str, type] = {
        "Site": Site,
        "Layer": Layer,
        "BaseReference": BaseReference,
        "Labels": Labels,
        "Note": Note,
    }
    for module in (*HOMES, *families.modules()):
        for name, found in vars(module).items():
            is_node = isinstance(found, type) and is_dataclass(found)
            if is_node and found not in (*WITHIN, *UNSETTLED):
                assert table.setdefault(name, found) is found, f"two classes are called {name}"
    return table


def detect(listing: Listing) -> bool:
    """Whether there is a graph, in a file of its own or in a header."""
    if listing.single is None:
        return listing.has(GRAPH) and KEY in listing.json(GRAPH)
    if not listing.single.endswith(".safetensors"):
        return False
    return KEY in listing.tensors(listing.single).metadata


def read(listing: Listing, options: ReadOptions) -> Bundle:
    """The bundle at `listing`. Raises InputError for other versions and malformed graphs."""
    file = listing.tensors(listing.single or TENSORS)
    where = f"{listing.origin} (metadata entry {KEY!r})"
    graph = object_in(file.metadata[KEY], where) if listing.single else listing.json(GRAPH)
    if graph.get(KEY) != VERSION:
        raise InputError(
            f"is version {graph.get(KEY)!r} of the native format, expected {VERSION}: update adaptmerge",
            where=listing.origin,
        )
    decoder = _Decoder(file.refs)
    stated = graph.get("adapters")
    if not isinstance(stated, dict):
        raise InputError("its graph is malformed: it has no adapters", where=listing.origin)
    adapters = {name: decoder.adapter(name, raw) for name, raw in stated.items()}
    if decoder.problems:
        problems = [f"its graph is malformed: {problem}" for problem in decoder.problems]
        raise InputError(capped(problems), where=listing.origin)
    left = sorted(set(file.refs) - decoder.used)
    if left:
        raise InputError([f"tensor {name!r} is in no edit" for name in left], where=listing.origin)
    return Bundle(adapters)


@dataclass(frozen=True, slots=True)
class _Stated:
    """An adapter as a graph states it."""

    edits: list[Any]
    base: Any
    notes: list[Any]
    hints: Mapping[str, Mapping[str, Any]]
    covers: list[str]
    labels: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)


class _Decoder:
    """Rebuilds graph nodes from JSON; only the classes in nodes() can be named. What is amiss is kept in
    `problems`."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self.problems: list[str] = []

    def adapter(self, name: str, raw: Any) -> Adapter:
        before = len(self.problems)
        stated = reader(_Stated)(raw, name, self.problems)
        if len(self.problems) > before:
            return Adapter(name, ())
        edits = [self._edit(f"{name}.edits[{i}]", edit) for i, edit in enumerate(stated.edits)]
        wrong = [key for key in stated.tokens if not key.isdecimal()]
        self.problems += [f"{name}.tokens has {quoted(key)}, which is no number" for key in wrong]
        return Adapter(
            name=name,
            edits=tuple(edit for edit in edits if edit is not None),
            base=self.of(BaseReference, f"{name}.base", stated.base),
            notes=tuple(self.of(Note, f"{name}.notes", note) for note in stated.notes),
            hints=stated.hints,
            covers=frozenset(stated.covers),
            labels={
                owner: self.of(Labels, f"{name}.labels", node)
                for owner, node in stated.labels.items()
            },
            tokens={int(k): token for k, token in stated.tokens.items() if k not in wrong},
        )

    def of(self, kind: type[Any], name: str, raw: Any) -> Any:
        """A node of a class; what else there is, is a problem."""
        try:
            found = self.node(raw)
        except ValueError as problem:
            self.problems.append(f"{name}: {problem}")
            return None
        if not isinstance(found, kind):
            self.problems.append(f"{name} is no {kind.__name__}")
        return found

    def _edit(self, name: str, raw: Any) -> Any:
        edit = self.of(object, name, raw)
        if edit is None:
            return None
        if not isinstance(getattr(type(edit), "kind", None), str):
            self.problems.append(f"{name} is no edit")
            return None
        found = [f"{name} ({edit.site}): {said}" for said in misshapen(edit, family_of(edit))]
        if not any(True for _ in refs_of(edit)):
            found.append(f"{name} ({edit.site}) has no tensor")
        self.problems += found
        return None if found else edit

    def node(self, raw: Any) -> Any:
        if isinstance(raw, list):
            return tuple(self.node(part) for part in raw)
        if not isinstance(raw, dict):
            return raw
        if "tensor" in raw:
            return self._tensor(raw)
        if "computed" in raw:
            return self._cut(self._computed(raw["computed"]), raw)
        if "dtype" in raw and len(raw) == 1:
            return _known(BY_NAME, raw["dtype"], "dtype")
        kind = _known(nodes(), raw.get("is"), "part of a graph")
        raw = _as_now(raw)
        values = {key: self.node(value) for key, value in raw.items() if key != "is"}
        return checked(kind, values, kind.__name__)

    def _computed(self, raw: Any) -> TensorRef:
        node = self.node(raw)
        if not isinstance(node, Source):
            raise ValueError("a computed tensor is no source of values")
        return bounded(computed(node))

    def _tensor(self, raw: Mapping[str, Any]) -> TensorRef:
        ref = _known(self.tensors, raw["tensor"], "tensor of its file")
        self.used.add(raw["tensor"])
        return self._cut(ref, raw)

    def _cut(self, ref: TensorRef, raw: Mapping[str, Any]) -> TensorRef:
        ref = replace(ref, shared=bool(raw.get("shared", False)))
        steps = self.node(raw.get("steps", []))
        if not isinstance(steps, tuple) or not all(isinstance(step, Step) for step in steps):
            raise ValueError(f"the steps of {ref.name} are none")
        for step in steps:
            ref = ref.taking(step)
        return ref


def _as_now(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A node of earlier versions as it is written now: a bottleneck's place is its site's."""
    site = raw.get("site")
    if raw["is"] != "Bottleneck" or not isinstance(site, dict) or "place" in site:
        return raw
    kept = {key: value for key, value in raw.items() if key != "place"}
    return {**kept, "site": {**site, "place": raw.get("place", "")}}


def _known(table: Mapping[str, Any], name: Any, what: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{quoted(name)} is no {what}")
    return table[name]


class _Encoder:
    """Turns graph nodes into JSON and collects the tensors they refer to."""

    def __init__(self, *, several: bool = False) -> None:
        self.tensors: dict[str, TensorRef] = {}
        self._several = several
        self._shared: dict[Any, str] = {}
        self._written: dict[TensorRef, str] = {}

    def adapter(self, adapter: Adapter) -> dict[str, Any]:
        prefix = f"{adapter.name}." if self._several else ""
        return {
            "edits": [
                self.node(e, f"{prefix}{i}.{key_of(e).name}") for i, e in enumerate(adapter.edits)
            ],
            "base": self.node(adapter.base, ""),
            "notes": [self.node(note, "") for note in adapter.notes],
            "hints": adapter.hints,
            "covers": sorted(adapter.covers),
            "labels": {owner: self.node(labels, "") for owner, labels in adapter.labels.items()},
            "tokens": {str(number): token for number, token in adapter.tokens.items()},
        }

    def node(self, value: Any, path: str) -> Any:
        if isinstance(value, TensorRef):
            return self._tensor(value, path)
        if isinstance(value, DType):
            return {"dtype": value.name}
        if isinstance(value, tuple):
            return [self.node(part, f"{path}.{i}") for i, part in enumerate(value)]
        if is_dataclass(value) and not isinstance(value, type):
            names = [f.name for f in fields(value)]
            inner = {n: self.node(getattr(value, n), f"{path}.{n}") for n in names}
            if isinstance(value, Site) and not value.place:
                del inner["place"]  # most sites have none, and say so as before there were places
            return {"is": type(value).__name__, **inner}
        return value

    def _tensor(self, ref: TensorRef, path: str) -> dict[str, Any]:
        if not isinstance(ref.source, WITHIN):
            steps = [self.node(step, "") for step in ref.steps]
            source = self.node(ref.source, path)
            return {"computed": source, "shared": ref.shared, "steps": steps}
        if not ref.shared:
            name = self._written.setdefault(ref, path) if self._several else path
            self.tensors[name] = ref
            return {"tensor": name}
        name = self._shared.setdefault(ref.source, f"shared.{len(self._shared)}")
        source = ref.source
        self.tensors[name] = replace(ref, shape=source.shape, dtype=source.dtype, steps=())
        steps = [self.node(step, "") for step in ref.steps]
        return {"tensor": name, "shared": True, "steps": steps}


def stores(options: WriteOptions) -> Stores:
    """Everything, each site with its own rank and scale."""
    return Stores(
        kinds=frozenset(
            kind for c in nodes().values() if isinstance(kind := getattr(c, "kind", None), str)
        ),
        layers=frozenset({"linear", "embedding", "conv", "experts", "parameter", "norm"}),
        one_family=False,
        low_rank=False,
        scale="site",
        params=None,
        dtypes=frozenset(BY_NAME),
        several=True,
        one_label_map=False,
    )


def write(bundle: Bundle, output: Output, options: WriteOptions) -> str:
    """Writes the bundle; returns the name of the tensor file."""
    encoder = _Encoder(several=len(bundle.adapters) > 1)
    adapters = {name: encoder.adapter(adapter) for name, adapter in bundle.adapters.items()}
    graph = {KEY: VERSION, "adapters": adapters}
    metadata = dict(output.metadata)
    if output.single:
        metadata[KEY] = json.dumps(graph, sort_keys=True)
    else:
        output.text(GRAPH, json.dumps(graph, indent=1, sort_keys=True) + "\n")
    name = output.single or TENSORS
    output.safetensors(name, dict(sorted(encoder.tensors.items())), metadata)
    return name


FORMAT = Format(
    name="native",
    title="adaptmerge's own format: holds every edit",
    url="docs/formats/native.md",
    detect=detect,
    read=read,
    write=write,
    stores=stores,
    before=("peft",),
    files=(GRAPH, TENSORS),
)
