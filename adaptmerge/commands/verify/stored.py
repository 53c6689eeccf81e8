"""Promises of what is stored whole: heads by their policy, and token rows, recomputed from the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from adaptmerge.adapters.graph import Adapter, Edit, Labels
from adaptmerge.adapters.stored_edits import (
    owner_of,
    saved_module,
    stored_value,
    token_rows,
    with_value,
)
from adaptmerge.bases.base import Base
from adaptmerge.commands.verify.checks import FAIL, PASS, Check
from adaptmerge.errors import InputError, VerificationFailed
from adaptmerge.lazy import torch
from adaptmerge.merging.heads.case import all_same
from adaptmerge.merging.heads.policies import (
    AVERAGE,
    CONCAT,
    DROP,
    ERROR,
    SEPARATE,
    Policies,
    heads_of,
    own_parameter,
    policies,
    shown,
    union,
)
from adaptmerge.methods.method import EXACT, Member
from adaptmerge.outputs.report import Report, SiteLine
from adaptmerge.tensors.held import Held
from adaptmerge.tensors.refs import TensorRef, computed

ALLOWED = {
    ERROR: {"pass"},
    AVERAGE: {"pass", "value"},
    CONCAT: {"pass", "concat"},
    SEPARATE: {"pass"},
    DROP: set(),
}


def policies_in(report: Report) -> Policies:
    """The head policies that a report says were asked for."""
    return policies(report.options["heads"], [item["name"] for item in report.inputs])


def promised_edit(
    report: Report,
    line: SiteLine,
    members: Sequence[Member],
    inputs: Mapping[str, Adapter],
    base: Base | None,
) -> Edit | None:
    """The edit that a line on a head or on token rows promises; None for parameters of other kinds.

    Raises VerificationFailed when the line is not what the policy in the report's options makes of it.
    """
    heads, order = policies_in(report), [item["name"] for item in report.inputs]
    members = sorted(members, key=lambda member: order.index(member.adapter))
    first = members[0].edit
    chosen = heads.chosen(owner_of(first))
    is_head = _is_head(members[0], inputs)
    if chosen and getattr(first, "role", "") != "bias":
        _demand(line, [m.adapter for m in members] == [chosen] and line.action == "pass", chosen)
    elif is_head:
        word = heads.of(owner_of(first))
        _demand(line, line.action in ALLOWED[word], word)
    if line.action == "pass":
        _demand(line, all_same(members), "one value for all")
        return first
    if line.action == CONCAT:
        return _with(first, torch.cat([_value(member) for member in members]))
    if line.kind == "rows":
        return _union(line, members, base)
    return _average(line, members, base) if is_head else None


def _demand(line: SiteLine, holds: bool, word: str) -> None:
    if not holds:
        raise VerificationFailed(
            f"{line.site}: the report's options ask for {word!r}, but it says {line.action!r} of "
            f"{', '.join(line.weights)}"
        )


def _is_head(member: Member, inputs: Mapping[str, Adapter]) -> bool:
    """Whether a parameter is of a module that has more than vectors, and belongs together."""
    if not saved_module(member.edit):
        return False
    found = [h for h in heads_of(inputs[member.adapter]) if h.owner == owner_of(member.edit)]
    return any(len(shape) > 1 for head in found for shape in head.shapes.values())


def _value(member: Member) -> torch.Tensor:
    return stored_value(member.edit).read().double()


def _held(value: torch.Tensor) -> TensorRef:
    return computed(Held(value.contiguous()))


def _with(edit: Edit, value: torch.Tensor) -> Edit:
    return with_value(edit, _held(value))


def _average(line: SiteLine, members: Sequence[Member], base: Base | None) -> Edit:
    """v0 + sum w (v_i - v0), v0 that of the base unless the weights sum to 1."""
    rest = 1.0 - sum(member.weight for member in members)
    total = sum(_value(member) * member.weight for member in members)
    assert isinstance(total, torch.Tensor)
    if abs(rest) > EXACT:
        stored = own_parameter(base, members[0].edit.site)
        total = total + rest * _needed(line, stored).read().double()
    return _with(members[0].edit, total)


def _needed(line: SiteLine, stored: TensorRef | None) -> TensorRef:
    if stored is None:
        raise InputError(
            "its weights do not sum to 1 here, so the base's own value went into it: pass --base DIR",
            where=line.site,
        )
    return stored


def _union(line: SiteLine, members: Sequence[Member], base: Base | None) -> Edit:
    """The rows of all members by token id; where two have one that differs, their weighted sum."""
    found: dict[int, list[tuple[float, torch.Tensor]]] = {}
    for member in members:
        own = token_rows(member.edit)
        for token, row in zip(own.rows, own.values.read().double(), strict=True):
            found.setdefault(token, []).append((member.weight, row))
    made = [_row(line, token, terms, members[0], base) for token, terms in sorted(found.items())]
    families = {token_rows(member.edit).family for member in members}
    return replace(
        token_rows(members[0].edit),
        rows=tuple(sorted(found)),
        values=_held(torch.stack(made)),
        family=families.pop() if len(families) == 1 else "",
    )


def _row(
    line: SiteLine,
    token: int,
    terms: Sequence[tuple[float, torch.Tensor]],
    member: Member,
    base: Base | None,
) -> torch.Tensor:
    first = terms[0][1]
    if all(torch.equal(first, row) for _, row in terms):
        return first
    total = sum(weight * row for weight, row in terms)
    assert isinstance(total, torch.Tensor)
    rest = 1.0 - sum(weight for weight, _ in terms)
    if abs(rest) > EXACT:
        stored = own_parameter(base, member.edit.site)
        total = total + rest * _needed(line, stored).read()[token].double()
    return total


def promised_labels(
    line: SiteLine, members: Sequence[Member], inputs: Mapping[str, Adapter], order: Sequence[str]
) -> Labels | None:
    """What the rows of a head stand for, by the labels of its inputs."""
    members = sorted(members, key=lambda member: order.index(member.adapter))
    found = {m.adapter: inputs[m.adapter].labels.get(owner_of(m.edit)) for m in members}
    if line.action == CONCAT:
        return union(members, found)
    return next((labels for labels in found.values() if labels is not None), None)


def check_labels(promised: Mapping[str, Labels], output: Adapter) -> list[Check]:
    """Whether the rows of the output's heads are called what they are."""
    if not promised:
        return []
    wrong = [owner for owner, labels in output.labels.items() if promised.get(owner) != labels]
    problems = [
        f"{owner}: its rows are said to be {shown(output.labels[owner])}, promised was "
        f"{shown(promised[owner])}"
        for owner in wrong
        if owner in promised
    ]
    if not problems and not promised.keys() & output.labels.keys():
        problems = [f"{owner}: its labels are missing" for owner in promised]
    if problems:
        return [Check("labels", FAIL, "; ".join(problems), {"problems": problems})]
    count = "1 head says" if len(promised) == 1 else f"{len(promised)} heads say"
    return [Check("labels", PASS, f"{count} what its rows stand for, as the inputs do")]
