"""What a report promises, recomputed in float64 from the inputs' own tensors, without the merge code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from adaptmerge.align import layer_count
from adaptmerge.base import Base
from adaptmerge.edits import factor_of, with_value
from adaptmerge.errors import InputError, VerificationFailed
from adaptmerge.factors import Factor, Rows, as_low_rank
from adaptmerge.files.refs import TensorRef
from adaptmerge.graph import Adapter, Edit, Site
from adaptmerge.lazy import torch
from adaptmerge.linalg import one_thread_each
from adaptmerge.registry import Member, method_named
from adaptmerge.report import Report, SiteLine
from adaptmerge.run import workers_default
from adaptmerge.weights import SiteRule, Weights

BLOCK = 1 << 19  # elements of a dense delta looked at at once: small enough for the cache


@dataclass(frozen=True, slots=True)
class Promised:
    """One promised edit: `edit` gives its kind and site, `terms` the weighted deltas it sums."""

    line: SiteLine
    edit: Edit
    terms: tuple[tuple[float, Factor], ...]
    values: tuple[tuple[float, TensorRef], ...] = ()


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Weighted factors as a factor, summed densely: the definition, not the merge."""

    terms: tuple[tuple[float, Factor], ...]
    shape: tuple[int, int]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        (weight, factor), *others = self.terms
        total = factor.dense(rows) * weight
        for weight, factor in others:
            total.add_(factor.dense(rows), alpha=weight)
        return total

    def thin(self) -> Any:
        raise NotImplementedError("a promise is only ever dense")


@dataclass(frozen=True, slots=True)
class Projected:
    """A promise cut to the column and row spaces of what is stored: its best low-rank fit there."""

    whole: Factor
    stored: Factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape

    def dense(self, rows: Rows = None) -> torch.Tensor:
        left, right = _projected(self.whole, self.stored)
        return (left[slice(*rows)] if rows else left) @ right

    def thin(self) -> Any:
        raise NotImplementedError("a promise is only ever dense")


@lru_cache(maxsize=2)
def _projected(whole: Factor, stored: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """The thin sides of P whole Q, P and Q projecting on the spaces of the stored sides."""
    pair = as_low_rank(stored)
    assert pair is not None
    left = _orthonormal(pair.up.read().double())
    right = _orthonormal(pair.down.read().double().T)
    inside = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for start, stop in row_blocks(whole.shape):
        inside += left[start:stop].T @ (whole.dense((start, stop)) @ right)
    return left, inside @ right.T


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of the columns; zero columns are padding and span nothing."""
    basis: torch.Tensor = torch.linalg.qr(columns[:, columns.any(dim=0)]).Q
    return basis


Key = tuple[str, str, str]
Weigh = Callable[[str, Site, str], float]


def key_of(edit: Edit) -> Key:
    """What a line of a report calls an edit by."""
    return edit.site.module, edit.site.param, edit.kind


def promises(report: Report, inputs: Mapping[str, Adapter], base: Base | None) -> list[Promised]:
    """The promised edits of a report. Raises VerificationFailed when the inputs lack what it names, have
    what it says nothing about, or when its weights are not those of its options."""
    found, problems = [], []
    weigh = _weighing(report, inputs)
    unnamed = {name: _by_key(adapter) for name, adapter in inputs.items()}
    for line in report.sites:
        members = [
            Member(name, weight, edit)
            for name, weight in line.weights.items()
            for edit in _taken(unnamed.get(name, {}), line)
        ]
        if not members or {member.adapter for member in members} != set(line.weights):
            problems.append(f"{line.site}: the report names inputs that have no such edit")
            continue
        problems += _wrong_weights(line, weigh)
        found.append(_promised(report, line, members, base))
    problems += _unaccounted(report, unnamed, weigh)
    if problems:
        raise VerificationFailed(problems)
    return found


def _weighing(report: Report, inputs: Mapping[str, Adapter]) -> Weigh:
    """The weight that the options of a report give an input at a site."""
    rules = tuple(_rule(raw) for raw in report.options["rules"])
    weights = Weights(report.options["weights"], rules)
    layers = layer_count(edit.site for adapter in inputs.values() for edit in adapter.edits)
    return lambda name, site, kind: weights.at(name, site, kind, layers)


def _rule(raw: Mapping[str, Any]) -> SiteRule:
    weights = {n: tuple(w) if isinstance(w, list) else w for n, w in raw["weights"].items()}
    return SiteRule(raw["match"], weights, raw["kind"])


def _by_key(adapter: Adapter) -> dict[Key, list[Edit]]:
    found: dict[Key, list[Edit]] = {}
    for edit in adapter.edits:
        found.setdefault(key_of(edit), []).append(edit)
    return found


def _taken(edits: dict[Key, list[Edit]], line: SiteLine) -> list[Edit]:
    """The edits of a line, taken off: with a base, sites get its names, longer or shorter by one."""
    shorter = line.module.partition(".")[2]
    keys = [(module, line.param, line.kind) for module in (line.module, shorter)]
    if not any(key in edits for key in keys):
        keys = [k for k in edits if (k[0].partition(".")[2], *k[1:]) == keys[0]]
    return next((edits.pop(key) for key in keys if key in edits), [])


def _wrong_weights(line: SiteLine, weigh: Weigh) -> list[str]:
    site = Site(line.module, line.param)
    return [
        f"{line.site}: the report says that {name} counts {weight:g} there, its options say otherwise"
        for name, weight in line.weights.items()
        if weigh(name, site, line.kind) != weight
    ]


def _unaccounted(
    report: Report, unnamed: Mapping[str, Mapping[Key, list[Edit]]], weigh: Weigh
) -> list[str]:
    """Edits of inputs that no line names, though their weight is not 0 and no Note says so."""
    noted = {note.site for note in report.notes if "left out" in note.what}
    lines = {(line.module, line.param, line.kind) for line in report.sites}
    chosen = lines if report.options["heads"] else set()
    return [
        f"{edits[0].site}: the report says nothing of what {name} has there"
        for name, keyed in unnamed.items()
        for key, edits in keyed.items()
        if str(edits[0].site) not in noted
        and weigh(name, edits[0].site, key[-1]) != 0.0
        and not (key in chosen and key[-1] in ("replace", "rows"))
    ]


def _promised(
    report: Report, line: SiteLine, members: Sequence[Member], base: Base | None
) -> Promised:
    first = members[0].edit
    if line.action == "value":
        values = [(m.weight, m.edit.value) for m in members]  # type: ignore[attr-defined]
        rest = 1.0 - sum(member.weight for member in members)
        stored = base.parameter(first.site) if base else None
        if abs(rest) > 1e-12 and stored is None:
            raise InputError(
                "its weights do not sum to 1 here, so the base's own value went into it: pass --base DIR",
                where=line.site,
            )
        if abs(rest) > 1e-12 and stored is not None:
            values.append((rest, stored))
        return Promised(line, first, (), tuple(values))
    factor = factor_of(first)
    if factor is None:
        return Promised(line, first, ())
    promise = method_named(report.method).promise
    if promise is not None and line.action != "pass":
        return Promised(line, first, ((1.0, promise(first.site, members)),))
    terms = [(m.weight, f) for m in members if (f := factor_of(m.edit)) is not None]
    return Promised(line, first, tuple(terms))


def row_blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a matrix, each of at most about BLOCK elements."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


@dataclass(frozen=True, slots=True)
class Distance:
    """|a - b|, |a| and |b| (Frobenius) of two deltas."""

    apart: float
    left: float
    right: float

    @property
    def relative(self) -> float:
        """|a - b| / |a|; 0 when both are zero, infinite when only a is."""
        if self.left == 0.0:
            return 0.0 if self.apart == 0.0 else math.inf
        return self.apart / self.left


def distance(a: Factor, b: Factor) -> Distance:
    """How far two factors are apart, dense in float64, a block of rows at a time."""
    with one_thread_each(), ThreadPoolExecutor(max_workers=workers_default()) as pool:
        blocks = pool.map(lambda rows: _squares(a.dense(rows), b.dense(rows)), row_blocks(a.shape))
        apart, left, right = (math.sqrt(sum(part)) for part in zip(*blocks, strict=True))
    return Distance(apart, left, right)


def _squares(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float, float]:
    """|left - right|^2, |left|^2 and |right|^2."""
    left, right = left.flatten(), right.flatten()
    squares = float(left @ left), float(right @ right)
    apart = left - right
    return float(apart @ apart), *squares


def settings(edit: Edit) -> dict[str, Any]:
    """What an edit says besides tensors and its place: token ids, sides, activations, roles."""
    named = ((field.name, getattr(edit, field.name)) for field in fields(edit))  # type: ignore[arg-type]
    made_of = ("site", "factor")
    return {n: v for n, v in named if n not in made_of and not isinstance(v, TensorRef)}


def other_tensors(edit: Edit) -> dict[str, TensorRef]:
    """The tensors of an edit outside its factor, by field: magnitudes, vectors, stored values."""
    named = ((field.name, getattr(edit, field.name)) for field in fields(edit))  # type: ignore[arg-type]
    return {name: value for name, value in named if isinstance(value, TensorRef)}


def expected_edit(promised: Promised, factor: Factor | None) -> Edit:
    """The promised edit as something a model can be run with."""
    from adaptmerge.edits import refitted

    if promised.values:
        return with_value(promised.edit, _settled_value(promised))
    return promised.edit if factor is None else refitted(promised.edit, factor)


def _settled_value(promised: Promised) -> TensorRef:
    from adaptmerge.files.dtypes import F64
    from adaptmerge.files.refs import listed

    shape = promised.values[0][1].shape
    total = sum(w * ref.read().double().reshape(shape) for w, ref in promised.values)
    assert isinstance(total, torch.Tensor)
    return listed(tuple(total.flatten().tolist()), shape, F64)
