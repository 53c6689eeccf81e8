"""Is every figure in the report of a fused model what the plan and the stored tensors make it?

The report is made again: planned from headers, with what the verifier has measured of every matrix in the
place of what the fusion did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from adaptmerge.commands.fuse import FusePlan, FuseReport, report_of
from adaptmerge.commands.fuse.pieces.write import Line, lines_of, settings_of, survey
from adaptmerge.commands.verify.checks import FAIL, Check, within
from adaptmerge.commands.verify.figures import MOVED, NOTES, right
from adaptmerge.commands.verify.fused.weights import Looked
from adaptmerge.commands.verify.stated import is_retold
from adaptmerge.commands.verify.tables import differences, entries, listed

SHOWN = 3
SHARES = ("gain", "sub", "predicted")
NORMS = ("norm", "relative", "weight_norm", "delta_norm")
EXACT = 1e-4  # relative: norms, and shares that are counted or sums of products in float32
MEASURED = 5e-3  # relative: errors, which are differences of what is nearly the same
RESOLVED = 1e-7  # of a weight: errors that are sums of float32 are no larger
# the files by their sha256 in another check; options are what the plan is made with
ELSEWHERE = ("report", "files", "versions", "options", "inputs", "notes", "moved")


def check_figures(plan: FusePlan, found: Looked, report: FuseReport) -> Check:
    """The check of all that a report says, beside what other checks compare."""
    lines = _lines(plan, found)
    if lines is None:
        return Check("report", FAIL, "the tensors are not those that it is about")
    again = report_of(plan, lines, {}, {item.name: {} for item in plan.inputs})
    problems = [*_told(again, report)] if is_retold(report) else []
    problems += _inputs(again, report)
    problems += _differences(_plain(report), _plain(again), "", 1.0)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if problems[SHOWN:] else ""
        return Check("report", FAIL, "; ".join(problems[:SHOWN]) + more, {"problems": problems})
    unseen = [] if is_retold(report) else ["entries, which another version told"]
    return right(len(report.sites), (NOTES, MOVED, *unseen))


def _lines(plan: FusePlan, found: Looked) -> list[Line] | None:
    """What a fusion would report, with what was measured of what is stored; None where any is missing."""
    measured = {(f.tensor, f.matrix.site): f.measured for f in found.findings}
    lines: list[Line] = []
    for shard in plan.shards:
        keys = [(n, one.matrix.site) for n, one in zip(shard.names, shard.made, strict=True)]
        if any(key not in measured for key in keys):
            return None
        choices = survey(shard, settings_of(plan.options))
        lines += lines_of(shard, choices, [measured[key] for key in keys])
    return lines


def _plain(report: FuseReport) -> dict[str, Any]:
    """What is compared of a report, each line under the name of its tensor and site."""
    raw = asdict(report)
    raw["sites"] = {f"{site.tensor} {site.site}": asdict(site) for site in report.sites}
    raw["base"] = {k: v for k, v in raw["base"].items() if k not in ("name", "calibration")}
    raw["shapes"] = [list(site.shape) for site in report.sites]
    return {name: value for name, value in raw.items() if name not in ELSEWHERE}


def _told(again: FuseReport, report: FuseReport) -> Iterator[str]:
    """What is said otherwise of options; what the verification itself allows is no option of the fusion."""
    wanted = {**listed(again.options), "allow": listed(report.options["allow"])}
    yield from differences("options:", wanted, listed(report.options))
    for said, found in zip(report.inputs, again.inputs, strict=True):
        yield from entries(f"input {found['name']}", said, found)
    yield from entries("base", report.base, again.base, {"calibration"})
    yield from entries("versions", report.versions, again.versions)


def _inputs(again: FuseReport, report: FuseReport) -> Iterator[str]:
    """What is said otherwise of inputs than they are: their format and base."""
    for said, found in zip(report.inputs, again.inputs, strict=True):
        for name in ("format", "task", "init", "adapter"):
            if said.get(name) != found[name]:
                yield f"input {found['name']}: {name} is {said.get(name)!r}, not {found[name]!r}"
        bases = [listed(one.get("base")) for one in (said, found)]
        if bases[0] != bases[1]:
            yield f"input {found['name']}: its base is said to be {bases[0]}, not {bases[1]}"


def _differences(said: Any, found: Any, where: str, weight: float) -> Iterator[str]:
    """Where two tables differ by more than measuring them again does."""
    if isinstance(found, Mapping) and isinstance(said, Mapping):
        weight = found.get("weight_norm", weight)
        for name in [*found, *(name for name in said if name not in found)]:
            if name not in ELSEWHERE:
                at = f"{where}: {name}" if where else str(name)
                yield from _differences(said.get(name), found.get(name), at, weight)
    elif not _alike(said, found, where, weight):
        yield f"{where} is {_short(said)}, measured was {_short(found)}"


def _alike(said: Any, found: Any, where: str, weight: float) -> bool:
    numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) for x in (said, found)]
    if not all(numbers) or isinstance(found, int):
        return bool(listed(said) == listed(found))
    if math.isnan(found):
        return math.isnan(said)
    if where.rpartition(": ")[2] in SHARES + NORMS:
        return within(abs(said - found), EXACT * abs(found) + RESOLVED)
    return within(abs(said - found), MEASURED * abs(found) + RESOLVED * weight)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
