"""Parameters stored whole: heads, embeddings, biases, token rows. Kept, chosen, put together or summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from adaptmerge.adapters.graph import Edit, Kind, Labels, Note
from adaptmerge.adapters.stored_edits import owner_of, saved_module, with_value
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.align import Group
from adaptmerge.merging.heads.concat import check_concat, is_earlier, last_layer, stack, value_of
from adaptmerge.merging.heads.policies import (
    AVERAGE,
    CONCAT,
    DROP,
    ERROR,
    SEPARATE,
    WORDS,
    are_named,
    is_vocabulary,
    own_parameter,
    shown,
    union,
)
from adaptmerge.merging.heads.tokens import union_of_rows
from adaptmerge.merging.request import Request
from adaptmerge.merging.resolve import Weighed
from adaptmerge.methods.method import EXACT, Meeting, Member
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


@dataclass(frozen=True)
class Meetings:
    """All parameters of a merge that are stored whole, by the module they belong to."""

    request: Request
    owners: Mapping[str, tuple[Weighed, ...]]

    @classmethod
    def of(cls, weighed: Sequence[Weighed], request: Request) -> Meetings:
        found: dict[str, list[Weighed]] = {}
        for group, members in weighed:
            if group.kind == "replace":
                found.setdefault(owner_of(members[0].edit), []).append((group, members))
        return cls(request, {owner: tuple(parts) for owner, parts in found.items()})

    def is_head(self, group: Group, members: Sequence[Member]) -> bool:
        """Whether a parameter is of a head: of a module saved whole that has more than vectors."""
        owner = owner_of(members[0].edit)
        parts = self.owners[owner] if saved_module(members[0].edit) else ()
        return any(len(value_of(m).shape) > 1 for _, found in parts for m in found)

    def labels(self, member: Member) -> Labels | None:
        return self.request.labels(member.adapter, owner_of(member.edit))

    @property
    def apart(self) -> tuple[str, ...]:
        """The inputs whose heads become adapters of their own."""
        found = [
            member.adapter
            for parts in self.owners.values()
            for group, members in parts
            if self.is_head(group, members)
            and self.request.heads.of(owner_of(members[0].edit)) == SEPARATE
            for member in members
        ]
        return tuple(dict.fromkeys(found))

    @property
    def stacked(self) -> dict[str, tuple[Weighed, ...]]:
        """The modules whose heads are put together."""
        found = self.request.heads
        return {o: parts for o, parts in self.owners.items() if found.of(o) == CONCAT}

    def top(self, owner: str, members: Sequence[Member]) -> str | None:
        """The module of a head that is put together; None where the head comes before another one."""
        known = next(filter(None, map(self.labels, members)), None)
        if known is None and is_earlier(owner, self.owners[owner], self.stacked):
            return None
        return last_layer(owner, self.owners[owner], known)


def settle_whole(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    """What becomes of a parameter or rows stored whole; nothing where they are left out, with a Note.

    Equal ones are one, a chosen input's wins, heads follow their policy, biases and norms are averaged.
    Raises CannotMerge otherwise.
    """
    request, first = met.request, members[0].edit
    role = "tokens" if group.kind == "rows" else getattr(first, "role", "tokens")
    if _is_spare(role, group, members, request):
        notes.append(Note(Kind.INFO, "a copy of the base is left out", site=str(group.site)))
        return []
    chosen = request.heads.chosen(owner_of(first))
    if chosen and role != "bias":
        return _chosen(chosen, role, group, members, met, notes)
    if role == "tokens":
        return _rows(group, members, request, notes)
    if met.is_head(group, members):
        return HEADS[request.heads.of(owner_of(first))](group, members, met, notes)
    return _parameter(role, group, members, met, notes)


def _chosen(
    name: str,
    role: str,
    group: Group,
    members: tuple[Member, ...],
    met: Meetings,
    notes: list[Note],
) -> list[Settlement]:
    chosen = tuple(member for member in members if member.adapter == name)
    if chosen:
        return [Settlement("pass", chosen[0].edit, chosen, labels=met.labels(chosen[0]))]
    owners = ", ".join(member.adapter for member in members)
    dropped = f"{role} of {owners} left out: --heads {name} has none here"
    notes.append(Note(Kind.DROPPED, dropped, site=str(group.site)))
    return []


def _is_spare(role: str, group: Group, members: Sequence[Member], request: Request) -> bool:
    """Whether every stored value is the base's own, bit for bit, and the target has no place for it."""
    if role != "base copy" or group.kind in request.stores.kinds:
        return False
    stored = request.base.parameter(members[0].edit.site) if request.base else None
    return stored is not None and all(
        same_values(stored, ref) for member in members for ref in refs_of(member.edit)
    )


def all_same(members: Sequence[Member]) -> bool:
    """Whether all members store the same values, of the same rows."""
    first, *others = [member.edit for member in members]
    rows = getattr(first, "rows", None)
    return all(
        getattr(other, "rows", None) == rows
        and all(map(same_values, refs_of(first), refs_of(other)))
        for other in others
    )


def _kept(
    what: str, group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    """The one value that all members have, with a word where not all inputs do."""
    if len(members) < len(group.members) or len(members) < len(met.request.weights.base):
        kept = f"{what} kept from {members[0].adapter}"
        notes.append(Note(Kind.INFO, kept, site=str(group.site)))
    labels = next(filter(None, map(met.labels, members)), None)
    return [Settlement("pass", members[0].edit, members, labels=labels)]


def _names(members: Sequence[Member]) -> str:
    return ", ".join(member.adapter for member in members)


def _error(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    if all_same(members) and _one_meaning(members, met):
        return _kept("head", group, members, met, notes)
    if is_vocabulary(owner_of(members[0].edit)):
        _check_shapes(group, members)
    what = "differs between" if not all_same(members) else "has other labels in each of"
    raise CannotMerge(
        f"head {what} {_names(members)}: pass --heads NAME to keep one of them, {OTHERWISE}",
        where=str(group.site),
    )


def _one_meaning(members: Sequence[Member], met: Meetings) -> bool:
    known = {labels for member in members if (labels := met.labels(member)) is not None}
    return len(known) < 2


def _average(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    labels = _common_labels(group, members, met, notes)
    if all_same(members):
        return [kept._replace(labels=labels) for kept in _kept("head", group, members, met, notes)]
    _check_shapes(group, members)
    edit = _weighted("head", group, members, met.request, weighted_values)
    return [Settlement("value", edit, members, labels=labels)]


def _check_shapes(group: Group, members: Sequence[Member]) -> None:
    """Raises CannotMerge where parameters of different shapes meet."""
    shapes = {member.adapter: list(value_of(member).shape) for member in members}
    if len(set(map(tuple, shapes.values()))) == 1:
        return
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if is_vocabulary(owner_of(members[0].edit)):
        raise CannotMerge(
            f"the inputs have vocabularies of different sizes ({found}): train them with one tokenizer "
            "(resize_token_embeddings), or pass --heads NAME to keep one of them",
            where=str(group.site),
        )
    raise CannotMerge(
        f"parameters of different shapes have no average ({found}): --heads concat puts the rows of "
        "heads together, --heads separate keeps each",
        where=str(group.site),
    )


def _common_labels(
    group: Group, members: Sequence[Member], met: Meetings, notes: list[Note]
) -> Labels | None:
    """The labels of heads that are averaged. Raises CannotMerge where they differ, unless allowed."""
    owner = owner_of(members[0].edit)
    found = {member.adapter: met.labels(member) for member in members}
    known = {labels for labels in found.values() if labels is not None}
    listed = "; ".join(f"{n}: {shown(v)}" for n, v in found.items() if v is not None)
    if len(known) > 1 and "labels" not in met.request.allowed:
        raise CannotMerge(
            f"the rows of these heads mean different things ({listed}): --heads concat puts them "
            "together; if the labels are only spelled differently, pass --allow labels",
            where=owner,
        )
    unnamed = not all(map(are_named, found.values()))
    said = f"different labels were taken as one ({listed})" if len(known) > 1 else ""
    if unnamed and not said and len(members) > 1 and not is_vocabulary(owner):
        said = f"rows are taken to mean the same in {_names(members)}: not all say their labels"
    note = Note(Kind.ASSUMED, said, site=owner)
    if said and note not in notes:
        notes.append(note)
    return next((labels for labels in found.values() if labels is not None), None)


def _concat(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    owner = owner_of(members[0].edit)
    if len(members) == 1 or (all_same(members) and _one_meaning(members, met)):
        return _kept("head", group, members, met, notes)
    top = met.top(owner, members)
    check_concat(owner, top, met.owners[owner])
    if group.site.module != top:
        return _kept("head", group, members, met, notes)
    last = [found for at, found in met.owners[owner] if at.site.module == top]
    tops = max(last, key=lambda found: len(value_of(found[0]).shape))
    labels = union(tops, {member.adapter: met.labels(member) for member in tops})
    return [Settlement("concat", stack(members), members, labels=labels)]


def _separate(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    if len(met.apart) < 2:
        return _kept("head", group, members, met, notes)
    return [
        Settlement("pass", member.edit, (member,), member.adapter, met.labels(member))
        for member in members
    ]


def _drop(
    group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    what = f"head of {_names(members)} left out: --heads {DROP}"
    notes.append(Note(Kind.DROPPED, what, site=str(group.site)))
    return []


HEADS: Mapping[str, Callable[..., list[Settlement]]] = {
    ERROR: _error,
    AVERAGE: _average,
    CONCAT: _concat,
    SEPARATE: _separate,
    DROP: _drop,
}
assert set(HEADS) == set(WORDS)


def _rows(
    group: Group, members: tuple[Member, ...], request: Request, notes: list[Note]
) -> list[Settlement]:
    """Trained tokens: those of all inputs, summed where two have the same one."""
    if len(members) == 1 or all_same(members):
        if len(members) < len(request.weights.base):
            kept = f"tokens kept from {members[0].adapter}"
            notes.append(Note(Kind.INFO, kept, site=str(group.site)))
        return [Settlement("pass", members[0].edit, members)]
    names = {name: adapter.tokens for name, adapter in request.adapters.items()}
    edit, rows = union_of_rows(group.site, members, names, request.base)
    summed = sum(not row.is_kept for row in rows)
    what = f"{len(rows)} tokens of {_names(members)} are put together, {summed} of them as sums"
    notes.append(Note(Kind.INFO, what, site=str(group.site)))
    return [Settlement("value", edit, members)]


def _parameter(
    role: str, group: Group, members: tuple[Member, ...], met: Meetings, notes: list[Note]
) -> list[Settlement]:
    """Biases, norms and embeddings: kept where equal, else their differences from the base summed."""
    request = met.request
    rule = request.method.rules.get("replace")
    total = sum(member.weight for member in members)
    exact = role != "bias" or rule is None or abs(total - 1.0) <= EXACT
    if all_same(members) and exact:
        return _kept(role, group, members, met, notes)
    _check_shapes(group, members)
    if role == "base copy" or rule is None:
        raise CannotMerge(
            f"{role} differs between {_names(members)}: pass --heads NAME to keep one of them",
            where=str(group.site),
        )
    if role != "bias":
        what = f"{role} of {_names(members)} summed as differences from the base"
        notes.append(Note(Kind.INFO, what, site=str(group.site)))
    return [Settlement("value", _weighted(role, group, members, request, rule), members)]


def _weighted(
    what: str,
    group: Group,
    members: tuple[Member, ...],
    request: Request,
    rule: Callable[[Meeting], Edit],
) -> Edit:
    """v = v0 + sum w (v_i - v0): without the base's v0 only if the weights of the holders sum to 1."""
    total = sum(member.weight for member in members)
    extra: tuple[Member, ...] = ()
    if abs(total - 1.0) > EXACT:
        stored = own_parameter(request.base, group.site)
        if stored is None or stored.shape != value_of(members[0]).shape:
            raise CannotMerge(
                f"stored {PLURALS.get(what, what)} with weights that sum to {total:g} need the base's own "
                f"{what}: pass --base DIR that has it, or weights that sum to 1 here (--site "
                f"'{group.site.module}:NAME=W,...')",
                where=str(group.site),
            )
        extra = (Member("base", 1.0 - total, with_value(members[0].edit, stored)),)
    dtype = widest([value_of(member).dtype for member in members])
    first = replace(members[0], edit=with_value(members[0].edit, value_of(members[0]).cast(dtype)))
    return rule(Meeting(group.site, (first, *members[1:], *extra)))
