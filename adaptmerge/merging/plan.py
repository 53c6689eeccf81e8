"""Every decision of a merge, made from headers before anything is computed, as printable data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptmerge.adapters.graph import Edit, Kind, Labels, Note, Site, key_of
from adaptmerge.adapters.stored_edits import why_opaque
from adaptmerge.adapters.weight_edits import WeightEdit, delta_on, factor_of
from adaptmerge.algebra.factors import Factor, Product, Sum, rank_bound
from adaptmerge.algebra.fit import Budget
from adaptmerge.algebra.low_rank import as_low_rank
from adaptmerge.errors import CannotMerge, CannotStore
from adaptmerge.formats.format import Stores, WriteOptions
from adaptmerge.merging.align import Group, and_more, layer_count
from adaptmerge.merging.heads.case import Case, StoredWhole
from adaptmerge.merging.heads.settlement import Settlement, settle_whole
from adaptmerge.merging.heads.tied import torn
from adaptmerge.merging.pass_through import PassThrough
from adaptmerge.merging.request import Request
from adaptmerge.merging.resolve import WHOLE, Weighed, resolve
from adaptmerge.merging.storable import unstorable
from adaptmerge.merging.weights import Weights
from adaptmerge.methods.method import Meeting, Member, Method
from adaptmerge.tensors.dtypes import F32, DType, default_dtype
from adaptmerge.tensors.refs import TensorRef
from adaptmerge.tensors.walk import refs_of

OPAQUE = "opaque"  # the kind of edits that nothing can be made of
BLIND = ("dora",)  # kinds that no budget and no sum can be judged for without the base


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at one site: "pass" keeps `edit` as it is stored; "fit" settles its factor as a
    low-rank pair, "whole" as one dense matrix; "value" settles its tensors, "concat" are those of several
    members one below the other. `promise` is the delta on
    the base that is meant, where the edit itself does not say it without the base's `weight`."""

    action: str
    edit: Edit
    members: tuple[Member, ...]
    budget: Budget = Budget()
    promise: Factor | None = None
    weight: TensorRef | None = None
    adapter: str = ""  # the only adapter of the output that has it
    labels: Labels | None = None

    @property
    def factor(self) -> Factor | None:
        """What is to be fitted, if anything is."""
        return factor_of(self.edit) if self.action in ("fit", "whole") else None

    @property
    def site(self) -> Site:
        return self.edit.site

    @property
    def is_vector(self) -> bool:
        """Whether the parameter is a vector (a bias), settled as one column; weights have two sides."""
        factor = self.factor
        return self.site.param != "weight" and (factor is None or factor.shape[1] == 1)

    @property
    def label(self) -> str:
        """The site, and the kind of edit where that is not the usual one."""
        return str(key_of(self.edit))


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
    asked: DType | None = None


def make_plan(groups: Sequence[Group], request: Request, inputs: Sequence[str]) -> Plan:
    """The plan of a merge. Raises CannotMerge or CannotStore with everything that is in the way."""
    request.weights.check([group.key for group in groups])
    weighed = resolve(_weigh(groups, request.weights), request)
    notes: list[Note] = []
    steps: list[Step] = []
    stored = StoredWhole.of(weighed, request)
    problems = torn(weighed, request.heads, request.base)
    dtype = request.dtype or _common_dtype(groups, request.stores)
    passing = PassThrough.of(weighed, request)
    for group, members in weighed:
        try:
            if group.kind in WHOLE:
                case = Case(group, members, stored, notes)
                steps += map(_whole_step, settle_whole(case))
            else:
                steps.append(_step(group, members, passing, notes))
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
        tuple(_told_once(notes)),
        request.dtype,
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
    sides = [ref.dtype for edit in edits for ref in refs_of(factor_of(edit))]
    found = default_dtype(sides or [ref.dtype for edit in edits for ref in refs_of(edit)])
    return found if found.name in stores.dtypes else F32


def _whole_step(one: Settlement) -> Step:
    return Step(one.action, one.edit, one.members, adapter=one.adapter, labels=one.labels)


def _step(
    group: Group,
    members: tuple[Member, ...],
    passing: PassThrough,
    notes: list[Note],
) -> Step:
    first = members[0].edit
    if first.kind == OPAQUE:
        raise CannotMerge(why_opaque(first), where=str(group.site))
    if passing.allows(members):
        return Step("pass", first, members)
    return _fit(group, members, passing.request, notes)


def _fit(group: Group, members: tuple[Member, ...], request: Request, notes: list[Note]) -> Step:
    """The step that settles what the method's rule makes of the members."""
    form = request.form if group.kind == "add" else None
    rule = request.method.forms[form] if form else request.method.rules.get(group.kind)
    if rule is None:
        raise CannotMerge(
            f"{request.method.name} has no rule for {group.kind} edits: one input at weight 1 passes "
            f"through; see 'adaptmerge methods' for those that have one",
            where=str(group.site),
        )
    weight = None if group.kind == "add" else request.weight(group.site)
    met = Meeting(group.site, members, weight, notes)
    edit = rule(met)
    promise = _promise(members, weight) if factor_of(edit) is not None else None
    if edit.kind != "add" and group.kind in BLIND:
        _judge_blind(group.kind, met, request, is_known=promise is not None)
    if factor_of(edit) is None:
        return Step("value", edit, members)
    if any(hasattr(ref.source, "store") for ref in refs_of(factor_of(edit))):
        return Step("value", edit, members, promise=_meant(members))
    return Step(
        _action(edit, members, request), edit, members, _cap(members, request), promise, weight
    )


def _meant(members: Sequence[Member]) -> Factor:
    """The weighted sum of deltas that need no base."""
    return Sum(tuple(Product((f,), m.weight) for m in members if (f := factor_of(m.edit))))


def _promise(members: Sequence[Member], weight: TensorRef | None) -> Factor | None:
    """The weighted sum of what the members add to the base's weight."""
    if weight is None:
        return None
    edits = [(m.weight, m.edit) for m in members if isinstance(m.edit, WeightEdit)]
    if not edits:
        return None
    return Sum(tuple(Product((delta_on([edit], weight),), w) for w, edit in edits))


def _judge_blind(kind: str, met: Meeting, request: Request, *, is_known: bool) -> None:
    """What is approximate or unknown about edits that depend on a base; is_known: what they promise."""
    if is_known:
        _judge_spectrum(kind, met, request)
        return
    if not request.budget.unlimited:
        raise CannotMerge(
            f"a budget on {kind} edits has an error that only the base can tell: pass --base DIR, "
            "or leave it out",
            where=str(met.site),
        )
    if "approximate" not in request.allowed and len(met.members) > 1:
        raise CannotMerge(
            f"{kind} edits depend on the base: pass --base DIR, or --allow approximate to sum "
            "deltas and magnitudes apart",
            where=str(met.site),
        )
    if len(met.members) > 1 or met.members[0].weight != 1.0:
        what = (
            "deltas and magnitudes were summed apart, without the base: an approximation of the sum"
        )
        met.say(Kind.APPROXIMATED, what)


def _judge_spectrum(kind: str, met: Meeting, request: Request) -> None:
    """Raises CannotMerge for budgets on singular values of a delta that lies inside a norm."""
    if request.budget.spectral:
        raise CannotMerge(
            f"--energy and --max-error cannot be held for {kind} edits, whose norms do not follow "
            "their deltas': pass --rank, or --as lora",
            where=str(met.site),
        )


def _action(edit: Edit, members: Sequence[Member], request: Request) -> str:
    """Whether a delta is settled as two sides or whole; a full rank by budget only, two sides hold more."""
    factor = factor_of(edit)
    assert factor is not None
    if 1 in factor.shape or not request.budget.unlimited or request.method.rank:
        return "fit"
    if rank_bound(factor) < min(factor.shape) or not any(map(_is_full, members)):
        return "fit"
    if not request.stores.low_rank:
        return "whole"
    kinds = sorted({kind for member in members for kind in member.kinds} - {"add"})
    what = f"what {' and '.join(kinds)} edits add" if kinds else "the exact sum"
    raise CannotMerge(
        f"as a LoRA {what} has full rank ({min(factor.shape)}): say how much of it to keep with --rank, "
        "--energy or --max-error, or --to native, which holds it whole",
        where=str(edit.site),
    )


def _is_full(member: Member) -> bool:
    factor = factor_of(member.edit)
    return (
        factor is not None
        and as_low_rank(factor) is None
        and rank_bound(factor) == min(factor.shape)
    )


def _cap(members: Sequence[Member], request: Request) -> Budget:
    if request.method.rank is None:
        return request.budget
    known = [f for m in members if (f := factor_of(m.edit)) is not None]
    bounds = [rank_bound(f) for f in known]
    ranks = [rank for rank, f in zip(bounds, known, strict=True) if rank < min(f.shape)]
    return request.budget.capped(request.method.rank(ranks or bounds)) if known else request.budget


def _told_once(notes: Sequence[Note]) -> list[Note]:
    """What was approximated at several sites in the same way, as one Note."""
    sites: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        if note.kind == Kind.APPROXIMATED:
            sites.setdefault((note.kind, note.what), []).append(note.site)
    kept = [note for note in notes if note.kind != Kind.APPROXIMATED]
    return kept + [Note(kind, what, site=and_more(at)) for (kind, what), at in sites.items()]


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
