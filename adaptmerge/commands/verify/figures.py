"""Is every figure of a report what its inputs, its options and its output make it?

What was decided is planned again from headers; ranks, norms and errors are measured, and totals are summed
up from them. What is left, and has no number in it, is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaptmerge.adapters.graph import Adapter, Note, key_of
from adaptmerge.adapters.weight_edits import factor_of
from adaptmerge.algebra.by_rows import row_ranges
from adaptmerge.algebra.factors import Factor, rank_bound
from adaptmerge.algebra.linalg import one_thread_each
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.commands.combine import Prepared
from adaptmerge.commands.extract.settle import rounding_of
from adaptmerge.commands.extract.tuned import Difference
from adaptmerge.commands.verify.checks import FAIL, PASS, Check, within
from adaptmerge.commands.verify.extracted import is_extraction
from adaptmerge.commands.verify.promise import Promised
from adaptmerge.commands.verify.stated import Stated, is_retold
from adaptmerge.commands.verify.told import told_otherwise
from adaptmerge.errors import AdaptmergeError
from adaptmerge.lazy import torch
from adaptmerge.merging.base_names import is_of_names
from adaptmerge.merging.plan import Step
from adaptmerge.merging.prepare import unweighted
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.methods.registry import method_named
from adaptmerge.outputs import companions
from adaptmerge.outputs.adapters import adapters_of, head_lines
from adaptmerge.outputs.report import Report, SiteLine, missed_budget, sanity_notes
from adaptmerge.tensors.dtypes import BY_NAME, SPELLINGS

SHOWN = 3
SUMMED = 1e-9  # relative: what sums of the report's own numbers may differ by
MEASURED = 1e-4  # relative: norms and cosines, of which the merge computes products in float32
UNSEEN = ("versions", "sources of inputs")  # what no file can tell
NOTES, MOVED = (
    "notes",
    "shares of codes that moved",
)  # what decides nothing, and is said in JSON only


@one_thread_each()  # products of thin sides: threads inside them wait for each other
def check_figures(stated: Stated) -> Check:
    """The check of all that a report says, beside what other checks compare."""
    problems, unseen = _plan_problems(stated)
    if not is_retold(stated.report):
        unseen.append("entries and notes, which another version told")
    elif not problems:
        problems += told_otherwise(stated)
    problems += _input_problems(stated)
    problems += [p for item in stated.promised for p in _line_problems(stated, item)]
    measured = _measured(stated)
    unseen += [] if measured else ["norms of inputs and cosines between them"]
    problems += _total_problems(stated.report, measured)
    problems += _output_problems(stated)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if problems[SHOWN:] else ""
        return Check("report", FAIL, "; ".join(problems[:SHOWN]) + more, {"problems": problems})
    return right(len(stated.report.sites), unseen)


def right(lines: int, unseen: Sequence[str]) -> Check:
    """The check of a report that is right, as far as it is computed again."""
    detail = f"{lines} lines and the totals are right"
    if loud := [what for what in unseen if what not in (NOTES, MOVED)]:
        detail += f"; not computed again: {', '.join(loud)}"
    return Check("report", PASS, detail, {"not_computed_again": [*UNSEEN, *unseen]})


def _plan_problems(stated: Stated) -> tuple[list[str], list[str]]:
    """What is said otherwise of a merge than its plan has it, and what was not planned."""
    report = stated.report
    if is_extraction(report):
        return [], [NOTES]
    if stated.lacks_base:
        return [], ["what was decided, for which the base is needed"]
    try:
        prepared = stated.planned
    except AdaptmergeError as problem:
        return [f"what it says cannot be planned: {problem.problems[0]}"], []
    problems = _unlike_steps(report, prepared.plan.steps)
    problems += _unlike_notes(stated, prepared) if is_retold(report) else []
    said: dict[str, Any] = {"adapters": adapters_of(prepared.plan.steps) or None}
    said["heads"] = head_lines(prepared.plan.steps, prepared.opened.heads) or None
    problems += [
        f"{name} of the output are not those of the plan"
        for name, wanted in said.items()
        if (report.output.get(name) or None) != wanted
    ]
    if report.output["dtype"] != str(prepared.plan.dtype):
        problems.append(f"the dtype is said to be {report.output['dtype']}")
    return problems, []


def _unlike_steps(report: Report, steps: Sequence[Step]) -> list[str]:
    """Lines that are not what is planned for their sites."""
    if len(steps) != len(report.sites):
        return [f"{len(report.sites)} sites are said to be merged, planned are {len(steps)}"]
    return [
        f"{line.site}: {name} is {said!r}, planned is {wanted!r}"
        for line, step in zip(report.sites, steps, strict=True)
        for name, wanted in _planned(step).items()
        if (said := getattr(line, name)) != wanted
    ]


def _planned(step: Step) -> dict[str, Any]:
    site, members = step.site, step.members
    factors = {m.adapter: f for m in members if (f := factor_of(m.edit)) is not None}
    return {
        "site": step.label,
        "module": site.module,
        "param": site.param,
        "kind": step.edit.kind,
        "action": step.action,
        "weights": {member.adapter: member.weight for member in members},
        "ranks_in": {name: rank_bound(factor) for name, factor in factors.items()},
        "expert": site.expert,
        "kinds_in": {member.adapter: list(member.kinds) for member in members},
        "adapter": step.adapter,
        "place": site.place,
    }


def _unlike_notes(stated: Stated, prepared: Prepared) -> list[str]:
    """Notes that nothing gives a reason for, and those that are not said; what a base is called counts only
    where it was not renamed."""
    report = stated.report
    found = [*prepared.notes, *sanity_notes(report.totals), *companions.notes(prepared.inputs)]
    found += missed_budget(prepared.plan.budget, report.totals, report.sites)
    weights = report.options["weights"]
    free = {unweighted(len(weights))} if len(set(weights.values())) == 1 else set[Note]()
    named = (report.base or {}).get("name")
    renamed = stated.base is not None and stated.base.path.name != named
    said, wanted = (
        {note for note in notes if note not in free and not (renamed and is_of_names(note))}
        for notes in (report.notes, found)
    )
    return [
        *(f"a note says without a reason: {_text(note)}" for note in sorted(said - wanted)),
        *(f"a note is missing: {_text(note)}" for note in sorted(wanted - said)),
    ]


def _text(note: Note) -> str:
    return str(note)


def _input_problems(stated: Stated) -> list[str]:
    """What is said otherwise of inputs than they are."""
    if is_extraction(stated.report):
        return []
    problems = []
    for said, item in zip(stated.report.inputs, stated.inputs, strict=True):
        base = asdict(item.adapter.base)
        base["replication"] = [list(pair) for pair in item.adapter.base.replication]
        found = {"format": item.format.name, "base": base}
        problems += [
            f"input {item.name}: {name} is {said.get(name)!r}, found was {value!r}"
            for name, value in found.items()
            if said.get(name) != value
        ]
    return problems


def _line_problems(stated: Stated, item: Promised) -> Iterator[str]:
    """What is wrong in the numbers of one line, each with the others and with what is stored."""
    line = item.line
    if line.site != str(line.key):
        yield f"{line.site}: is the line of {line.key.site}"
    lost = math.hypot(line.truncation, line.rounding)
    if not _near(line.error * line.norm if line.norm else lost, lost, SUMMED * lost):
        yield f"{line.site}: truncation and rounding are {lost:.4g}, the error says otherwise"
    if line.norm == 0.0 and line.error != 0.0:
        yield f"{line.site}: an error of {line.error:.3g} of nothing"
    if min(line.truncation, line.rounding, line.error, line.norm) < 0.0:
        yield f"{line.site}: has a norm below 0"
    if line.action == "pass" and (line.truncation, line.rounding, line.error) != (0.0, 0.0, 0.0):
        yield f"{line.site}: goes through as it is, and is said to have lost something"
    if line.action == "pass" and not item.terms and line.norm != 0.0:
        yield f"{line.site}: is no delta, and is said to have a norm of {line.norm:.6g}"
    yield from _rank_problems(stated, item)


def _rank_problems(stated: Stated, item: Promised) -> Iterator[str]:
    """A rank is that of what is stored, where zeros may have been added to it, and within the cap."""
    line, stored = item.line, _stored(stated, item)
    pair = None if stored is None else as_low_rank(stored)
    if line.rank is None:
        if line.action == "fit" and line.param == "weight":
            yield f"{line.site}: has no rank"
        return
    if isinstance(line.rank, bool) or not isinstance(line.rank, int) or line.rank < 0:
        yield f"{line.site}: the rank is {line.rank!r}"
        return
    cap = stated.report.options["budget"].get("rank")
    if line.action == "fit" and cap is not None and line.rank > cap:
        yield f"{line.site}: the rank is {line.rank}, allowed were {cap}"
    if pair is None:
        if stored is not None and line.action == "fit" or stored is None and line.rank:
            yield f"{line.site}: the rank is said to be {line.rank}"
        return
    used = _used(pair.up.read(), pair.down.read())
    bounds = {pair.rank, sum(line.ranks_in.values()), cap}
    if line.rank != used and not (line.rank > used and line.rank in bounds):
        yield f"{line.site}: the rank is {used}, said is {line.rank}"


def _used(up: torch.Tensor, down: torch.Tensor) -> int:
    """The number of the last column of `up` and row of `down` that are not zero."""
    live = (up.any(dim=0) & down.any(dim=1)).nonzero()
    return int(live.max()) + 1 if len(live) else 0


def _stored(stated: Stated, item: Promised) -> Factor | None:
    """What the output stores of a line."""
    adapters = [r.adapter for n, r in stated.results.items() if item.line.adapter in ("", n)]
    edits = _edits(adapters[0]) if adapters else {}
    edit = edits.get(item.line.key)
    return None if edit is None else factor_of(edit)


def _edits(adapter: Adapter) -> dict[Any, Any]:
    return {key_of(edit): edit for edit in adapter.edits}


def _total_problems(report: Report, measured: Mapping[str, float]) -> list[str]:
    """Totals that are not the sums over the lines, or not what the inputs' deltas give."""
    said = _flat(asdict(report.totals))
    problems = [
        f"totals: {name} is {said[name]}, over all lines it is {value}"
        for name, value in _sums(report).items()
        if not _near(said[name], value, SUMMED * abs(value))
    ]
    problems += [
        f"totals: {name} is {said.get(name)}, measured was {value}"
        for name, value in measured.items()
        if not _near(said.get(name), value, MEASURED * max(1.0, abs(value)))
    ]
    if measured:
        unknown = sorted(said.keys() - measured.keys() - _sums(report).keys())
        problems += [f"totals: {name} is of no inputs" for name in unknown]
    return problems


def _flat(totals: Mapping[str, Any]) -> dict[str, Any]:
    """The totals with what is of one input, or of two, named after them."""
    found = {}
    for name, value in totals.items():
        inner = {f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {}
        found.update(inner if isinstance(value, dict) else {name: value})
    return found


def _near(said: Any, found: float, tolerance: float) -> bool:
    """Whether a number of a report is the one that was found."""
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        return False
    if math.isnan(found):  # inputs that are not finite, which is a fault of its own
        return math.isnan(said)
    return within(abs(said - found), tolerance)


def _counted(report: Report) -> list[SiteLine]:
    """The lines that totals are over: of deltas, where there are any."""
    return [line for line in report.sites if line.kind not in WHOLE] or list(report.sites)


def _sums(report: Report) -> dict[str, float]:
    lines = _counted(report)
    norm = math.hypot(*(line.norm for line in lines))
    lost = {name: [getattr(line, name) for line in lines] for name in ("truncation", "rounding")}
    lost["error"] = [math.hypot(line.truncation, line.rounding) for line in lines]
    shares = {name: math.hypot(*values) / norm if norm else 0.0 for name, values in lost.items()}
    return {"norm": norm, **shares}


def _measured(stated: Stated) -> dict[str, float]:
    """The norms of inputs, the cosines between them and what of them is kept; nothing where a promise does
    not tell them apart."""
    names = [item["name"] for item in stated.report.inputs]
    if method_named(stated.report.method).promise is not None:
        return {}
    gram = dict.fromkeys([(a, b) for a in names for b in names], 0.0)
    apart = 0.0
    for item in stated.promised:
        if item.line.kind in WHOLE or item.weight is not None or item.line.action == "value":
            continue
        if not item.terms:
            continue
        inner = _inner(item)
        if not inner:
            return {}
        for i, a in enumerate(item.line.weights):
            apart += item.line.weights[a] ** 2 * inner[i][i]
            for j, b in enumerate(item.line.weights):
                gram[a, b] += inner[i][j]
    norms = {name: math.sqrt(max(gram[name, name], 0.0)) for name in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = {f"input_norms {name}": norm for name, norm in norms.items()}
    for a, b in pairs:
        sizes = norms[a] * norms[b]
        found[f"cosines {a} {b}"] = gram[a, b] / sizes if sizes else 0.0
    norm = stated.report.totals.norm
    found["kept"] = 1.0 if len(names) < 2 else norm / math.sqrt(apart) if apart else 0.0
    return found


def _inner(item: Promised) -> list[list[float]]:
    """Inner products of the deltas that meet at a site, unweighted; none where only their sum is known."""
    factors = [factor for _, factor in item.terms]
    if len(factors) != len(item.line.weights):
        return []
    if len(factors) == 1:
        (weight,) = item.line.weights.values()
        alone = item.line.norm / weight
        return [[alone * alone]]
    pairs = [as_low_rank(factor) for factor in factors]
    thin = [pair for pair in pairs if pair is not None]
    if len(thin) == len(factors):
        sides = [(p.up.read().double() * p.scale, p.down.read().double()) for p in thin]
        return [[float(((u.T @ v) * (d @ e.T)).sum()) for v, e in sides] for u, d in sides]
    total = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    for rows in row_ranges(factors[0]):
        flat = torch.stack([factor.dense(rows).double().flatten() for factor in factors])
        total += flat @ flat.T
    return [[float(value) for value in row] for row in total]


def _output_problems(stated: Stated) -> list[str]:
    """What is said otherwise of the output than it is."""
    report = stated.report
    problems = [
        f"the format is {result.format.name}, said is {report.format}"
        for result in stated.results.values()
        if result.format.name != report.format
    ]
    asked = report.options.get("dtype")
    if asked is not None and SPELLINGS[asked] != BY_NAME[str(report.output["dtype"]).upper()]:
        problems.append(f"--dtype was {asked}, and it is {report.output['dtype']}")
    if is_extraction(report):
        problems += _noise_problems(stated)
    return problems


def _noise_problems(stated: Stated) -> list[str]:
    """The share of an extraction that can be rounding of the tuned checkpoint."""
    differences = [
        factor
        for item in stated.promised
        for _, factor in item.terms
        if isinstance(factor, Difference)
    ]
    size = math.hypot(*(line.norm for line in stated.report.sites if line.action == "fit"))
    noise = math.sqrt(sum(rounding_of(factor.tuned) for factor in differences))
    found, said = noise / size if size else 0.0, stated.report.output.get("checkpoint_rounding")
    if _near(said, found, MEASURED * max(1.0, found)):
        return []
    return [f"checkpoint_rounding is {said}, measured was {found}"]
