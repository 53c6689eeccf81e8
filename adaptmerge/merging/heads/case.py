"""Cases: one parameter, or rows of one, that inputs store whole, among all others that a merge has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Edit, Labels, Note, Site
from adaptmerge.adapters.stored_edits import owner_of, role_of, saved_module, trained_tokens
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.align import Group
from adaptmerge.merging.heads.concat import is_earlier, last_layer, value_of
from adaptmerge.merging.heads.policies import CONCAT, SEPARATE, is_vocabulary
from adaptmerge.merging.request import Request
from adaptmerge.merging.resolve import Weighed
from adaptmerge.methods.method import Member
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.walk import refs_of


def all_same(members: Sequence[Member]) -> bool:
    """Whether all members store the same values, of the same rows."""
    first, *others = [member.edit for member in members]
    return all(
        trained_tokens(other) == trained_tokens(first)
        and all(map(same_values, refs_of(first), refs_of(other)))
        for other in others
    )


@dataclass(frozen=True)
class StoredWhole:
    """All parameters of a merge that are stored whole, by the module they belong to."""

    request: Request
    owners: Mapping[str, tuple[Weighed, ...]]

    @classmethod
    def of(cls, weighed: Sequence[Weighed], request: Request) -> StoredWhole:
        found: dict[str, list[Weighed]] = {}
        for group, members in weighed:
            if group.kind == "replace":
                found.setdefault(owner_of(members[0].edit), []).append((group, members))
        return cls(request, {owner: tuple(parts) for owner, parts in found.items()})

    def is_head(self, edit: Edit) -> bool:
        """Whether a parameter is of a head: of a module saved whole that has more than vectors."""
        parts = self.owners[owner_of(edit)] if saved_module(edit) else ()
        return any(len(value_of(m).shape) > 1 for _, found in parts for m in found)

    def is_vocabulary(self, owner: str) -> bool:
        """Whether the rows of a module are tokens."""
        return is_vocabulary(owner, self.request.base)

    def labels(self, member: Member) -> Labels | None:
        """What a member says the rows of its head stand for."""
        return self.request.labels(member.adapter, owner_of(member.edit))

    def of_policy(self, word: str) -> dict[str, tuple[Weighed, ...]]:
        """The modules with that policy."""
        return {o: parts for o, parts in self.owners.items() if self.request.heads.of(o) == word}

    @property
    def apart(self) -> tuple[str, ...]:
        """The inputs whose heads become adapters of their own."""
        found = [
            member.adapter
            for parts in self.of_policy(SEPARATE).values()
            for _, members in parts
            if self.is_head(members[0].edit)
            for member in members
        ]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Case:
    """What is stored whole and meets at a site: the members, and what else the merge stores whole.

    notes: where it is said what becomes of them.
    """

    group: Group
    members: tuple[Member, ...]
    stored: StoredWhole
    notes: list[Note]

    def say(self, kind: str, what: str) -> None:
        """Adds a Note about this site."""
        self.notes.append(Note(kind, what, site=str(self.site)))

    def refused(self, why: str) -> CannotMerge:
        """The error that nothing can become of this site."""
        return CannotMerge(why, where=str(self.site))

    @property
    def request(self) -> Request:
        return self.stored.request

    @property
    def site(self) -> Site:
        return self.group.site

    @property
    def first(self) -> Edit:
        return self.members[0].edit

    @property
    def owner(self) -> str:
        """The module that the parameter belongs to."""
        return owner_of(self.first)

    @property
    def parts(self) -> tuple[Weighed, ...]:
        """All parameters of that module."""
        return self.stored.owners[self.owner]

    @property
    def role(self) -> str:
        """What the parameter is, see `Replace`, or "tokens"."""
        return role_of(self.first) or "tokens"

    @property
    def names(self) -> str:
        return ", ".join(member.adapter for member in self.members)

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return sum(member.weight for member in self.members)

    @property
    def is_of_all(self) -> bool:
        """Whether every input of the merge has it."""
        return len(self.members) >= len(self.request.weights.base)

    @property
    def is_head(self) -> bool:
        return self.stored.is_head(self.first)

    @property
    def is_vocabulary(self) -> bool:
        return self.stored.is_vocabulary(self.owner)

    @property
    def all_same(self) -> bool:
        return all_same(self.members)

    @property
    def said(self) -> dict[str, Labels | None]:
        """What the rows stand for by each input, where it says."""
        return {member.adapter: self.stored.labels(member) for member in self.members}

    @property
    def labels(self) -> Labels | None:
        """What the rows stand for, by the first input that says."""
        return next((labels for labels in self.said.values() if labels is not None), None)

    @property
    def has_one_meaning(self) -> bool:
        """Whether no two inputs say different labels."""
        return all(labels in (None, self.labels) for labels in self.said.values())

    @property
    def last_layer(self) -> str | None:
        """The module of a head whose rows are put together; None where it comes before another one. Raises
        CannotMerge where there is none."""
        if self.is_vocabulary:
            raise CannotMerge(
                "its rows are the tokens of a vocabulary, of which two make no larger one: choose another "
                "policy than concat",
                where=self.owner,
            )
        found = self.stored.of_policy(CONCAT).items()
        others = {o: parts for o, parts in found if not self.stored.is_vocabulary(o)}
        if self.labels is None and is_earlier(self.owner, self.parts, others):
            return None
        return last_layer(self.owner, self.parts, self.labels)
