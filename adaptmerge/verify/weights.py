"""Oracle 1: every site of the output against what its report promises, in dense float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptmerge.edits import factor_of
from adaptmerge.files.compare import same_values
from adaptmerge.graph import Adapter, Edit
from adaptmerge.lazy import torch
from adaptmerge.report import Report
from adaptmerge.verify.checks import FAIL, PASS, Check
from adaptmerge.verify.promise import (
    Distance,
    Projected,
    Promised,
    WeightedSum,
    distance,
    expected_edit,
    other_tensors,
)

TOLERANCE = 1e-5  # relative; float32 factors and their products stay well below
SLACK = 0.01  # share by which a reported error may be off


def check_weights(
    report: Report, promised: Sequence[Promised], output: Adapter
) -> tuple[Check, list[Edit]]:
    """The check of all sites, and the promised edits for oracle 2: truncated where the output is."""
    stored = {_key(edit): edit for edit in output.edits}
    expected: list[Edit] = []
    problems: list[str] = []
    worst: list[tuple[float, str]] = []
    effect = 0.0
    for item in promised:
        edit = stored.pop(_key(item.edit), None)
        found, size, off = _site(item, edit, expected)
        problems += found
        effect += size**2
        worst.append((off, item.line.site))
    problems += [f"{edit.site}: is in the output, but in no input" for edit in stored.values()]
    if not problems and effect == 0.0 and _only_deltas(promised) and report.totals.norm > 0.0:
        problems.append("the output has no effect at all")
    return _check(problems, worst, len(promised)), expected


def _key(edit: Edit) -> tuple[str, str, str]:
    return edit.site.module, edit.site.param, edit.kind


def _only_deltas(promised: Sequence[Promised]) -> bool:
    return all(item.terms for item in promised)


def _check(problems: list[str], worst: list[tuple[float, str]], count: int) -> Check:
    numbers: dict[str, Any] = {
        "sites": count,
        "worst": [{"site": site, "error": off} for off, site in sorted(worst, reverse=True)[:5]],
    }
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if problems[5:] else ""
        )
        return Check("weights", FAIL, shown, {**numbers, "problems": problems})
    detail = f"{count} sites hold what was promised (float64, dense)"
    return Check("weights", PASS, detail, numbers)


def _site(
    item: Promised, edit: Edit | None, expected: list[Edit]
) -> tuple[list[str], float, float]:
    """Problems of one site, the size of its stored delta, and its error beyond what was reported."""
    if item.values:
        return _value(item, edit, expected)
    if not item.terms:
        expected.append(item.edit)
        return (_same_tensors(item, edit), 0.0, 0.0) if edit else ([_missing(item)], 0.0, 0.0)
    whole = WeightedSum(item.terms, item.terms[0][1].shape)
    stored = factor_of(edit) if edit else None
    if edit is None or stored is None:
        return _absent(item, whole, expected)
    if stored.shape != whole.shape:
        return [f"{item.line.site}: stored {stored.shape}, promised {whole.shape}"], 0.0, 1.0
    lossy = item.line.truncation > 0.0
    reference = Projected(whole, stored) if lossy else whole
    expected.append(expected_edit(item, reference))
    apart = distance(whole, stored)
    problems = _same_tensors(item, edit) + _error(item, apart)
    return problems, apart.right, abs(apart.relative - item.line.error)


def _missing(item: Promised) -> str:
    return f"{item.line.site}: was promised and is not in the output"


def _absent(
    item: Promised, whole: WeightedSum, expected: list[Edit]
) -> tuple[list[str], float, float]:
    """A site without a stored delta is right only when the promise is that nothing is left of it."""
    if item.line.rank == 0 and (item.line.truncation > 0.0 or item.line.norm == 0.0):
        return [], 0.0, 0.0
    expected.append(expected_edit(item, whole))
    return [_missing(item)], 0.0, 1.0


def _error(item: Promised, apart: Distance) -> list[str]:
    """The measured error must be the reported one."""
    if item.line.rank == 0 and apart.right == 0.0:
        return []
    allowed = max(TOLERANCE, SLACK * item.line.error)
    if abs(apart.relative - item.line.error) <= allowed:
        return []
    return [
        f"{item.line.site}: is {apart.relative:.2e} of the delta away from what was promised, "
        f"reported was {item.line.error:.2e}"
    ]


def _same_tensors(item: Promised, edit: Edit | None) -> list[str]:
    """Magnitudes, vectors and stored values must be the inputs' own, bit for bit."""
    if edit is None:
        return [_missing(item)]
    theirs = other_tensors(edit)
    return [
        f"{item.line.site}: {name} differs from the input's"
        for name, ref in other_tensors(item.edit).items()
        if name not in theirs or not _equal(ref, theirs[name])
    ]


def _equal(a: Any, b: Any) -> bool:
    return same_values(a, b) or (
        a.count == b.count and torch.equal(a.read().double().flatten(), b.read().double().flatten())
    )


def _value(
    item: Promised, edit: Edit | None, expected: list[Edit]
) -> tuple[list[str], float, float]:
    wanted = expected_edit(item, None)
    expected.append(wanted)
    if edit is None:
        return [_missing(item)], 0.0, 1.0
    a = other_tensors(wanted)["value"].read().double()
    b = other_tensors(edit)["value"].read().double().reshape(a.shape)
    off = float((a - b).norm()) / (float(a.norm()) or 1.0)
    if abs(off - item.line.error) <= max(TOLERANCE, SLACK * item.line.error):
        return [], 0.0, off
    return [f"{item.line.site}: value is {off:.2e} away from what was promised"], 0.0, off
