"""Parameters stored whole: heads, embeddings, biases, token rows. Kept, chosen, put together or summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from adaptmerge.adapters.graph import Edit, Kind, Labels, Note
from adaptmerge.adapters.stored_edits import with_value
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.heads.case import Case
from adaptmerge.merging.heads.concat import check_concat, concatenated, value_of
from adaptmerge.merging.heads.policies import (
    AVERAGE,
    CONCAT,
    DROP,
    ERROR,
    SEPARATE,
    WORDS,
    are_named,
    own_parameter,
    shown,
    union,
)
from adaptmerge.merging.heads.tokens import union_of_rows
from adaptmerge.methods.method import EXACT, Meeting, Member, Rule
from adaptmerge.methods.sums import weighted_values
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.dtypes import widest
from adaptmerge.tensors.walk import refs_of

OTHERWISE = "or one of average, concat, separate and drop"
PLURALS = {"bias": "biases", "head": "heads", "unlisted": "parameters"}


class Settlement(NamedTuple):
    """What becomes of one parameter: how ("pass", "value", "concat"), of whom, in which adapter of the
    output ("" for all), and what its rows stand for."""

    action: str
    edit: Edit
    members: tuple[Member, ...]
    adapter: str = ""
    labels: Labels | None = None


def settle_whole(case: Case) -> list[Settlement]:
    """What becomes of a parameter or rows stored whole; nothing where they are left out, with a Note.

    Equal ones are one, a chosen input's wins, heads follow their policy, biases and norms are averaged.
    Raises CannotMerge otherwise.
    """
    heads = case.request.heads
    chosen = heads.chosen(case.owner)
    if _is_spare(case):
        case.say(Kind.INFO, "a copy of the base is left out")
        return []
    if chosen and case.role != "bias":
        return _chosen(case, chosen)
    if case.role == "tokens":
        return _rows(case)
    return HEADS[heads.of(case.owner)](case) if case.is_head else _parameter(case)


def _is_spare(case: Case) -> bool:
    """Whether every stored value is the base's own, bit for bit, and the target has no place for it."""
    base = case.request.base
    if case.role != "base copy" or case.group.kind in case.request.stores.kinds:
        return False
    own = base.parameter(case.first.site) if base else None
    refs = [ref for member in case.members for ref in refs_of(member.edit)]
    return own is not None and all(same_values(own, ref) for ref in refs)


def _chosen(case: Case, name: str) -> list[Settlement]:
    """That of one input, if it has any."""
    chosen = tuple(member for member in case.members if member.adapter == name)
    if chosen:
        return [Settlement("pass", chosen[0].edit, chosen, labels=case.stored.labels(chosen[0]))]
    dropped = f"{case.role} of {case.names} left out: --heads {name} has none here"
    case.say(Kind.DROPPED, dropped)
    return []


def _kept(case: Case, what: str) -> list[Settlement]:
    """The one value that all members have, with a word where not all inputs do."""
    _say_kept(case, what)
    return [Settlement("pass", case.first, case.members, labels=case.labels)]


def _say_kept(case: Case, what: str) -> None:
    if not case.is_of_all:
        case.say(Kind.INFO, f"{what} kept from {case.members[0].adapter}")


def _error(case: Case) -> list[Settlement]:
    same = case.all_same
    if same and case.has_one_meaning:
        return _kept(case, "head")
    if case.is_vocabulary:
        _check_shapes(case)
    what = "has other labels in each of" if same else "differs between"
    raise case.refused(
        f"head {what} {case.names}: pass --heads NAME to keep one of them, {OTHERWISE}"
    )


def _average(case: Case) -> list[Settlement]:
    _check_labels(case)
    if case.all_same:
        return _kept(case, "head")
    _check_shapes(case)
    edit = _weighted(case, "head", weighted_values)
    return [Settlement("value", edit, case.members, labels=case.labels)]


def _check_shapes(case: Case) -> None:
    """Raises CannotMerge where parameters of different shapes meet."""
    shapes = {member.adapter: list(value_of(member).shape) for member in case.members}
    if len(set(map(tuple, shapes.values()))) == 1:
        return
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if case.is_vocabulary:
        raise case.refused(
            f"the inputs have vocabularies of different sizes ({found}): train them with one tokenizer "
            "(resize_token_embeddings), or pass --heads NAME to keep one of them"
        )
    raise case.refused(
        f"parameters of different shapes have no average ({found}): --heads concat puts the rows of "
        "heads together, --heads separate keeps each"
    )


def _check_labels(case: Case) -> None:
    """Raises CannotMerge where the labels of heads that are averaged differ, unless that is allowed; says
    what is assumed of them."""
    known = {name: labels for name, labels in case.said.items() if labels is not None}
    listed = "; ".join(f"{name}: {shown(labels)}" for name, labels in known.items())
    if not case.has_one_meaning and "labels" not in case.request.allowed:
        raise CannotMerge(
            f"the rows of these heads mean different things ({listed}): --heads concat puts them "
            "together; if the labels are only spelled differently, pass --allow labels",
            where=case.owner,
        )
    note = Note(Kind.ASSUMED, _assumed(case, listed), site=case.owner)
    if note.what and note not in case.notes:
        case.notes.append(note)


def _assumed(case: Case, listed: str) -> str:
    """What is taken for granted of the labels of heads that are averaged; "" where nothing is."""
    if not case.has_one_meaning:
        return f"different labels were taken as one ({listed})"
    if all(map(are_named, case.said.values())) or len(case.members) == 1 or case.is_vocabulary:
        return ""
    return f"rows are taken to mean the same in {case.names}: not all say their labels"


def _concat(case: Case) -> list[Settlement]:
    if len(case.members) == 1 or (case.all_same and case.has_one_meaning):
        return _kept(case, "head")
    last = case.last_layer
    check_concat(case.owner, last, case.parts)
    if case.site.module != last:
        return _kept(case, "head")
    labels = _joined_labels(case, last)
    return [Settlement("concat", concatenated(case.members), case.members, labels=labels)]


def _joined_labels(case: Case, last: str) -> Labels:
    """What the rows of heads one below the other stand for: those of the matrix of their last layer."""
    of_last = [members for group, members in case.parts if group.site.module == last]
    tops = max(of_last, key=lambda members: len(value_of(members[0]).shape))
    return union(tops, {member.adapter: case.stored.labels(member) for member in tops})


def _separate(case: Case) -> list[Settlement]:
    if len(case.stored.apart) < 2:
        return _kept(case, "head")
    return [
        Settlement("pass", member.edit, (member,), member.adapter, case.stored.labels(member))
        for member in case.members
    ]


def _drop(case: Case) -> list[Settlement]:
    case.say(Kind.DROPPED, f"head of {case.names} left out: --heads {DROP}")
    return []


HEADS: Mapping[str, Callable[[Case], list[Settlement]]] = {
    ERROR: _error,
    AVERAGE: _average,
    CONCAT: _concat,
    SEPARATE: _separate,
    DROP: _drop,
}
assert set(HEADS) == set(WORDS)


def _rows(case: Case) -> list[Settlement]:
    """Trained tokens: those of all inputs, summed where two have the same one."""
    if len(case.members) == 1 or case.all_same:
        _say_kept(case, "tokens")
        return [Settlement("pass", case.first, case.members)]
    names = {name: adapter.tokens for name, adapter in case.request.adapters.items()}
    edit, rows = union_of_rows(case.site, case.members, names, case.request.base)
    summed = sum(not row.is_kept for row in rows)
    what = f"{len(rows)} tokens of {case.names} are put together, {summed} of them as sums"
    case.say(Kind.INFO, what)
    return [Settlement("value", edit, case.members)]


def _parameter(case: Case) -> list[Settlement]:
    """Biases, norms and embeddings: kept where equal, else their differences from the base summed."""
    role, rule = case.role, case.request.method.rules.get("replace")
    exact = role != "bias" or rule is None or abs(case.total - 1.0) <= EXACT
    if case.all_same and exact:
        return _kept(case, role)
    _check_shapes(case)
    if role == "base copy" or rule is None:
        raise case.refused(
            f"{role} differs between {case.names}: pass --heads NAME to keep one of them"
        )
    if role != "bias":
        case.say(Kind.INFO, f"{role} of {case.names} summed as differences from the base")
    return [Settlement("value", _weighted(case, role, rule), case.members)]


def _weighted(case: Case, what: str, rule: Rule) -> Edit:
    """v = v0 + sum w (v_i - v0): without the base's v0 only if the weights of the holders sum to 1."""
    extra = () if abs(case.total - 1.0) <= EXACT else (_share_of_base(case, what),)
    first, *others = case.members
    dtype = widest([value_of(member).dtype for member in case.members])
    first = replace(first, edit=with_value(first.edit, value_of(first).cast(dtype)))
    return rule(Meeting(case.site, (first, *others, *extra)))


def _share_of_base(case: Case, what: str) -> Member:
    """The base's own value, with what the weights leave of 1. Raises CannotMerge where it has none."""
    own = own_parameter(case.request.base, case.site)
    if own is None or own.shape != value_of(case.members[0]).shape:
        raise case.refused(
            f"stored {PLURALS.get(what, what)} with weights that sum to {case.total:g} need the base's own "
            f"{what}: pass --base DIR that has it, or weights that sum to 1 here (--site "
            f"'{case.site.module}:NAME=W,...')"
        )
    return Member("base", 1.0 - case.total, with_value(case.first, own))
