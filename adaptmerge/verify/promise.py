"""What a report promises, recomputed in float64 from the inputs' own tensors, without the merge code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adaptmerge.base import Base
from adaptmerge.edits import factor_of, with_value
from adaptmerge.errors import VerificationFailed
from adaptmerge.factors import Factor, Rows, as_low_rank
from adaptmerge.files.refs import TensorRef
from adaptmerge.graph import Adapter, Edit
from adaptmerge.lazy import torch
from adaptmerge.registry import Member, method_named
from adaptmerge.report import Report, SiteLine

BLOCK = 1 << 22  # elements of a dense delta looked at at once


@dataclass(frozen=True, slots=True)
class Promised:
    """One promised edit: `edit` gives its kind and site, `terms` the weighted deltas it sums."""

    line: SiteLine
    edit: Edit
    terms: tuple[tuple[float, Factor], ...]
    values: tuple[tuple[float, TensorRef], ...] = ()

    def dense(self, rows: Rows = None) -> torch.Tensor:
        """The promised delta, float64."""
        total = sum(weight * factor.dense(rows) for weight, factor in self.terms)
        assert isinstance(total, torch.Tensor)
        return total


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Weighted factors as a factor, summed densely: the definition, not the merge."""

    terms: tuple[tuple[float, Factor], ...]
    shape: tuple[int, int]

    def dense(self, rows: Rows = None) -> torch.Tensor:
        total = sum(weight * factor.dense(rows) for weight, factor in self.terms)
        assert isinstance(total, torch.Tensor)
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
        pair = as_low_rank(self.stored)
        assert pair is not None
        left = _orthonormal(pair.up.read().double())
        right = _orthonormal(pair.down.read().double().T)
        inside = sum(
            left[start:stop].T @ (self.whole.dense((start, stop)) @ right)
            for start, stop in row_blocks(self.shape)
        )
        value: torch.Tensor = left @ inside @ right.T
        return value[slice(*rows)] if rows else value

    def thin(self) -> Any:
        raise NotImplementedError("a promise is only ever dense")


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of the columns; zero columns are padding and span nothing."""
    basis: torch.Tensor = torch.linalg.qr(columns[:, columns.any(dim=0)]).Q
    return basis


def promises(report: Report, inputs: Mapping[str, Adapter], base: Base | None) -> list[Promised]:
    """The promised edits of a report. Raises VerificationFailed when the inputs lack what it names."""
    found, problems = [], []
    for line in report.sites:
        members = [
            Member(n, w, e) for n, w in line.weights.items() if (e := _edit(inputs[n], line))
        ]
        if len(members) != len(line.weights):
            problems.append(f"{line.site}: the report names inputs that have no such edit")
            continue
        found.append(_promised(report, line, members, base))
    if problems:
        raise VerificationFailed(problems)
    return found


def _edit(adapter: Adapter, line: SiteLine) -> Edit | None:
    return next(
        (
            e
            for e in adapter.edits
            if (e.site.module, e.site.param, e.kind) == (line.module, line.param, line.kind)
        ),
        None,
    )


def _promised(
    report: Report, line: SiteLine, members: Sequence[Member], base: Base | None
) -> Promised:
    first = members[0].edit
    if line.action == "value":
        values = [(m.weight, m.edit.value) for m in members]  # type: ignore[attr-defined]
        rest = 1.0 - sum(member.weight for member in members)
        stored = base.parameter(first.site) if base else None
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
    sums = [0.0, 0.0, 0.0]
    for rows in row_blocks(a.shape):
        left, right = a.dense(rows), b.dense(rows)
        for i, part in enumerate((left - right, left, right)):
            sums[i] += float(part.square().sum())
    return Distance(*(math.sqrt(value) for value in sums))


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
