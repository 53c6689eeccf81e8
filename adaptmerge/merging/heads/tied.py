"""Modules that share one matrix, and modules that one input stores whole and another row by row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from adaptmerge.adapters.stored_edits import owner_of
from adaptmerge.bases.base import Base
from adaptmerge.merging.heads.concat import value_of
from adaptmerge.merging.heads.policies import Policies, is_vocabulary
from adaptmerge.merging.resolve import Weighed
from adaptmerge.methods.method import Member
from adaptmerge.tensors.compare import same_values

Problem = tuple[str, str]


def torn(weighed: Sequence[Weighed], heads: Policies, base: Base | None) -> list[Problem]:
    """(site, sentence) where copies of one matrix would become different ones, or where rows of a matrix
    meet a whole one of another input."""
    whole = [
        item for item in weighed if item[0].kind == "replace" and item[0].site.param == "weight"
    ]
    vocabularies = [item for item in whole if is_vocabulary(item[0].site.module, base)]
    rows = [item for item in weighed if item[0].kind == "rows"]
    return [
        *(found for one, two in combinations(vocabularies, 2) for found in _torn(one, two, heads)),
        *(
            found
            for one in whole
            for two in rows
            if one[0].site == two[0].site
            for found in _mixed(one, two, heads)
        ),
    ]


def _torn(one: Weighed, two: Weighed, heads: Policies) -> list[Problem]:
    """Where both are settled alike nothing can come apart, and nothing has to be read."""
    if _fate(one, heads) == _fate(two, heads):
        return []
    left, right = ({member.adapter: member for member in item[1]} for item in (one, two))
    both = [name for name in left if name in right]
    if not both or not all(same_values(value_of(left[n]), value_of(right[n])) for n in both):
        return []
    sites = one[0].site, two[0].site
    alone = {name: str(sites[name in right]) for name in {*left, *right} - {*both}}
    why = ", ".join(f"{name} has only {site}" for name, site in sorted(alone.items()))
    sentence = (
        f"is one matrix with {sites[1]} in {', '.join(both)}, and the two would come apart"
        f"{f' ({why})' if why else ''}: give both the same weights and --heads policy"
    )
    return [(str(sites[0]), sentence)]


def _fate(item: Weighed, heads: Policies) -> tuple[object, ...]:
    members = item[1]
    word = heads.of(owner_of(members[0].edit))
    chosen = heads.chosen(owner_of(members[0].edit))
    if chosen:
        return (chosen, any(member.adapter == chosen for member in members))
    return (word, *((member.adapter, member.weight) for member in members))


def _mixed(one: Weighed, two: Weighed, heads: Policies) -> list[Problem]:
    site = one[0].site
    owners, others = _adapters(one[1]), _adapters(two[1])
    if owners == others or heads.chosen(owner_of(one[1][0].edit)) or heads.chosen(site.module):
        return []
    sentence = (
        f"{', '.join(owners)} stores all of it and {', '.join(others)} rows of it: pass --heads NAME to "
        "keep one of them"
    )
    return [(str(site), sentence)]


def _adapters(members: Sequence[Member]) -> tuple[str, ...]:
    return tuple(member.adapter for member in members)
