"""Every decision of a merge, made from headers before anything is computed, as printable data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adaptmerge.align import Group, and_more, layer_count
from adaptmerge.base import Base
from adaptmerge.edits import factor_of, family_of, with_value
from adaptmerge.errors import CannotMerge, CannotStore
from adaptmerge.factors import Factor, rank_bound, refs_of
from adaptmerge.files.compare import same_values
from adaptmerge.files.dtypes import F32, DType
from adaptmerge.fit import Budget
from adaptmerge.graph import Edit, Kind, Note, Site
from adaptmerge.lower import stored_scale, unstorable
from adaptmerge.registry import Format, Member, Method, Stores, WriteOptions, default_dtype
from adaptmerge.weights import Weights

LORA = "lora"  # the family of plain low-rank deltas, which every merge can become
WHOLE = ("replace", "rows")  # kinds that are stored whole, beside any family
EXACT = 1e-12  # weights that differ from a sum of 1 by no more than this sum to 1


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at one site: "pass" keeps `edit` as it is stored, "fit" settles `factor` as its
    low-rank pair, "value" settles it as the stored parameter itself."""

    action: str
    edit: Edit
    members: tuple[Member, ...]
    factor: Factor | None = None
    budget: Budget = Budget()

    @property
    def site(self) -> Site:
        return self.edit.site

    @property
    def is_vector(self) -> bool:
        """Whether the parameter is a vector (a bias), settled as one column; weights have two sides."""
        return self.site.param != "weight"

    @property
    def label(self) -> str:
        """The site, and the kind of edit where that is not the usual one."""
        kind = self.edit.kind
        return str(self.site) if kind == "add" else f"{self.site} ({kind})"


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps in order, and what holds for all of them."""

    steps: tuple[Step, ...]
    method: Method
    budget: Budget
    dtype: DType
    stores: Stores
    inputs: tuple[str, ...]
    allowed: frozenset[str] = frozenset()
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of a merge, names resolved."""

    method: Method
    weights: Weights
    target: Format
    stores: Stores
    budget: Budget = Budget()
    dtype: DType | None = None
    heads: str | None = None
    base: Base | None = None
    allowed: frozenset[str] = field(default_factory=frozenset)


def make_plan(groups: Sequence[Group], request: Request, inputs: Sequence[str]) -> Plan:
    """The plan of a merge. Raises CannotMerge or CannotStore with everything that is in the way."""
    request.weights.check([(group.site, group.kind) for group in groups])
    weighed = _weigh(groups, request.weights)
    notes: list[Note] = []
    steps: list[Step] = []
    problems: list[tuple[str, str]] = []
    dtype = request.dtype or _common_dtype(groups, request.stores)
    scale = _shared_scale(weighed, request)
    family = _kept_family(weighed, request)
    for group, members in weighed:
        try:
            step = _step(group, members, request, scale, family, notes)
            steps += [] if step is None else [step]
        except CannotMerge as problem:
            problems += [(problem.where or "", sentence) for sentence in problem.problems]
    if problems:
        raise CannotMerge(_gathered(problems))
    if not steps:
        raise CannotMerge("no site is left: every weight is zero")
    _check_target([step.edit for step in steps], dtype, request)
    return Plan(
        tuple(steps),
        request.method,
        request.budget,
        dtype,
        request.stores,
        tuple(inputs),
        request.allowed,
        tuple(notes),
    )


def _check_target(edits: Sequence[Edit], dtype: DType, request: Request) -> None:
    """Raises CannotStore with every reason why the target cannot hold the result."""
    target, stores = request.target, request.stores
    refused = unstorable(edits, stores, target.name)
    if not refused and target.refuses is not None:
        refused += target.refuses(edits, WriteOptions(base=request.base))
    if dtype.name not in stores.dtypes:
        refused.append(f"{target.name} does not store {dtype}")
    if refused:
        raise CannotStore([*refused[:-1], f"{refused[-1]}; --to native holds every edit"])


Weighed = tuple[Group, tuple[Member, ...]]


def _weigh(groups: Sequence[Group], weights: Weights) -> list[Weighed]:
    """Members with their weights; weight 0 leaves a member out, and a site without members too."""
    layers = layer_count(group.site for group in groups)
    weighed = []
    for group in groups:
        members = [
            Member(name, weights.at(name, group.site, group.kind, layers), edit)
            for name, edit in group.members
        ]
        kept = tuple(member for member in members if member.weight != 0.0)
        if kept:
            weighed.append((group, kept))
    return weighed


def _common_dtype(groups: Sequence[Group], stores: Stores) -> DType:
    edits = [edit for group in groups for _, edit in group.members]
    found = default_dtype([ref.dtype for edit in edits for ref in refs_of(factor_of(edit))])
    return found if found.name in stores.dtypes else F32


def _shared_scale(weighed: Sequence[Weighed], request: Request) -> float | None:
    """The one scale that lets every site pass as it is; None: sites may pass with their own."""
    if request.stores.scale == "site":
        return None
    passing = [_passing_scale(members, request) for _, members in weighed if _factored(members)]
    if request.stores.scale == "adapter" and len(set(passing)) == 1 and passing[0] is not None:
        return passing[0]
    return 1.0


def _kept_family(weighed: Sequence[Weighed], request: Request) -> str:
    """The family that the result is written as, when all of it passes in that form; else "lora"."""
    edits = [members[0].edit for group, members in weighed if group.kind not in WHOLE]
    found = {family_of(edit) for edit in edits}
    alone = all(len(m) == 1 and m[0].weight == 1.0 for g, m in weighed if g.kind not in WHOLE)
    bare = request.budget.unlimited and not any(
        _recast(f, request) for edit in edits if (f := factor_of(edit)) is not None
    )
    family = found.pop() if len(found) == 1 else LORA
    return family if alone and bare and family in request.stores.families else LORA


def _factored(members: Sequence[Member]) -> bool:
    return factor_of(members[0].edit) is not None


def _passing_scale(members: Sequence[Member], request: Request) -> float | None:
    """The stored scale of a lone member at weight 1 that need not be refitted, else None."""
    factor = factor_of(members[0].edit)
    if factor is None or len(members) > 1 or members[0].weight != 1.0:
        return None
    if _over_budget(factor, request.budget) or _recast(factor, request):
        return None
    return stored_scale(factor)


def _over_budget(factor: Factor, budget: Budget) -> bool:
    return budget.spectral or (budget.rank is not None and rank_bound(factor) > budget.rank)


def _recast(factor: Factor, request: Request) -> bool:
    """Whether stored tensors are not in the dtype asked for, or in none that the target stores."""
    return any(
        ref.dtype != (request.dtype or ref.dtype) or ref.dtype.name not in request.stores.dtypes
        for ref in refs_of(factor)
    )


def _step(
    group: Group,
    members: tuple[Member, ...],
    request: Request,
    scale: float | None,
    family: str,
    notes: list[Note],
) -> Step | None:
    first = members[0].edit
    if group.kind in WHOLE:
        return _whole(group, members, request, notes)
    factor = factor_of(first)
    if len(members) == 1 and members[0].weight == 1.0:
        if (
            factor is None
            or (family != LORA and family_of(first) == family)
            or _may_pass(members, request, scale)
        ):
            return Step("pass", first, members)
        _no_blind_budget(group, request.budget)
        return _fit(first, members, factor, request)
    rule = request.method.rules.get(group.kind)
    if rule is None:
        raise CannotMerge(
            f"{request.method.name} has no rule for {group.kind} edits, which depend on the base: one "
            "input at weight 1 passes through, a sum is not defined yet",
            where=str(group.site),
        )
    return _fit(first, members, rule(group.site, members), request)


def _may_pass(members: Sequence[Member], request: Request, scale: float | None) -> bool:
    if not request.stores.low_rank:
        factor = factor_of(members[0].edit)
        assert factor is not None
        return not (_over_budget(factor, request.budget) or _recast(factor, request))
    found = _passing_scale(members, request)
    return found is not None and scale in (None, found)


def _no_blind_budget(group: Group, budget: Budget) -> None:
    if group.kind != "add" and not budget.unlimited:
        raise CannotMerge(
            f"a budget on {group.kind} edits has an error that only the base can tell: leave it out",
            where=str(group.site),
        )


def _fit(first: Edit, members: tuple[Member, ...], factor: Factor, request: Request) -> Step:
    budget = request.budget
    if request.method.rank is not None:
        ranks = [rank_bound(f) for m in members if (f := factor_of(m.edit)) is not None]
        budget = budget.capped(request.method.rank(ranks))
    return Step("fit", first, members, factor, budget)


def _whole(
    group: Group, members: tuple[Member, ...], request: Request, notes: list[Note]
) -> Step | None:
    """Parameters stored whole: equal ones are one, a chosen input's wins, biases are averaged."""
    role = getattr(members[0].edit, "role", "tokens")
    if (
        role == "base copy"
        and group.kind not in request.stores.kinds
        and _is_base(members, request)
    ):
        notes.append(Note(Kind.INFO, "a copy of the base is left out", site=str(group.site)))
        return None
    chosen = [member for member in members if member.adapter == request.heads]
    if request.heads and role != "bias":
        if chosen:
            return Step("pass", chosen[0].edit, tuple(chosen))
        owners = ", ".join(member.adapter for member in members)
        dropped = f"{role} of {owners} left out: --heads {request.heads} has none here"
        notes.append(Note(Kind.DROPPED, dropped, site=str(group.site)))
        return None
    summed = role == "bias" and "replace" in request.method.rules
    whole = abs(sum(member.weight for member in members) - 1.0) <= EXACT
    if _all_same(members) and (whole or not summed):
        if len(members) < len(group.members) or len(members) < _inputs(request):
            notes.append(
                Note(Kind.INFO, f"{role} kept from {members[0].adapter}", site=str(group.site))
            )
        return Step("pass", members[0].edit, members)
    if summed:
        return _bias(group, members, request)
    names = ", ".join(member.adapter for member in members)
    raise CannotMerge(
        f"{role} differs between {names}: pass --heads NAME to keep one of them",
        where=str(group.site),
    )


def _is_base(members: Sequence[Member], request: Request) -> bool:
    """Whether every stored value is the base's own, bit for bit."""
    stored = request.base.parameter(members[0].edit.site) if request.base else None
    return stored is not None and all(
        same_values(stored, ref) for member in members for ref in refs_of(member.edit)
    )


def _inputs(request: Request) -> int:
    return len(request.weights.base)


def _all_same(members: Sequence[Member]) -> bool:
    first, *others = [member.edit for member in members]
    rows = getattr(first, "rows", None)
    return all(
        getattr(other, "rows", None) == rows
        and all(map(same_values, refs_of(first), refs_of(other)))
        for other in others
    )


def _bias(group: Group, members: tuple[Member, ...], request: Request) -> Step:
    """b = b0 + sum w (b_i - b0): without the base only if the weights of all inputs sum to 1."""
    total = sum(member.weight for member in members)
    extra: tuple[Member, ...] = ()
    if abs(total - 1.0) > EXACT:
        stored = request.base.parameter(group.site) if request.base else None
        if stored is None:
            raise CannotMerge(
                f"stored biases with weights that sum to {total:g} need the base's own bias: pass "
                "--base DIR, or weights that sum to 1 over all inputs",
                where=str(group.site),
            )
        first = members[0].edit
        extra = (Member("base", 1.0 - total, with_value(first, stored)),)
    rule = request.method.rules["replace"]
    return Step("value", members[0].edit, members, rule(group.site, (*members, *extra)))


def _gathered(problems: Sequence[tuple[str, str]]) -> list[str]:
    """One sentence for all sites that have the same problem."""
    sites: dict[str, list[str]] = {}
    for where, sentence in problems:
        sites.setdefault(sentence, []).append(where)
    return [f"{and_more(found)}: {sentence}" for sentence, found in sites.items()]


def plan_rows(plan: Plan) -> list[Mapping[str, object]]:
    """The plan as rows: site, action, weights, ranks in and the cap, for printing and the report."""
    return [
        {
            "site": step.label,
            "action": step.action,
            "weights": {member.adapter: member.weight for member in step.members},
            "ranks": {
                m.adapter: rank_bound(f)
                for m in step.members
                if (f := factor_of(m.edit)) is not None
            },
            "rank_cap": step.budget.rank,
        }
        for step in plan.steps
    ]
