"""Trained token rows of several inputs: the union of their ids, and a weighted sum where two differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptmerge.adapters.graph import Edit, Site
from adaptmerge.adapters.stored_edits import token_rows
from adaptmerge.algebra.factors import Leaf, Place, Product, Sum, values
from adaptmerge.bases.base import Base
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.heads.policies import own_parameter
from adaptmerge.methods.method import EXACT, Member
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.dtypes import widest
from adaptmerge.tensors.refs import TensorRef, constant, join


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one token: the weighted rows it is the sum of, one of weight 1 where all agree."""

    token: int
    terms: tuple[tuple[float, TensorRef], ...]

    @property
    def is_kept(self) -> bool:
        return len(self.terms) == 1


def union_of_rows(
    site: Site,
    members: Sequence[Member],
    names: Mapping[str, Mapping[int, str]],
    base: Base | None,
) -> tuple[Edit, list[Row]]:
    """One edit with the rows of all members, by id, and how each was made. Raises CannotMerge."""
    _check_names(site, members, names)
    widths = {m.adapter: token_rows(m.edit).values.shape[1:] for m in members}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in widths.items())
        raise CannotMerge(f"the token rows are of different widths: {found}", where=str(site))
    holders = sorted(_holders(members).items())
    rows = [_row(site, token, found, base) for token, found in holders]
    dtype = widest([token_rows(member.edit).values.dtype for member in members])
    if all(row.is_kept for row in rows):
        value = join([row.terms[0][1].cast(dtype) for row in rows], 0)
    else:
        (width,) = next(iter(widths.values()))
        shape = (len(rows), width)
        placed = [
            Place(Product((Leaf(ref),), weight), shape, row=number)
            for number, row in enumerate(rows)
            for weight, ref in row.terms
        ]
        value = values(Sum(tuple(placed)), constant(0.0, shape, dtype))
    first = token_rows(members[0].edit)
    families = {token_rows(member.edit).family for member in members}
    family = families.pop() if len(families) == 1 else ""
    tokens = tuple(row.token for row in rows)
    return replace(first, rows=tokens, values=value, family=family), rows


def _holders(members: Sequence[Member]) -> dict[int, list[tuple[Member, TensorRef]]]:
    """The rows of each token id, by the inputs that have one."""
    found: dict[int, list[tuple[Member, TensorRef]]] = {}
    for member in members:
        own = token_rows(member.edit)
        for number, token in enumerate(own.rows):
            row = own.values.slice(0, number, number + 1)
            found.setdefault(token, []).append((member, row))
    return found


def _row(
    site: Site, token: int, found: Sequence[tuple[Member, TensorRef]], base: Base | None
) -> Row:
    first = found[0][1]
    if all(same_values(first, other) for _, other in found[1:]):
        return Row(token, ((1.0, first),))
    terms = tuple((member.weight, ref) for member, ref in found)
    rest = 1.0 - sum(weight for weight, _ in terms)
    if abs(rest) <= EXACT:
        return Row(token, terms)
    stored = own_parameter(base, site)
    if stored is None or token >= stored.shape[0]:
        names = ", ".join(member.adapter for member, _ in found)
        raise CannotMerge(
            f"token {token} differs between {names}, whose weights sum to {1.0 - rest:g}: pass --base DIR "
            "that has the token, weights that sum to 1, or --heads NAME to keep one of them",
            where=str(site),
        )
    return Row(token, (*terms, (rest, stored.slice(0, token, token + 1))))


def _check_names(
    site: Site, members: Sequence[Member], names: Mapping[str, Mapping[int, str]]
) -> None:
    """Raises CannotMerge where one id is two tokens, or one token has two ids."""
    strings: dict[int, tuple[str, str]] = {}
    numbers: dict[str, tuple[int, str]] = {}
    problems = []
    for member in members:
        known = names.get(member.adapter, {})
        for token in token_rows(member.edit).rows:
            if token not in known:
                continue
            text, name = known[token], member.adapter
            before, owner = strings.setdefault(token, (text, name))
            if before != text:
                problems.append(f"token {token} is {before!r} in {owner} and {text!r} in {name}")
            number, other = numbers.setdefault(text, (token, name))
            if number != token:
                problems.append(f"token {text!r} is {number} in {other} and {token} in {name}")
    if problems:
        last = f"{problems[-1]}: train them with one tokenizer, or pass --heads NAME to keep one"
        raise CannotMerge([*problems[:-1], last], where=str(site))
