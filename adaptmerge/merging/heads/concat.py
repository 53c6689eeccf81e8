"""Heads put together row by row: which layer of a head has the labels, and whether the rest agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptmerge.adapters.graph import Edit, Labels
from adaptmerge.adapters.module_paths import natural_key
from adaptmerge.adapters.stored_edits import stored_value, with_value
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.resolve import Weighed
from adaptmerge.methods.method import Member
from adaptmerge.tensors.compare import same_values
from adaptmerge.tensors.dtypes import widest
from adaptmerge.tensors.refs import TensorRef, join

APART = "keep both by --heads separate"


def value_of(member: Member) -> TensorRef:
    """The stored parameter of a member."""
    return stored_value(member.edit)


def last_layer(owner: str, parts: Sequence[Weighed], labels: Labels | None) -> str:
    """The module of a head whose rows are its outputs: the one of as many rows as labels, else the last
    by name. Raises CannotMerge where a head has none."""
    matrices = {
        g.site.module: value_of(ms[0]) for g, ms in parts if len(value_of(ms[0]).shape) == 2
    }
    if not matrices:
        raise CannotMerge(f"has no layer with rows to put together: {APART}", where=owner)
    fitting = [m for m, ref in matrices.items() if labels and ref.shape[0] == len(labels.names)]
    return fitting[0] if len(fitting) == 1 else max(matrices, key=natural_key)


def concatenated(members: Sequence[Member]) -> Edit:
    """One edit whose value is that of each member below the one before. Raises CannotMerge."""
    refs = [value_of(member) for member in members]
    if len({ref.shape[1:] for ref in refs}) > 1:
        found = ", ".join(f"{m.adapter} {list(value_of(m).shape)}" for m in members)
        raise CannotMerge(
            f"heads of different widths cannot be put together: {found}: {APART}",
            where=str(members[0].edit.site),
        )
    dtype = widest([ref.dtype for ref in refs])
    return with_value(members[0].edit, join([ref.cast(dtype) for ref in refs], 0))


def check_concat(owner: str, top: str | None, parts: Sequence[Weighed]) -> None:
    """Raises CannotMerge unless all inputs have the same parameters, equal ones but in the last layer;
    `top` None: all must be equal."""
    names = list(dict.fromkeys(member.adapter for _, members in parts for member in members))
    for group, members in parts:
        lacking = [name for name in names if name not in {member.adapter for member in members}]
        if lacking:
            raise CannotMerge(
                f"{', '.join(m.adapter for m in members)} has it, {', '.join(lacking)} not, so the heads "
                f"cannot be put together: {APART}",
                where=str(group.site),
            )
        first, *others = map(value_of, members)
        if group.site.module != top and not all(same_values(first, ref) for ref in others):
            raise CannotMerge(
                f"differs between {', '.join(names)}, and only the last layer of a head can be put "
                f"together: {APART}",
                where=str(group.site),
            )


def is_earlier(
    owner: str, parts: Sequence[Weighed], others: Mapping[str, Sequence[Weighed]]
) -> bool:
    """Whether another head takes as many inputs as this one has outputs: then it comes before it."""
    rows = {value_of(m).shape[0] for g, ms in parts for m in ms if g.site.module == owner}
    names = {member.adapter for _, members in parts for member in members}
    return any(
        member.adapter in names
        and len(value_of(member).shape) == 2
        and value_of(member).shape[1] in rows
        for other, found in others.items()
        if other != owner
        for _, members in found
        for member in members
    )
