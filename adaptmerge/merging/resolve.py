"""What the edits that meet at a site become: their own kind, one DoRA, or a delta on the base.

Edits of one kind with a rule stay what they are. Where kinds meet, or the target has no place for one,
each adapter's edits become what they add to the base's own weight: exact, but only the base can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from adaptmerge.adapters.graph import Layer, Site
from adaptmerge.adapters.weight_edits import Add, WeightEdit, delta_of, delta_on, family_of, side_of
from adaptmerge.errors import CannotMerge
from adaptmerge.merging.align import Group, and_more
from adaptmerge.merging.request import Request
from adaptmerge.methods.method import Member

Weighed = tuple[Group, tuple[Member, ...]]
LORA = "lora"  # the form of plain low-rank deltas, which every sum can become
WHOLE = ("replace", "rows")  # kinds that are stored whole, beside any family
JOINED = "dora"  # the kind that sums of these become with a base
JOINABLE = frozenset({"add", "dora", "scale"})


def resolve(weighed: Sequence[Weighed], request: Request) -> list[Weighed]:
    """The groups with edits that the method has a rule for and the target a place. Raises CannotMerge."""
    aside = [item for item in weighed if not _is_weight_edit(item)]
    _no_form_for(aside, request)
    sites: dict[Site, list[Weighed]] = {}
    for item in weighed:
        if _is_weight_edit(item):
            sites.setdefault(item[0].site, []).append(item)
    kept = {site for site, items in sites.items() if _may_stay(items, request)}
    kept -= _of_other_families(sites, kept, request)
    problems: dict[str, list[str]] = {}
    found = [*aside]
    for site, items in sites.items():
        try:
            found += items if site in kept else _changed(site, items, request)
        except CannotMerge as problem:
            problems.setdefault(problem.problems[0], []).append(str(site))
    if problems:
        raise CannotMerge([f"{and_more(at)}: {what}" for what, at in problems.items()])
    order = {item[0].site: index for index, item in enumerate(weighed)}
    return sorted(_alike(found, request), key=lambda item: order[item[0].site])


def _no_form_for(aside: Sequence[Weighed], request: Request) -> None:
    """Raises CannotMerge for edits of what flows where they are asked for as deltas of weights."""
    kinds = sorted({group.kind for group, _ in aside} - set(WHOLE))
    if request.form is not None and kinds:
        raise CannotMerge(
            f"{' and '.join(kinds)} edits change what flows through the model, no weights: leave "
            f"--as {request.form} out"
        )


def _is_weight_edit(item: Weighed) -> bool:
    group, members = item
    return group.kind not in WHOLE and isinstance(members[0].edit, WeightEdit)


def _may_stay(items: Sequence[Weighed], request: Request) -> bool:
    """Whether the edits at a site go on as they are: one adapter's own, or of one kind with a rule."""
    storable = all(_is_storable(group, members, request) for group, members in items)
    if not storable or not _has_form(items, request):
        return False
    names = {member.adapter for _, members in items for member in members}
    if len(names) == 1 and all(member.weight == 1.0 for _, found in items for member in found):
        return True
    ((group, members), *others) = items
    sides = {side_of(member.edit) for member in members}
    return (
        not others
        and group.kind in request.method.rules
        and len(sides) == 1
        and (group.kind != JOINED or _can_join(group.site, request))
    )


def _has_form(items: Sequence[Weighed], request: Request) -> bool:
    plain = all(group.kind == "add" for group, _ in items)
    return request.form is None or plain


def _is_storable(group: Group, members: Sequence[Member], request: Request) -> bool:
    stores = request.stores
    return group.kind in stores.kinds or family_of(members[0].edit) in stores.families


def _can_join(site: Site, request: Request) -> bool:
    return request.weight(site) is not None or "approximate" in request.allowed


def _of_other_families(
    sites: dict[Site, list[Weighed]], kept: Iterable[Site], request: Request
) -> set[Site]:
    """Kept sites that the target could not hold beside the others, having one family per file."""
    if not request.stores.one_family:
        return set()
    members = [member for items in sites.values() for _, found in items for member in found]
    several = len({member.adapter for member in members}) > 1
    generic = request.stores.kinds if several else None
    families = {site: _family(sites[site], generic) for site in kept}
    found = set(families.values()) | ({LORA} if len(families) < len(sites) else set())
    return {s for s, family in families.items() if family != LORA} if len(found) > 1 else set()


def _family(items: Sequence[Weighed], generic: frozenset[str] | None) -> str:
    """The family that a site is written as: its own when it passes, that of LoRA when it is summed. One
    of another kind than the `generic` ones is a family by itself, where several adapters meet."""
    ((group, members), *_) = items
    own = family_of(members[0].edit)
    if own == LORA and generic is not None and group.kind not in generic:
        own = group.kind
    alone = len(members) == 1 and members[0].weight == 1.0
    return (own or LORA) if alone or members[0].edit.kind != "add" else LORA


def _changed(site: Site, items: Sequence[Weighed], request: Request) -> list[Weighed]:
    """One group of one kind: a DoRA of all where that is exact and wanted, else deltas on the base."""
    members = tuple(member for _, found in items for member in found)
    group = replace(items[0][0], members=tuple((m.adapter, m.edit) for m in members), kind="add")
    if _joins(members, request) and request.weight(site) is not None:
        return [(replace(group, kind=JOINED), members)]
    deltas = _deltas(site, members, request)
    return [(group, deltas)] if deltas else []


def _joins(members: Sequence[Member], request: Request) -> bool:
    kinds = {member.edit.kind for member in members}
    once = len({member.adapter for member in members}) == len(members)
    outer = all(side_of(member.edit) == "out" for member in members)
    wanted = request.form is None and JOINED in request.method.rules
    return (
        wanted
        and once
        and outer
        and JOINED in kinds
        and kinds <= JOINABLE
        and JOINED in request.stores.kinds
    )


def _deltas(site: Site, members: Sequence[Member], request: Request) -> tuple[Member, ...]:
    """Each adapter's edits, in their order, as what they add. Raises CannotMerge without the base."""
    if "add" not in request.method.rules:
        kinds = " and ".join(sorted({member.edit.kind for member in members}))
        raise CannotMerge(
            f"{request.method.name} has no rule for {kinds} edits: see 'adaptmerge methods'"
        )
    weight = request.weight(site)
    by_adapter: dict[str, list[Member]] = {}
    for member in members:
        by_adapter.setdefault(member.adapter, []).append(member)
    if weight is None and any(_needs_base(found) for found in by_adapter.values()):
        return _without_weight(site, members, request)
    result = []
    for name, found in by_adapter.items():
        edits = [member.edit for member in found]
        if len({member.weight for member in found}) > 1:
            raise CannotMerge(
                f"the edits of {name} act one on the other: give them one weight here"
            )
        factor = delta_of(edits[0]) if weight is None else delta_on(edits, weight)
        assert factor is not None  # else the base was asked for
        made = Add(_on_base(edits[0].site, request), factor)
        result.append(Member(name, found[0].weight, made, tuple(edits)))
    return tuple(result)


def _on_base(site: Site, request: Request) -> Site:
    """The site with what the base knows of its layer: the kernel of a convolution, a norm's vector."""
    stored = None if request.base is None else request.base.parameter(site)
    if (
        stored is None
        or len(stored.shape) == 2
        or site.expert is not None
        or site.param != "weight"
    ):
        return site
    layer = Layer("norm") if len(stored.shape) == 1 else Layer("conv", stored.shape[2:])
    return replace(site, layer=layer)


def _needs_base(members: Sequence[Member]) -> bool:
    return len(members) > 1 or delta_of(members[0].edit) is None


def _without_weight(site: Site, members: Sequence[Member], request: Request) -> tuple[Member, ...]:
    """Nothing, where the base has no such bias to edit; else an error."""
    kinds = " and ".join(sorted({member.edit.kind for member in members}))
    if request.base is None:
        what = "meet here, and what they add together depends" if " and " in kinds else "depend"
        raise CannotMerge(f"{kinds} edits {what} on the base: pass --base DIR")
    if site.param == "bias" and request.base.locate(site.module) is not None:
        return ()
    raise CannotMerge(f"the base {request.base.path.name} has no such parameter to edit")


def _alike(found: Sequence[Weighed], request: Request) -> list[Weighed]:
    """Plain deltas as DoRA where the target holds only one of the two, and the base is known."""
    exclusive = request.stores.exclusive
    kinds = {group.kind for group, _ in found}
    if not {"add", JOINED} <= exclusive or not {"add", JOINED} <= kinds:
        return list(found)
    return [
        (replace(group, kind=JOINED), members)
        if group.kind == "add" and request.weight(group.site) is not None and _is_weight(group)
        else (group, members)
        for group, members in found
    ]


def _is_weight(group: Group) -> bool:
    return group.site.param == "weight"
