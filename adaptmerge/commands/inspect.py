"""What an adapter is made of, grouped for a reader, from headers; with its values where asked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaptmerge.adapters.graph import Edit, Kind, Labels, Note
from adaptmerge.adapters.module_paths import is_suffix, layer_index, original, suffixes
from adaptmerge.adapters.stored_edits import role_of
from adaptmerge.adapters.weight_edits import factor_of, family_of, scaled_by
from adaptmerge.algebra.factors import rank_bound
from adaptmerge.bases.base import Base
from adaptmerge.formats.inputs import Input
from adaptmerge.merging.heads.policies import Head, heads_of, shown
from adaptmerge.merging.misfits import misfits_of, missing
from adaptmerge.merging.storable import stored_scale
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.walk import refs_of

NUMBER = re.compile(
    r"(?<=\.)\d+(?=\.|\[|:|$)|(?<=\[)\d+(?=\])|^\d+(?=\.)"
)  # parts of a name that count


@dataclass(frozen=True, slots=True)
class Family:
    """Edits that look alike but for the numbers in their names: `modules` has * for those that differ, and
    `numbers` says which there are of what they count: {"layers": "0-27", "experts": "0-7"}."""

    modules: str
    numbers: Mapping[str, str]
    count: int
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    dtype: str
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class HeadLine:
    """A module stored whole: the shapes of its parameters, and what its rows stand for where known."""

    module: str
    listed: bool
    shapes: Mapping[str, tuple[int, ...]]
    labels: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Fit:
    """How many of the modules that an adapter changes are in a base as it needs them, and what is amiss."""

    base: str
    found: int
    modules: int
    problems: tuple[str, ...]
    likely: str | None = None  # what the names of the adapter seem to be in the base


@dataclass(frozen=True, slots=True)
class Summary:
    """One adapter at a glance."""

    name: str
    format: str
    base: dict[str, Any]
    sites: int
    parameters: int
    families: Sequence[Family]
    heads: Sequence[HeadLine]
    notes: Sequence[Note]
    values: bool
    fit: Fit | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def head_rows(self) -> list[list[object]]:
        """Table rows, one per head."""
        return [
            [
                head.module,
                ", ".join("x".join(map(str, shape)) for shape in head.shapes.values()),
                "yes" if head.listed else "no",
                None if head.labels is None else shown(Labels(head.labels)),
            ]
            for head in self.heads
        ]

    def counted(self) -> list[str]:
        """What the * of the rows stand for, one line for each kind of number: "layers 0-27"."""
        found: dict[str, dict[str, list[str]]] = {}
        for family in self.families:
            for word, span in family.numbers.items():
                found.setdefault(word, {}).setdefault(span, []).append(family.modules)
        return [
            f"{word} {span}" + (f" of {_ends(modules)}" if len(spans) > 1 else "")
            for word, spans in found.items()
            for span, modules in spans.items()
        ]

    def rows(self) -> list[list[object]]:
        """Table rows, one per family."""
        rows: list[list[object]] = [
            [f.modules, f.count, f.kind, "x".join(map(str, f.shape)), f.rank, f.scale, f.dtype]
            for f in self.families
        ]
        if self.values:
            for row, family in zip(rows, self.families, strict=True):
                row.append(family.norm)
        return rows


def _ends(patterns: Sequence[str]) -> str:
    """The rows by what follows the last number."""
    return ", ".join(dict.fromkeys(name.rpartition("*.")[2] for name in patterns))


def summarise(item: Input, *, values: bool = False, base: Base | None = None) -> Summary:
    """The summary of an opened input; `values` reads every tensor, and a base says what of it fits."""
    edits = _own(item.adapter.edits)
    stored = [tuple(refs_of(edit)) for edit in edits]
    groups: dict[tuple[Any, ...], list[Edit]] = {}
    for edit, refs in zip(edits, stored, strict=True):
        groups.setdefault(_likeness(edit, refs), []).append(edit)
    families = [_family(key, group, values) for key, group in groups.items()]
    notes = [*item.adapter.notes, *(_value_notes(edits) if values else ())]
    return Summary(
        name=item.name,
        format=item.format.name,
        base=asdict(item.adapter.base),
        sites=len({edit.site for edit in edits}),
        parameters=_parameters(ref for refs in stored for ref in refs),
        families=families,
        heads=[_head_line(head) for head in heads_of(item.adapter)],
        notes=notes,
        values=values,
        fit=None if base is None else _fit(item, base),
    )


def _fit(item: Input, base: Base) -> Fit:
    """What is stored whole, as heads are, needs no module of the base and is not counted."""
    changes = [
        e for e in item.adapter.edits if factor_of(e) is not None or scaled_by(e) is not None
    ]
    replication = item.adapter.base.replication
    misfit: dict[str, list[str]] = {}
    for edit in changes:
        module = edit.site.module
        absent = base.locate(original(module, replication)) is None
        said = misfits_of(edit, base, replication) or [missing(edit.site, base)] * absent
        misfit.setdefault(module, []).extend(said)
    problems = [problem for said in misfit.values() for problem in said]
    found = sum(not said for said in misfit.values())
    likely = next((_likely(m, base) for m, said in misfit.items() if said), None)
    return Fit(base.path.name, found, len(misfit), tuple(problems), likely)


def _likely(module: str, base: Base) -> str | None:
    """What the base calls a module that it has under no name that we know of: one with as much of the end
    of its path as can be, below other modules."""
    if base.locate(module) is not None:
        return None
    ends = [end for end in reversed(suffixes(module)) if layer_index(end) is not None]
    for end in ends[1:]:
        found = sorted(name for name in base.modules if is_suffix(end, name))
        if len(found) == 1:
            own, other = (name.removesuffix(end) for name in (module, found[0]))
            return f"{own}* of the adapter seems to be {other}* of the base"
    return None


def _head_line(head: Head) -> HeadLine:
    labels = None if head.labels is None else head.labels.names
    return HeadLine(head.owner, head.listed, head.shapes, labels)


def _own(edits: Sequence[Edit]) -> list[Edit]:
    """The edits with tensors of their own: scales of outputs act on the bias, too, where there is one, by
    the numbers that are the weight's."""
    found: list[Edit] = []
    seen: dict[str, set[Any]] = {}
    for edit in edits:
        stored = {ref.source for ref in refs_of(edit)}
        known = seen.setdefault(edit.site.module, set())
        if not stored or not stored <= known:
            found.append(edit)
        known |= stored
    return found


def _parameters(refs: Iterable[TensorRef]) -> int:
    """Stored numbers, shared tensors counted once."""
    shared: dict[Any, int] = {}
    own = 0
    for ref in refs:
        if ref.shared:
            shared[ref.source] = math.prod(ref.source.shape)
        else:
            own += ref.count
    return own + sum(shared.values())


def _likeness(edit: Edit, refs: Sequence[TensorRef]) -> tuple[Any, ...]:
    factor = factor_of(edit)
    shape = factor.shape if factor is not None else refs[0].shape if refs else ()
    rank = None if factor is None else rank_bound(factor)
    scale = None if factor is None else stored_scale(factor)
    dtypes = "/".join(sorted({str(ref.dtype) for ref in refs}))
    role = role_of(edit)
    family = family_of(edit)
    special = family if edit.kind == "add" and family != "lora" else ""
    kind = f"{edit.kind} ({role or special})" if role or special else edit.kind
    return NUMBER.sub("*", str(edit.site)), kind, shape, rank, scale, dtypes


def _pattern(sites: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The sites, which differ in numbers only, as one with * where they do, and what there is of each."""
    counted = zip(*(map(int, NUMBER.findall(site)) for site in sites), strict=True)
    spans = [sorted(set(values)) for values in counted]
    numbers: dict[str, str] = {}
    parts, at = [], 0
    for found, span in zip(NUMBER.finditer(sites[0]), spans, strict=True):
        before = sites[0][: found.start()]
        parts += [sites[0][at : found.start()], "*" if len(span) > 1 else found[0]]
        at = found.end()
        if len(span) > 1:
            numbers["experts" if before.endswith("[") else _counted_by(before)] = _spans(span)
    return "".join([*parts, sites[0][at:]]), numbers


def _counted_by(before: str) -> str:
    """What a number counts, by the name before it: layers, blocks, experts."""
    word = before.rstrip(".").rpartition(".")[2]
    return "layers" if word in ("h", "") else f"{word.removesuffix('s')}s"


def _spans(values: Sequence[int]) -> str:
    """Numbers in order, those that follow each other as one span: 0-3, 7."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)


def _family(key: tuple[Any, ...], edits: Sequence[Edit], values: bool) -> Family:
    _, kind, shape, rank, scale, dtype = key
    modules, numbers = _pattern([str(edit.site) for edit in edits])
    norm = _norm(edits) if values else None
    return Family(modules, numbers, len(edits), kind, shape, rank, scale, dtype, norm)


def _norm(edits: Sequence[Edit]) -> float:
    """Root of the summed squares of the deltas, or of the stored tensors where there is none."""
    from adaptmerge.algebra.linalg import product_norm, working

    total = 0.0
    for edit in edits:
        factor = factor_of(edit)
        if factor is None:
            total += sum(float(ref.read().double().square().sum()) for ref in refs_of(edit))
            continue
        for term in factor.thin():
            size = term.scale * product_norm(working(term.up), working(term.down))
            total += size * size  # a power of what is too large raises
    return math.sqrt(total)


def _value_notes(edits: Sequence[Edit]) -> list[Note]:
    from adaptmerge.lazy import torch

    notes = []
    for edit in edits:
        for ref in refs_of(edit):
            value = ref.read()
            if ref.dtype.is_float and not bool(torch.isfinite(value.float()).all()):
                notes.append(
                    Note(Kind.INFO, f"{ref.name} holds NaN or infinity", site=str(edit.site))
                )
        if factor_of(edit) is not None and _norm([edit]) == 0.0:
            notes.append(Note(Kind.INFO, "the delta is exactly zero", site=str(edit.site)))
    return notes
