"""What a merge method is: a rule for each kind of edit, of what meets at a site, and what is true of it.

A method is one module of `adaptmerge.methods` with a constant METHOD; other distributions add theirs
through the entry point group of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from adaptmerge.adapters.graph import Edit, Note, Site
from adaptmerge.tensors.refs import TensorRef


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter's edit at a site, with its weight there, and what it was made of if not itself."""

    adapter: str
    weight: float
    edit: Edit
    made_of: tuple[Edit, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the adapter's own edits here."""
        return tuple(edit.kind for edit in self.made_of or (self.edit,))


EXACT = 1e-12  # weights that differ from a sum of 1 by no more than this sum to 1


@dataclass(frozen=True, slots=True)
class Meeting:
    """What meets at one site: the members, and the base's weight there (canonical) when it is known.

    notes: where a rule says what it approximates.
    """

    site: Site
    members: tuple[Member, ...]
    weight: TensorRef | None = None
    notes: list[Note] = field(default_factory=list)

    def say(self, kind: str, what: str) -> None:
        """Adds a Note about this site."""
        self.notes.append(Note(kind, what, site=str(self.site)))

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return sum(member.weight for member in self.members)

    @property
    def rest(self) -> float:
        """What the weights leave of 1: the share of the base's own value; 0 where they sum to 1."""
        rest = 1.0 - self.total
        return rest if abs(rest) > EXACT else 0.0


Rule = Callable[[Meeting], Edit]


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method: a rule per kind of edit, and what is true of it.

    A rule returns the merged edit, its factor and tensors as expressions that a run computes. `forms`
    are rules by the name of a family that deltas of that family are kept in on request. `reduce`
    False stacks terms even where redundant. `rank` gives the method's own cap from the input ranks.
    `promise` is what the result should be, for the verifier; None means the weighted sum of deltas.
    `caution` is a sentence shown with every result.
    """

    name: str
    summary: str
    rules: Mapping[str, Rule]
    forms: Mapping[str, Rule] = field(default_factory=dict)
    url: str = ""
    reduce: bool = True
    rank: Callable[[Sequence[int]], int] | None = None
    promise: Rule | None = None
    caution: str = ""
    linear: bool = True
    gauge_invariant: bool = True
