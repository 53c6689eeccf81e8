"""Do two adapters, in any formats, compute the same?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adaptmerge.adapters.graph import Adapter, Edit, Site
from adaptmerge.adapters.weight_edits import Effect, WeightEdit, delta_on, factor_of
from adaptmerge.algebra.by_rows import Distance, distance_in_parallel
from adaptmerge.algebra.factors import Factor
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.promise import other_tensors, settings
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
    for label, found in _compared(groups, base):
        larger = max(found.left, found.right)
        share = _share(found.apart, larger)
        rows.append(SiteDifference(label, found.left, found.right, share))
        apart += found.apart**2
        size += larger**2
    return Difference(tuple(rows), _share(math.sqrt(apart), math.sqrt(size)))


def _compared(groups: Sequence[Group], base: Base | None) -> Iterator[tuple[str, Distance]]:
    """(label, distance) of every site on the base, and of every kind where it says nothing."""
    on_base: dict[Site, list[Group]] = {}
    for group in groups:
        weight = None if base is None else base.weight(group.site)
        if weight is not None and _adds(group):
            on_base.setdefault(group.site, []).append(group)
            continue
        sides = dict(group.members)
        yield str(group.key), _compare(sides.get("a"), sides.get("b"))
    for site, found in on_base.items():
        weight = None if base is None else base.weight(site)
        assert weight is not None
        left, right = (_delta(found, name, weight) for name in ("a", "b"))
        yield str(site), distance_in_parallel(left, right)


def _adds(group: Group) -> bool:
    return group.kind not in WHOLE and all(isinstance(e, WeightEdit) for _, e in group.members)


def _delta(groups: Sequence[Group], name: str, weight: TensorRef) -> Factor:
    """What one side's edits at a site add to the base's weight; zero if it has none there."""
    edits: list[Any] = [e for group in groups for owner, e in group.members if owner == name]
    return delta_on(edits, weight) if edits else Effect((), weight)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _compare(a: Edit | None, b: Edit | None) -> Distance:
    """Over the factor and the other tensors of an edit."""
    if a is None or b is None:
        size = _size(a or b)
        return Distance(size, size, 0.0) if b is None else Distance(size, 0.0, size)
    ours, theirs = other_tensors(a), other_tensors(b)
    if settings(a) != settings(b) or ours.keys() != theirs.keys():
        sizes = _size(a), _size(b)
        return Distance(math.hypot(*sizes), *sizes)
    fa, fb = factor_of(a), factor_of(b)
    found = Distance() if fa is None or fb is None else distance_in_parallel(fa, fb)
    sums = [found.apart**2, found.left**2, found.right**2]
    for name, ref in ours.items():
        parts = _beside(ref.read().double().flatten(), theirs[name].read().double().flatten())
        sums = [total + float(p.square().sum()) for total, p in zip(sums, parts, strict=True)]
    return Distance(*map(math.sqrt, sums))


def _beside(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """left - right, left and right; of different sizes all of both is apart."""
    apart = left - right if left.shape == right.shape else torch.cat([left, right])
    return apart, left, right


def _size(edit: Edit | None) -> float:
    assert edit is not None
    factor = factor_of(edit)
    total = distance_in_parallel(factor, factor).left ** 2 if factor is not None else 0.0
    for ref in other_tensors(edit).values():
        total += float(ref.read().double().square().sum())
    return math.sqrt(total)
