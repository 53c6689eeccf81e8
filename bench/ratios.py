"""Samples as the cells of a table: the ratio of medians, with the raw figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from bench.cases import Row

Samples = Mapping[str, Sequence[float]]
HEAD = ("", "ratio", "goal", "measured", "compared with", "measured")


def lines(rows: Sequence[Row], samples: Samples, units: Mapping[str, str]) -> list[list[str]]:
    """The cells of the table, heading first; rows without samples are left out."""
    measured = [row for row in rows if samples.get(row.case) and samples.get(row.reference)]
    return [list(HEAD), *(_cells(row, samples, units[row.case]) for row in measured)]


def spread(values: Sequence[float], unit: str) -> str:
    """Median, least and most: 2.31 s (2.28-2.40)."""
    factor, shown, digits = _scale(median(values), unit)
    low, middle, high = (f"{f(values) * factor:.{digits}f}" for f in (min, median, max))
    return f"{middle} {shown} ({low}-{high})"


def _cells(row: Row, samples: Samples, unit: str) -> list[str]:
    ours, theirs = samples[row.case], samples[row.reference]
    return [
        row.title,
        _ratio(row, median(ours), median(theirs), unit),
        row.goal,
        spread(ours, unit),
        row.against,
        spread(theirs, unit),
    ]


def _ratio(row: Row, ours: float, theirs: float, unit: str) -> str:
    if row.faster:
        ratio = theirs / ours
        return f"{ratio:,.{1 if ratio < 10 else 0}f} x faster"
    more = f", {ours - theirs:+.0f} MB" if unit == "MB" else ""
    return f"{ours / theirs:.2f} x{more}"


def _scale(value: float, unit: str) -> tuple[float, str, int]:
    """What to multiply by, the unit to show, and the digits behind the point."""
    if unit == "MB":
        return 1, unit, 0
    if value >= 1:
        return 1, unit, 2
    return 1000, "ms", 0 if value >= 0.02 else 2
