"""Do two adapters, in any formats, compute the same?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.weight_edits import Effect, WeightEdit, delta_on, factor_of
from adaptmerge.algebra.factors import Factor
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.promise import distance, other_tensors, settings
from adaptmerge.lazy import torch
from adaptmerge.merging.align import Group, align
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """One site: sizes of both sides and |a - b| relative to the larger."""

    site: str
    left: float
    right: float
    relative: float


@dataclass(frozen=True, slots=True)
class Difference:
    """All sites, and the whole relative difference."""

    sites: tuple[SiteDifference, ...]
    relative: float

    def as_json(self) -> dict[str, Any]:
        """Plain data, worst sites first."""
        rows = sorted(self.sites, key=lambda s: -s.relative)
        listed = [{"site": s.site, "a": s.left, "b": s.right, "relative": s.relative} for s in rows]
        return {"relative": self.relative, "sites": listed}


def difference(a: Adapter, b: Adapter, base: Base | None = None) -> Difference:
    """|a - b| per site, dense in float64. Raises CannotMerge when the two do not fit one model.

    With the base, edits of any kind are compared by what they add to it.
    """
    groups, _ = align({"a": a, "b": b}, base, frozenset({"base"}))
    rows, apart, size = [], 0.0, 0.0
    for label, left, right, off in _compared(groups, base):
        rows.append(SiteDifference(label, left, right, _share(off, max(left, right))))
        apart += off**2
        size += max(left, right) ** 2
    return Difference(tuple(rows), _share(math.sqrt(apart), math.sqrt(size)))


def _compared(
    groups: Sequence[Group], base: Base | None
) -> Iterator[tuple[str, float, float, float]]:
    """(label, |a|, |b|, |a - b|) of every site on the base, and of every kind where it says nothing."""
    on_base: dict[Site, list[Group]] = {}
    for group in groups:
        weight = None if base is None else base.weight(group.site)
        if weight is not None and _adds(group):
            on_base.setdefault(group.site, []).append(group)
            continue
        sides = dict(group.members)
        label = str(group.site) if group.kind == "add" else f"{group.site} ({group.kind})"
        yield label, *_compare(sides.get("a"), sides.get("b"))
    for site, found in on_base.items():
        weight = None if base is None else base.weight(site)
        assert weight is not None
        deltas = [_delta(found, name, weight) for name in ("a", "b")]
        apart = distance(*deltas)
        yield str(site), apart.left, apart.right, apart.apart


def _adds(group: Group) -> bool:
    return group.kind not in WHOLE and all(isinstance(e, WeightEdit) for _, e in group.members)


def _delta(groups: Sequence[Group], name: str, weight: TensorRef) -> Factor:
    """What one side's edits at a site add to the base's weight; zero if it has none there."""
    edits: list[Any] = [e for group in groups for owner, e in group.members if owner == name]
    return delta_on(edits, weight) if edits else Effect((), weight)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _compare(a: Edit | None, b: Edit | None) -> tuple[float, float, float]:
    """(|a|, |b|, |a - b|) over the factor and the other tensors of an edit."""
    if a is None or b is None:
        size = _size(a or b)
        return (size, 0.0, size) if b is None else (0.0, size, size)
    sums = [0.0, 0.0, 0.0]
    fa, fb = factor_of(a), factor_of(b)
    if fa is not None and fb is not None:
        found = distance(fa, fb)
        sums = [found.left**2, found.right**2, found.apart**2]
    theirs: Mapping[str, Any] = other_tensors(b)
    if settings(a) != settings(b) or other_tensors(a).keys() != theirs.keys():
        sizes = _size(a), _size(b)
        return *sizes, math.hypot(*sizes)
    for name, ref in other_tensors(a).items():
        left, right = ref.read().double().flatten(), theirs[name].read().double().flatten()
        parts = (
            left,
            right,
            left - right if left.shape == right.shape else torch.cat([left, right]),
        )
        sums = [total + float(p.square().sum()) for total, p in zip(sums, parts, strict=True)]
    return math.sqrt(sums[0]), math.sqrt(sums[1]), math.sqrt(sums[2])


def _size(edit: Edit | None) -> float:
    assert edit is not None
    factor = factor_of(edit)
    total = distance(factor, factor).left ** 2 if factor is not None else 0.0
    for ref in other_tensors(edit).values():
        total += float(ref.read().double().square().sum())
    return math.sqrt(total)
